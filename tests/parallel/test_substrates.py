"""The same lines of code on one device, on meshes, as a fleet and as two processes: same losses."""

import contextlib
import functools
import json
import os
import pathlib

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from several_processes import clean_env, run_all

from jaxopt_suite.experiments import model
from jaxopt_suite.optimizers import registry
from jaxopt_suite.parallel.meshes import make_mesh, parse_mesh
from jaxopt_suite.parallel.roll_call import free_port
from jaxopt_suite.parallel.train_step import make_train_step

ROOT = pathlib.Path(__file__).parents[2]
SIZES = model.ModelConfig(d_model=32, n_layers=2, n_heads=4, d_ff=64, vocab_size=64)
STEPS, CLIP = 50, 0.1
# Largest relative difference of losses: float64 leaves room for the rounding of some 1e3 sums;
# float32 for sums in another order, carried on through 50 steps of training.
TOLERANCE = {"float64": 1e-10, "float32": 2e-4}
SUBSTRATES = ["data=8", "data=2,fsdp=2,model=2", "worker=4,model=2", "fleet of 4"]
# Not SOAP: statistics of few gradients have null spaces, of whose bases two programs choose two.
OURS = [
    name
    for name, recipe in registry().items()
    if not (recipe.peer or recipe.communicates or name == "soap")
]
OPTIMIZERS = ["adamw", "adafactor", "muon", "clipped adamw", *OURS]
# So that what is special about them happens in a model this small, and several times.
HYPERPARAMETERS = {
    "adafactor": {"min_dim_size_to_factor": 16},
    "adam_snsm": {"rank": 8, "refresh_every": 10},
    "shampoo": {"stack_multiple": 8},
}
COSTLY = ("shampoo",)  # a minute to compile


def batches(steps=STEPS):
    """Arithmetic progressions modulo the vocabulary: [steps, batch, sequence + 1], learnt soon."""
    rng = np.random.default_rng(0)
    start, stride = rng.integers(0, 64, (steps, 16, 1)), rng.integers(1, 4, (steps, 16, 1))
    return ((start + stride * np.arange(17)) % SIZES.vocab_size).astype(np.int32)


def optimizer(name):
    if name == "clipped adamw":
        return optax.chain(optax.clip_by_global_norm(CLIP), optimizer("adamw"))
    recipe = registry()[name]
    return recipe.make(recipe.learning_rate, **HYPERPARAMETERS.get(name, {}))


@functools.cache
def initial(dtype, **options):
    graphdef, params = model.build(SIZES, seed=0, dtype=dtype, **options)
    # Drawn here: what JAX draws depends, in its last bit, on how the drawing was compiled, and a
    # process that did it before keeps that program.
    rng = np.random.default_rng(0)
    draw = lambda x: 0.1 * rng.standard_normal(x.shape) if x.ndim > 1 else np.ones(x.shape)
    params = jax.tree.map(lambda x: np.asarray(draw(x), dtype), params)
    return functools.partial(model.loss_fn, graphdef), params


def train(name, dtype, substrate, *, steps=STEPS, axis_types=AxisType.Auto, build=(), **options):
    """Losses and gradient norms, [steps, 2]."""
    loss, params = initial(dtype, **dict(build))
    tx, mesh = optimizer(name), None
    if "worker" in substrate or "fleet" in substrate:
        mean = optax.stateless(lambda grads, params: jax.lax.pmean(grads, "worker"))
        tx, options["worker_axis"] = optax.chain(mean, tx), "worker"
    if "fleet" in substrate:
        options["workers"] = 4
    elif substrate != "one device":
        mesh = make_mesh(parse_mesh(substrate), axis_types=axis_types)
        options["param_specs"] = model.param_specs(SIZES, mesh)
    step = make_train_step(loss, tx, mesh, **options)
    state, seen = step.init(params), []
    for batch in batches(steps):
        state, metrics = step(state, batch)
        assert bool(metrics.finite)
        # Waits: more than 32 steps on their way at once make simulated devices block one another.
        seen.append([float(metrics.loss), float(metrics.grad_norm)])
    return np.array(seen)


@functools.cache
def reference(name, dtype, **options):
    """What one device gives."""
    return train(name, dtype, "one device", **options)


def precision(dtype: str) -> contextlib.AbstractContextManager[None]:
    return jax.enable_x64(dtype == "float64")


# Float64 shows to 1e-10 that programs are the same; in float32 an elementwise, a factored, an
# orthogonalised and a projected update stand for all.
IN_FLOAT32 = ("clipped adamw", "adafactor", "muon", "adam_snsm")


