"""Cutting trees into stacks of blocks and putting them together again, and the stacks' algebra."""

import itertools

import jax
import jax.numpy as jnp
import mode_products as modes
import numpy as np
import pytest

from jaxopt_suite.optimizers.shampoo import blocks as blocks_lib
from jaxopt_suite.optimizers.shampoo import kronecker
from jaxopt_suite.optimizers.shampoo.batches import in_batches

RAGGED = [(7, 5), (), (3,), (1, 9, 1), (4, 4), (0, 3), (2, 3, 5), (8, 1), (0,)]


def numbered(shapes):
    """Arrays of which no two entries are equal."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    starts = itertools.accumulate(sizes, initial=1)
    return [
        np.arange(start, start + size, dtype=np.float32).reshape(shape)
        for start, size, shape in zip(starts, sizes, shapes, strict=False)
    ]


@pytest.mark.parametrize(
    ("shape", "limit", "expected"),
    [
        ((32, 3, 64, 64), 8192, (96, 4096)),
        ((3, 3, 64, 64), 256, (3, 192, 64)),
        ((3, 3, 64, 64), 1, (3, 3, 64, 64)),
        ((1, 5, 1), 4, (5,)),
        ((), 4, (1,)),
        ((1, 1), 4, (1,)),
        ((2, 0, 3), 4, (0,)),
    ],
)
def test_neighbouring_dimensions_are_merged_from_the_last_one(shape, limit, expected):
    assert blocks_lib.merge(shape, limit) == expected


@pytest.mark.parametrize(
    ("block_size", "merge_dims", "multiple"),
    [(3, True, 1), (3, False, 4), (4, True, 4), (100, False, 1)],
)
def test_stacks_hold_every_piece_of_every_leaf_once_and_are_put_together(
    block_size, merge_dims, multiple
):
    leaves = numbered(RAGGED)
    cut = blocks_lib.cut(RAGGED, block_size=block_size, merge_dims=merge_dims, multiple=multiple)
    stacks = cut.stack([jnp.asarray(x) for x in leaves])
    expected: dict[str, list[bytes]] = {}
    for leaf, merged in zip(leaves, cut.merged, strict=True):
        starts = [range(0, size, block_size) for size in merged]
        for corner in itertools.product(*starts):
            piece = leaf.reshape(merged)[tuple(slice(s, s + block_size) for s in corner)]
            expected.setdefault("x".join(map(str, piece.shape)), []).append(piece.tobytes())
    assert stacks.keys() == expected.keys()
    for name, pieces in expected.items():
        rows = np.asarray(stacks[name])
        assert rows.shape == cut.shape(name)
        assert len(rows) == -(-len(pieces) // multiple) * multiple
        assert sorted(row.tobytes() for row in rows[: len(pieces)]) == sorted(pieces)
        assert not rows[len(pieces) :].any()
    for back, leaf in zip(cut.unstack(stacks, leaves), leaves, strict=True):
        np.testing.assert_array_equal(back, leaf)


def test_leaves_that_need_no_cutting_are_stacked_by_one_operation_however_many_they_are():
    """What compiling takes must not grow with the layers where nothing else does."""

    def operations(layers):
        # One leaf in the middle is cut along its columns; all others lie as they are needed.
        shapes = [(4, 8)] * layers + [(4, 16)] + [(12, 8)] * layers
        leaves = numbered(shapes)
        plan = blocks_lib.cut(shapes, block_size=8, merge_dims=False, multiple=4 * layers + 3)
        program = jax.jit(plan.stack).lower(leaves).as_text()
        found = plan.unstack(plan.stack(leaves), leaves)
        jax.tree.map(np.testing.assert_array_equal, found, leaves)
        return [program.count(f"stablehlo.{x} ") for x in ("dynamic_update_slice", "concatenate")]

    assert operations(3) == operations(6) == [3, 3]


def test_leaves_come_back_in_their_own_dtypes():
    leaves = [jnp.ones((3, 3), jnp.bfloat16), jnp.ones(4, jnp.float16), jnp.ones(())]
    cut = blocks_lib.cut([x.shape for x in leaves], block_size=2)
    stacks = cut.stack([x.astype(jnp.float32) for x in leaves])
    assert [x.dtype for x in cut.unstack(stacks, leaves)] == [x.dtype for x in leaves]


def test_rows_know_their_leaf_and_padding_belongs_to_none():
    cut = blocks_lib.cut([(4, 6), (2,), (2, 2)], block_size=2, merge_dims=False, multiple=4)
    assert cut.owners("2x2").tolist() == [0] * 6 + [2] + [-1]
    assert cut.owners("2").tolist() == [1, -1, -1, -1]


def test_blocks_whose_squares_are_no_numbers_are_not_usable():
    g = np.ones((5, 2, 2), np.float32)
    g[1, 0, 0] = np.nan
    g[2, 1, 1] = 1e30  # its square leaves float32
    g[3, 0, 1] = -np.inf
    good = blocks_lib.usable({"2x2": jnp.asarray(g)})
    assert good["2x2"].tolist() == [True, False, False, False, True]


def test_gram_matrices_and_products_are_those_of_the_unfoldings():
    rng = np.random.default_rng(0)
    for shape in [(3,), (4, 3, 2)]:
        x = rng.normal(size=(5, *shape)).astype(np.float32)
        matrices = [rng.normal(size=(5, d, d)).astype(np.float32) for d in shape]
        matrices[-1] = None  # the identity
        zeros = [np.zeros((5, d, d), np.float32) for d in shape]
        grams, product = kronecker.observe(zeros, x, 0.0, 1.0), kronecker.multiply(x, matrices)
        for row in range(5):
            expected = x[row]
            for mode, matrix in enumerate(matrices):
                found = grams[mode][row]
                np.testing.assert_allclose(found, modes.gram(x[row], mode), rtol=1e-5, atol=1e-5)
                if matrix is not None:
                    expected = modes.times(expected, matrix[row].T, mode)
            np.testing.assert_allclose(product[row], expected, rtol=1e-4, atol=1e-4)  # float32


def test_turning_into_bases_and_back_changes_nothing():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 4, 5)).astype(np.float32)
    bases = [np.linalg.qr(rng.normal(size=(3, d, d)))[0].astype(np.float32) for d in (4, 5)]
    turned = kronecker.rotate(x, bases)
    expected = np.einsum("yab,yac,ycd->ybd", bases[0], x, bases[1])
    np.testing.assert_allclose(turned, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(kronecker.rotate_back(turned, bases), x, rtol=0, atol=1e-5)


def test_matrices_of_one_size_and_kind_are_one_batch():
    calls = []

    def work(kind, a, b):
        calls.append((kind, a.shape, b.shape))
        return {"sum": a.sum((1, 2)) + b, "kind": jnp.full(len(a), kind)}

    def of(rows, size, start):
        return jnp.full((rows, size, size), start), jnp.arange(rows) + start

    places = {
        ("x", 0): of(2, 3, 1.0),
        ("x", 1): of(2, 4, 2.0),
        ("y", 0): of(5, 3, 3.0),
        ("z", 0): of(1, 3, 4.0),
    }
    found = in_batches(work, places, lambda place: 1 if place[0] == "z" else 0)
    assert calls == [
        (0, (7, 3, 3), (7,)),
        (0, (2, 4, 4), (2,)),
        (1, (1, 3, 3), (1,)),
    ]
    for place, (a, b) in places.items():
        np.testing.assert_array_equal(found[place]["sum"], jnp.sum(a, (1, 2)) + b)
        assert found[place]["kind"].tolist() == [int(place[0] == "z")] * len(a)


def test_the_dtype_of_the_arithmetic_is_at_least_float32():
    assert blocks_lib.wide({"a": jnp.ones(2, jnp.bfloat16)}) == jnp.float32
    assert blocks_lib.wide({}) == jnp.float32
    with jax.enable_x64(True):
        tree = {"a": jnp.ones(2, jnp.float16), "b": jnp.ones(2, jnp.float64)}
        assert blocks_lib.wide(tree) == jnp.float64
