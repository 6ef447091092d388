"""The loop against one written out by hand; stopping and going on; what a bad run leaves behind."""

import dataclasses
import math
import pathlib
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import loop, model
from jaxopt_suite.experiments.checkpoints import Checkpoints, DamagedCheckpointWarning
from jaxopt_suite.experiments.config import TrainConfig
from jaxopt_suite.experiments.data import Corpus, train_batches, validation_batches
from jaxopt_suite.experiments.logs import RunFolder
from jaxopt_suite.experiments.loop import train
from jaxopt_suite.experiments.steps import Program, build_program
from jaxopt_suite.optimizers.registry import registry

STEPS = 12
SIZES = {"batch_size": 2, "seq_len": 16}
CONFIG = TrainConfig(
    **SIZES, steps=STEPS, log_every=3, eval_every=5, eval_batches=2, checkpoint_every=4
)
CORPUS = Corpus(
    name="sentences",
    train=np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 40, np.uint8),
    validation=np.frombuffer(b"pack my box with five dozen liquor jugs. " * 8, np.uint8),
)


@pytest.fixture(scope="module", autouse=True)
def presets_of_a_few_thousand_parameters():
    """Models small enough that compiling, most of the time these tests take, is quick."""
    small = {"nano": model.ModelConfig(8, 1, 1, 16), "tiny": model.ModelConfig(16, 1, 1, 16)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "PRESETS", model.PRESETS | small)
        yield


@pytest.fixture(scope="module")
def program():
    """One program for every test whose runs differ from ``CONFIG`` in folder and seed only."""
    return build_program(CONFIG)


@pytest.fixture(scope="module")
def undisturbed(program, tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed"), program)


def run(path, program, **options):
    return train(at(path), corpus=CORPUS, program=program, **options)


def at(path, **changes):
    return dataclasses.replace(CONFIG, out=str(path), **changes)


def losses(result):
    """The records without what depends on the clock."""
    clock = ("seconds", "tokens_per_second")
    return [{k: v for k, v in r.items() if k not in clock} for r in result.run.read()]


class Interrupting:
    """The training batches, with something happening before the n-th of this start."""

    def __init__(self, batches, number, action):
        self.batches, self.number, self.action = batches, number, action
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        self.number -= 1
        if self.number == 0:
            self.action()
        return next(self.batches)


@pytest.fixture
def before_batch(monkeypatch):
    def arrange(number, action):
        interrupt = lambda *args, **kwargs: Interrupting(
            train_batches(*args, **kwargs), number, action
        )
        monkeypatch.setattr(loop, "train_batches", interrupt)

    return arrange


def sigterm():
    signal.raise_signal(signal.SIGTERM)


def test_the_records_are_those_of_a_loop_written_out_by_hand(undisturbed):
    graphdef, params = model.build(model.PRESETS["nano"], seed=0)
    peak, warmup = registry()["adamw"].learning_rate, round(0.1 * STEPS)
    rate = lambda t: (
        peak * (t + 1) / (warmup + 1)
        if t < warmup
        else peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (t - warmup) / (STEPS - warmup))))
    )
    batches = train_batches(CORPUS, **SIZES, seed=0)

    @jax.jit
    def advance(params, state, tokens, rate):
        loss, grads = jax.value_and_grad(lambda p: model.loss_fn(graphdef, p, tokens))(params)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        clipped = jax.tree.map(lambda g: g * jnp.minimum(1.0, 1.0 / norm), grads)
        updates, state = registry()["adamw"].make(rate).update(clipped, state, params)
        return jax.tree.map(jnp.add, params, updates), state, loss, norm

    state, by_hand = registry()["adamw"].make(1.0).init(params), {}
    for step in range(1, STEPS + 1):
        params, state, loss, norm = advance(params, state, next(batches), rate(step - 1))
        by_hand[step] = (float(loss), float(norm), rate(step - 1))
    records = [record for record in undisturbed.run.read() if record["step"] > 0]
    assert [record["step"] for record in records] == [3, 5, 6, 9, 10, 12]
    seen = [(record["loss"], record["grad_norm"], record["lr"]) for record in records]
    # float32, other fusions; a rounding in one step is amplified by the eleven after it
    np.testing.assert_allclose(seen, [by_hand[r["step"]] for r in records], rtol=1e-3)
    held_out = validation_batches(CORPUS, **SIZES, batches=2)
    validation = np.mean([model.loss_fn(graphdef, params, x) for x in held_out])
    assert undisturbed.val_loss == pytest.approx(validation, rel=1e-3)  # as above


