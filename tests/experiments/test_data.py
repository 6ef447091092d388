"""The corpus is the same everywhere; the stream of windows is a function of its position alone."""

import json
import math
import pathlib
import sysconfig
import threading
import time

import numpy as np
import pytest

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments.data import (
    Corpus,
    load_corpus,
    train_batches,
    validation_batches,
)


def _corpus(train: int = 241, validation: int = 241) -> Corpus:
    """Bytes that count upwards: below 256 of them, a byte tells its own position."""
    count = lambda n: (np.arange(n) % 256).astype(np.uint8)
    return Corpus(name="counting", train=count(train), validation=count(validation))


def _folder(root: pathlib.Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return str(root)


def _take(iterator, n: int) -> np.ndarray:
    return np.stack([next(iterator) for _ in range(n)])


# --- what is read, and how it is split


def test_the_default_corpus_is_a_few_megabytes_of_source_text_and_the_same_twice():
    first, second = load_corpus(), load_corpus()
    assert 4e6 < first.train.size < 16e6
    assert 0.03 < first.validation.size / first.train.size < 0.2
    assert b"import" in first.train.tobytes()
    assert b"import" in first.validation.tobytes()
    assert first.train.dtype == first.validation.dtype == np.uint8
    assert first.fingerprint == second.fingerprint
    assert first.unigram_entropy() < math.log(256)


def test_the_default_corpus_leaves_out_tests_installed_packages_and_machine_files(
    tmp_path, monkeypatch
):
    names = ["abc.py", "json/decoder.py", "re/_parser.py"]
    left_out = ["test/a.py", "x/tests/b.py", "site-packages/c.py", "_sysconfigdata_y.py", "lib.so"]
    _folder(tmp_path, {name: f"<{name}>".encode() for name in names + left_out})
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = load_corpus()
    read = corpus.train.tobytes() + corpus.validation.tobytes()
    assert sorted(read.decode().strip("<>").split("><")) == names


def test_a_python_without_library_sources_is_told_to_give_data(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match=r"no library sources in .*give a text file or a folder"):
        load_corpus()


def test_each_file_of_a_folder_lies_whole_on_one_side_and_every_byte_on_some_side(tmp_path):
    files = {f"sub{i % 3}/file_{i:02}.txt": bytes([i + 1]) * (i + 5) for i in range(40)}
    corpus = load_corpus(_folder(tmp_path, files))
    assert not set(corpus.train) & set(corpus.validation)
    assert corpus.train.size + corpus.validation.size == sum(map(len, files.values()))


def test_the_split_depends_on_the_paths_alone(tmp_path):
    names = [f"file_{i:02}.txt" for i in range(40)]
    one = load_corpus(_folder(tmp_path / "a", {n: n.encode() for n in names}))
    other = load_corpus(_folder(tmp_path / "b", {n: n.encode() for n in reversed(names)}))
    assert one.fingerprint == other.fingerprint
    # Written down once: another machine, Python or file system must find the same files.
    held_out = "".join(f"file_{i:02}.txt" for i in (0, 7, 10, 15, 17, 27, 29))
    assert one.validation.tobytes().decode() == held_out


@pytest.mark.parametrize("count", [2, 3, 5])
def test_neither_side_of_a_small_folder_is_empty(tmp_path, count):
    corpus = load_corpus(_folder(tmp_path, {f"{i}.txt": b"text" for i in range(count)}))
    assert corpus.train.size >= 4
    assert corpus.validation.size >= 4


def test_a_file_is_cut_so_that_its_last_tenth_is_validation(tmp_path):
    text = bytes(range(1, 101))
    corpus = load_corpus(_folder(tmp_path, {"text": text}) + "/text")
    assert (corpus.train.tobytes(), corpus.validation.tobytes()) == (text[:90], text[90:])


def test_a_folder_with_one_file_of_text_splits_like_the_file(tmp_path):
    folder = _folder(tmp_path, {"text": bytes(range(1, 101)), "image": b"a\0b", "empty": b""})
    assert load_corpus(folder).fingerprint == load_corpus(folder + "/text").fingerprint


def test_hidden_files_and_files_that_are_not_text_are_left_out_of_a_folder(tmp_path):
    text = {"a.txt": b"aaaa", "deep/er/b.txt": b"bbbb"}
    rest = {".git/c": b"cccc", ".hidden": b"dddd", "e.png": b"ee\0e"}
    corpus = load_corpus(_folder(tmp_path, text | rest))
    assert sorted(corpus.train.tobytes() + corpus.validation.tobytes()) == sorted(b"aaaabbbb")


def test_the_fingerprint_changes_with_a_byte_and_with_the_split():
    data = np.arange(100, dtype=np.uint8)
    changed = data.copy()
    changed[40] += 1
    corpora = [
        Corpus(name="x", train=data[:90], validation=data[90:]),
        Corpus(name="x", train=changed[:90], validation=changed[90:]),
        Corpus(name="x", train=data[:89], validation=data[89:]),
    ]
    assert len({corpus.fingerprint for corpus in corpora}) == 3


def test_unigram_entropy_of_a_half_and_two_quarters_is_one_and_a_half_bits():
    validation = np.frombuffer(b"aabcaabc", np.uint8)
    corpus = Corpus(name="x", train=np.zeros(9, np.uint8), validation=validation)
    assert corpus.unigram_entropy() == pytest.approx(1.5 * math.log(2), rel=1e-12)  # rounding only


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "missing.txt", r"cannot read the data .*missing\.txt: No such file"),
        ({"empty.txt": b""}, "empty.txt", r"empty\.txt is an empty file"),
        ({"image.png": b"\x89P\0"}, "image.png", r"image\.png is not a text file.*NUL"),
        ({}, "", "holds no text: of its 0 files 0 are not text"),
        (
            {"a": b"\0", "b": b"x\0", "c": b""},
            "",
            "of its 3 files 2 are not .* and 1 are empty",
        ),
    ],
)
def test_data_without_text_is_refused_with_the_reason(tmp_path, files, path, message):
    with pytest.raises(UserError, match=message):
        load_corpus(str(pathlib.Path(_folder(tmp_path, files), path)))


