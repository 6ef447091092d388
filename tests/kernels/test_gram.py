"""Gram matrices by one triangle: as accurate as the definition, whatever tiles make of a shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxopt_suite import kernels, parallel
from jaxopt_suite.kernels import triangles_tpu
from jaxopt_suite.optimizers.shampoo import shampoo, soap

B, W = 0.9, 0.1
kernel = functools.partial(kernels.gram_update, impl="interpret")
definition = functools.partial(kernels.gram_update, impl="xla")


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles of a small matrix; the interpreter does not ask for multiples of 128."""
    monkeypatch.setattr(triangles_tpu, "_TILES", {"float32": 8, "bfloat16": 8})
    monkeypatch.setattr(triangles_tpu, "_DEPTH", 16)


def given(shape, mode, dtype=np.float32, seed=0, scale=1.0):
    """A symmetric statistic for a mode of blocks of this shape, and the blocks."""
    rng = np.random.default_rng(seed)
    d = shape[mode + 1]
    half = rng.normal(size=(shape[0], d, d))
    statistics = jnp.asarray(half + np.swapaxes(half, 1, 2), jnp.float32)
    return statistics, jnp.asarray(scale * rng.normal(size=shape), dtype)


def in_float64(statistics, blocks, mode, decay=B, weight=W):
    decay, weight = (np.float64(np.float32(x)) for x in (decay, weight))
    unfolded = np.moveaxis(np.asarray(blocks, np.float64), mode + 1, 1)
    unfolded = unfolded.reshape(len(blocks), blocks.shape[mode + 1], -1)
    products = np.einsum("kan,kbn->kab", unfolded, unfolded)
    return decay * np.asarray(statistics, np.float64) + weight * products


def assert_as_accurate(found, plain, exact):
    """Against float64: no worse than the plain path, but for the order of sums of other shapes."""
    error = lambda x: np.max(np.abs(np.asarray(x, np.float64) - exact))
    rounding = 2.0**-23 * np.max(np.abs(exact))
    assert error(found) <= 2 * error(plain) + rounding


@pytest.mark.parametrize(
    ("shape", "mode"),
    [
        ((2, 530, 70), 0),  # whole tiles of either dtype, and a rest
        ((1, 19, 1100), 0),  # two steps, the second one short
        ((1, 1100, 19), 1),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_as_accurate_as_the_definition_at_the_tiles_of_hardware(shape, mode, dtype):
    statistics, blocks = given(shape, mode, dtype)
    found, plain = (f(statistics, blocks, B, W, mode=mode) for f in (kernel, definition))
    assert found.dtype == plain.dtype == jnp.float32
    assert_as_accurate(found, plain, in_float64(statistics, blocks, mode))


@pytest.mark.parametrize(
    ("shape", "mode"),
    [
        ((2, 16, 32), 0),
        ((3, 17, 33), 0),
        ((3, 33, 17), 1),
        ((2, 5, 9, 6), 1),
        ((2, 5, 9, 6), 2),
        ((4, 11), 0),
        ((1, 1, 1), 0),
    ],
)
def test_every_tile_of_every_mode_is_where_it_belongs(shape, mode, small_tiles):
    statistics, blocks = given(shape, mode)
    found, plain = (f(statistics, blocks, B, W, mode=mode) for f in (kernel, definition))
    assert_as_accurate(found, plain, in_float64(statistics, blocks, mode))


def test_a_statistic_may_be_kept_in_bfloat16(small_tiles):
    statistics, blocks = given((2, 20, 40), 0)
    narrow = statistics.astype(jnp.bfloat16)
    found, plain = (f(narrow, blocks, B, W) for f in (kernel, definition))
    assert found.dtype == jnp.bfloat16
    exact = in_float64(narrow, blocks, 0)
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8)  # one rounding
    np.testing.assert_allclose(found.astype(np.float32), plain.astype(np.float32), rtol=2**-7)


def test_the_result_is_symmetric_to_the_last_bit_and_what_lies_above_is_not_read(small_tiles):
    statistics, blocks = given((2, 21, 21), 1)
    above = np.triu(np.ones((21, 21), bool), 1)
    spoiled = jnp.where(above, jnp.nan, statistics)
    found = kernel(spoiled, blocks, B, W, mode=1)
    np.testing.assert_array_equal(found, jnp.swapaxes(found, 1, 2))
    np.testing.assert_array_equal(found, kernel(statistics, blocks, B, W, mode=1))


@pytest.mark.parametrize("impl", ["interpret", "xla"])
def test_a_decay_of_one_and_a_weight_of_nothing_leave_the_statistic(impl, small_tiles):
    statistics, blocks = given((2, 20, 40), 0)
    found = kernels.gram_update(statistics, blocks, jnp.float32(1), jnp.float32(0), impl=impl)
    np.testing.assert_array_equal(found, statistics)


@pytest.mark.parametrize("scale", [0.0, 1e-22, 1e25])
def test_zeros_denormal_and_huge_products_are_what_the_definition_makes_of_them(scale, small_tiles):
    statistics, blocks = given((2, 12, 20), 0, scale=scale)
    zeros = jnp.zeros_like(statistics)
    found, plain = (np.asarray(f(zeros, blocks, B, W)) for f in (kernel, definition))
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(plain))
    finite = np.isfinite(plain)
    # 1e-22 squared has a bit or two left in float32, and may be flushed.
    np.testing.assert_allclose(found[finite], plain[finite], rtol=1e-5, atol=1.2e-38)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_what_is_not_finite_spoils_its_row_and_column_and_no_other_block(bad, small_tiles):
    statistics, blocks = given((3, 12, 20), 0)
    found = np.asarray(kernel(statistics, blocks.at[1, 9, 18].set(bad), B, W))
    spoiled = np.zeros((3, 12, 12), bool)
    spoiled[1, 9, :] = spoiled[1, :, 9] = True
    np.testing.assert_array_equal(~np.isfinite(found), spoiled)