def test_the_result_says_what_the_records_say(undisturbed):
    records = undisturbed.run.read()
    assert undisturbed.stopped == "finished"
    assert undisturbed.step == STEPS
    assert undisturbed.train_loss == records[-1]["loss"]
    assert undisturbed.val_loss == records[-1]["val_loss"]
    assert [r["step"] for r in records if "val_loss" in r] == [0, 5, 10, 12]
    assert records[0]["val_loss"] == pytest.approx(math.log(256), abs=0.2)  # knows nothing yet
    assert undisturbed.val_loss < records[0]["val_loss"]
    assert all(r["tokens"] == r["step"] * 2 * 16 for r in records)
    assert undisturbed.learning_rate == registry()["adamw"].learning_rate
    assert undisturbed.n_params == model.n_params(model.PRESETS["nano"])
    assert undisturbed.state_bytes == 8 * undisturbed.n_params + 2 * 4  # two moments, two counts
    assert undisturbed.unigram_entropy == CORPUS.unigram_entropy()


def test_the_clock_runs_for_steps_only(tmp_path, program, monkeypatch):
    now = [0.0]

    class Ticking(Interrupting):
        def __next__(self):
            now[0] += 1.0
            return next(self.batches)

    def slowly(self, state, batches, evaluate=Program.evaluate):
        now[0] += 1000.0
        return evaluate(self, state, batches)

    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    wrapped = lambda *args, **kwargs: Ticking(train_batches(*args, **kwargs), 0, None)
    monkeypatch.setattr(loop, "train_batches", wrapped)
    monkeypatch.setattr(Program, "evaluate", slowly)
    result = run(tmp_path, program)
    assert result.seconds == STEPS
    assert result.ms_per_step == 1000.0
    assert result.tokens_per_second == 2 * 16


@pytest.mark.parametrize("stop_at", [1, 4, 7])  # nothing saved yet; a checkpoint's step; between
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, program, undisturbed, before_batch, stop_at):
    before_batch(stop_at, sigterm)
    stopped = run(tmp_path, program)
    assert (stopped.stopped, stopped.signum, stopped.step) == ("signal", signal.SIGTERM, stop_at)
    assert f"SIGTERM after step {stop_at} of {STEPS}" in stopped.message
    with Checkpoints(stopped.run.checkpoints_path) as checkpoints:
        restored = checkpoints.restore(program.abstract_state)
    assert restored.step == stop_at
    counts = optax.tree_utils.tree_get_all_with_path(restored.state.opt_state, "count")
    assert [int(count) for _, count in counts] == [stop_at, stop_at]  # Adam's and the schedule's
    before_batch(0, None)
    resumed = run(tmp_path, program)
    assert resumed.stopped == "finished"
    assert losses(resumed) == losses(undisturbed)


def test_a_run_stopped_before_its_first_step_starts_as_if_it_never_was(
    tmp_path, program, undisturbed, monkeypatch
):
    def stop_during_evaluation(self, state, batches, evaluate=Program.evaluate):
        sigterm()
        return evaluate(self, state, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Program, "evaluate", stop_during_evaluation)
        stopped = run(tmp_path, program)
    assert (stopped.stopped, stopped.step) == ("signal", 0)
    assert math.isnan(stopped.train_loss)
    assert losses(run(tmp_path, program)) == losses(undisturbed)


