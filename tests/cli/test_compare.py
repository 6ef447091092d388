"""``jaxopt-suite compare`` from its command line to its files, with real training at nano size."""

import json
import pathlib
import random
import shlex
import statistics

import pytest
from rich.console import Console

from jaxopt_suite.cli import compare as command
from jaxopt_suite.cli.main import main
from jaxopt_suite.experiments import compare
from jaxopt_suite.experiments.config import CompareConfig

STEPS = 6


def words(out: pathlib.Path, data: pathlib.Path) -> list[str]:
    sizes = f"--steps {STEPS} --batch-size 4 --seq-len 32 --eval-every 3 --eval-batches 2"
    choice = "--optimizers adamw,sgd --seeds 2 --set sgd.momentum=0.5"
    return ["compare", *shlex.split(sizes), *shlex.split(choice), f"--out={out}", f"--data={data}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    rng = random.Random(0)
    path.write_text(" ".join(rng.choice(["alpha", "beta", "gamma"]) for _ in range(4000)))
    return path


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, data: pathlib.Path) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("compare") / "out"
    assert main(words(folder, data)) == 0
    return folder


def records(out: pathlib.Path, optimizer: str, seed: int) -> list[dict]:
    lines = (out / optimizer / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "val_loss" in record]


def test_the_summary_is_what_the_runs_own_logs_say(out: pathlib.Path):
    summary = json.loads((out / "summary.json").read_text())
    rows = {row["optimizer"]: row for row in summary["table"]}
    finals = {n: [records(out, n, seed)[-1] for seed in (0, 1)] for n in ("adamw", "sgd")}
    for name, last in finals.items():
        losses = [record["val_loss"] for record in last]
        assert {record["step"] for record in last} == {STEPS}
        assert rows[name]["losses"] == losses
        # Means of two floats in another order of additions.
        assert rows[name]["mean"] == pytest.approx(statistics.fmean(losses), rel=1e-12)
        assert rows[name]["spread"] == pytest.approx(statistics.stdev(losses), rel=1e-12)
    assert rows["adamw"]["steps_to_baseline"] == STEPS
    # The state of AdamW is two float32 copies of the parameters and a step count or two.
    assert 8.0 <= rows["adamw"]["state_bytes_per_param"] < 8.001
    assert rows["adamw"]["mean"] < 5.5  # both learn: ln 256 = 5.545 is knowing nothing


def test_runs_with_the_same_seed_start_alike_whatever_the_optimizer(out: pathlib.Path):
    starts = {
        (n, seed): records(out, n, seed)[0]["val_loss"] for n in ("adamw", "sgd") for seed in (0, 1)
    }
    assert starts["adamw", 0] == starts["sgd", 0]
    assert starts["adamw", 1] == starts["sgd", 1]
    assert starts["adamw", 0] != starts["adamw", 1]


def test_all_files_are_there(out: pathlib.Path):
    for name in ("report.md", "report.html", "summary.json", "curves.png", "curves.svg"):
        assert (out / name).stat().st_size > 0
    assert "sgd" in (out / "report.html").read_text()
    assert "momentum=0.5" in (out / "report.md").read_text()


def test_on_a_mesh_the_losses_are_the_same_and_what_is_sent_has_a_column(
    out: pathlib.Path,
    data: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
):
    assert main([*words(tmp_path, data), "--mesh", "data=4", "--seeds", "1"]) == 0
    alone, split = (json.loads((folder / "summary.json").read_text()) for folder in (out, tmp_path))
    first = {row["optimizer"]: row["losses"][0] for row in alone["table"]}
    for row in split["table"]:
        # Float32 sums over the batch in another order, six steps.
        assert row["losses"][0] == pytest.approx(first[row["optimizer"]], rel=2e-4)
        gradients = 4 * split["runs"][0]["n_params"] * 2 * 3 / 4  # around a ring of four
        assert gradients <= row["wire_bytes"] <= gradients + 64
    assert {run["mesh"] for run in split["runs"]} == {"data=4"}
    assert "bytes sent per" in capsys.readouterr().out
    assert "mesh data=4" in (tmp_path / "report.md").read_text()
    assert "bytes sent per" not in (out / "report.md").read_text()


