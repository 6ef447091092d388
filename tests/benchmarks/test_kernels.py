"""The benchmark of kernels: what it refuses, and the page made of it."""

import itertools
import types

import jax
import pytest

from benchmarks import docs_kernels
from benchmarks._results import append
from benchmarks.kernels import __main__ as command
from benchmarks.kernels import leaves, times
from jaxopt_suite import kernels
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.parallel.chips import CHIPS


def test_an_unknown_kernel_is_refused_with_the_list_of_those_there_are(capsys):
    assert command.main(["gram"]) == 2
    error = capsys.readouterr().err
    assert "no kernel 'gram'" in error
    assert "gram_update" in error
    assert "train_step" in error


def test_the_page_shows_the_newest_run_of_a_kernel_and_says_where_there_is_none(tmp_path):
    empty = docs_kernels.sections(tmp_path)
    assert empty["kernels"] == "No measurements yet.\n"
    assert "No times yet: `python -m benchmarks.kernels time`" in empty["kernel_times"]
    made = dict.fromkeys(("date", "our_commit", "hardware", "command"), "x")
    made |= {"load": 0.0, "versions": {}}
    for megabytes in (7, 8):
        figures = {"flops": 0, "bytes_accessed": megabytes * 10**6, "temporary_bytes": 0}
        row = {"kernel": "k", "case": "c", "topology": "v5e:2x2", "xla": figures, "pallas": figures}
        append(tmp_path / "kernels.json", row | made | {"date": f"day {megabytes}"})
    text = docs_kernels.sections(tmp_path)["kernels"]
    assert "| c | v5e | 0.00 → 0.00 | 8.0 → 8.0 | 0.01 → 0.01 | 0.0 → 0.0 |" in text
    assert "7.0" not in text


def test_leaves_are_timed_on_the_cpu_and_the_page_says_what_was_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(leaves, "CHIPS", {})
    seconds = itertools.count(step=0.25)
    (row,) = leaves.measure(leaves=3, clock=lambda: next(seconds))
    assert row["tree"]["ms"] == row["packed"]["ms"] == 250
    assert row["tree"]["loops"] >= 3
    made = dict.fromkeys(("date", "our_commit", "hardware", "command"), "x")
    made |= {"load": 0.0, "versions": {}}
    append(tmp_path / "kernels_leaves.json", row | made)
    untimed = {name: dict(row[name]) for name in leaves.WAYS}
    for figures in untimed.values():
        del figures["ms"]
    append(tmp_path / "kernels_leaves.json", row | untimed | {"chip": "v5e"} | made)
    text = docs_kernels.sections(tmp_path)["kernel_leaves"]
    assert "| cpu | 3 of 1024 |" in text
    assert "| 250 → 250 |" in text
    assert text.count("unmeasured") == 1


def test_leaves_for_an_unknown_chip_are_refused_with_the_list_of_those_there_are(capsys):
    assert command.main(["leaves", "v5"]) == 2
    assert "no chip 'v5'; there are: cpu, v5e, h100" in capsys.readouterr().err


def test_times_are_refused_on_a_cpu(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "TIMES", tmp_path / "times.json")
    assert command.main(["time"]) == 2
    assert "timed on a TPU or a GPU, and JAX has only 'cpu' here" in capsys.readouterr().err
    assert command.main(["time", "gram"]) == 2
    assert "no kernel to time 'gram'; there are: int8_encode" in capsys.readouterr().err
    assert not command.TIMES.exists()


@pytest.mark.parametrize(
    ("platform", "kind", "name"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", "h100"),
        ("gpu", "NVIDIA H200", "h200"),
        ("tpu", "TPU v5 lite", "v5e"),
        ("tpu", "TPU v5", "v5p"),
    ],
)
def test_a_device_is_known_by_what_jax_calls_it(platform, kind, name):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    assert times._chip(device) is CHIPS[name]


def test_a_chip_without_figures_is_refused_with_the_list_of_those_with():
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA A100-SXM4-80GB")
    with pytest.raises(UserError, match=r"'NVIDIA A100-SXM4-80GB' is none of .*NVIDIA H100"):
        times._chip(device)


def test_a_row_has_the_time_of_a_call_and_what_part_of_the_bandwidth_that_is(monkeypatch, tmp_path):
    monkeypatch.setattr(times, "_chip", lambda device: CHIPS["h100"])
    seconds = itertools.count(step=0.5)  # between two looks at the clock half a second
    clock = lambda: next(seconds)
    n = 2**14
    rows = list(times.measure(["int8_encode", "int8_mean"], sizes=[n], clock=clock))
    encode, mean = rows
    assert encode["least_bytes"] == 9 * n + 4 * n // 256  # x read; codes, decoded, scales written
    assert mean["least_bytes"] == 8 * (n + 4 * n // 256) + 4 * n
    us = 0.5e6 / times.CALLS
    assert encode["xla"]["us"] == us
    assert encode["xla"]["of_bandwidth"] == pytest.approx(
        encode["least_bytes"] / us * 1e6 / 3.35e12
    )
    assert encode["pallas"] is encode["difference"] is None  # not on this CPU
    made = dict.fromkeys(("date", "our_commit", "hardware", "command"), "x")
    for row in rows:
        append(tmp_path / "kernels_times.json", row | made | {"load": 0.0, "versions": {}})
    text = docs_kernels.sections(tmp_path)["kernel_times"]
    assert "| int8_encode | 16384 | h100 | 25000.0 | none | 0% |  |" in text


def test_a_kernel_s_results_are_compared_with_those_of_the_compiler_s_program():
    case = next(times._cases([2**14]))
    exact = jax.jit(lambda x: kernels.int8_encode(x, impl="xla"))
    off = jax.jit(lambda x: exact(x)._replace(decoded=1.25 * exact(x).decoded))
    assert times._difference(case, {"xla": exact, "pallas": exact}) == 0
    assert times._difference(case, {"xla": exact, "pallas": off}) == pytest.approx(0.25)
