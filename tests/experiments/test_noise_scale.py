"""``--noise-scale``: measured between workers, logged, and nothing else changed by it."""

import numpy as np
import pytest

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import model
from jaxopt_suite.experiments.config import TrainConfig
from jaxopt_suite.experiments.data import Corpus
from jaxopt_suite.experiments.loop import train
from jaxopt_suite.experiments.progress import describe

TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 40, np.uint8)
COMMON = {
    "steps": 4, "eval_every": 4, "log_every": 2, "batch_size": 8, "seq_len": 16,
    "eval_batches": 1, "mesh": "worker=4", "checkpoint_every": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setattr(model, "PRESETS", {"nano": model.ModelConfig(8, 1, 1, 16)})


def records(path, **options):
    config = TrainConfig(**{**COMMON, "out": str(path), **options})
    return train(config, corpus=Corpus("sentences", TEXT, TEXT)).run.read()


@pytest.mark.slow
def test_it_is_logged_and_the_losses_stay_as_they_are(tmp_path):
    plain = records(tmp_path / "plain")
    watched = records(tmp_path / "watched", noise_scale=True)
    for name in ("loss", "val_loss"):
        before, after = ([r[name] for r in each if name in r] for each in (plain, watched))
        np.testing.assert_allclose(after, before, rtol=1e-6)  # another program, fused otherwise
    last = watched[-1]
    assert last["noise_scale_status"] == "ok"
    assert last["noise_scale"] > 0
    assert "noise scale" in describe(last)
    assert "noise_scale" not in plain[-1]
    # Sequences of one sentence in any of 45 phases differ little beside the gradient at the start.
    assert last["noise_scale"] < 100


@pytest.mark.parametrize(
    "options",
    [
        {"mesh": None},
        {"mesh": "data=4"},
        {"mesh": "worker=1"},
        {"compress": "sign()"},
        {"optimizer": "terngrad"},
    ],
)
def test_where_it_cannot_be_measured_it_is_refused(tmp_path, options):
    with pytest.raises(UserError, match="--noise-scale must be given with"):
        records(tmp_path / "run", noise_scale=True, **options)
