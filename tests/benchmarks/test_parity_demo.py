"""The parity adapter of DeMo: its process group of threads, and its fleet of ours."""

import concurrent.futures
import threading

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.parity import demo


class _Tensor:
    """As much of a tensor as a process group uses."""

    def __init__(self, value):
        self.value = value

    def copy_(self, other):
        self.value = other.value


def test_every_thread_of_a_group_gets_what_all_sent_in_the_order_of_ranks_each_time():
    barrier, sent = threading.Barrier(4, timeout=60), [None] * 4
    groups = [demo._Group(rank, barrier, sent) for rank in range(4)]
    assert all(group.size() == 4 for group in groups)

    def member(rank):
        seen = []
        for call in range(50):
            received = [_Tensor(None) for _ in range(4)]
            own = _Tensor((call, rank))
            done = demo._all_gather(received, own, group=groups[rank], async_op=True)
            done.wait()
            seen.append([place.value for place in received])
        return seen

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(member, range(4)))
    expected = [[(call, rank) for rank in range(4)] for call in range(50)]
    assert found == [expected] * 4


def test_both_sides_make_the_same_gradients_for_a_worker_out_of_the_common_one():
    common = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    for worker in range(4):
        official = demo._mixed(np.float32(worker), common, lambda x, by: np.roll(x, int(by), 0))
        ours = demo._mixed(worker, jnp.asarray(common.T), lambda x, by: jnp.roll(x, by, -1))
        np.testing.assert_allclose(ours.T, official, rtol=1e-6)  # a product and a sum
        assert (worker == 0) == np.array_equal(official, common)


def test_the_fleet_of_ours_is_worth_one_transformation_and_its_workers_differ():
    tx = demo._ours(4, demo._mixed, 0.0, side=4, k=2, decay=0.5)
    params = {"w": jnp.zeros((8, 8))}
    grads = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)}
    updates, state = tx.update(grads, tx.init(params), params)
    assert jax.tree.map(jnp.shape, updates) == {"w": (8, 8)}
    (momentum,) = (x for x in jax.tree.leaves(state) if x.ndim > 1)
    assert momentum.shape == (4, 8, 8)
    assert all(not np.allclose(momentum[0], other) for other in momentum[1:])