def test_a_finished_run_is_not_trained_again(tmp_path, program, before_batch):
    first = run(tmp_path, program)
    before_batch(1, lambda: pytest.fail("a finished run asked for data"))
    again = run(tmp_path, program)
    assert "finished before" in again.message
    plain = lambda result: dataclasses.replace(result, message="", run=None)
    assert plain(again) == plain(first)


def test_a_crash_between_checkpoints_loses_only_the_steps_since(
    tmp_path, program, undisturbed, before_batch
):
    before_batch(7, lambda: (_ for _ in ()).throw(RuntimeError("crash")))
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path, program)
    assert RunFolder(tmp_path).read()[-1]["step"] == 6  # past the checkpoint of step 4
    before_batch(0, None)
    assert losses(run(tmp_path, program)) == losses(undisturbed)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, program, undisturbed, before_batch):
    before_batch(10, sigterm)
    stopped = run(tmp_path, program)
    newest = stopped.run.checkpoints_path / "10"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    before_batch(0, None)
    with pytest.warns(DamagedCheckpointWarning, match=str(newest)):
        assert losses(run(tmp_path, program)) == losses(undisturbed)


@pytest.fixture(scope="module")
def poisoned():
    """Plain SGD whose sixth update is not a number."""

    def update(updates, count, params=None):
        factor = jnp.where(count == 5, jnp.nan, -0.1)
        return jax.tree.map(lambda g: factor * g, updates), count + 1

    tx = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
    return build_program(CONFIG, tx=tx)


@pytest.mark.parametrize(("log_every", "checkpoint_every"), [(3, 4), (5, 5), (4, 3), (6, 6)])
def test_a_step_that_is_not_finite_ends_the_run_and_is_never_saved(
    tmp_path, poisoned, log_every, checkpoint_every
):
    config = at(tmp_path, log_every=log_every, checkpoint_every=checkpoint_every)
    result = train(config, corpus=CORPUS, program=poisoned)
    assert (result.stopped, result.step) == ("nonfinite", 6)
    assert math.isfinite(result.train_loss)  # the loss came before the update
    assert "not finite at step 6: loss " in result.message
    assert "update norm nan" in result.message
    assert RunFolder(tmp_path).read()[-1]["step"] == 6
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        saved = checkpoints.steps()
    assert saved == [step for step in (checkpoint_every,) if step < 6]
    kept = f"the checkpoint of step {saved[-1]} holds" if saved else "no checkpoint came before"
    assert kept in result.message


def test_a_loss_that_is_not_finite_is_recorded_as_such(tmp_path):
    explode = optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None: (jax.tree.map(lambda g: 1e15 * g, updates), state),
    )
    exploding = build_program(CONFIG, tx=explode)
    result = run(tmp_path, exploding)
    assert result.stopped == "nonfinite"
    assert math.isnan(result.train_loss)
    assert RunFolder(tmp_path).read()[-1]["loss"] is None
    assert losses(run(tmp_path, exploding)) == losses(result)


def test_a_state_that_starts_as_the_parameters_can_be_donated(tmp_path):
    keep = optax.GradientTransformation(lambda params: params, lambda u, s, params=None: (u, s))
    tx = optax.chain(optax.sgd(0.1), keep)
    assert train(at(tmp_path), corpus=CORPUS, tx=tx).stopped == "finished"


def test_a_step_consumes_the_state_it_is_given(program):
    state = program.initial(0)
    tokens = np.zeros((2, 17), np.int32)
    after, metrics = program.step(state, tokens)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert metrics.finite
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, program.abstract_state)


def test_evaluation_happens_where_the_recipe_says(tmp_path):
    at_zero = lambda opt_state, params: jax.tree.map(jnp.zeros_like, params)
    recipe = dataclasses.replace(registry()["adamw"], eval_params=at_zero)
    result = train(at(tmp_path, steps=2), corpus=CORPUS, recipe=recipe)
    assert result.val_loss == pytest.approx(math.log(256))  # all logits zero: every byte as likely


def test_eval_params_get_the_optimizer_s_state_without_the_clipping_s(tmp_path):
    result = train(at(tmp_path, steps=2, optimizer="schedule_free"), corpus=CORPUS)
    assert math.isfinite(result.val_loss)


