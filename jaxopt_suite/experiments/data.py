"""Text as bytes: what is read, how it is split, and the grain pipeline that cuts it into windows.

The default text is the standard library of the Python that runs: real text, in every Python,
about 8 MB to train on and 0.6 MB to validate on, loaded within a fifth of a second.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Callable, Mapping

import grain
import numpy as np

from jaxopt_suite.core.checks import check_int
from jaxopt_suite.core.errors import UserError

VOCAB_SIZE = 256

# Tests, and what distributions of Python leave out or package apart, so that the text is nearly the
# same everywhere; encodings holds generated tables; the prefixes are of files about one machine.
_NOT_IN_STDLIB = frozenset(
    {
        *("test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"),
        *("distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo", "encodings"),
    }
)
_MACHINE_PREFIXES = (".", "config-", "_sysconfigdata")


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Bytes to train on and bytes to validate on.

    Attributes:
      name: where they come from, for people.
      train: uint8 [bytes].
      validation: uint8 [bytes]; shares no file, or no stretch of the one file, with ``train``.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray

    def unigram_entropy(self) -> float:
        """Entropy of the validation bytes' own frequencies, in nats per byte.

        No model that ignores context can have a lower validation loss.
        """
        counts = np.bincount(self.validation, minlength=VOCAB_SIZE)
        frequency = counts[counts > 0] / self.validation.size
        return float(-np.sum(frequency * np.log(frequency)))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with any byte of the corpus and with the split."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.train, self.validation):
            digest.update(part.size.to_bytes(8, "little"))
            digest.update(part.tobytes())
        return digest.hexdigest()


def load_corpus(path: str | os.PathLike[str] | None = None) -> Corpus:
    """Reads a corpus and splits it into train and validation.

    Several files are split by file: a hash of its relative path puts each on one side, about one in
    ten in validation and at least one on either side, the same on every machine. A single file is
    cut in two: its last tenth is validation.

    Args:
      path: a text file; a folder, read recursively, in which names that start with a dot and links
        to folders are ignored, and files that are not text (they contain a NUL byte) are skipped;
        or ``None`` for the sources of Python's standard library.

    Returns:
      The corpus.

    Raises:
      UserError: if the path is missing, cannot be read, or holds no text.
    """
    if path is None:
        return _load_standard_library(pathlib.Path(sysconfig.get_paths()["stdlib"]))
    root = pathlib.Path(path)
    try:
        return _load_folder(root) if root.is_dir() else _load_file(root)
    except OSError as error:
        where = error.filename or path
        raise UserError(f"cannot read the data {where}: {error.strerror}") from error


def train_batches(
    corpus: Corpus,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Endless batches of windows of the training bytes, a pure function of seed and position.

    Each epoch cuts the bytes, from an offset of its own, into windows whose predicted bytes do not
    overlap, and visits them in an order of its own. No threads are started: a batch costs less than
    a training step of the smallest model by two orders of magnitude.

    Args:
      corpus: what to read.
      batch_size: windows per step over all processes.
      seq_len: predicted bytes per window; a window has one byte more.
      seed: of offsets and order; not negative.
      process_index: which process this is. The batches of all processes together are the batch that
        a single process would see.
      process_count: number of processes; it divides ``batch_size``.

    Returns:
      An iterator of int32 [batch_size / process_count, seq_len + 1], with ``get_state()``, a dict
      that JSON can hold, and ``set_state(state)``.

    Raises:
      UserError: if the training bytes hold less than one batch, or the processes do not divide it.
    """
    check_int("seed", seed, low=0)
    _check_one_batch("train", corpus.name, corpus.train, batch_size, seq_len)
    if batch_size % process_count:
        raise UserError(
            f"batch_size must be a multiple of the {process_count} processes, got {batch_size}"
        )
    windows = _Windows(corpus.train, seq_len, seed)
    stream = grain.MapDataset.range(windows.per_epoch).repeat().map_with_index(windows)
    mine = stream[process_index::process_count]
    # drop_remainder drops nothing: without it grain rounds an endless length past sys.maxsize.
    batches = mine.batch(batch_size // process_count, drop_remainder=True)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def validation_batches(
    corpus: Corpus, *, batch_size: int, seq_len: int, batches: int
) -> list[np.ndarray]:
    """The fixed windows every validation reads: disjoint, evenly spread over the validation bytes.

    Args:
      corpus: what to read.
      batch_size: windows per batch.
      seq_len: predicted bytes per window; a window has one byte more.
      batches: the most batches to return; fewer come back where the bytes hold fewer.

    Returns:
      At least one array, int32 [batch_size, seq_len + 1].

    Raises:
      UserError: if the validation bytes hold less than one batch.
    """
    check_int("batches", batches)
    _check_one_batch("validation", corpus.name, corpus.validation, batch_size, seq_len)
    size, width = corpus.validation.size, seq_len + 1
    batches = min(batches, size // (width * batch_size))
    starts = np.arange(batches * batch_size) * size // (batches * batch_size)
    windows = corpus.validation[starts[:, None] + np.arange(width)].astype(np.int32)
    return list(windows.reshape(batches, batch_size, width))


class _Windows:
    """Finds a window from its position in the stream; ``per_epoch`` positions make an epoch.

    The order is drawn here and not by ``grain.MapDataset.shuffle``: that gives up the processor at
    every element, measured to cost 6 ms each time when other processes want it.
    """

    def __init__(self, text: np.ndarray, seq_len: int, seed: int) -> None:
        self._text, self._seq_len, self._seed = text, seq_len, seed
        # One window fewer than fit, so that offsets reach every byte (never predicting the first).
        self.per_epoch = max(1, (text.size - 1) // seq_len - 1)
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    def __call__(self, position: int, number: int) -> np.ndarray:
        offset, order = self._epoch(position // self.per_epoch)
        start = offset + order[number] * self._seq_len
        return self._text[start : start + self._seq_len + 1].astype(np.int32)

    def _draw_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """The epoch's first byte, and the order of its windows: int64 [per_epoch]."""
        # NumPy promises the same raw words in every version, but not the same permutations.
        bits = np.random.Philox(np.random.SeedSequence((self._seed, epoch)))
        words = bits.random_raw(self.per_epoch + 1)
        offsets = self._text.size - self.per_epoch * self._seq_len
        return int(words[0]) % offsets, np.argsort(words[1:], kind="stable")


def _check_one_batch(part: str, name: str, text: np.ndarray, batch_size: int, seq_len: int) -> None:
    check_int("batch_size", batch_size)
    check_int("seq_len", seq_len)
    need = batch_size * (seq_len + 1)
    if text.size < need:
        raise UserError(
            f"the {part} part of {name} has {text.size} bytes, and one batch of {batch_size} "
            f"windows of {seq_len + 1} bytes needs {need}: give more text, or lower the batch size "
            "or the sequence length"
        )


def _load_standard_library(root: pathlib.Path) -> Corpus:
    keep = lambda name: name not in _NOT_IN_STDLIB and not name.startswith(_MACHINE_PREFIXES)
    sources = [path for path in _list_files(root, keep) if path.endswith(".py")]
    if len(sources) < 2:
        raise UserError(
            f"this Python keeps no library sources in {root}: give a text file or a folder as data"
        )
    texts = {path: (root / path).read_bytes() for path in sources}
    return _split_by_file(f"the standard library of Python {sysconfig.get_python_version()}", texts)


def _load_file(path: pathlib.Path) -> Corpus:
    text = path.read_bytes()
    if not text:
        raise UserError(f"the data {path} is an empty file; give a text file or a folder of them")
    if not _is_text(text):
        raise UserError(f"the data {path} is not a text file: it contains NUL bytes")
    return _split_tail(str(path), text)


def _load_folder(root: pathlib.Path) -> Corpus:
    contents = {
        path: (root / path).read_bytes()
        for path in _list_files(root, lambda name: not name.startswith("."))
    }
    texts = {path: content for path, content in contents.items() if content and _is_text(content)}
    if not texts:
        binary = sum(not _is_text(content) for content in contents.values())
        raise UserError(
            f"the data folder {root} holds no text: of its {len(contents)} files {binary} are not "
            f"text (they contain NUL bytes) and {len(contents) - binary} are empty"
        )
    if len(texts) == 1:
        return _split_tail(str(root), *texts.values())
    return _split_by_file(str(root), texts)


def _is_text(content: bytes) -> bool:
    return b"\0" not in content


def _list_files(root: pathlib.Path, keep: Callable[[str], bool]) -> list[str]:
    """Regular files under ``root`` whose every name is kept: sorted relative paths with slashes."""
    found: list[pathlib.Path] = []
    for folder, folders, files in os.walk(root, onerror=_reraise):
        folders[:] = filter(keep, folders)
        found += (pathlib.Path(folder, name) for name in filter(keep, files))
    return sorted(path.relative_to(root).as_posix() for path in found if path.is_file())


def _reraise(error: OSError) -> None:
    raise error


def _split_by_file(name: str, texts: Mapping[str, bytes]) -> Corpus:
    """Splits at least two files, named by relative path, by a hash of those paths."""
    rank = {path: hashlib.blake2b(os.fsencode(path), digest_size=8).digest() for path in texts}
    tenth = (2**64 // 10).to_bytes(8, "big")
    wanted = sum(digest < tenth for digest in rank.values())
    held_out = set(sorted(texts, key=rank.__getitem__)[: min(max(wanted, 1), len(texts) - 1)])
    join = lambda paths: np.frombuffer(b"".join(texts[path] for path in paths), np.uint8)
    return Corpus(
        name=name,
        train=join(path for path in texts if path not in held_out),
        validation=join(path for path in texts if path in held_out),
    )


def _split_tail(name: str, text: bytes) -> Corpus:
    data = np.frombuffer(text, np.uint8)
    train, validation = np.split(data, [data.size - data.size // 10])
    return Corpus(name=name, train=train, validation=validation)
