"""What a step does besides stepping: donation, placement, metrics, communication, refusals."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_suite.core import tree_bytes
from jaxopt_suite.experiments import model
from jaxopt_suite.optimizers import registry
from jaxopt_suite.parallel import hlo, wire
from jaxopt_suite.parallel.layout import TrainState
from jaxopt_suite.parallel.meshes import make_mesh, parse_mesh
from jaxopt_suite.parallel.specs import undivided
from jaxopt_suite.parallel.train_step import make_train_step

SHAPES = {"up": (16, 64), "bias": (64,), "down": (64, 8)}
LIKE = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
SPECS = {"up": P(None, "model"), "bias": P("model"), "down": P("model")}
BATCH = {
    "x": np.random.default_rng(1).normal(size=(16, 16)).astype(np.float32),
    "y": np.random.default_rng(2).normal(size=(16, 8)).astype(np.float32),
}


def make_params():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    return {
        name: 0.3 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["up"] + params["bias"][None])
    return jnp.mean((hidden @ params["down"] - batch["y"]) ** 2)


def mean():
    return optax.stateless(lambda updates, params: jax.lax.pmean(updates, "worker"))


def step_on(text, tx=None, *, loss_fn=loss, axis_types=AxisType.Auto, **options):
    """A step for a mesh such as ``data=8``, "one device" or "fleet"."""
    tx = tx or optax.adam(0.01)
    if "worker" in text or text == "fleet":
        options.setdefault("worker_axis", "worker")
    if text == "fleet":
        return make_train_step(loss_fn, tx, **{"workers": 4, **options})
    if text == "one device":
        return make_train_step(loss_fn, tx, **options)
    mesh = make_mesh(parse_mesh(text), axis_types=axis_types)
    if "model" in text:
        options.setdefault("param_specs", SPECS)
    return make_train_step(loss_fn, tx, mesh, **options)


EVERYWHERE = ["one device", "fleet", "data=8", "data=2,fsdp=2,model=2", "worker=4,model=2"]


def communicating(text):
    workers = "worker" in text or text == "fleet"
    return optax.chain(mean(), optax.adam(0.01)) if workers else None


# Who owns which arrays.


@pytest.mark.parametrize("text", [*EVERYWHERE, "data=8 offload"])
def test_a_step_consumes_its_state_and_leaves_the_callers_parameters(text):
    text, *offload = text.split(" off")
    step = step_on(text, communicating(text), offload_state=bool(offload))
    params = make_params()
    if step.mesh is not None:  # as they are to lie: nothing need be moved, all must be copied
        shardings = step.layout(params).param_specs
        shardings = jax.tree.map(lambda s: NamedSharding(step.mesh, s), shardings)
        params = jax.device_put(params, shardings)
    first = step.init(params)
    second, _ = step(first, BATCH)
    assert all(x.is_deleted() for x in jax.tree.leaves(first))
    third, _ = step(second, BATCH)
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, third)))
    for name, expected in make_params().items():
        np.testing.assert_array_equal(params[name], expected)


@pytest.mark.parametrize("text", ["data=2,fsdp=2,model=2", "worker=4,model=2"])
def test_new_state_takes_the_place_of_old(text):
    step = step_on(text, communicating(text))
    compiled = step.lower(LIKE, BATCH).compile()
    state = jax.tree.leaves(step.abstract_state(LIKE))
    aliases = hlo.parse(compiled.as_text()).input_output_alias
    assert {(a.output, a.parameter) for a in aliases} == {((i,), i) for i in range(len(state))}
    local = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in state)
    assert compiled.memory_analysis().alias_size_in_bytes >= local


@pytest.mark.parametrize("axis_types", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("text", ["data=2,fsdp=2,model=2", "worker=4,model=2"])
def test_parameters_made_by_a_function_are_whole_on_no_device(text, axis_types):
    inside = {}

    def make():
        params = make_params()
        for name, x in params.items():
            jax.debug.inspect_array_sharding(
                x, callback=functools.partial(inside.__setitem__, name)
            )
        return params

    step = step_on(text, communicating(text), axis_types=axis_types)
    made, given = step.init(make), step.init(make_params())
    for name, spec in SPECS.items():
        assert inside[name].is_equivalent_to(NamedSharding(step.mesh, spec), len(SHAPES[name]))
    placed = step.abstract_state(LIKE)
    for a, b, like in zip(*map(jax.tree.leaves, (made, given, placed)), strict=True):
        assert a.sharding == b.sharding == like.sharding
        assert {s.data.shape for s in a.addressable_shards} == {like.sharding.shard_shape(a.shape)}
        # Random numbers are drawn in pieces, by operations fused differently.
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert made.params["up"].addressable_shards[0].data.shape == (16, 32)


@pytest.mark.parametrize("name", ["adamw", "adam_sn"])
def test_zero1_leaves_an_eighth_of_the_state_on_each_device(name):
    config = model.ModelConfig(d_model=32, n_layers=1, n_heads=4, d_ff=64, vocab_size=64)
    graphdef, params = model.build(config, seed=0)
    mesh = make_mesh({"data": 8})
    tx = registry()[name].make(0.01)
    step = make_train_step(
        functools.partial(model.loss_fn, graphdef), tx, mesh, shard_state_over=("data",)
    )
    state, _ = step(step.init(params), np.zeros((8, 9), np.int32))
    specs = jax.tree.map(lambda x: x.sharding.spec, state.opt_state)
    left = sum(x.nbytes for x in undivided(state.opt_state, specs, mesh, ("data",)))
    whole = tree_bytes(state.opt_state)
    for device in mesh.devices.flat:
        held = sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(state.opt_state)
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        assert held <= 1.02 * whole / 8 + left
    assert left <= 4 * len(jax.tree.leaves(state.opt_state))  # counters
    assert tree_bytes(state.params) == sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.params)
    )


# What a step reports.


def numpy_norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree)))


@pytest.mark.parametrize("text", ["one device", "data=8", "data=2,fsdp=2,model=2"])
def test_metrics_are_those_of_the_whole_batch_before_the_update(text):
    step = step_on(text, optax.sgd(0.1))
    params = make_params()
    value, grads = jax.value_and_grad(loss)(params, BATCH)
    state, metrics = step(step.init(params), BATCH)
    # Float32 sums in another order.
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, numpy_norm(grads), rtol=1e-5)
    np.testing.assert_allclose(metrics.update_norm, 0.1 * numpy_norm(grads), rtol=1e-5)
    assert bool(metrics.finite)
    reported = metrics.loss, metrics.grad_norm, metrics.update_norm, metrics.finite
    assert [m.shape for m in reported] == [()] * 4
    assert metrics.finite.dtype == bool
    assert metrics.finite_here
    for name, p in params.items():
        np.testing.assert_allclose(state.params[name], p - 0.1 * grads[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", ["fleet", "worker=4,model=2"])
def test_metrics_of_workers_are_the_mean_loss_and_root_mean_squares_of_norms(text):
    tx = optax.stateless(lambda g, p: jax.tree.map(lambda g: -0.1 * g, g))  # nothing is exchanged
    step = step_on(text, tx)
    params = make_params()
    parts = [jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], BATCH) for i in range(4)]
    found = [jax.value_and_grad(loss)(params, part) for part in parts]
    state, metrics = step(step.init(params), BATCH)
    norm = np.sqrt(np.mean([numpy_norm(grads) ** 2 for _, grads in found]))
    # Float32 sums in another order.
    np.testing.assert_allclose(metrics.loss, np.mean([value for value, _ in found]), rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    np.testing.assert_allclose(metrics.update_norm, 0.1 * norm, rtol=1e-5)
    for i, (_, grads) in enumerate(found):  # consecutive rows belong to a worker
        for name, p in params.items():
            np.testing.assert_allclose(
                state.params[name][i], p - 0.1 * grads[name], rtol=1e-5, atol=1e-6
            )


BROKEN = {
    "an infinite loss": (lambda p, b: loss(p, b) + jnp.float32(jnp.inf), optax.sgd(0.1)),
    "a gradient that is no number": (
        lambda p, b: loss(p, b) + 0 * jnp.sqrt(0 * jnp.sum(p["up"])),
        optax.sgd(0.1),
    ),
    "an infinite update": (loss, optax.stateless(lambda g, p: jax.tree.map(lambda x: x / 0, g))),
}


@pytest.mark.parametrize("text", ["one device", "fleet", "worker=4,model=2"])
@pytest.mark.parametrize("what", list(BROKEN))
def test_what_is_not_finite_is_reported(what, text):
    loss_fn, tx = BROKEN[what]
    step = step_on(text, tx, loss_fn=loss_fn)
    assert not bool(step(step.init(make_params()), BATCH)[1].finite)


def test_one_worker_that_is_not_finite_is_enough():
    batch = {**BATCH, "y": BATCH["y"].copy()}
    batch["y"][5] = np.inf
    step = step_on("fleet", optax.sgd(0.1))
    assert not bool(step(step.init(make_params()), batch)[1].finite)


@pytest.mark.parametrize("text", EVERYWHERE)
def test_the_loss_is_traced_once_for_many_steps_and_kinds_of_batches(text):
    traces = []

    def counted(params, batch):
        traces.append(1)
        return loss(params, batch)

    step = step_on(text, communicating(text), loss_fn=counted)
    state = step.init(make_params())
    for batch in (BATCH, BATCH, step.shard_batch(BATCH), jax.tree.map(jnp.asarray, BATCH)):
        state, _ = step(state, batch)
    assert len(traces) == 1
    step(step.init(make_params()), BATCH)
    assert len(traces) == 1


# What a step sends.


@pytest.mark.parametrize("text", ["worker=4,model=2", "worker=2,data=2,model=2"])
@pytest.mark.parametrize("own", [0, 1])
def test_besides_what_the_optimizer_sends_nothing_crosses_between_workers(text, own):
    step = step_on(text, optax.chain(mean(), optax.adam(0.01)) if own else optax.adam(0.01))
    found = wire.collectives(step.lower(LIKE, BATCH).compile(), step.mesh)
    crossing = [c for c in found if c.axes is None or "worker" in c.axes]
    held = 4 * (16 * 32 + 32 + 32 * 8)  # half of the parameters: the other axis is not crossed
    assert [(c.kind, c.axes, c.payload) for c in crossing] == own * [
        ("all-reduce", ("worker",), held)
    ]


def fsdp_collectives(name, **hyperparameters):
    config = model.ModelConfig(d_model=32, n_layers=2, n_heads=4, d_ff=64, vocab_size=64)
    graphdef, params = model.build(config, seed=0)
    mesh = make_mesh({"fsdp": 8})
    step = make_train_step(
        functools.partial(model.loss_fn, graphdef),
        registry()[name].make(0.01, **hyperparameters),
        mesh,
        param_specs=model.param_specs(config, mesh),
    )
    return params, wire.collectives(step.lower(params, np.zeros((8, 17), np.int32)).compile(), mesh)


@pytest.mark.parametrize("name", ["adamw", "adam_sn", "grams", "lion"])
def test_under_fsdp_each_matrix_is_gathered_for_the_loss_and_no_state_ever(name):
    params, found = fsdp_collectives(name)
    matrices = [4 * x.size for x in jax.tree.leaves(params) if x.ndim == 2]
    gathers = [c for c in found if c.kind == "all-gather"]
    assert sorted(c.payload for c in gathers) == sorted(matrices)
    assert all("/gradients/" in c.op_name for c in gathers)
    assert {c.kind for c in found} == {"all-gather", "all-reduce"}


def test_under_fsdp_no_more_of_adafactors_state_is_gathered_than_a_vector():
    """The columns of a square matrix have the layout of its rows: see `state_specs`."""
    params, found = fsdp_collectives("adafactor", min_dim_size_to_factor=16)
    squares = [4 * 32 for x in jax.tree.leaves(params) if x.shape == (32, 32)]
    gathers = [c.payload for c in found if c.kind == "all-gather" and "/optimizer/" in c.op_name]
    assert gathers == squares


# A link that communicates, written for what a device holds.


def sign_mean(axis_name):
    """Mean of the workers' signs, a byte for eight of them, over the worker axis alone."""

    def exchange(x):
        bits = jnp.packbits((x > 0).ravel())
        manual = axis_name in jax.sharding.get_abstract_mesh().manual_axes
        equal = {"to": "invarying"} if manual else {}  # every worker has the same afterwards
        gathered = jax.lax.all_gather(bits, axis_name, **equal)
        signs = 2 * jnp.unpackbits(gathered, axis=1, count=x.size).astype(x.dtype) - 1
        return jnp.mean(signs, axis=0).reshape(x.shape)

    def update(updates, state, params=None, *, param_specs=None):
        if param_specs is None:
            return jax.tree.map(exchange, updates), state
        mesh = jax.sharding.get_abstract_mesh()
        rest = set(mesh.axis_names) - set(mesh.manual_axes)

        def one(x, spec):
            local = jax.shard_map(exchange, in_specs=spec, out_specs=spec, axis_names=rest)
            return local(x)

        return jax.tree.map(one, updates, param_specs), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def signs(text, **options):
    tx = optax.chain(sign_mean("worker"), optax.clip_by_global_norm(1.0), optax.adam(0.01))
    return step_on(text, tx, **options)


