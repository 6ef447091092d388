"""Both sides of a comparison with several workers, as far as it can be tested without PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.parity import _fleet, demo


def test_both_sides_make_the_same_gradients_for_a_worker_out_of_the_common_one():
    common = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    for worker in range(4):
        roll = lambda x, by: np.roll(x, int(by), 0)
        official = _fleet.own_gradient(np.float32(worker), common, roll)
        ours = _fleet.own_gradient(worker, jnp.asarray(common.T), lambda x, by: jnp.roll(x, by, -1))
        np.testing.assert_allclose(ours.T, official, rtol=1e-6)  # a product and a sum
        assert (worker == 0) == np.array_equal(official, common)


def test_the_fleet_of_ours_is_worth_one_transformation_and_its_workers_differ():
    tx = demo._ours(4, _fleet.own_gradient, 0.0, side=4, k=2, decay=0.5)
    params = {"w": jnp.zeros((8, 8))}
    grads = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)}
    updates, state = tx.update(grads, tx.init(params), params)
    assert jax.tree.map(jnp.shape, updates) == {"w": (8, 8)}
    (momentum,) = (x for x in jax.tree.leaves(state) if x.ndim > 1)
    assert momentum.shape == (4, 8, 8)
    assert all(not np.allclose(momentum[0], other) for other in momentum[1:])
