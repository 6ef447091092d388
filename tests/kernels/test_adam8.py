"""Adam over codes of 8 bits: the kernel is the definition, and this the recursion by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adam8_steps import (
    B1,
    B2,
    EPS,
    HARD,
    assert_directions_agree,
    assert_moments_agree,
    gradients,
    numbers,
)
from jax.experimental.pallas import tpu as pltpu

from jaxopt_suite import kernels
from jaxopt_suite.kernels import adam8_tpu, dynamic8

CASES = [
    ((70, 640), 128, "float32"),  # tiles of rows and of columns, of each the last one not full
    ((40, 200), 128, "float32"),  # a row ends inside a block
    ((3, 20, 256), 256, "bfloat16"),
    ((33, 384), 256, "float32"),
    ((64, 128), 256, "float16"),  # rows shorter than a block
]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(adam8_tpu, "_ENTRIES", 32 * 2 * 128)
    monkeypatch.setattr(adam8_tpu, "_GROUPS", 2)
    monkeypatch.setattr(adam8_tpu, "_ROWS", 32)


@functools.partial(jax.jit, static_argnames=("block", "impl"))
def one_step(g, moments, at, block, impl):
    return kernels.adam8_update(g, moments, at, block=block, impl=impl)


def run(grads, block, impl, moments=None):
    found, moments = [], moments or kernels.adam8_zeros(grads[0].shape, block=block)
    for step, g in enumerate(grads, start=1):
        u, moments = one_step(g, moments, numbers(step), block, impl)
        found.append(np.asarray(u.astype(jnp.float32)))
    return found, moments


def nearest(x, signed):
    book = np.asarray(
        dynamic8.decode(jnp.arange(256, dtype=jnp.uint8), dynamic8.code_book(signed)), np.float64
    )
    return book[np.abs(x[..., None] - book).argmin(axis=-1)]


def kept(x, block, signed):
    """What is left of float64 moments between the steps."""
    new = np.zeros_like(x)
    for start in range(0, x.shape[-1], block):
        part = x[..., start : start + block]
        scale = np.abs(part).max(axis=-1, keepdims=True)
        scale = np.where(scale == 0, 1, scale)
        new[..., start : start + block] = nearest(part / scale, signed) * scale
    return new


def by_hand(grads, block):
    """The recursion in float64: after each step the direction, at the end the moments."""
    m = v = np.zeros(grads[0].shape)
    found = []
    for step, g in enumerate(np.asarray(grads, np.float64), start=1):
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        found.append(m / (1 - B1**step) / (np.sqrt(v / (1 - B2**step)) + EPS))
        m, v = kept(m, block, True), kept(v, block, False)
    return found, (m, v)


@pytest.mark.parametrize(("shape", "block", "dtype"), CASES)
def test_the_kernel_is_the_definition(shape, block, dtype, small_tiles):
    grads = gradients(shape, 3, dtype)
    found, moments = run(grads, block, "interpret")
    expected, defined = run(grads, block, "xla")
    for u, v in zip(found, expected, strict=True):
        assert_directions_agree(u, v, dtype)
    assert_moments_agree(moments, defined)


def test_what_lies_beyond_the_end_of_a_row_is_in_no_scale(monkeypatch):
    """The interpreter's NaN would be left out anyway; on hardware it is what was there before."""
    zeros = lambda impl: impl == "interpret" and pltpu.InterpretParams(uninitialized_memory="zero")
    monkeypatch.setattr(adam8_tpu, "interpreter", zeros)
    g = gradients((32, 200), 1)[0]
    grads = [g, -0.9 * g]  # the first moment is almost 0 again, where code 0 would be -0.99
    step = lambda impl, moments, at: kernels.adam8_update(
        grads[at - 1], moments, numbers(at), block=128, impl=impl
    )[1]
    found = expected = kernels.adam8_zeros((32, 200), block=128)
    for at in (1, 2):
        found, expected = step("interpret", found, at), step("xla", expected, at)
    np.testing.assert_allclose(found.mu_scales, expected.mu_scales, rtol=1e-6)


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_it_is_the_recursion_by_hand(impl):
    grads = gradients((32, 300), 4)
    found, moments = run(grads, 128, impl)
    expected, exact = by_hand(grads, 128)
    for u, v in zip(found, expected, strict=True):
        # float32's rounding, but for the few entries of which a moment was near a tie.
        off = np.abs(u - v) > 1e-5 * (1 + np.abs(v))
        assert off.mean() < 1e-3
    for new, old in zip(kernels.adam8_decode(moments, block=128), exact, strict=True):
        off = np.abs(np.asarray(new) - old) > 1e-5 * np.abs(old)
        assert off.mean() < 2e-3


