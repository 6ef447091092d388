"""Runs that the tests of several files fit."""

import csv
import os
import pathlib

import numpy as np
import pytest

VARIABLE = "JAXOPT_SUITE_PUBLIC_DATA"


@pytest.fixture(scope="session")
def chinchilla_runs():
    """All 245 digitised runs of Hoffmann et al. (2022), tokens imputed as FLOP / 6N."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"needs {VARIABLE}, the folder with other people's published runs")
    with open(pathlib.Path(folder) / "chinchilla_epoch.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    column = lambda name: np.array([float(row[name]) for row in rows])
    n = column("Model Size")
    return {"N": n, "D": column("Training FLOP") / 6 / n, "loss": column("loss")}


@pytest.fixture(scope="session")
def kept_runs(chinchilla_runs):
    """The 240 of them that the replication fitted: without the 5 highest losses."""
    keep = np.argsort(np.argsort(chinchilla_runs["loss"])) < 240
    return {name: values[keep] for name, values in chinchilla_runs.items()}


@pytest.fixture(scope="session")
def grid_runs():
    """Sizes and tokens of 36 runs, tokens per parameter from 1 to 1000, without losses."""
    n = np.repeat(np.geomspace(2e7, 2e10, 6), 6)
    return {"N": n, "D": n * np.tile(np.geomspace(1, 1000, 6), 6)}
