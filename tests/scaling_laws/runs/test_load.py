"""Runs from files and frames: what is read, what is refused, and that no row is lost silently."""

import json
import tracemalloc

import numpy as np
import pandas
import pytest

from jaxopt_suite.scaling_laws import load_runs
from jaxopt_suite.scaling_laws.runs import BadRuns

ROWS = [
    {"run_id": "a", "N": 1e6, "D": 2e8, "loss": 4.0, "optimizer": "adamw", "seed": 0},
    {"run_id": "b", "N": 2e6, "D": 2e8, "loss": 3.5, "optimizer": "muon", "seed": 0},
    {"run_id": "c", "N": 4e6, "D": 4e8, "loss": 3.0, "optimizer": "adamw", "seed": 1},
]


def json_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def written(folder, kind, rows=ROWS):
    frame = pandas.DataFrame(rows)
    path = folder / f"runs.{kind}"
    if kind == "jsonl":
        return json_file(path, rows)
    if kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "frame", "mapping", "folder"])
def test_every_kind_of_source_gives_the_same_table(tmp_path, kind):
    if kind == "frame":
        source = pandas.DataFrame(ROWS)
    elif kind == "mapping":
        source = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    else:
        source = written(tmp_path, "csv" if kind == "folder" else kind)
        source = tmp_path if kind == "folder" else source
    runs = load_runs(source)
    np.testing.assert_array_equal(runs["N"], [1e6, 2e6, 4e6])
    np.testing.assert_array_equal(runs["loss"], [4.0, 3.5, 3.0])
    assert runs["N"].dtype == np.float64
    assert list(runs["optimizer"]) == ["adamw", "muon", "adamw"]
    assert runs.dropped == ()
    assert runs.digest == load_runs(pandas.DataFrame(ROWS)).digest


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_row_knows_its_file_and_line(tmp_path, kind):
    path = written(tmp_path, kind)
    first = {"jsonl": 1, "csv": 2, "parquet": 0}[kind]
    assert list(load_runs(path).where) == [f"{path}:{first + i}" for i in range(3)]
    kept = load_runs(path, keep="N > 1e6")
    assert list(kept.where) == [f"{path}:{first + i}" for i in (1, 2)]
    assert [str(each) for each in kept.dropped] == [f"{path}:{first}: not kept by 'N > 1e6'"]


@pytest.mark.parametrize(
    "columns", ["N=p,D=t,loss=val/loss", {"N": "p", "D": "t", "loss": "val/loss"}]
)
def test_columns_are_mapped_from_text_and_from_mappings(tmp_path, columns):
    row = {"p": 1e6, "t": 2e8, "val/loss": 3.25, "params": 7.0}
    runs = load_runs(json_file(tmp_path / "a.jsonl", [row]), columns=columns)
    assert (runs["N"][0], runs["D"][0], runs["loss"][0]) == (1e6, 2e8, 3.25)
    assert dict(runs.conventions.sources)["loss"] == "val/loss"


BAD = [
    ("N", -1.0, "N is -1, not above 0"),
    ("loss", 0.0, "loss is 0, not above 0"),
    ("loss", -2.5, "loss is -2.5, not above 0"),
    ("loss", float("nan"), "loss is nan"),
    ("loss", float("inf"), "loss is inf"),
    ("loss", None, "loss is missing"),
    ("loss", "3.1", "loss is '3.1', not a number"),
    ("D", True, "D is True, not a number"),
    ("D", 10**400, "not a number"),
    ("seed", "zero", "seed is 'zero', not a number"),
]


@pytest.mark.parametrize(("name", "value", "told"), BAD)
def test_a_bad_value_is_named_by_line_and_dropped_only_if_allowed(tmp_path, name, value, told):
    rows = [ROWS[0], ROWS[1] | {name: value}, ROWS[2]]
    path = json_file(tmp_path / "a.jsonl", rows)
    with pytest.raises(BadRuns, match="1 row cannot be used") as error:
        load_runs(path)
    assert f"{path}:2: " in str(error.value)
    assert told in str(error.value)
    runs = load_runs(path, on_bad="drop")
    assert list(runs["run_id"]) == ["a", "c"]
    assert [each.where for each in runs.dropped] == [f"{path}:2"]


