"""The benchmark of kernels: what it refuses, and the page made of it."""

from benchmarks import docs_kernels
from benchmarks._results import append
from benchmarks.kernels import __main__ as command


def test_an_unknown_kernel_is_refused_with_the_list_of_those_there_are(capsys):
    assert command.main(["gram"]) == 2
    error = capsys.readouterr().err
    assert "no kernel 'gram'" in error
    assert "gram_update" in error
    assert "train_step" in error


def test_the_page_shows_the_newest_row_of_a_case_and_says_where_there_is_none(tmp_path):
    assert docs_kernels.sections(tmp_path) == {"kernels": "No measurements yet.\n"}
    made = dict.fromkeys(("date", "our_commit", "hardware", "command"), "x")
    made |= {"load": 0.0, "versions": {}}
    for megabytes in (7, 8):
        figures = {"flops": 0, "bytes_accessed": megabytes * 10**6, "temporary_bytes": 0}
        row = {"kernel": "k", "case": "c", "topology": "v5e:2x2", "xla": figures, "pallas": figures}
        append(tmp_path / "kernels.json", row | made)
    text = docs_kernels.sections(tmp_path)["kernels"]
    assert "| c | v5e | 0.00 → 0.00 | 8.0 → 8.0 | 0.0 → 0.0 |" in text
    assert "7.0" not in text
