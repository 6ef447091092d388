"""Runs that the tests of several files fit."""

import csv
import os
import pathlib

import numpy as np
import pytest

VARIABLE = "JAXOPT_SUITE_PUBLIC_DATA"


@pytest.fixture(scope="session")
def public_columns():
    """A function from a file's name to a function from a column's name to float64 ``[rows]``."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"needs {VARIABLE}, the folder with other people's published runs")

    def read(name):
        with open(pathlib.Path(folder) / name, newline="") as file:
            rows = list(csv.DictReader(file))
        return lambda column: np.array([float(row[column]) for row in rows])

    return read


@pytest.fixture(scope="session")
def chinchilla_runs(public_columns):
    """All 245 digitised runs of Hoffmann et al. (2022), tokens imputed as FLOP / 6N."""
    column = public_columns("chinchilla_epoch.csv")
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


@pytest.fixture(scope="session")
def noisy_runs(grid_runs):
    """The same with losses of a Chinchilla law, and 0.3 % noise."""
    loss = 1.7 + 400 * grid_runs["N"] ** -0.34 + 410 * grid_runs["D"] ** -0.28
    noise = np.random.default_rng(0).standard_normal(36)
    return {**grid_runs, "loss": loss * np.exp(0.003 * noise)}
