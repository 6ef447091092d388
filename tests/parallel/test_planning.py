"""Plans: exact where a closed form is known, honest where a step does not fit."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import optax
import pytest

from jaxopt_suite.parallel import topologies
from jaxopt_suite.parallel.chips import CHIPS
from jaxopt_suite.parallel.planning import plan
from jaxopt_suite.parallel.topologies import Topology
from jaxopt_suite.parallel.train_step import make_train_step

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu-aot (libtpu)"
)
needs_cuda_pjrt = pytest.mark.skipif(
    not topologies.is_installed("jax_plugins.xla_cuda12"),
    reason="needs the extra gpu-aot (jax-cuda12-pjrt)",
)

WIDTH, BATCH = 64, 128
PARAMS = {"w": jax.ShapeDtypeStruct((WIDTH, WIDTH), np.float32)}
TOKENS = jax.ShapeDtypeStruct((BATCH, WIDTH), np.float32)


def _loss(params, batch):
    return jax.numpy.mean(jax.numpy.square(batch @ params["w"]))


def _make_step(mesh, **options):
    return make_train_step(_loss, optax.adamw(1e-3), mesh, **options)


def _pod(**changes) -> Topology:
    """The eight CPU devices of the tests, in the place of one host of eight GPUs."""
    chip = dataclasses.replace(CHIPS["h100"], **changes)
    return Topology("cpu:1x1x8", chip, (1, 1, 8), tuple(jax.devices()))


@pytest.fixture(scope="module")
def made():
    flops = 2.0 * 2 * BATCH * WIDTH * WIDTH
    return plan(_make_step, PARAMS, TOKENS, topology=_pod(), mesh={"data": 8}, model_flops=flops)


def test_the_flops_are_those_of_one_device_s_part_of_the_batch(made):
    # Forward, and backward for the weights; nothing asks for the gradient of the batch.
    assert made.flops == 2 * 2 * (BATCH // 8) * WIDTH * WIDTH
    assert made.exact


def test_the_state_is_counted_exactly(made):
    whole = WIDTH * WIDTH * 4  # data parallelism: whole on every device
    assert made.memory.parts["parameters"] == whole
    assert made.memory.parts["optimizer state"] == 2 * whole + 4  # and the count
    assert made.memory.parts["batch"] == BATCH // 8 * WIDTH * 4


def test_what_goes_over_the_wire_is_the_gradient_and_the_loss(made):
    (link,) = made.links
    assert link.axes == ("data",)
    assert link.path == "NVLink"
    assert link.nbytes == 2 * 7 / 8 * (WIDTH * WIDTH + 1) * 4
    assert link.seconds == link.nbytes / 450e9


def test_the_bound_is_the_slowest_resource_at_its_peak(made):
    assert made.times["compute"] == made.flops / 989e12
    assert made.times["memory traffic"] == made.hbm_bytes / 3.35e12
    assert made.bound == max(made.times.values())
    assert made.utilization == pytest.approx(made.flops / 989e12 / made.bound)
    slowest = max(made.times, key=made.times.get)
    assert made.fits
    assert made.constraint.startswith(f"Bound by {slowest}: a step takes at least ")


def test_two_devices_a_chip_share_what_it_has(made):
    halved = dataclasses.replace(made, topology=_pod(devices=2))
    assert halved.times["compute"] == 2 * made.times["compute"]
    assert halved.times["memory traffic"] == 2 * made.times["memory traffic"]


def test_a_step_that_does_not_fit_says_how_much_it_needs_and_what_for(made):
    small = dataclasses.replace(made, available=10_000.0)
    assert not small.fits
    assert small.constraint.startswith("Does not fit: a device needs ")
    largest = max(made.memory.parts, key=made.memory.parts.get)
    assert small.constraint.endswith(f"of them are {largest}.")


def test_json_holds_every_number_and_the_sources(made):
    content = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert content["memory"]["total"] == sum(content["memory"]["parts"].values())
    assert content["memory"]["compiler"]["sum"] == made.compiler_bytes
    assert content["flops"] == made.flops
    assert content["wire"][0]["nbytes"] == made.links[0].nbytes
    assert content["chip"]["sources"] == list(CHIPS["h100"].sources)
    assert content["constraint"] == made.constraint


def test_state_spread_over_the_data_axis_takes_an_eighth():
    step = lambda mesh: _make_step(mesh, shard_state_over=("data",))
    spread = plan(step, PARAMS, TOKENS, topology=_pod(), mesh={"data": 8})
    assert spread.memory.parts["optimizer state"] == 2 * WIDTH * WIDTH * 4 // 8 + 4


@pytest.mark.parametrize("mesh", [{"data": 4}, {"data": 16}, {"data": 4, "model": 4}])
def test_a_mesh_of_another_size_than_the_pod_is_refused(mesh):
    with pytest.raises(ValueError, match="topology cpu:1x1x8 has 8"):
        plan(_make_step, PARAMS, TOKENS, topology=_pod(), mesh=mesh)


@pytest.fixture
def tpu_settings(monkeypatch):
    for name, value in topologies.SETTINGS.items():
        monkeypatch.setenv(name, value)


@needs_libtpu
def test_a_step_for_tpus_that_are_not_there(tpu_settings):
    made = plan(_make_step, PARAMS, TOKENS, topology="v5e:2x2", mesh={"data": 4})
    assert made.flops == 2 * 2 * (BATCH // 4) * WIDTH * WIDTH
    assert made.memory.parts["parameters"] == WIDTH * 128 * 4  # a tile is 128 wide
    assert made.available == 16 * 2**30
    assert {link.axes for link in made.links} == {("data",)}


@needs_libtpu
def test_a_gather_among_workers_that_fill_a_torus_stays_a_gather(tpu_settings):
    def gathered(updates, state, params=None):
        del params
        rows = jax.lax.all_gather(updates["w"].astype(np.uint8), "worker", to="invarying")
        return {"w": rows.astype(np.float32).sum(0)}, state

    tx = optax.GradientTransformation(lambda params: optax.EmptyState(), gathered)

    def make_step(mesh):
        return make_train_step(_loss, tx, mesh, worker_axis="worker")

    batch = jax.ShapeDtypeStruct((64, WIDTH), np.float32)
    made = plan(make_step, PARAMS, batch, topology="v5e:8x8", mesh={"worker": 64})
    (link,) = made.links
    assert link.nbytes == pytest.approx(63 * WIDTH * WIDTH, rel=0.01)  # twice that otherwise


@needs_libtpu
def test_a_step_too_large_for_its_tpu_is_planned_all_the_same(tpu_settings):
    params = {"w": jax.ShapeDtypeStruct((40_000, 40_000), np.float32)}  # 6 GiB, and Adam's 12
    batch = jax.ShapeDtypeStruct((8, 40_000), np.float32)
    made = plan(_make_step, params, batch, topology="v5e:2x2", mesh={"data": 4})
    assert not made.fits
    assert made.memory.total > 3 * 40_000**2 * 4
    assert made.available < 16 * 2**30  # the compiler keeps a part for itself
    # The compiler's message has two decimals; packing is in its figure only.
    assert made.memory.total == pytest.approx(made.compiler_bytes, rel=0.1)
    assert made.flops == 2 * 2 * 2 * 40_000**2


@needs_cuda_pjrt
def test_a_step_for_gpus_that_are_not_there():
    made = plan(_make_step, PARAMS, TOKENS, topology="h200:1x2x8", mesh={"data": 2, "model": 8})
    assert made.memory.parts["parameters"] == WIDTH * WIDTH * 4
    assert {link.path for link in made.links} == {"network between hosts"}
