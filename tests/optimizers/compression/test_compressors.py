"""What every compressor keeps: bytes, shapes, its constants, the ways it may be run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressor_cases import CASES, draws, like, relative_error, round_trip
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from jaxopt_suite.optimizers.compression import compressors

KEY = jax.random.key(7)
ROUNDING = 1e-5  # float32 sums of some hundred terms, relative to ‖x‖²
SHAPES = st.one_of(
    st.sampled_from([(), (0,), (3, 0), (1,), (7,), (8,), (9,), (65, 3), (5, 6, 7), (1, 1, 1)]),
    st.lists(st.integers(1, 40), max_size=3).map(tuple),
)
EVERY = pytest.mark.parametrize("name", CASES)
FAMILIES = pytest.mark.parametrize(
    "name",
    [
        *("top_k", "top_k 12 bits", "random_k", "sign blocks", "ternary", "int8 stochastic"),
        *("int4", "e4m3", "low_rank", "dct_top_k"),
    ],
)


def sent(compressor, payload):
    """The leaves that travel."""
    leaves = jax.tree.leaves(payload)
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return [x for x in leaves if floating(x) or not compressor.linear]


@EVERY
@settings(max_examples=15)
@given(shape=SHAPES)
def test_nbytes_is_what_the_payload_takes_and_decode_keeps_the_shape(name, shape):
    c = CASES[name]
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    payload = jax.eval_shape(c.encode, x, KEY)
    found = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in sent(c, payload))
    assert c.nbytes(shape) == found
    decoded = jax.eval_shape(lambda p: c.decode(p, x), payload)
    assert (decoded.shape, decoded.dtype) == (shape, jnp.float32)


@EVERY
def test_tensors_of_zeros_stay_so_in_every_shape(name):
    shapes = [(), (0,), (1,), (9,), (9, 7), (2, 3, 5)]
    run = jax.jit(lambda xs: [round_trip(CASES[name], x) for x in xs])
    assert not any(np.any(found) for found in run([np.zeros(shape) for shape in shapes]))


def hostile(shape):
    """Tensors on which compressors are at their worst, and one ordinary one."""
    rng = np.random.default_rng(0)
    size = math.prod(shape)
    spike = np.full(size, 1 / (1 + math.sqrt(size)))
    spike[size // 2] = 1.0  # ternary
    halves = np.full(size, 0.5 / 127)
    halves[0] = 1.0  # every other entry lies between two levels
    single = np.zeros(size)
    single[-1] = 3.0
    flat = np.where(rng.random(size) < 0.5, -1.0, 1.0)
    wide = np.exp(rng.normal(size=size) * 5)
    every = [rng.normal(size=size), spike, halves, single, flat, wide, wide * 1e-25, wide * 1e20]
    return [x.reshape(shape) for x in every]


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.contraction])
@pytest.mark.parametrize("shape", [(300,), (24, 40)])
def test_no_error_exceeds_the_contraction_factor(name, shape):
    c = CASES[name]
    drawn = c.shared_key or name == "low_rank"  # there the bound is one on the mean over draws
    keys = jax.random.split(KEY, 400 if drawn else 1)
    one = jax.vmap(lambda x, key: round_trip(c, x, key), (None, 0))
    xs = np.stack(hostile(shape)).astype(np.float32)
    found = np.asarray(jax.jit(jax.vmap(one, (0, None)))(xs, keys), np.float64)
    for x, draw in zip(xs.astype(np.float64), found, strict=True):
        errors = np.sum((draw - x).reshape(len(keys), -1) ** 2, axis=1) / np.sum(x**2)
        slack = 4 * np.std(errors) / math.sqrt(len(keys))  # four standard errors
        assert np.mean(errors) <= 1 - c.contraction(shape) + slack + ROUNDING


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.variance and n != "identity"])
def test_unbiased_within_four_standard_errors_and_no_noisier_than_the_variance(name):
    c, count = CASES[name], 10_000
    for x in hostile((24,))[:3]:
        x = x.astype(np.float32)
        found = draws(c, x, count)
        error = np.std(found, axis=0) / math.sqrt(count)
        assert np.all(np.abs(np.mean(found, axis=0) - x) <= 4.5 * error + 1e-6 * np.abs(x).max())
        ratio = np.sum((found - x) ** 2, axis=1) / np.sum(x**2)
        slack = 4 * np.std(ratio) / math.sqrt(count)
        assert np.mean(ratio) <= c.variance(x.shape) + slack + ROUNDING


@EVERY
def test_a_non_finite_entry_is_not_hidden(name):
    c = CASES[name]
    run = jax.jit(lambda x: round_trip(c, x))
    for bad in (np.nan, np.inf, -np.inf):
        x = np.random.default_rng(1).normal(size=(20, 12)).astype(np.float32)
        x[3, 4] = bad
        found = np.asarray(run(x))
        # A shared draw may have passed it over.
        assert c.shared_key or not np.isfinite(found[3, 4])


@FAMILIES
def test_a_stack_is_compressed_as_each_tensor_is(name):
    c = CASES[name]
    xs = jax.random.normal(jax.random.key(1), (3, 9, 15))
    keys = jax.random.split(KEY, 3)
    one = jax.jit(lambda x, key: round_trip(c, x, key))
    single = np.stack([one(x, key) for x, key in zip(xs, keys, strict=True)])
    # Fusion may change the last bits of a sum or a product, nothing more.
    np.testing.assert_allclose(jax.vmap(one)(xs, keys), single, rtol=1e-5, atol=1e-5)


@FAMILIES
def test_runs_in_shard_map_with_an_equal_or_a_different_key(name):
    c = CASES[name]
    mesh = jax.make_mesh((2,), ("worker",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    x = jax.random.normal(jax.random.key(1), (2, 40, 6))

    def worker(x):
        own = jax.random.fold_in(KEY, jax.lax.axis_index("worker"))
        return jnp.stack([round_trip(c, x[0], KEY), round_trip(c, x[0], own)])[None]

    spec = PartitionSpec("worker")
    run = jax.jit(jax.shard_map(worker, mesh=mesh, in_specs=spec, out_specs=spec))
    expected = jax.jit(jax.vmap(lambda x: round_trip(c, x, KEY)))(x)
    np.testing.assert_allclose(run(x)[:, 0], expected, rtol=1e-5, atol=1e-5)  # fusion


ENTRYWISE = [n for n, c in CASES.items() if c.block and "stoch" not in n and "ternary" not in n]
ONE_SCALE = ["sign", "int8 tensor", "e4m3"]
SCALED_BY_TENSOR = [*ONE_SCALE, "ternary", "ternary clip"]  # one float32 more for every piece more


@pytest.mark.parametrize("name", [n for n in ENTRYWISE if n not in ONE_SCALE])
def test_pieces_cut_at_blocks_decode_to_the_same(name):
    c = CASES[name]
    x = np.random.default_rng(2).normal(size=6 * c.block).astype(np.float32)
    run = jax.jit(lambda x: round_trip(c, x))
    np.testing.assert_array_equal(
        np.concatenate([run(x[: 2 * c.block]), run(x[2 * c.block :])]), run(x)
    )


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.block])
def test_bytes_of_pieces_add_up_but_for_scales_and_part_filled_bytes(name):
    c = CASES[name]
    whole, piece = c.nbytes((32 * c.block,)), c.nbytes((8 * c.block,))
    assert 0 <= 4 * piece - whole <= (12 if name in SCALED_BY_TENSOR else 0)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.linear])
def test_the_mean_of_linear_payloads_decodes_to_the_mean(name):
    c = CASES[name]
    xs = np.random.default_rng(3).normal(size=(4, 5, 9)).astype(np.float32)
    payloads = [c.encode(jnp.asarray(x), KEY) for x in xs]
    average = lambda *a: sum(a) / 4 if jnp.issubdtype(a[0].dtype, jnp.floating) else a[0]
    mean = c.decode(jax.tree.map(average, *payloads), like(xs[0]))
    apart = np.mean([c.decode(p, like(xs[0])) for p in payloads], axis=0)
    np.testing.assert_allclose(mean, apart, rtol=1e-5, atol=1e-6)  # the order of four additions


# Relative errors of one draw of 65536 entries, in the order of the methods below.
MEASURED = {
    "gauss": (0.363, 0.404, 0.915, 7.9e-5, 4.9e-5, 1.4e-2, 9.6e-3, 6.9e-4, 2.8e-3),
    "laplace": (0.501, 0.587, 0.839, 2.2e-4, 1.0e-4, 2.6e-2, 1.5e-2, 7.0e-4, 2.8e-3),
}


@pytest.mark.parametrize("kind", MEASURED)
def test_relative_errors_are_those_known_for_gaussian_and_laplace_tensors(kind):
    methods = (
        *(
            compressors.sign(),
            compressors.sign("l2"),
            compressors.top_k(fraction=0.01),
            compressors.int8(4096),
            compressors.int8(256),
        ),
        *(compressors.int4(128), compressors.int4(32), compressors.fp8(), compressors.fp8("e5m2")),
    )
    rng = np.random.default_rng(5)
    x = rng.normal(size=65536) if kind == "gauss" else rng.laplace(size=65536)
    found = [relative_error(method, x) for method in methods]
    # 20%: scatter between draws, whose largest entries set the scales
    np.testing.assert_allclose(found, MEASURED[kind], rtol=0.2)