@pytest.mark.parametrize("name", ["", "a.txt"])
def test_an_unreadable_file_is_named(tmp_path, monkeypatch, name):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    folder = _folder(tmp_path, {"a.txt": b"text"})
    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)  # root may read anything
    with pytest.raises(UserError, match=r"cannot read the data .*a\.txt: Permission denied"):
        load_corpus(pathlib.Path(folder, name))


# --- the stream of training windows


def test_windows_are_int32_stretches_of_the_text():
    batch = next(train_batches(_corpus(), batch_size=4, seq_len=8, seed=0))
    assert (batch.shape, batch.dtype) == ((4, 9), np.int32)
    np.testing.assert_array_equal(np.diff(batch, axis=1), 1)


def test_an_epoch_predicts_no_byte_twice_and_the_next_has_its_own_order_and_offset():
    per_epoch = (241 - 1) // 8 - 1
    stream = train_batches(_corpus(), batch_size=1, seq_len=8, seed=3)
    epochs = _take(stream, 4 * per_epoch)[:, 0, 0].reshape(4, per_epoch)
    for starts in epochs:
        np.testing.assert_array_equal(np.diff(np.sort(starts)), 8)
    assert len({int(starts[0]) % 8 for starts in epochs}) > 1
    assert len({tuple(starts // 8) for starts in epochs}) == 4


def test_in_the_long_run_every_byte_but_the_first_is_predicted():
    batches = _take(train_batches(_corpus(), batch_size=4, seq_len=8, seed=0), 400)
    assert set(batches[..., 1:].ravel()) == set(range(1, 241))


@pytest.mark.parametrize("size", [9, 10, 17, 24])
def test_a_text_of_hardly_more_than_one_window_is_enough(size):
    batches = _take(train_batches(_corpus(size), batch_size=1, seq_len=8, seed=0), 50)
    assert set(batches[..., 1:].ravel()) == set(range(1, size))


def test_the_stream_depends_on_the_seed_and_on_nothing_else():
    take = lambda seed: _take(train_batches(_corpus(), batch_size=4, seq_len=8, seed=seed), 20)
    np.testing.assert_array_equal(take(0), take(0))
    assert (take(0) != take(1)).any()
    # Written down once: a run may be resumed under another NumPy or grain.
    assert take(0)[0, :, 0].tolist() == [57, 145, 201, 65]


@pytest.mark.parametrize("position", [0, 1, 13, 50])
def test_a_stream_restored_from_json_continues_as_if_never_interrupted(position):
    make = lambda: train_batches(_corpus(), batch_size=4, seq_len=8, seed=0)
    undisturbed = _take(make(), position + 20)
    stopped = make()
    for _ in range(position):
        next(stopped)
    saved = json.dumps(stopped.get_state())
    resumed = make()
    next(resumed)  # what it read before must not matter
    resumed.set_state(json.loads(saved))
    np.testing.assert_array_equal(_take(resumed, 20), undisturbed[position:])


@pytest.mark.parametrize("processes", [2, 4])
def test_the_processes_share_out_the_batches_of_one_process(processes):
    make = lambda i, n: train_batches(
        _corpus(), batch_size=8, seq_len=8, seed=0, process_index=i, process_count=n
    )
    alone = _take(make(0, 1), 20)  # several epochs
    for i in range(processes):
        np.testing.assert_array_equal(_take(make(i, processes), 20), alone[:, i::processes])


def test_reading_starts_no_thread_and_takes_less_than_a_millisecond_a_batch():
    threads = threading.active_count()
    stream = train_batches(_corpus(100_000), batch_size=16, seq_len=128, seed=0)
    seconds = []
    for _ in range(10):
        start = time.thread_time()
        _take(stream, 20)
        seconds.append((time.thread_time() - start) / 20)
    assert threading.active_count() == threads
    assert min(seconds) < 1e-3  # of processor time, about five times what it takes


def test_too_little_text_for_a_batch_is_refused_with_the_numbers():
    numbers = r"of counting has 35 bytes, and one batch of 4 windows of 9 bytes needs 36"
    sizes = {"batch_size": 4, "seq_len": 8}
    with pytest.raises(UserError, match="train part " + numbers):
        train_batches(_corpus(train=35), **sizes, seed=0)
    with pytest.raises(UserError, match="validation part " + numbers):
        validation_batches(_corpus(validation=35), **sizes, batches=1)


def test_processes_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(UserError, match="multiple of the 3 processes, got 4"):
        train_batches(_corpus(), batch_size=4, seq_len=8, seed=0, process_count=3)


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"seq_len": 0}, {"seed": -1}])
def test_sizes_and_seeds_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        train_batches(_corpus(), **({"batch_size": 4, "seq_len": 8, "seed": 0} | bad))


# --- validation windows


def test_validation_windows_are_fixed_disjoint_and_spread_over_the_text():
    make = lambda: validation_batches(_corpus(), batch_size=4, seq_len=8, batches=3)
    batches = make()
    assert [(b.shape, b.dtype) for b in batches] == [((4, 9), np.int32)] * 3
    np.testing.assert_array_equal(batches, make())
    np.testing.assert_array_equal(np.diff(batches, axis=-1), 1)
    gaps = np.diff(np.stack(batches)[..., 0].ravel())
    assert set(gaps) <= {241 // 12, 241 // 12 + 1}


def test_a_short_validation_text_gives_the_whole_batches_it_holds():
    assert len(validation_batches(_corpus(), batch_size=4, seq_len=8, batches=100)) == 241 // 36
    exact = validation_batches(_corpus(validation=36), batch_size=4, seq_len=8, batches=100)
    np.testing.assert_array_equal(np.ravel(exact), np.arange(36))
