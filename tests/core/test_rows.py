"""Work on rows: all at once or some at a time give the same, each row once, in the same memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxopt_suite import core
from jaxopt_suite.core import rows as rows_lib


@pytest.mark.parametrize("rows", [0, 1, 20, 21, 35, 61])
def test_work_by_runs_is_the_work_and_takes_at_most_twenty_rows_on_a_cpu(rows):
    seen = []

    def work(tree, shift):
        seen.append(len(shift))
        return {"sum": jnp.sum(tree["m"], axis=(1, 2)) + shift, "rows": tree["m"][:, 0]}

    matrices = np.random.default_rng(0).normal(size=(rows, 6, 4)).astype(np.float32)
    shifts = np.arange(rows, dtype=np.float32)
    got = jax.jit(core.by_runs(work))({"m": matrices}, shifts)
    np.testing.assert_allclose(got["sum"], matrices.sum((1, 2)) + shifts, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got["rows"], matrices[:, 0])
    assert min(seen) == min(rows, {21: 11, 35: 18, 61: 16}.get(rows, rows))
    assert max(seen) == rows  # what an accelerator is given


def _stepped(old, x, shift):
    """Not the same if it is done twice."""
    return {"m": 2 * old["m"] + x, "count": old["count"] + shift.astype(jnp.int32)}


def _operands(rows):
    rng = np.random.default_rng(rows)
    old = {
        "m": rng.normal(size=(rows, 3, 4)).astype(np.float32),
        "count": np.arange(rows, dtype=np.int32),
    }
    return old, rng.normal(size=(rows, 3, 4)).astype(np.float32), np.ones(rows, np.float32)


@pytest.mark.parametrize("calls", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 20, 21, 35, 61])
def test_every_row_is_updated_once(rows, calls, monkeypatch):
    monkeypatch.setattr(rows_lib, "_BYTES", 4 * 104)  # four rows of the operands
    seen = []

    def work(old, x, shift):
        seen.append(len(x))
        return _stepped(old, x, shift)

    old, x, shift = _operands(rows)
    got = jax.jit(functools.partial(core.update_rows, work, calls=calls))(old, x, shift)
    np.testing.assert_allclose(got["m"], 2 * old["m"] + x, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got["count"], np.arange(rows) + 1)
    at_once = {21: 11, 35: 18, 61: 16}.get(rows, rows) if calls else min(rows, 4)
    assert min(seen) == at_once
    assert max(seen) == rows  # what an accelerator is given


def test_rows_are_taken_singly_if_one_does_not_fit(monkeypatch):
    monkeypatch.setattr(rows_lib, "_BYTES", 10)
    old, x, shift = _operands(3)
    got = core.update_rows(_stepped, old, x, shift)
    np.testing.assert_allclose(got["m"], 2 * old["m"] + x, rtol=1e-6, atol=1e-6)


def test_on_a_cpu_the_new_rows_are_written_over_the_old_ones():
    def work(old, x):
        return 0.9 * old + jnp.einsum("kij,klj->kil", x, x)

    x = jax.ShapeDtypeStruct((100, 128, 128), jnp.float32)
    run = jax.jit(lambda old, x: core.update_rows(work, old, x), donate_argnums=0)
    compiled = run.lower(x, x).compile()
    if jax.default_backend() == "cpu":
        assert compiled.memory_analysis().temp_size_in_bytes < 3 * rows_lib._BYTES < x.size * 4
    plain = jax.jit(work, donate_argnums=0).lower(x, x).compile()
    assert plain.memory_analysis().temp_size_in_bytes >= x.size * 4


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_accelerators_have_no_loop(platform):
    x = np.ones((100, 128, 128), np.float32)
    run = jax.jit(functools.partial(core.update_rows, lambda old, x: old @ x))
    text = run.trace(x, x).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.while" in text) == (platform == "cpu")


def test_on_a_mesh_each_device_updates_its_rows(monkeypatch):
    monkeypatch.setattr(rows_lib, "_BYTES", 4 * 104)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    old, x, _ = _operands(36)
    # The old rows are the same on all devices, the new ones are not.
    on_all = jax.shard_map(
        lambda old, x: core.update_rows(_stepped, old, x, jnp.ones(len(x))),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P("data"),
    )
    part = jax.tree.map(lambda leaf: leaf[:9], old)
    got = jax.jit(on_all)(part, x)
    repeated = np.tile(part["m"], (4, 1, 1))
    np.testing.assert_allclose(got["m"], 2 * repeated + x, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got["count"], np.tile(np.arange(9), 4) + 1)
