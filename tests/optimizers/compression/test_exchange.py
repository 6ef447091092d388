"""Facts about exchanges: bytes, what two phases do, which one is chosen, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fleets import WORKERS

from jaxopt_suite import parallel
from jaxopt_suite.optimizers.compression import compressors
from jaxopt_suite.optimizers.compression.exchange import (
    check_exchange,
    choose,
    exchange_messages,
    sent_bytes,
)
from jaxopt_suite.optimizers.compression.pieces import from_bytes, piece_length, to_bytes


def exchanged(compressor, messages, way, *, mesh=None):
    """Mean and what was sent, ``[workers, ...]``, for one message of each worker."""

    def worker(x):
        keys = [jax.random.fold_in(jax.random.key(0), jax.lax.axis_index("worker"))]
        return exchange_messages(compressor, [x], keys, [way], "worker")

    run = jax.jit(parallel.run_workers(worker, axis_name="worker", mesh=mesh))
    done = run(messages)
    return np.asarray(done.mean[0]), np.asarray(done.sent[0])


def messages(*shape, workers=WORKERS):
    return np.random.default_rng(0).normal(size=(workers, *shape)).astype(np.float32)


def test_bytes_of_any_payload_come_back_as_they_were():
    payload = {
        "codes": jnp.arange(-3, 4, dtype=jnp.int8),
        "scale": jnp.asarray([1.5, -jnp.inf, 3e-45], jnp.float32),
        "index": jnp.arange(6, dtype=jnp.uint16).reshape(2, 3),
        "half": jnp.ones(3, jnp.bfloat16),
        "scalar": jnp.uint32(7),
        "empty": jnp.zeros((0, 4)),
    }
    buffer = to_bytes(payload)
    assert buffer.dtype == jnp.uint8
    assert buffer.shape == (128,)  # 7 + 12 + 12 + 6 + 4, and padding
    assert to_bytes(jnp.zeros(33)).shape == (256,)
    back = from_bytes(buffer, payload)
    for name, x in payload.items():
        assert back[name].dtype == x.dtype
        np.testing.assert_array_equal(back[name], x)


@pytest.mark.parametrize("way", ["dense", "mean", "gather", "two_phase"])
def test_nothing_is_lost_where_nothing_is_compressed(way):
    for shape in ((), (5, 7)):
        x = messages(*shape)
        mean, sent = exchanged(compressors.identity(), x, way)
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-6, atol=1e-6)  # order of eight sums
        np.testing.assert_allclose(sent, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("compressor", "workers"),
    [(compressors.sign(), 1), (compressors.sign(), 3), (compressors.int4(8), 8)],
)
def test_in_two_phases_the_result_is_the_mean_of_what_was_sent_also_with_padding(
    compressor, workers
):
    x = messages(7, 19, workers=workers)
    mean, sent = exchanged(compressor, x, "two_phase")
    np.testing.assert_allclose(sent.mean(0), mean, rtol=1e-5, atol=1e-5)  # n (z - y) cancels
    assert np.abs(mean - x.mean(0)).max() > 0.01


def test_the_owner_of_a_piece_bears_the_error_of_the_second_encoding():
    workers, length = 4, 16
    x = messages(workers * length, workers=workers)
    scale = lambda v: np.abs(v).mean()
    code = lambda v: scale(v) * np.where(v >= 0, 1, -1)
    mean, sent = exchanged(compressors.sign(), x, "two_phase")
    pieces = x.reshape(workers, workers, length)  # [worker, piece]
    for owner in range(workers):
        here = slice(owner * length, (owner + 1) * length)
        seen = [pieces[w, owner] if w == owner else code(pieces[w, owner]) for w in range(workers)]
        z = np.mean(seen, axis=0)
        np.testing.assert_allclose(mean[here], code(z), rtol=1e-5)  # float32 sums
        for w in range(workers):
            own = x[w, here] - workers * (z - code(z))
            expected = own if w == owner else code(pieces[w, owner])
            np.testing.assert_allclose(sent[w, here], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_mesh_gives_what_a_simulated_fleet_gives():
    x = messages(7, 19)
    mesh = parallel.make_mesh({"worker": WORKERS})
    for way in ("gather", "two_phase"):
        ours = exchanged(compressors.int8(8), x, way, mesh=mesh)
        for a, b in zip(ours, exchanged(compressors.int8(8), x, way), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)  # fused differently


def test_bytes_have_the_closed_forms():
    sign, top, n = compressors.sign(), compressors.top_k(8), 8
    assert sent_bytes(sign, (64, 64), n, "dense") == 2 * 7 / 8 * 4 * 4096
    assert sent_bytes(sign, (64, 64), n, "gather") == 7 * (512 + 4)
    assert sent_bytes(sign, (64, 64), n, "two_phase") == 2 * 7 * (64 + 4)
    assert sent_bytes(top, (64, 64), n, "gather") == 7 * top.nbytes((64, 64))
    assert sent_bytes(compressors.low_rank(2), (64, 64), n, "auto") == 2 * 7 / 8 * 4 * 2 * 128
    assert sent_bytes(compressors.random_k(16), (64, 64), n, "mean") == 2 * 7 / 8 * 64
    assert piece_length(100, 8, 8) == 16
    assert piece_length(0, 8, 8) == 0


@pytest.mark.parametrize(
    ("compressor", "shape", "workers", "way"),
    [
        (compressors.sign(), (64, 64), 8, "two_phase"),
        (compressors.sign(), (64, 64), 2, "gather"),  # as many bytes, one encoding less
        (compressors.sign(), (64, 64), 1, "gather"),
        (compressors.top_k(fraction=0.01), (64, 64), 8, "gather"),
        (compressors.top_k(fraction=0.01), (64, 64), 256, "dense"),  # 255 payloads are more
        (compressors.random_k(fraction=0.5), (64, 64), 8, "mean"),
        (compressors.int8(256), (32, 32), 64, "dense"),  # a piece would be mostly padding
    ],
)
def test_auto_takes_what_sends_least(compressor, shape, workers, way):
    assert choose(compressor, shape, workers, "auto") == way
    chosen = sent_bytes(compressor, shape, workers, "auto")
    assert chosen == sent_bytes(compressor, shape, workers, way)
    assert chosen <= sent_bytes(compressor, shape, workers, "gather")


@pytest.mark.parametrize(
    ("compressor", "exchange", "message"),
    [
        (compressors.sign(), "mean", "exchange='mean' .* not linear: sign takes one of 'auto', 'g"),
        (compressors.top_k(3), "two_phase", "'two_phase' cuts .*: top_k takes one of 'auto', 'g"),
        (compressors.sign(), "ring", "exchange must be one of .* got 'ring'"),
    ],
)
def test_an_exchange_that_a_compressor_cannot_do_is_refused(compressor, exchange, message):
    with pytest.raises(ValueError, match=message):
        check_exchange(compressor, exchange)
