"""Training on meshes: the losses of one device, and a run that goes on where others began it."""

import dataclasses
import json
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import loop, model
from jaxopt_suite.experiments.config import TrainConfig
from jaxopt_suite.experiments.data import Corpus, train_batches
from jaxopt_suite.experiments.loop import train
from jaxopt_suite.experiments.steps import build_program
from jaxopt_suite.optimizers.registry import registry

STEPS = 6
CONFIG = TrainConfig(
    steps=STEPS,
    batch_size=16,
    seq_len=12,
    log_every=1,
    eval_every=3,
    eval_batches=1,
    checkpoint_every=STEPS,
)
CORPUS = Corpus(
    name="sentences",
    train=np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 40, np.uint8),
    validation=np.frombuffer(b"pack my box with five dozen liquor jugs. " * 8, np.uint8),
)
# Float32 sums in another order, a different one in each of 2 layers and 6 steps. Measured: at most
# 1e-6. A batch whose parts are weighted wrongly, or a part seen twice, is off by 1e-2.
CLOSE = {"rtol": 2e-5, "atol": 0}


@pytest.fixture(scope="module", autouse=True)
def a_preset_of_a_few_thousand_parameters():
    """Two layers and two heads: every mesh axis has something to split."""
    with pytest.MonkeyPatch.context() as patch:
        small = {"nano": model.ModelConfig(d_model=16, n_layers=2, n_heads=2, d_ff=32)}
        patch.setattr(model, "PRESETS", model.PRESETS | small)
        yield


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    return losses(train_at(tmp_path_factory.mktemp("one")))


def train_at(path, **options):
    return train(dataclasses.replace(CONFIG, out=str(path), **options), corpus=CORPUS)


def losses(result):
    """Training loss, gradient norm and validation loss of every record."""
    names = ("loss", "grad_norm", "val_loss")
    return [[r.get(name, math.nan) for name in names] for r in result.run.read()]


@pytest.mark.parametrize(
    "options",
    [
        {"mesh": "data=8"},
        pytest.param({"mesh": "fsdp=8"}, marks=pytest.mark.slow),
        {"mesh": "data=2,fsdp=2,model=2"},
        pytest.param({"mesh": "data=8", "shard_state_over": "data"}, marks=pytest.mark.slow),
        {"mesh": "data=2,fsdp=4", "shard_state_over": "data"},
        {"accumulate": 2},
        pytest.param({"mesh": "data=4", "accumulate": 2}, marks=pytest.mark.slow),
        {"scan_layers": True},
        {"remat": True},
        {"mesh": "fsdp=4,model=2", "scan_layers": True, "remat": True},
        {"mesh": "data=2", "offload_state": True},
    ],
    ids=str,
)
def test_a_layout_changes_no_loss(tmp_path, on_one_device, options):
    found = train_at(tmp_path, **options)
    assert found.mesh == options.get("mesh")
    np.testing.assert_allclose(losses(found), on_one_device, **CLOSE)


def test_workers_change_no_loss_and_report_the_norm_of_their_own_gradients(tmp_path, on_one_device):
    found, expected = (
        np.array(x) for x in (losses(train_at(tmp_path, mesh="worker=4,data=2")), on_one_device)
    )
    np.testing.assert_allclose(found[:, [0, 2]], expected[:, [0, 2]], **CLOSE)
    assert (found[1:, 1] > expected[1:, 1]).all()  # the mean of gradients is the shorter


def test_a_device_sends_each_gradient_once_around_the_ring(tmp_path):
    """All-reduce over 8 devices: 7/8 of the bytes out to be summed, and 7/8 back."""
    program = build_program(dataclasses.replace(CONFIG, mesh="data=8"))
    gradients = 4 * program.n_params * 2 * 7 / 8
    assert gradients <= program.traffic.mean <= gradients + 64  # the loss, and whether it is finite
    assert build_program(CONFIG).traffic.mean == 0


def test_bfloat16_trains_almost_alike_and_is_another_run(tmp_path, on_one_device):
    narrow = losses(train_at(tmp_path, dtype="bfloat16"))
    # 8 bits of mantissa, averaged over 192 predictions; measured 2e-3
    np.testing.assert_allclose(narrow, on_one_device, rtol=2e-2)
    assert narrow != on_one_device
    with pytest.raises(UserError, match=r"dtype is .bfloat16. there and .float32. here"):
        train_at(tmp_path)