@pytest.mark.parametrize("axis_types", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("worker=4,model=2", {}),
        ("worker=2,data=2,model=2", {}),
        ("worker=4,data=2", {"shard_state_over": ("data",)}),
    ],
)
def test_a_link_on_shards_gives_what_it_gives_a_fleet_on_whole_tensors(text, options, axis_types):
    step = signs(text, axis_types=axis_types, **options)
    workers = step.mesh.shape["worker"]
    fleet = make_train_step(loss, step.tx, worker_axis="worker", workers=workers)
    state, expected = step.init(make_params()), fleet.init(make_params())
    for _ in range(4):
        state, metrics = step(state, BATCH)
        expected, expected_metrics = fleet(expected, BATCH)
    # Signs are exact; the rest is four steps of float32.
    for a, b in zip(
        *map(jax.tree.leaves, ((state, metrics), (expected, expected_metrics))), strict=True
    ):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_its_payload_is_packed_and_crosses_the_worker_axis_alone():
    step = signs("worker=4,model=2")
    found = wire.collectives(step.lower(LIKE, BATCH).compile(), step.mesh)
    packed = [c for c in found if c.dtype in ("u8", "s8", "pred")]
    assert {(c.kind, c.dtype, c.axes) for c in packed} == {("all-gather", "u8", ("worker",))}
    assert sum(c.payload for c in packed) == 4 * (16 * 32 + 32 + 32 * 8) // 8
    assert not [c for c in found if c not in packed and "worker" in c.axes]  # metrics stay apart


