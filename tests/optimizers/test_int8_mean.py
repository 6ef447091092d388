"""INTELLECT-1's quantiser by hand and in means, and AdamW on 8-bit means."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fleets import normal, relative_difference, run_fleet

from jaxopt_suite.optimizers import adamw_int8, compressed_mean, feedback, intellect_int8

KEY = jax.random.key(0)


def decoded(x, **settings):
    compressor = intellect_int8(**settings)
    payload = jax.jit(compressor.encode)(jnp.asarray(x, jnp.float32), KEY)
    sizes = sum(leaf.nbytes for leaf in jax.tree.leaves(payload))
    assert sizes == compressor.nbytes(np.shape(x)) == np.size(x) + 1024
    return np.asarray(compressor.decode(payload, jax.ShapeDtypeStruct(np.shape(x), jnp.float32)))


def by_hand(x, width=6.0):
    """Codes and decoded numbers in float64, bin by bin."""
    flat = np.asarray(x, np.float64).ravel()
    step = width * np.sqrt(np.sum(flat**2) / (flat.size - 1)) / 256
    scaled = flat / step
    codes = np.clip(np.sign(scaled) * np.floor(np.abs(scaled) + 0.5) + 128, 0, 255).astype(int)
    means = np.array([flat[codes == b].mean() if (codes == b).any() else 0.0 for b in range(256)])
    return codes, means[codes].reshape(np.shape(x))


@pytest.mark.parametrize("width", [6.0, 12.0, 1.0])
def test_bins_and_their_means_are_those_written_down_in_numpy(width):
    x = np.random.default_rng(0).standard_t(3, size=(37, 41)).astype(np.float32)
    codes, expected = by_hand(x, width)
    payload = intellect_int8(width).encode(jnp.asarray(x), KEY)
    np.testing.assert_array_equal(payload.codes, codes)  # no entry is a tie
    # Float32 sums of up to 1500 numbers of one sign.
    np.testing.assert_allclose(decoded(x, width=width), expected, rtol=1e-5, atol=1e-6)


def test_halves_are_rounded_away_from_zero():
    # 256 / 6 * |x| / sigma is a half: four entries of magnitude c have sigma = c * sqrt(4/3).
    x = np.array([1.0, -1.0, 1.0, -1.0])
    width = 256 / (0.5 * np.sqrt(4 / 3))
    codes = np.asarray(intellect_int8(width).encode(jnp.asarray(x, jnp.float32), KEY).codes)
    inside = np.asarray(
        intellect_int8(width * 1.001).encode(jnp.asarray(x, jnp.float32), KEY).codes
    )
    outside = np.asarray(
        intellect_int8(width * 0.999).encode(jnp.asarray(x, jnp.float32), KEY).codes
    )
    np.testing.assert_array_equal(inside, 128)
    np.testing.assert_array_equal(outside, [129, 127, 129, 127])
    assert (codes == outside).all() or (codes == inside).all()  # the tie itself is rounding's


def test_the_sum_of_a_tensor_is_kept_whatever_its_tails():
    x = np.random.default_rng(1).standard_cauchy(size=5000).astype(np.float32)
    assert decoded(x).sum() == pytest.approx(x.sum(), rel=1e-4)  # float32 sums


@pytest.mark.parametrize(
    ("draw", "width", "expected"),
    [
        ("normal", 6.0, 2.6e-4),
        ("normal", 12.0, 1.8e-4),
        ("laplace", 6.0, 7.2e-3),
        ("laplace", 12.0, 2.9e-4),
    ],
)
def test_relative_squared_errors_are_the_known_ones(draw, width, expected):
    x = getattr(np.random.default_rng(2), draw)(size=2**20).astype(np.float32)
    error = np.sum((x - decoded(x, width=width)) ** 2) / np.sum(x**2)
    # Bins of width c/256 have c²/256²/12; beyond c/2 a Laplace tail of mass exp(-c/√2) has half
    # of a variance, and a hundred entries of it in the last case.
    assert error == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_zeros_and_extreme_sizes_pass(scale):
    x = scale * np.random.default_rng(3).normal(size=300)
    error = np.abs(decoded(x) - x.astype(np.float32)).max()
    assert error <= 0.5 * scale  # the tails beyond three root mean squares


def test_single_entries_are_exact_and_empty_tensors_pass():
    np.testing.assert_array_equal(decoded(np.array([-3.5])), [-3.5])
    assert decoded(np.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_is_not_hidden(bad):
    x = np.ones(100)
    x[7] = bad
    assert np.isnan(decoded(x)).all()


def test_the_error_of_the_mean_does_not_grow_with_the_number_of_workers():
    errors = {}
    for workers in (2, 16):
        inputs = normal({"w": (256, 256)}, steps=1, workers=workers, spread=0.0)
        tx = compressed_mean(
            intellect_int8(),
            axis_name="worker",
            feedback=feedback.none(),
            exchange="two_phase",
            dense=lambda path, leaf: False,
        )
        updates, _ = run_fleet(tx, inputs)
        mean = inputs["w"].astype(np.float64).mean(0)
        errors[workers] = np.sum((updates["w"] - mean) ** 2) / np.sum(mean**2)
    # A worker's own piece is exact: 1 - 1/n of an encoding's error, and that of the second one.
    assert errors[16] < 1.2 * (1 + 15 / 16) / (1 + 1 / 2) * errors[2]
    assert 1e-4 < errors[16] < 1e-3


@pytest.mark.parametrize("quantiser", ["absmax", "intellect"])
def test_adamw_on_an_8_bit_mean_is_near_adamw_on_the_mean(quantiser):
    shapes = {"matrix": (40, 60), "vector": (7,)}
    inputs = normal(shapes, steps=10, workers=4)
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    tx = adamw_int8(0.1, weight_decay=0.01, axis_name="worker", quantiser=quantiser)
    updates, _ = run_fleet(tx, inputs, params=params)
    adam = optax.adamw(0.1, weight_decay=0.01)
    state = adam.init(params)
    for t in range(10):
        mean = {name: jnp.asarray(x[:, t].mean(0)) for name, x in inputs.items()}
        expected, state = adam.update(mean, state, params)
        found = {name: x[t] for name, x in updates.items()}
        np.testing.assert_allclose(found["vector"], expected["vector"], rtol=1e-4)
        # Adam's first step is a sign: an entry of the mean near zero may come out otherwise.
        difference = relative_difference(found, expected)
        assert 1e-5 < difference < 0.2, t


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="quantiser must be one of 'absmax', 'intellect'"):
        adamw_int8(0.1, axis_name="worker", quantiser="int4")
    with pytest.raises(ValueError, match="width must be in"):
        intellect_int8(0.0)