def cases():
    """All of them; of most optimizers the suite runs one substrate, each in its turn."""
    for dtype, names in (("float32", IN_FLOAT32), ("float64", OPTIMIZERS)):
        for i, name in enumerate(names):
            for j, substrate in enumerate(SUBSTRATES):
                always = i % 4 == j or (dtype, name) == ("float64", "clipped adamw")
                always = always and name not in COSTLY
                marks = [pytest.mark.slow] if always else [pytest.mark.exhaustive]
                yield pytest.param(dtype, name, substrate, marks=marks)


@pytest.mark.parametrize(("dtype", "name", "substrate"), list(cases()))
def test_fifty_steps_have_the_losses_of_one_device(dtype, name, substrate):
    with precision(dtype):
        expected, got = reference(name, dtype), train(name, dtype, substrate)
    assert expected[-1, 0] < 0.2 * expected[0, 0]  # it learns
    if name == "clipped adamw":
        assert np.min(expected[:, 1]) > 2 * CLIP  # active at every step
    np.testing.assert_allclose(got[:, 0], expected[:, 0], rtol=TOLERANCE[dtype], atol=0)


VARIANTS = {
    "ZeRO-1": ("data=4,model=2", {"shard_state_over": ("data",)}),
    "ZeRO-1 over two axes": ("data=4,fsdp=2", {"shard_state_over": ("data", "fsdp")}),
    "ZeRO-1 beside workers": ("worker=2,data=4", {"shard_state_over": ("data",)}),
    "micro-batches": ("data=2,fsdp=2,model=2", {"accumulate": 2}),
    "micro-batches of workers": ("worker=4,model=2", {"accumulate": 4}),
    "micro-batches of a fleet": ("fleet of 4", {"accumulate": 2}),
    "rematerialisation": ("data=2,fsdp=2,model=2", {"remat": True}),
    "a policy of rematerialisation": (
        "worker=4,model=2",
        {"remat": jax.checkpoint_policies.dots_saveable},
    ),
    "offloaded state": ("data=2,fsdp=2,model=2", {"offload_state": True}),
    "offloaded state of workers": ("worker=4,model=2", {"offload_state": True}),
    "an explicit mesh": ("data=2,fsdp=2,model=2", {"axis_types": AxisType.Explicit}),
    "explicit workers": ("worker=4,model=2", {"axis_types": AxisType.Explicit}),
    "explicit workers alone": ("worker=4", {"axis_types": AxisType.Explicit}),
    "all of it": (
        "worker=2,data=4",
        {
            "axis_types": AxisType.Explicit,
            "shard_state_over": ("data",),
            "accumulate": 2,
            "remat": True,
            "offload_state": True,
        },
    ),
    "a scan over layers": ("data=2,fsdp=2,model=2", {"build": (("scan_layers", True),)}),
}


def test_zero_beside_workers_and_a_third_axis_is_refused():
    with pytest.raises(ValueError, match=r"no other axes, and this one has 'model'"):
        train("adamw", "float32", "worker=2,data=2,model=2", shard_state_over=("data",))


@pytest.mark.parametrize(
    "name", ["clipped adamw", pytest.param("adafactor", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_way_to_run_a_step_gives_the_same_step(variant, name):
    substrate, options = VARIANTS[variant]
    with precision("float64"):
        expected = reference(name, "float64", steps=6)
        got = train(name, "float64", substrate, steps=6, **options)
    equal = slice(1 if "worker" in substrate or "fleet" in substrate else 2)
    # Norms are of whole gradients without workers, and else of those of their parts of the batch.
    np.testing.assert_allclose(got[:, equal], expected[:, equal], rtol=TOLERANCE["float64"], atol=0)


# The same as one of two processes, which prints what `train` gives.
PROCESS = """
import importlib.util, json, sys
import jax
from jaxopt_suite.parallel.processes import initialize
address, count, index, path, name, substrate = sys.argv[1:]
initialize(address, int(count), int(index), timeout=40, local_device_count=8 // int(count))
spec = importlib.util.spec_from_file_location("substrates", path)
substrates = importlib.util.module_from_spec(spec)
spec.loader.exec_module(substrates)
with substrates.precision("float64"):
    print(json.dumps(substrates.train(name, "float64", substrate).tolist()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "substrate"),
    list(zip(["clipped adamw", "adafactor", "adam_snsm"], SUBSTRATES[:3], strict=True)),
)
def test_two_processes_of_four_devices_have_the_losses_of_one_process(name, substrate):
    address = f"localhost:{free_port()}"
    common = (str(pathlib.Path(__file__)), name, substrate)
    env = clean_env(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]))
    ended = run_all(*(["-c", PROCESS, address, "2", str(i), *common] for i in range(2)), env=env)
    assert [e.status for e in ended] == [0, 0], ended[0].err + ended[1].err
    with precision("float64"):
        expected = reference(name, "float64")
    for each in ended:
        got = np.array(json.loads(each.out.splitlines()[-1]))
        np.testing.assert_allclose(got[:, 0], expected[:, 0], rtol=TOLERANCE["float64"], atol=0)
