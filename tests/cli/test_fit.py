"""``jaxopt-suite fit`` from its command line to its files."""

import csv
import json
import pathlib
import shlex

import numpy as np
import pytest

from jaxopt_suite import scaling_laws
from jaxopt_suite.cli.main import main
from jaxopt_suite.experiments import fit_study

TRUTH = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
OPTIONS = "--columns N=params,loss=val/loss --flops 6ND --starts 16 --bootstrap 40 --resample size"


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> pathlib.Path:
    """Five slices of eight sizes, with 0.1 % noise, and one row that is no run."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("logs") / "runs.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["params", "size", "flops", "val/loss"])
        for flops in np.geomspace(1e18, 1e21, 5):
            for i, factor in enumerate(np.geomspace(1 / 8, 8, 8)):
                n = np.sqrt(flops / 120) * factor
                loss = TRUTH["E"] + TRUTH["A"] * n**-0.34 + TRUTH["B"] * (flops / 6 / n) ** -0.28
                rows.writerow([n, i, flops, loss * np.exp(1e-3 * rng.standard_normal())])
        rows.writerow([1e9, 9, 1e20, "nan"])
    return path


@pytest.fixture(scope="module")
def folder(logs, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("report") / "out"
    words = f"fit {logs} {OPTIONS} --on-bad drop --at 1e21 --at 1e24 --next-run 1e20 --out {out}"
    words += " --columns N=params,loss=val/loss,size=size"
    assert main(shlex.split(words)) == 0
    return out


def test_the_stored_fit_is_the_fit_of_these_runs(logs, folder):
    stored = scaling_laws.Fit.from_json((folder / "fit.json").read_text())
    assert stored.converged
    assert (stored.table.n, stored.draws.unit, stored.draws.units) == (40, "size", 8)
    for name, value in TRUTH.items():
        # 0.1 % noise leaves levels of the two terms within a factor of two, exponents within 0.04.
        assert stored.coefficients[name] == pytest.approx(value, rel=1.0 if name in "AB" else 0.12)


def test_the_summary_holds_rows_what_was_left_out_and_every_table(folder):
    found = json.loads((folder / "summary.json").read_text())
    assert len(found["rows"]) == 40
    (dropped,) = found["dropped"]
    assert dropped["where"].endswith("runs.csv:42")
    assert found["conventions"]["derived"] == {"D": "C / (6 N)"}
    assert found["frontier"]["extrapolation"] == pytest.approx([1.0, 1000.0], rel=1e-6)
    assert found["next_run"]["at"] == 1e24  # the largest budget asked for
    assert len(found["isoflop"]["slices"]) == 5
    assert found["holdouts"]
    assert {rival["label"] for rival in found["rivals"]} >= {"chinchilla", "chinchilla, E = 0"}
    by_aic = {rival["label"]: rival["aic"] for rival in found["rivals"]}
    assert by_aic["chinchilla"] < by_aic["chinchilla, E = 0"]
    assert "--at 1e+24" in found["command"]
    again = shlex.split(found["command"])[1:]
    assert again[1].endswith("runs.csv")


def test_the_page_has_the_pictures_the_checks_and_the_warning_of_what_is_far(folder):
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 2
    for title in ("Ranges", "Residuals", "Runs held out", "Beyond the runs", "Other forms"):
        assert f"<h3>{title}</h3>" in page
    assert "1e+03x DOUBTFUL" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # it loads nothing
    text = (folder / "report.md").read_text()
    assert "![" in text
    assert (folder / "fit.svg").read_text().startswith("<?xml")
    assert (folder / "isoflop.svg").exists()


def test_the_terminal_shows_the_table_and_what_was_left_out(logs, capsys):
    assert main(["fit", str(logs), *shlex.split(OPTIONS), "--on-bad=drop", "--resample=rows"]) == 0
    printed = capsys.readouterr().out
    for name in TRUTH:
        assert f"\n  {name} " in printed
    assert "1 left out" in printed
    assert "converged" in printed


def test_the_list_names_every_law(capsys):
    assert main(["fit", "--list"]) == 0
    printed = capsys.readouterr().out
    for name in scaling_laws.laws.registry():
        assert name in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("fit", "--runs must be"),
        ("fit nowhere.csv", "does not exist"),
        ("fit {logs} --columns N=params,loss=val/loss --flops 6ND", "runs.csv:42"),
        ("fit {logs} --columns N=nothing --on-bad drop", "nothing"),
        ("fit {logs} --law chinchila", "got 'chinchila'"),
        ("fit {logs} --objective hubert(3)", "--objective"),
        ("fit {logs} --objective huber(-1)", "--objective"),
        ("fit {logs} --bootstrap -1", "--bootstrap"),
        ("fit {logs} --level 90", "--level"),
        ("fit {logs} --at -1", "--at"),
        ("fit {logs} {options} --on-bad drop --keep size==0 --resample rows", "needs at least 7"),
        ("fit {logs} {options} --on-bad drop --out {logs}", "--out"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words, said, logs, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = words.format(
        logs=logs, options=OPTIONS.replace("loss=val/loss", "loss=val/loss,size=size")
    )
    assert main(shlex.split(text)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_leverage_is_the_diagonal_of_the_hat_matrix():
    runs = {"C": np.geomspace(1e3, 1e6, 8), "loss": 2 + 50 * np.geomspace(1e3, 1e6, 8) ** -0.5}
    law = scaling_laws.Law(
        name="line",
        formula="L = E + A C^-1/2",
        inputs=("C",),
        parameters=(scaling_laws.floor("E"), scaling_laws.coefficient("A", start=(1, 100))),
        predict=lambda p, x: p["E"] + p["A"] * scaling_laws.power(x["C"], -0.5),
    )
    objective = scaling_laws.squares(space="linear")
    fit = scaling_laws.fit(law, runs, objective=objective, starts=8, bootstrap=0)
    x = np.stack([np.ones(8), runs["C"] ** -0.5], axis=1)
    hat = np.diag(x @ np.linalg.inv(x.T @ x) @ x.T)
    np.testing.assert_allclose(fit_study.leverage(fit), hat, rtol=1e-8)