def test_the_kernel_is_as_accurate_as_the_definition():
    (g,) = grads = gradients((64, 256), 1)
    exact = by_hand(grads, 256)[0][0]
    (by_kernel,), (plain,) = run(grads, 256, "interpret")[0], run(grads, 256, "xla")[0]
    error = lambda u: np.abs(u - exact).max()
    assert error(by_kernel) <= 1.5 * error(plain)  # of roundings in another order
    assert error(by_kernel) < 1e-6
    assert g.shape == by_kernel.shape


def test_with_a_block_an_entry_nothing_is_lost_of_what_is_positive():
    """An entry over itself is 1, which has a code."""
    grads = np.abs(gradients((4, 60), 6))
    found, _ = run(grads, 1, "xla")
    m = v = 0.0
    for step, (u, g) in enumerate(zip(found, grads, strict=True), start=1):
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        expected = m / (1 - B1**step) / (np.sqrt(v / (1 - B2**step)) + EPS)
        np.testing.assert_allclose(u, expected, rtol=1e-5)


def test_the_first_step_is_adams_and_zeros_leave_everything_as_it_was():
    grads = gradients((32, 256), 1)
    zeros = kernels.adam8_zeros((32, 256), block=128)
    expected = grads[0] / (np.abs(grads[0]) + EPS)
    np.testing.assert_allclose(run(grads, 128, "xla")[0][0], expected, rtol=1e-5)
    for impl in ("xla", "interpret"):
        (u,), same = run(jnp.zeros((1, 32, 256)), 128, impl)
        assert not u.any()
        for new, old in zip(same, zeros, strict=True):
            np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("impl", ["xla", "interpret"])
@pytest.mark.parametrize("value", list(HARD))
def test_hard_numbers_leave_the_others_alone_and_nothing_that_is_none(value, impl):
    grads = gradients((32, 256), 3)
    hard = grads.at[1, 3, 7].set(HARD[value]).at[1, 5, 128:].set(HARD[value])
    expected, _ = run(grads, 128, impl)
    found, moments = run(hard, 128, impl)
    assert np.isfinite(found).all()
    assert all(np.isfinite(np.asarray(x)).all() for x in moments)
    same = np.ones((32, 256), bool)
    same[3, :128] = same[5, 128:] = False  # the two blocks it is in
    for u, v in zip(found, expected, strict=True):
        np.testing.assert_array_equal(u[same], v[same])
    if not abs(HARD[value]) < 1e20:
        _, before = run(hard[:2], 128, impl)
        assert before.mu[3, 7] == 127  # zero
        assert before.nu[3, 7] == 0
        assert found[1][3, 7] == 0
        assert not found[1][5, 128:].any()
        assert not before.mu_scales[5, 1]


def test_a_second_moment_that_rounds_to_zero_makes_the_step_as_much_too_long_as_promised():
    """The documented trap: a coordinate 1e-4 of the largest has a square of 1e-8 of it."""
    g = jnp.full((32, 256), 1e-4).at[:, 0].set(1.0)
    found, _ = run(jnp.stack([g] * 100), 128, "xla")
    too_long = np.sqrt((1 - B2**100) / (1 - B2))  # as if there were no past
    # A first moment of 1e-4 of the largest has eight codes in its decade.
    np.testing.assert_allclose(found[-1][:, 1:128], too_long, rtol=0.15)
    np.testing.assert_allclose(found[-1][:, 0], 1.0, rtol=0.02)
    np.testing.assert_allclose(found[-1][:, 128:], 1.0, rtol=0.02)  # a block without the large one


@pytest.mark.parametrize("shape", [(31, 256), (256,), (40, 100), (0, 128), (64, 0)])
def test_leaves_that_the_kernel_does_not_take_are_left_to_the_compiler(shape):
    g, moments = jnp.ones(shape), kernels.adam8_zeros(shape)
    call = lambda impl: jax.jit(lambda g: kernels.adam8_update(g, moments, numbers(1), impl=impl))
    assert call("pallas").lower(g).as_text() == call("xla").lower(g).as_text()
    assert call("pallas")(g)[0].shape == shape


def test_it_can_be_mapped(small_tiles):
    grads = gradients((2, 32, 128), 1)[0]
    moments = kernels.adam8_zeros(grads.shape)

    def step(impl):
        one = lambda g, m: kernels.adam8_update(g, m, numbers(1), impl=impl)
        return jax.tree.leaves(jax.jit(jax.vmap(one))(grads, moments))

    for new, old in zip(step("interpret"), step("xla"), strict=True):
        np.testing.assert_allclose(np.asarray(new, float), np.asarray(old, float), rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"block": 0}, ValueError, "block must be"),
        ({"block": 2.5}, TypeError, "block"),
        ({"block": 100, "impl": "pallas"}, ValueError, "multiple of 128, got block=100"),
        ({"impl": "cuda"}, ValueError, "impl must be one of 'auto'"),
    ],
)
def test_what_there_is_no_kernel_for_is_refused(settings, error, message):
    g = jnp.ones((32, 256))
    with pytest.raises(error, match=message):
        kernels.adam8_update(g, kernels.adam8_zeros(g.shape), numbers(1), **settings)