@pytest.mark.parametrize("axis_types", [AxisType.Auto, AxisType.Explicit])
def test_a_loss_may_enter_explicit_sharding_by_itself(axis_types):
    def explicit(params, batch):
        def product(up, x):
            seen.append((str(jax.typeof(up)), str(jax.typeof(x))))
            return jnp.matmul(x, up, out_sharding=P("data", "model"))

        into = jax.sharding.explicit_axes(product, in_sharding=(P(None, "model"), P("data")))
        hidden = jnp.tanh(into(params["up"], batch["x"]) + params["bias"][None])
        return jnp.mean((hidden @ params["down"] - batch["y"]) ** 2)

    seen = []
    step = step_on("data=4,model=2", loss_fn=explicit, axis_types=axis_types)
    _, metrics = step(step.init(make_params()), BATCH)
    assert set(seen) == {("float32[16,64@model]", "float32[16@data,16]")}
    np.testing.assert_allclose(metrics.loss, loss(make_params(), BATCH), rtol=1e-5)  # float32


# Bad input.


MESH = "data=2,model=4"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (MESH, {"worker_axis": "island"}, "worker_axis .* 'data', 'model', got 'island'"),
        (MESH, {"shard_state_over": ("fsdp",)}, "shard_state_over .* 'data', 'model', got 'fsdp'"),
        (
            MESH,
            {"batch_spec": P("rows")},
            r"batch_spec .*'rows'.* 'data', 'model'|'data', 'model'.*'rows'",
        ),
        ("worker=4,model=2", {"shard_state_over": ("worker",)}, "holds the worker axis 'worker'"),
        ("worker=4,model=2", {"workers": 3}, "workers=3, but the mesh has 4"),
        (MESH, {"workers": 2}, "workers=2"),
        (MESH, {"accumulate": 0}, "accumulate must be .*1.*, got 0"),
        ("fleet", {"workers": 0}, "workers must be .*1.*, got 0"),
        ("one device", {"worker_axis": "worker"}, "worker_axis='worker' and workers=None"),
        ("one device", {"workers": 4}, "worker_axis=None and workers=4"),
        (
            "one device",
            {"shard_state_over": ("data",)},
            r"shard_state_over=\('data',\) needs a mesh",
        ),
        ("one device", {"offload_state": True}, "offload_state=True needs a mesh"),
        ("one device", {"batch_spec": P("data")}, "batch_spec=.*'data'.* needs a mesh"),
        ("one device", {"param_specs": SPECS}, "param_specs=.* needs a mesh"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_once(text, options, message):
    with pytest.raises(ValueError, match=message):
        step_on(text, **options)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (P("tensor"), "has no axis 'tensor'"),
        (P("model", "model"), "axis 'model' comes twice"),
        (P("worker"), "'worker' is the worker axis"),
        (P(None, None, "model"), "3 entries for 2 dimensions"),
    ],
)
@pytest.mark.parametrize("use", ["init", "init by a function", "lower", "abstract_state"])
def test_specs_the_mesh_cannot_carry_out_are_refused_with_parameter_and_mesh(spec, message, use):
    step = step_on("worker=4,model=2", communicating("worker"), param_specs={**SPECS, "up": spec})
    calls = {
        "init": lambda: step.init(make_params()),
        "init by a function": lambda: step.init(make_params),
        "lower": lambda: step.lower(LIKE, BATCH),
        "abstract_state": lambda: step.abstract_state(LIKE),
    }
    with pytest.raises(ValueError, match=message) as refused:
        calls[use]()
    for part in ("['up']", str(spec), "(16, 64)", "worker=4,model=2"):
        assert part in str(refused.value)