def test_starting_again_trains_nothing_and_prints_the_same_table(
    out: pathlib.Path,
    data: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    before = (out / "summary.json").read_text()
    monkeypatch.setattr(compare, "train", refuse)
    monkeypatch.setattr(compare, "build_program", refuse)
    assert main(words(out, data)) == 0
    assert (out / "summary.json").read_text() == before
    printed = capsys.readouterr().out
    assert "adamw" in printed
    assert "baseline" in printed
    assert "nats per byte" in printed
    assert str(out / "report.html") in printed


def test_a_run_killed_after_its_last_step_gets_its_result_from_its_folder(
    out: pathlib.Path, data: pathlib.Path
):
    path = out / "sgd" / "seed-1" / "result.json"
    before = json.loads(path.read_text())
    path.unlink()
    assert main(words(out, data)) == 0
    after = json.loads(path.read_text())
    assert before | {"load": 0} == after | {"load": 0}


def test_the_shown_command_makes_the_same_comparison(monkeypatch: pytest.MonkeyPatch):
    config = CompareConfig(
        optimizers="adamw,lion", lr_sweep=True, clip=None, set=("b2=0.9", "lion.b1=0.5"), out="a b"
    )
    read: list[CompareConfig] = []
    monkeypatch.setattr(command, "run", lambda given: read.append(given) or 0)
    first, *arguments = shlex.split(command.command(config))
    assert first == "jaxopt-suite"
    assert main(arguments) == 0
    assert read == [config]
    assert command.command(CompareConfig()) == "jaxopt-suite compare"


def test_a_signal_gives_its_exit_status_and_says_how_to_go_on(
    tmp_path: pathlib.Path,
    data: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def stop(*_: object, **__: object) -> None:
        raise compare.Interrupted("stopped by SIGTERM after step 3 of 6", 15)

    monkeypatch.setattr(compare, "compare", stop)
    assert main(words(tmp_path, data)) == 143
    shown = capsys.readouterr().err
    assert "stopped by SIGTERM" in shown
    assert "to go on: jaxopt-suite compare" in shown


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--optimizers=adamw,adamv", "'adamv' is not one of"),
        ("--optimizers=", "different names"),
        ("--set=rank=3", "no optimizer compared has 'rank'"),
        ("--preset=giant", "--preset must be one of"),
        ("--mesh=data=9", "needs 9 devices, and there are 8"),
        ("--mesh=dta=2", "worker, data, fsdp, model, got 'dta'"),
        ("--mesh=data=3", "--batch-size: "),
        ("--shard-state-over=data", "--shard-state-over must be given with --mesh"),
        ("--data=/no/such/file", "/no/such/file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    tmp_path: pathlib.Path,
    data: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    message: str,
):
    given = [w for w in words(tmp_path, data) if not w.startswith(option.split("=")[0] + "=")]
    if option.startswith("--optimizers"):
        position = given.index("--optimizers")
        del given[position : position + 2]
    assert main([*given, option]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_a_narrow_terminal_gets_the_table_in_two_parts(
    out: pathlib.Path, data: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    config = CompareConfig(
        optimizers="adamw,sgd",
        seeds=2,
        steps=STEPS,
        batch_size=4,
        seq_len=32,
        eval_every=3,
        eval_batches=2,
        set=("sgd.momentum=0.5",),
        out=str(out),
        data=str(data),
    )
    comparison = compare.compare(config, command="x")
    command.show(comparison, Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    assert sum("adamw" in line and "8.00" in line for line in lines) == 1
    assert sum("adamw" in line and "baseline" in line for line in lines) == 1
    assert max(len(line) for line in lines if "nats" not in line) <= 80