class Stopping:
    """The training batches, with a SIGTERM before the n-th."""

    def __init__(self, batches, number):
        self.batches, self.number = batches, number
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        self.number -= 1
        if self.number == 0:
            signal.raise_signal(signal.SIGTERM)
        return next(self.batches)


@pytest.fixture
def stopped_run(tmp_path, monkeypatch):
    """Three steps of a run on data=8."""
    with monkeypatch.context() as patch:
        stopping = lambda *args, **kwargs: Stopping(train_batches(*args, **kwargs), 3)
        patch.setattr(loop, "train_batches", stopping)
        result = train_at(tmp_path / "run", mesh="data=8")
    assert (result.stopped, result.step) == ("signal", 3)
    return result.run.path


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"mesh": "data=4"}, marks=pytest.mark.slow),
        {"mesh": "data=2,fsdp=4"},
        {"mesh": "data=8", "shard_state_over": "data", "scan_layers": True},
    ],
)
def test_a_run_goes_on_on_another_mesh(stopped_run, on_one_device, options):
    resumed = train_at(stopped_run, **options)
    assert resumed.stopped == "finished"
    np.testing.assert_allclose(losses(resumed), on_one_device, **CLOSE)
    starts = [json.loads(line) for line in (stopped_run / "starts.jsonl").read_text().splitlines()]
    assert [(s["step"], s["mesh"]) for s in starts] == [(0, "data=8"), (3, options.get("mesh"))]


def test_a_run_goes_on_on_its_own_mesh_bit_for_bit(stopped_run, tmp_path):
    undisturbed = train_at(tmp_path / "undisturbed", mesh="data=8")
    resumed = train_at(stopped_run, mesh="data=8")
    clock = ("seconds", "tokens_per_second")
    plain = lambda run: [{k: v for k, v in r.items() if k not in clock} for r in run.read()]
    assert plain(resumed.run) == plain(undisturbed.run)


def test_no_device_ever_holds_the_whole_state_of_an_fsdp_run():
    program = build_program(dataclasses.replace(CONFIG, mesh="fsdp=8"))
    state = program.initial(0)
    whole = sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim == 2)
    here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state) if x.ndim == 2)
    assert here == whole / 8
    one = build_program(CONFIG).initial(0)
    same = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    jax.tree.map(same, jax.tree.leaves(state.params), jax.tree.leaves(one.params))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": "dta=8"}, r"--mesh dta=8: .*worker, data, fsdp, model, got 'dta'"),
        ({"mesh": "data"}, "--mesh data: axis 'data' needs a positive size"),
        ({"mesh": "data=9"}, "needs 9 devices, and there are 8"),
        ({"mesh": "data=3"}, r"--batch-size: .*multiple of 3 .*got shape \(16, 13\)"),
        ({"mesh": "data=8", "accumulate": 4}, "--batch-size: .*multiple of 32 "),
        ({"mesh": "data=2,model=4"}, "'model' of size 4 must divide n_heads = 2"),
        ({"mesh": "data=2", "shard_state_over": "fsdp"}, "axes 'data', got 'fsdp'"),
        ({"shard_state_over": "data"}, "--shard-state-over must be given with --mesh"),
        ({"offload_state": True}, "--offload-state must be given with --mesh"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train_at(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_workers_that_disagree_are_evaluated_at_their_mean():
    """As after a recipe that communicates by itself, or, here, one that claims to and does not."""
    alone = dataclasses.replace(
        registry()["sgd"],
        factory=lambda learning_rate, *, axis_name, **_: optax.sgd(learning_rate),
        communicates=True,
    )
    config = dataclasses.replace(CONFIG, mesh="worker=2", optimizer="sgd", learning_rate=1.0)
    program = build_program(config, recipe=alone)
    tokens = np.random.default_rng(0).integers(0, 256, (16, 13)).astype(np.int32)
    state, _ = program.step(program.initial(0), tokens)
    params = jax.tree.map(np.asarray, state.params)
    head = params["head"]
    assert head.shape == (2, 16, 256)
    assert (head[0] != head[1]).any()
    mean = jax.tree.map(lambda x: jnp.asarray(x.mean(0)), params)
    expected = float(model.loss_fn(program.graphdef, mean, tokens))
    assert program.evaluate(state, [tokens]) == pytest.approx(expected, rel=1e-6)  # float32
    first = float(model.loss_fn(program.graphdef, jax.tree.map(lambda x: x[0], params), tokens))
    assert abs(first - expected) > 1e-4
    with pytest.raises(UserError, match=r"sgd communicates .*worker=4, got 'data=2'"):
        build_program(dataclasses.replace(config, mesh="data=2"), recipe=alone)