@pytest.mark.parametrize("text", ["abc", "", "nan", "-1", "1_000", "inf"])
def test_a_text_in_a_numeric_column_of_a_csv_is_bad(tmp_path, text):
    path = tmp_path / "a.csv"
    path.write_text(f"N,D,loss\n1e6,1e8,3.0\n2e6,{text},2.9\n")
    with pytest.raises(BadRuns, match=r"a\.csv:3: D is"):
        load_runs(path)
    assert list(load_runs(path, on_bad="drop")["N"]) == [1e6]


def test_all_bad_rows_are_counted_and_the_first_ones_shown(tmp_path):
    path = json_file(tmp_path / "a.jsonl", [{"N": -i, "D": 1, "loss": 1} for i in range(2000)])
    with pytest.raises(BadRuns, match=r"2000 rows cannot be used(.|\n)*and 1990 more") as error:
        load_runs(path)
    assert error.value.count == 2000
    assert len(error.value.bad) == 1000


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"N": 1e6, "D"', "cut short"),
        ('{"N": 1e6, "D"\n', "not JSON"),
        ("[1, 2]\n", "not a JSON object"),
        ('{"a": "\\udcff"\n', "not JSON"),
    ],
)
def test_a_damaged_line_of_json_is_named(tmp_path, line, told):
    path = json_file(tmp_path / "a.jsonl", ROWS)
    path.write_text(path.read_text() + "\n" + line)
    with pytest.raises(BadRuns, match=told) as error:
        load_runs(path)
    assert f"{path}:5" in str(error.value)
    assert len(load_runs(path, on_bad="drop")) == 3


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"N": 1, "D": 2, "loss": 3, "run_id": "\xff\xfe"}\n')
    with pytest.raises(BadRuns, match=r"a\.jsonl:1: not UTF-8"):
        load_runs(path)
    path = tmp_path / "a.csv"
    path.write_bytes(b"N,D,loss,run_id\n1,2,3,\xff\n")
    with pytest.raises(BadRuns, match=r"a\.csv:2: run_id is .*, not UTF-8"):
        load_runs(path)