def test_inside_shard_map_every_device_has_its_own_blocks():
    mesh = parallel.make_mesh({"data": 2}, devices=jax.devices()[:2])
    statistics, blocks = given((4, 20, 40), 0)
    decay = jnp.float32(B)  # equal on all devices, where the blocks differ
    update = lambda s, g, b: kernel(s, g, b, 1 - b)
    specs = (P("data"), P("data"), P())
    spread = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=specs, out_specs=P("data")))
    expected = kernel(statistics, blocks, decay, 1 - decay)
    np.testing.assert_array_equal(spread(statistics, blocks, decay), expected)


def test_on_a_cpu_auto_is_the_definition():
    statistics, blocks = given((2, 20, 40), 0)
    texts = [
        jax.jit(functools.partial(kernels.gram_update, impl=impl))
        .lower(statistics, blocks, B, W)
        .as_text()
        for impl in ("auto", "xla")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"impl": "triton"}, ValueError, "impl must be one of 'auto', 'xla', 'pallas'"),
        ({"mode": 2}, ValueError, r"p above mode=2, got \(2, 3, 4\)"),
        ({"mode": -1}, ValueError, "mode must be an int of at least 0, got -1"),
        ({"mode": 1}, ValueError, r"\(2, 4, 4\) for mode 1 of blocks \(2, 3, 4\), got \(2, 3, 3\)"),
        ({"blocks": jnp.ones((2, 3, 0))}, ValueError, r"with entries, got \(2, 3, 0\)"),
        ({"blocks": jnp.ones((2, 3, 4), jnp.float16)}, TypeError, "blocks of float32 or bfloat16"),
        ({"statistics": jnp.ones((2, 3, 3), int)}, TypeError, "statistics of float32 or bfloat16"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    call = {"statistics": jnp.zeros((2, 3, 3)), "blocks": jnp.ones((2, 3, 4))} | change
    with pytest.raises(error, match=message):
        kernel(**{"decay": B, "weight": W} | call)


@pytest.mark.parametrize("make", [shampoo, soap])
def test_an_optimizer_with_the_kernel_takes_the_steps_of_the_one_without(make):
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros((12, 8))}
    draw = lambda: jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
    gradients = [draw() for _ in range(3)]

    def last_state(impl):
        tx = make(0.1, refresh_every=2, gram_impl=impl)
        state = tx.init(params)
        for g in gradients:
            _, state = jax.jit(tx.update)(g, state, params)
        return state

    plain, by_kernel = (jax.tree.leaves(last_state(impl)) for impl in ("auto", "interpret"))
    # Statistics of three gradients in float32, and roots of these: rounding times their condition.
    for a, b in zip(plain, by_kernel, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("make", [shampoo, soap])
def test_an_optimizer_refuses_an_implementation_that_there_is_not(make):
    with pytest.raises(ValueError, match="gram_impl must be one of"):
        make(0.1, gram_impl="triton")
