"""Every communicating recipe: a simulated fleet, a mesh and two processes take the same steps."""

import os
import sys

import jax
import numpy as np
import pytest
from fleets import WORKERS, copies, normal, relative_difference, run_fleet, train_fleet
from several_processes import ROOT, clean_env, run_all

from jaxopt_suite import parallel
from jaxopt_suite.optimizers import registry
from jaxopt_suite.parallel.roll_call import free_port

STEPS = 30
SHAPES = {"matrix": (64, 48), "vector": (40,)}
SETTINGS = {
    "onebit_adam": {"warmup_steps": 10},
    "diloco": {"sync_every": 4},
    "streaming_diloco": {"sync_every": 4, "mixing": 0.5},
}
RECIPES = [n for n, recipe in registry().items() if recipe.communicates and not recipe.apart]
APART = ["diloco", "streaming_diloco"]

# The same operations in the same order; only sums inside one operation (an all-reduce, a norm, a
# product of matrices) may be split differently by XLA, which rounds differently.
ORDER_OF_SUMS = 1e-6
LARGER = {"powersgd": 1e-3}  # power steps on noise separate what differs by a rounding: 2e-5 here


def recipe(name):
    found = registry()[name]
    return found.make(found.learning_rate, axis_name="worker", **SETTINGS.get(name, {}))


def updates(name, mesh=None):
    """[steps, ...], of a given sequence of gradients on every worker."""
    params = {leaf: np.ones(shape, np.float32) for leaf, shape in SHAPES.items()}
    inputs = normal(SHAPES, steps=STEPS)
    return run_fleet(recipe(name), inputs, mesh=mesh, params=params)[0]


def parting(name, mesh=None):
    """Every worker's parameters ``[workers, steps, ...]`` and the outer ones, with absences.

    At step 12 nobody is there, which is a synchronisation.
    """
    active = np.random.default_rng(3).integers(0, 2, size=(WORKERS, STEPS))
    active[:, 11] = 0
    params = {leaf: np.ones(shape, np.float32) for leaf, shape in SHAPES.items()}
    inputs = normal(SHAPES, steps=STEPS)
    gradient = lambda p, x: jax.tree.map(lambda a, b: a + b, p, x)
    own, state = train_fleet(recipe(name), gradient, inputs, params, mesh=mesh, active=active)
    return own, state.outer_params


@pytest.mark.parametrize("name", APART)
def test_workers_that_part_and_stay_away_do_so_on_a_mesh_as_in_a_simulated_fleet(name):
    on_mesh, outer = parting(name, parallel.make_mesh({"worker": WORKERS}))
    simulated = parting(name)
    assert relative_difference((on_mesh, outer), simulated) <= ORDER_OF_SUMS
    for leaf in jax.tree.leaves(outer):
        held = copies(leaf)
        assert len(held) == WORKERS
        for other in held[1:]:
            np.testing.assert_array_equal(held[0].view(np.int32), other.view(np.int32))


@pytest.mark.parametrize("name", RECIPES)
def test_a_mesh_takes_the_steps_of_a_simulated_fleet_and_replicas_are_equal_bits(name):
    real = updates(name, parallel.make_mesh({"worker": WORKERS}))
    difference = relative_difference(real, updates(name))
    assert difference <= LARGER.get(name, ORDER_OF_SUMS)
    for leaf in jax.tree.leaves(real):
        held = copies(leaf)
        assert len(held) == WORKERS
        for other in held[1:]:
            np.testing.assert_array_equal(held[0].view(np.int32), other.view(np.int32))


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    address = f"localhost:{free_port()}"
    env = clean_env(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]))
    words = [[__file__, address, str(i), str(tmp_path / f"{i}.npz")] for i in range(2)]
    ended = run_all(*words, env=env)
    assert [e.status for e in ended] == [0, 0], ended[0].err + ended[1].err
    first, second = (np.load(tmp_path / f"{i}.npz") for i in range(2))
    for name in RECIPES:
        one = updates(name, parallel.make_mesh({"worker": WORKERS}))
        got = {leaf: first[f"{name} {leaf}"] for leaf in one}
        assert relative_difference(got, one) <= LARGER.get(name, ORDER_OF_SUMS), name
        for leaf in one:
            np.testing.assert_array_equal(got[leaf], second[f"{name} {leaf}"])
    for name in APART:
        one = parting(name, parallel.make_mesh({"worker": WORKERS}))[1]
        got = {leaf: first[f"{name} {leaf}"] for leaf in one}
        assert relative_difference(got, one) <= ORDER_OF_SUMS, name


def main(address, index, path):
    """One of two processes: saves the updates of every recipe."""
    parallel.initialize(address, 2, index, timeout=40, local_device_count=WORKERS // 2)
    mesh = parallel.make_mesh({"worker": WORKERS})
    found = {name: updates(name, mesh) for name in RECIPES}
    found |= {name: parting(name, mesh)[1] for name in APART}
    np.savez(path, **{f"{name} {leaf}": x for name in found for leaf, x in found[name].items()})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