def test_a_csv_row_of_another_length_is_damaged(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('N,D,loss\n1e6,1e8,3.0\n1e6,2e8\n"1e6","3e8","2.5"\n')
    with pytest.raises(BadRuns, match=r"a\.csv:3: 2 fields where the header has 3"):
        load_runs(path)
    assert list(load_runs(path, on_bad="drop")["loss"]) == [3.0, 2.5]


def test_repeated_runs_are_bad_and_the_first_is_kept(tmp_path):
    path = json_file(tmp_path / "a.jsonl", [*ROWS, ROWS[0] | {"loss": 1.0}])
    with pytest.raises(BadRuns, match=r"a\.jsonl:4: repeats .*a\.jsonl:1"):
        load_runs(path)
    assert load_runs(path, on_bad="drop")["loss"][0] == 4.0


def test_without_run_id_a_row_repeats_another_if_all_values_do():
    table = {"N": [1.0, 1.0, 2.0, 1.0], "D": [5.0] * 4, "loss": [3.0, 3.1, 3.0, 3.0]}
    with pytest.raises(BadRuns, match="frame:3: repeats frame:0"):
        load_runs(table)
    lacking = table | {"seed": [np.nan, 0, 1, np.nan]}
    with pytest.raises(BadRuns, match="frame:3: repeats frame:0"):
        load_runs(lacking)
    assert len(load_runs(table | {"seed": [0, 1, 2, 3]})) == 4
    signed = {"N": [1.0, 1.0], "loss": [2.0, 2.0], "seed": [0.0, -0.0]}
    with pytest.raises(BadRuns, match="frame:1: repeats frame:0"):
        load_runs(signed)


def test_a_missing_description_is_not_a_number_and_never_zero(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("N,D,loss,seed,optimizer\n1e6,1e8,3.0,,\n2e6,1e8,2.9,0,adamw\n")
    runs = load_runs(path)
    np.testing.assert_array_equal(runs["seed"], [np.nan, 0.0])
    assert list(runs["optimizer"]) == ["", "adamw"]
    with pytest.raises(BadRuns, match="seed is missing"):
        load_runs(path, columns="seed=seed")


def test_a_count_that_only_some_rows_have_is_missing_in_the_others(tmp_path):
    path = json_file(
        tmp_path / "a.jsonl", [{"D": 1.0, "loss": 2.0}, {"N": 1.0, "D": 3.0, "loss": 2.0}]
    )
    with pytest.raises(BadRuns, match=r"a\.jsonl:1: N is missing"):
        load_runs(path)


def test_an_unknown_column_is_refused_with_those_there_are(tmp_path):
    path = json_file(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"loss='val/loss' is no column of .*'run_id', 'N', 'D'"):
        load_runs(path, columns="loss=val/loss")


def test_a_column_that_may_be_two_is_refused(tmp_path):
    path = json_file(tmp_path / "a.jsonl", [{"N": 1, "D": 1, "loss": 3.0, "val_loss": 4.0}])
    with pytest.raises(ValueError, match="column loss may be 'loss' or 'val_loss'"):
        load_runs(path)
    assert load_runs(path, columns="loss=val_loss")["loss"][0] == 4.0


def test_the_same_measure_under_two_names_in_two_files_is_refused(tmp_path):
    json_file(tmp_path / "a.jsonl", [{"N": 1, "D": 1, "loss": 3.0}])
    json_file(tmp_path / "b.jsonl", [{"N": 1, "D": 1, "val_loss": 3.0}])
    with pytest.raises(ValueError, match=r"column loss is 'loss' in .*a\.jsonl and 'val_loss'"):
        load_runs(tmp_path)


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no runs"):
        load_runs(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_runs(tmp_path / "absent")
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match=r"no runs are left of 0 rows in .*a\.jsonl"):
        load_runs(tmp_path)
    with pytest.raises(ValueError, match=r"end in \.jsonl"):
        load_runs(written(tmp_path, "csv").rename(tmp_path / "a.xlsx"))
    with pytest.raises(TypeError, match="path, a data frame or a mapping"):
        load_runs(3)
    with pytest.raises(ValueError, match="no runs are left of 3 rows"):
        load_runs(pandas.DataFrame(ROWS), keep="N > 1e9")
    with pytest.raises(ValueError, match="no column gives the loss"):
        load_runs({"N": [1.0], "D": [2.0]})


LOG = [
    {"run_id": run, "step": step, "N": n, "D": 1e5 * step, "loss": 5.0 - step / 10}
    for run, n in (("a", 1e6), ("b", 2e6))
    for step in (10, 30, 20)
]


def test_final_mode_takes_the_row_of_the_largest_step_and_curve_mode_all(tmp_path):
    path = json_file(tmp_path / "log.jsonl", LOG)
    final = load_runs(path)
    assert list(final["step"]) == [30, 30]
    assert list(final["D"]) == [3e6, 3e6]
    assert list(final.where) == [f"{path}:2", f"{path}:5"]
    assert len(load_runs(path, mode="curve")) == 6


def test_a_run_whose_last_loss_is_bad_has_no_final_loss(tmp_path):
    rows = [*LOG, {"run_id": "a", "step": 40, "N": 1e6, "D": 4e6, "loss": None}]
    path = json_file(tmp_path / "log.jsonl", rows)
    runs = load_runs(path, on_bad="drop")
    assert list(runs["run_id"]) == ["b"]
    assert f"ends with an unusable record, {path}:7" in runs.dropped[1].reason
    assert len(load_runs(path, on_bad="drop", mode="curve")) == 6


def test_records_of_a_log_without_a_loss_are_passed_over(tmp_path):
    rows = [*LOG, {"run_id": "a", "step": 35, "grad_norm": 1.0, "N": 1e6, "D": 4e6}]
    assert list(load_runs(json_file(tmp_path / "log.jsonl", rows))["step"]) == [30, 30]


def test_steps_without_a_run_are_refused_unless_the_file_is_the_run(tmp_path):
    rows = [{"step": s, "N": 1, "D": s, "loss": 9 - s} for s in (1, 2)]
    for name in ("a", "b"):
        json_file(tmp_path / f"{name}.jsonl", rows)
    with pytest.raises(ValueError, match="a step but no run_id"):
        load_runs(tmp_path)
    runs = load_runs(tmp_path, columns="run_id=file")
    assert list(runs["loss"]) == [7, 7]
    assert runs["run_id"][0] == str(tmp_path / "a.jsonl")


def test_a_step_logged_twice_is_bad(tmp_path):
    path = json_file(tmp_path / "log.jsonl", [*LOG, LOG[1]])
    for mode in ("final", "curve"):
        with pytest.raises(BadRuns, match=r"log\.jsonl:7: (step 30 of run 'a' is at|repeats)"):
            load_runs(path, mode=mode)


def test_unfinished_schedules_are_left_out_of_final_losses_and_reported():
    table = {"N": [1.0, 2.0], "D": [1.0, 2.0], "loss": [2.0, 1.0], "decay_finished": [True, False]}
    runs = load_runs(table)
    assert list(runs["N"]) == [1.0]
    assert "schedule had not finished" in runs.dropped[0].reason
    assert len(load_runs(table, unfinished="keep")) == 2
    assert len(load_runs(table, mode="curve")) == 2


def test_names_of_ones_own_are_numbers_or_text_as_told(tmp_path):
    path = json_file(tmp_path / "a.jsonl", [{"N": 1, "D": 1, "loss": 2.0, "g": 8, "set": "web"}])
    runs = load_runs(path, columns="granularity=g,corpus=set", text=["corpus"])
    assert (runs["granularity"][0], runs["corpus"][0]) == (8.0, "web")
    with pytest.raises(BadRuns, match=r"corpus \('set'\) is 'web', not a number"):
        load_runs(path, columns="corpus=set")
    with pytest.raises(ValueError, match="text must be names in columns"):
        load_runs(path, text=["corpus"])


def test_missing_values_of_pandas_are_missing():
    frame = pandas.DataFrame(ROWS).convert_dtypes()
    frame.loc[1, "optimizer"] = pandas.NA
    assert list(load_runs(frame)["optimizer"]) == ["adamw", "", "adamw"]
    frame.loc[1, "loss"] = pandas.NA
    with pytest.raises(BadRuns, match="frame:1: loss is missing"):
        load_runs(frame)


def test_arguments_out_of_range_are_refused():
    table = {"N": [1.0], "D": [1.0], "loss": [2.0]}
    for bad in ({"mode": "last"}, {"on_bad": "zero"}, {"unfinished": "no"}):
        with pytest.raises(ValueError, match="must be one of"):
            load_runs(table, **bad)
    for columns in ("N", "N=", "=x", "N=a,N=b"):
        with pytest.raises(ValueError, match="columns must"):
            load_runs(table, columns=columns)
    with pytest.raises(TypeError, match="columns must map names"):
        load_runs(table, columns={"N": 3})
    with pytest.raises(ValueError, match=r"got \(1,\) for 'D' and \(2,\) for 'N'"):
        load_runs({"N": [1.0, 2.0], "D": [1.0]})


def test_selected_rows_leave_the_others_in_dropped_and_arrays_are_read_only():
    runs = load_runs(pandas.DataFrame(ROWS))
    some = runs.select(runs["N"] < 3e6, reason="held out")
    assert len(some) == 2
    assert [str(each) for each in some.dropped] == ["frame:2: held out"]
    assert some.digest != runs.digest
    with pytest.raises(ValueError, match="read-only"):
        some["N"][0] = 1.0
    with pytest.raises(TypeError, match="mask must be boolean"):
        runs.select([0, 1, 2])
    with pytest.raises(ValueError, match="mask must have shape"):
        runs.select([True])
    with pytest.raises(KeyError, match="no column 'U'"):
        runs["U"]
    assert list(some.to_frame()["where"]) == ["frame:0", "frame:1"]
    assert "held out" in some.summary()


def test_a_large_file_is_never_held_as_a_whole(tmp_path):
    """Eight bytes a number and twelve for where it was: far less than the text of the rows."""
    path = tmp_path / "large.jsonl"
    line = '{"N": %d, "D": 1e9, "loss": 3.25, "note": "' + "x" * 1000 + '"}\n'
    with path.open("w") as file:
        file.writelines(line % i for i in range(1, 10_001))
    tracemalloc.start()
    load_runs(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Columns, their growth, and the hashes that find repeats: 1.2 MB measured, of 10.5 MB of text.
    assert peak < 0.25 * path.stat().st_size