def test_without_clipping_the_optimizer_sees_the_gradient_itself(tmp_path):
    tx = optax.sgd(1.0)
    tiny_clip = train(at(tmp_path / "a", clip=1e-9, steps=3), corpus=CORPUS, tx=tx)
    unclipped = train(at(tmp_path / "b", clip=None, steps=3), corpus=CORPUS, tx=tx)
    start = tiny_clip.run.read()[0]["val_loss"]
    assert tiny_clip.val_loss == pytest.approx(start, abs=1e-6)  # steps of length 1e-9
    assert unclipped.val_loss < start - 0.01


def test_seeds_share_a_program_and_differ_in_data_and_parameters(tmp_path, program, undisturbed):
    other = train(at(tmp_path, seed=1), corpus=CORPUS, program=program)
    assert other.run.read()[0]["val_loss"] != undisturbed.run.read()[0]["val_loss"]


def test_contradicting_arguments_are_refused(tmp_path, program):
    with pytest.raises(ValueError, match="something else than this config"):
        train(at(tmp_path, clip=2.0), corpus=CORPUS, program=program)
    with pytest.raises(ValueError, match="something else than this config"):
        train(at(tmp_path), corpus=CORPUS, program=program, tx=optax.sgd(0.1))
    with pytest.raises(ValueError, match="tx is complete"):
        train(at(tmp_path, learning_rate=0.1), corpus=CORPUS, tx=optax.sgd(0.1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, "--optimizer must be one of grams,.*got 'adam'"),
        ({"preset": "huge"}, "--preset must be one of nano, tiny,.*got 'huge'"),
        ({"set": ("beta=0.9",)}, "no hyperparameter 'beta'; it has: .*b2"),
        ({"set": ("b2=high",)}, "adamw does not take --set b2=high"),
        ({"optimizer": "grams", "set": ("b2=1.5",)}, r"b2 must be in \[0, 1\), got 1.5"),
        ({"seq_len": 10_000}, "part of sentences has"),
        ({"data": "/no/such/file"}, "cannot read the data /no/such/file"),
        ({"out": "/dev/null/run"}, "cannot use /dev/null/run as a run folder"),
    ],
)
def test_what_the_user_can_put_right_is_said_before_anything_is_written(tmp_path, changes, message):
    config = at(tmp_path / "run")
    corpus = None if "data" in changes else CORPUS
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(config, **changes), corpus=corpus)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [{"preset": "tiny"}, {"optimizer": "grams"}, {"steps": 13}, {"seed": 1}, {"set": ("b2=0.9",)}],
)
def test_a_folder_goes_on_only_with_the_run_it_holds(undisturbed, changes):
    (name,) = changes
    with pytest.raises(UserError, match=f"holds another run: .*{name} is .* there and .* here"):
        train(at(undisturbed.run.path, **changes), corpus=CORPUS)


def test_other_data_is_another_run(undisturbed, program):
    reversed_text = dataclasses.replace(CORPUS, train=CORPUS.train[::-1])
    with pytest.raises(UserError, match="data_fingerprint is"):
        train(at(undisturbed.run.path), corpus=reversed_text, program=program)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: [lines[0], lines[1][:9], *lines[2:]], "line 2 of .*metrics.jsonl"),
        (lambda lines: [*lines[:2], *lines[3:]], "the record of step 5 is missing"),
        (lambda lines: lines[:2], "the record of step 5 is missing"),
        (lambda lines: [*lines[:2], *lines[1:]], "a record is there twice"),
    ],
)
def test_records_that_were_tampered_with_are_refused_and_left(
    tmp_path, program, before_batch, spoil, message
):
    before_batch(8, sigterm)
    metrics = pathlib.Path(run(tmp_path, program).run.metrics_path)
    metrics.write_text("".join(line + "\n" for line in spoil(metrics.read_text().splitlines())))
    before_batch(0, None)
    with pytest.raises(UserError, match=message):
        run(tmp_path, program)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [4, 8]
