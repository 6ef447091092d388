"""TensorBoard's event files: written by TensorBoard, read without it."""

import struct

import numpy as np
import pytest
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary import Writer
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util import tensor_util

from jaxopt_suite.scaling_laws import load_runs
from jaxopt_suite.scaling_laws.runs import BadRuns
from jaxopt_suite.scaling_laws.runs.events import event_rows, masked_crc
from jaxopt_suite.scaling_laws.runs.sources import Damaged


def write_scalars(folder, points):
    """Event files by TensorBoard's summary writer: numbers as tensors."""
    writer = Writer(str(folder))
    for tag, step, value in points:
        writer.add_scalar(tag, value, step)
    writer.close()
    return next(folder.glob("events.out.tfevents.*"))


def write_events(folder, values, step=7):
    """An event file with these summary values."""
    writer = EventFileWriter(str(folder))
    summary = summary_pb2.Summary(value=values)
    writer.add_event(event_pb2.Event(step=step, summary=summary))
    writer.close()
    return next(folder.glob("events.out.tfevents.*"))


def rows_of(path):
    return {row.values["step"]: row.values for row in event_rows(path, "r")}


POINTS = [
    (tag, step, value)
    for step in (10, 20, 30)
    for tag, value in (("params", 1e6), ("tokens", 1e4 * step), ("val/loss", 4 - step / 16))
]


def test_scalars_are_read_back_exactly(tmp_path):
    rows = rows_of(write_scalars(tmp_path, POINTS))
    for tag, step, value in POINTS:
        assert rows[step][tag] == np.float32(value)


def test_a_folder_of_event_files_is_a_folder_of_runs(tmp_path):
    for name in ("small", "large"):
        write_scalars(tmp_path / "sweep" / name, POINTS)
    runs = load_runs(tmp_path, columns="loss=val/loss")
    assert list(runs["run_id"]) == ["sweep/large", "sweep/small"]
    assert list(runs["step"]) == [30, 30]
    assert list(runs["loss"]) == [2.125, 2.125]
    assert len(load_runs(tmp_path, columns="loss=val/loss", mode="curve")) == 6


VALUES = [
    ("plain", {"simple_value": 0.5}, 0.5),
    ("double", {"tensor": np.float64(1 / 3)}, 1 / 3),
    ("float", {"tensor": np.float32(0.25)}, 0.25),
    ("int", {"tensor": np.int32(-3)}, -3.0),
    ("long", {"tensor": np.int64(1 << 40)}, float(1 << 40)),
]


@pytest.mark.parametrize(("tag", "field", "value"), VALUES)
def test_each_form_of_a_scalar_is_read(tmp_path, tag, field, value):
    if "tensor" in field:
        field = {"tensor": tensor_util.make_tensor_proto(field["tensor"])}
    path = write_events(tmp_path, [summary_pb2.Summary.Value(tag=tag, **field)])
    assert rows_of(path)[7][tag] == value


def test_what_is_no_number_is_passed_over(tmp_path):
    values = [
        summary_pb2.Summary.Value(tag="vector", tensor=tensor_util.make_tensor_proto([1.0, 2.0])),
        summary_pb2.Summary.Value(tag="text", tensor=tensor_util.make_tensor_proto(b"words")),
        summary_pb2.Summary.Value(tag="histogram", histo=summary_pb2.HistogramProto(min=0.0)),
        summary_pb2.Summary.Value(tag="loss", simple_value=2.0),
    ]
    assert rows_of(write_events(tmp_path, values))[7] == {"run_id": "r", "step": 7, "loss": 2.0}


def test_a_negative_step_is_read(tmp_path):
    path = write_events(tmp_path, [summary_pb2.Summary.Value(tag="x", simple_value=1.0)], step=-2)
    assert list(rows_of(path)) == [-2]


@pytest.mark.parametrize("data", [b"", b"123456789", bytes(range(256))])
def test_checksums_are_tensorboards(data):
    assert masked_crc(data) == masked_crc32c(data)


def test_a_file_that_is_cut_short_is_named_and_read_that_far(tmp_path):
    path = write_scalars(tmp_path, POINTS)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(BadRuns, match=r":10: record 10 is cut short; nothing after it is read"):
        load_runs(tmp_path, columns="loss=val/loss", mode="curve")
    runs = load_runs(tmp_path, columns="loss=val/loss", mode="curve", on_bad="drop")
    assert list(runs["step"]) == [10, 20]


@pytest.mark.parametrize("at", [3, 9, 14, -2])
def test_a_flipped_bit_anywhere_is_found(tmp_path, at):
    path = write_events(tmp_path, [summary_pb2.Summary.Value(tag="x", simple_value=1.0)])
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    damaged = [row for row in event_rows(path, "r") if isinstance(row, Damaged)]
    assert len(damaged) == 1
    assert "checksum" in damaged[0].reason


def test_a_record_that_is_no_event_is_named(tmp_path):
    path = tmp_path / "events.out.tfevents.1"
    data = b"\x0b\x01\x02"
    head = struct.pack("<Q", len(data))
    path.write_bytes(
        head + struct.pack("<I", masked_crc(head)) + data + struct.pack("<I", masked_crc(data))
    )
    (row,) = event_rows(path, "r")
    assert row.reason == "record 1 is no event; nothing after it is read"
