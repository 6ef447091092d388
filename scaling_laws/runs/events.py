"""TensorBoard's event files, read without TensorBoard.

An event file is a sequence of TFRecords: a length (uint64, little-endian), its checksum, that many
bytes, their checksum; checksums are CRC-32C, rotated and shifted ("masked"). The bytes are an
``Event`` protocol buffer: a wall time, a step, and a summary with values, each a tag and either a
float or a tensor. Scalars are read in both forms; images, histograms and texts are passed over.
"""

import pathlib
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxopt_suite.scaling_laws.runs.sources import Damaged, Row, Rows

PATTERN = "events.out.tfevents.*"

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LONGEST = 1 << 30  # no event is longer: a length beyond it is damage

# dtype in the protocol buffer: (NumPy's, field of typed values)
_TENSORS = {1: ("<f4", 5), 2: ("<f8", 6), 3: ("<i4", 7), 9: ("<i8", 10)}


def _table() -> tuple[int, ...]:
    rows = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        rows.append(value)
    return tuple(rows)


_CRC = _table()


def masked_crc(data: bytes) -> int:
    """CRC-32C as TFRecords have it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class _Broken(Exception):
    """What follows in the file cannot be read."""


def records(path: pathlib.Path) -> Iterator[bytes]:
    """The records of a TFRecord file, each with its checksum compared.

    Raises:
      _Broken: where one is cut short or damaged: nothing tells where the next would begin.
    """
    with path.open("rb") as file:
        while head := file.read(12):
            if len(head) < 12:
                raise _Broken("cut short")
            length, crc = struct.unpack("<QI", head)
            if crc != masked_crc(head[:8]) or length > _LONGEST:
                raise _Broken("damaged: the checksum of its length is wrong")
            body = file.read(length + 4)
            if len(body) < length + 4:
                raise _Broken("cut short")
            data = body[:length]
            if struct.unpack("<I", body[length:])[0] != masked_crc(data):
                raise _Broken("damaged: its checksum is wrong")
            yield data


def event_rows(path: pathlib.Path, run_id: str) -> Rows:
    """One row for each step: its scalars by tag, ``step`` and ``run_id``, in the order of steps.

    The line of a row is the number, from 1, of the last record that belongs to it. A value that is
    logged again for the same step replaces the former, as it does in TensorBoard.
    """
    rows: dict[int, tuple[int, dict[str, Any]]] = {}
    damaged, number = None, 0
    try:
        for data in records(path):
            number += 1
            step, values = _event(data)
            if values:
                former = rows[step][1] if step in rows else {"run_id": run_id, "step": step}
                rows[step] = number, former | values
    except _Broken as error:
        damaged = Damaged(number + 1, f"record {number + 1} is {error}; nothing after it is read")
    except (IndexError, struct.error, ValueError):
        damaged = Damaged(number, f"record {number} is no event; nothing after it is read")
    for step in sorted(rows):
        yield Row(*rows[step])
    if damaged is not None:
        yield damaged


def _event(data: bytes) -> tuple[int, dict[str, float]]:
    """The step of an event and its scalars."""
    step = 0
    values: dict[str, float] = {}
    for field, value in _fields(data):
        if field == 2:
            step = value - (1 << 64) if value >> 63 else value
        elif field == 5:
            for inner, one in _fields(value):
                if inner == 1:
                    values |= _scalar(one)
    return step, values


def _scalar(data: bytes) -> dict[str, float]:
    """The tag and the number of one value of a summary; nothing if it is no number."""
    tag, number = "", None
    for field, value in _fields(data):
        if field == 1:
            tag = value.decode()
        elif field == 2:
            number = struct.unpack("<f", value)[0]
        elif field == 8:
            number = _tensor(value)
    return {} if number is None else {tag: float(number)}


def _tensor(data: bytes) -> float | None:
    """The number in a tensor without axes."""
    dtype, axes, content = 0, 0, b""
    typed: dict[int, Any] = {}
    for field, value in _fields(data):
        if field == 1:
            dtype = value
        elif field == 2:
            axes = sum(inner == 2 for inner, _ in _fields(value))
        elif field == 4:
            content = value
        else:
            typed[field] = value
    if dtype not in _TENSORS or axes:
        return None
    kind, field = _TENSORS[dtype]
    value = typed.get(field, content)
    if isinstance(value, int):  # a varint that is not packed
        return float(np.uint64(value).astype(np.int64))
    if kind[1] == "i" and field in typed:  # packed varints
        return float(np.uint64(_varint(value, 0)[0]).astype(np.int64))
    if len(value) != np.dtype(kind).itemsize:
        return None
    return float(np.frombuffer(value, kind)[0])


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and contents of a protocol buffer's fields: ints of varints, bytes of all others."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            length, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if at + length > len(data):
            raise ValueError("a field is longer than its message")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at ``at``, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