def test_an_axis_that_does_not_divide_a_dimension_is_refused_with_both():
    step = step_on("fsdp=3,model=2", param_specs={**SPECS, "up": P("fsdp")})
    with pytest.raises(ValueError, match=r"dimension 0 of size 16 cannot .* 3 equal parts"):
        step.init(make_params())


@pytest.mark.parametrize(
    ("text", "options", "parts"),
    [
        ("data=2,fsdp=2,model=2", {}, 4),
        ("data=2,fsdp=2,model=2", {"accumulate": 3}, 12),
        ("data=2,model=4", {"batch_spec": P(("data", "model"))}, 8),
        ("worker=4,model=2", {}, 4),
        ("fleet", {"accumulate": 2}, 8),
        ("one device", {"accumulate": 5}, 5),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_what_would(text, options, parts):
    step = step_on(text, communicating(text), **options)
    good = {"x": np.zeros((2 * parts, 16)), "y": np.zeros((2 * parts, 8))}
    step.check_batch(good)
    bad = {**good, "y": np.zeros((2 * parts - 1, 8))}
    message = rf"\['y'\] must be a multiple of {parts} .*got shape \({2 * parts - 1}, 8\)"
    for refuse in (step.check_batch, step.shard_batch, lambda b: step.lower(LIKE, b)):
        with pytest.raises(ValueError, match=message):
            refuse(bad)
    with pytest.raises(ValueError, match=r"the batch must be .* got shape \(\)"):
        step.check_batch(np.float32(1))


def test_a_state_of_another_step_is_refused():
    step = step_on("data=8")
    with pytest.raises(ValueError, match="a state comes from init"):
        step(step_on("data=8", optax.sgd(0.1)).init(make_params()), BATCH)
    step.init(make_params())
    with pytest.raises(ValueError, match="a state comes from init"):
        step(TrainState(make_params(), ()), BATCH)


# Places.


def test_each_device_gets_its_rows_of_the_batch():
    step = step_on("data=2,fsdp=2,model=2")
    placed = step.shard_batch(BATCH)
    assert step.shard_batch(placed)["x"] is placed["x"]
    assert placed["x"].sharding.spec == P(("data", "fsdp"))
    for shard in placed["x"].addressable_shards:
        np.testing.assert_array_equal(shard.data, BATCH["x"][shard.index])
        assert shard.data.shape == (4, 16)


def test_the_rows_of_a_worker_are_consecutive_whatever_the_order_of_axes():
    step = step_on("data=2,worker=4", communicating("worker"))
    assert step.batch_sharding.spec == P(("worker", "data"))
    text = step_on("data=2,worker=4", communicating("worker"), batch_spec=P("data"))
    assert text.batch_sharding.spec == P(("worker", "data"))
