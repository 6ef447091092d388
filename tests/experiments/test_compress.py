"""``--compress``: any compressor under any optimizer of one's own gradients."""

import numpy as np
import pytest

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments.compress import COMPRESSORS, FEEDBACKS, parse_call
from jaxopt_suite.experiments.config import CompareConfig, TrainConfig
from jaxopt_suite.experiments.entries import entries
from jaxopt_suite.experiments.steps import build_program

COMMON = {"optimizer": "adamw", "batch_size": 8, "seq_len": 16, "mesh": "worker=4", "clip": None}


def losses(steps=4, **options):
    program = build_program(TrainConfig(**{**COMMON, **options}))
    state, seen = program.initial(0), []
    rng = np.random.default_rng(0)
    for _ in range(steps):
        tokens = rng.integers(0, 256, (8, 17), dtype=np.int32)
        state, metrics = program.step(state, tokens)
        seen.append(float(metrics.loss))
    return program, np.array(seen)


@pytest.fixture(scope="module")
def whole():
    return losses()


def test_identity_changes_no_loss_and_keeps_no_memory(whole):
    program, seen = losses(compress="identity()")
    np.testing.assert_allclose(seen, whole[1], rtol=1e-6)
    assert 0 <= program.state_bytes - whole[0].state_bytes <= 8  # a counter


def test_each_worker_clips_its_own_gradient_before_it_is_compressed():
    # Large enough to be active for SGD, which unlike Adam heeds the size of a gradient.
    rate = {"optimizer": "sgd", "learning_rate": 0.5, "clip": 0.05}
    _, before = losses(compress="identity()", **rate)
    _, after = losses(**rate)
    assert 1e-5 < np.max(np.abs(before - after)) < 0.1  # the mean of clipped ones is another


def test_a_compressor_sends_less_trains_otherwise_and_its_memory_is_counted(whole):
    program, seen = losses(compress="sign(block=256)")
    assert program.traffic.mean < 0.1 * whole[0].traffic.mean
    np.testing.assert_allclose(seen[0], whole[1][0], rtol=1e-6)  # before the first update
    assert np.max(np.abs(seen[1:] - whole[1][1:])) > 1e-3
    residuals = 4 * 4 * program.n_params  # float32, of four workers
    assert 0.9 * residuals < program.state_bytes - whole[0].state_bytes < residuals + 8


def test_feedback_and_exchange_are_heeded(whole):
    without, _ = losses(compress="int8()", feedback="none", exchange="gather", steps=1)
    assert without.state_bytes - whole[0].state_bytes <= 8
    gathered = 3 / (2 * 3 / 4 * 4)  # of the bytes of an all-reduce in float32
    assert gathered < without.traffic.mean / whole[0].traffic.mean < 1.1 * gathered


def test_calls_are_made_of_names_literals_and_other_calls():
    assert (
        parse_call("feedback", "momentum(0.1, then=ef())", FEEDBACKS).name == "momentum(0.1, ef())"
    )
    assert parse_call("compress", " sign ", COMPRESSORS).name == "sign"
    assert parse_call("compress", "top_k(9, chunk=256)", COMPRESSORS).block == 256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topk(9)", r"--compress must be a call of one of: .*top_k\(k, fraction.*got 'topk\(9\)'"),
        ("top_k(9", "a call of one of"),
        ("9", "a call of one of"),
        ("", "a call of one of"),
        ("sign() + 1", "a call of one of"),
        ("__import__('os').getcwd()", "a call of one of"),
        ("top_k(0)", r"a call with legal arguments \(k must be .*got 0"),
        ("top_k(kk=1)", "legal arguments .*unexpected keyword"),
        ("top_k(k=open('x'))", "a call of one of"),
        ("int8(width=1)", "legal arguments"),
    ],
)
def test_another_text_is_refused_with_what_would_be_legal(text, message):
    with pytest.raises(UserError, match=message):
        parse_call("compress", text, COMPRESSORS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": None}, r"--compress must be given with --mesh worker=4"),
        ({"mesh": "data=4"}, r"--compress must be given with --mesh worker=4"),
        ({"optimizer": "demo"}, "given without demo"),
        ({"exchange": "mean"}, "one that the compressor can do .*not linear"),
        ({"feedback": "econtrol(2)"}, r"--feedback must be .*eta must be"),
        ({"feedback": ""}, r"--feedback must be a call of one of: none\(\), ef\(\)"),
        ({"compress": None, "feedback": "ef()"}, "--compress must be given with --feedback"),
        ({"compress": None, "exchange": "gather"}, "--compress must be given with --feedback"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build_program(TrainConfig(**{**COMMON, "compress": "sign()", **options}))


def test_a_comparison_is_refused_before_its_first_run():
    with pytest.raises(UserError, match="given without demo"):
        entries(CompareConfig(optimizers="adamw,demo", mesh="worker=4", compress="sign()"))
