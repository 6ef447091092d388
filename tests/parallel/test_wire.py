"""The wire counter against closed forms: live CPU programs, and stored ones for TPUs and a GPU.

``programs/write.py`` has the programs; their docstrings say what they do. ``S`` is the bytes of all
gradients of one layer, ``g`` the devices of a group.
"""

import collections
import pathlib
import runpy
import types

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxopt_suite.parallel import groups, hlo, wire

WRITE = runpy.run_path(str(pathlib.Path(__file__).parent / "programs" / "write.py"))
LAYERS, WIDTH, HIDDEN, BATCH = (WRITE[name] for name in ("LAYERS", "WIDTH", "HIDDEN", "BATCH"))
DEVICES = {"cpu": 8, "h100": 8, "v5e-2x2": 4, "v5e-4x4": 16, "v5p-2x2x2": 8}
# An axis that spans a whole torus of more than one dimension: TPUs all-reduce along it, and slice.
WHOLE_TORUS = ("v5e-4x4", "v5p-2x2x2")
ROW = 4 * WIDTH
S = 4 * 2 * WIDTH * HIDDEN
LOSS = 4


@pytest.fixture(scope="module")
def program():
    """The parsed program of a case for a target; those for the CPU are compiled here."""
    read = {}

    def get(case, target):
        if (case, target) not in read:
            live = target == "cpu"
            text = WRITE["compiled"](case, jax.devices()).as_text() if live else None
            read[case, target] = hlo.parse(text or WRITE["read"](f"{case}.{target}"))
        return read[case, target]

    return get


def _mesh(case, target):
    n = DEVICES[target]
    if case in ("tensor_parallel", "explicit", "loops"):
        return AbstractMesh((n // 2, 2), ("data", "model"))
    return AbstractMesh((n,), ("fsdp" if case == "fsdp" else "data",))


def _payloads(module, mesh):
    """Payload by kind, dtype, axes and times: XLA may merge or split what is sent together."""
    found = collections.Counter()
    for c in wire.collectives(module, mesh):
        found[c.kind, c.dtype, c.axes, c.times] += c.payload
    return dict(found)


def _ring(g):
    return (g - 1) / g


def _targets(*names):
    return pytest.mark.parametrize("target", names)


@_targets("cpu", "h100", "v5e-2x2", "v5p-2x2x2")
def test_data_parallelism_all_reduces_the_gradients_and_the_loss(program, target):
    module, mesh, g = program("data_parallel", target), _mesh("data", target), DEVICES[target]
    assert _payloads(module, mesh) == {("all-reduce", "f32", ("data",), 1): S + LOSS}
    assert wire.bytes_sent(module) == 2 * (S + LOSS) * (g - 1) / g
    assert wire.bytes_by_axis(module, mesh) == {("data",): 2 * (S + LOSS) * (g - 1) / g}


@_targets("cpu", "h100", *WHOLE_TORUS, "v5e-2x2")
def test_zero1_scatters_gradients_and_gathers_parameters(program, target):
    module, mesh, g = program("zero1", target), _mesh("zero1", target), DEVICES[target]
    # CPUs all-reduce and slice, and so do TPUs along a whole torus: twice the bytes of gradients.
    scatters = target not in ("cpu", *WHOLE_TORUS)
    reduction = "reduce-scatter" if scatters else "all-reduce"
    assert _payloads(module, mesh) == {
        (reduction, "f32", ("data",), 1): S,
        ("all-gather", "f32", ("data",), 1): S,
    }
    assert wire.bytes_sent(module) == (2 if scatters else 3) * S * (g - 1) / g


@_targets("cpu", "h100", *WHOLE_TORUS, "v5e-2x2")
def test_fsdp_gathers_parameters_twice_and_scatters_gradients_layer_by_layer(program, target):
    module, mesh, g = program("fsdp", target), _mesh("fsdp", target), DEVICES[target]
    reduction = "reduce-scatter" if target in ("h100", "v5e-2x2") else "all-reduce"
    # TPUs multiply in bfloat16 by default, and gather the parameters rounded to it already.
    dtype, size = ("bf16", 2) if target.startswith("v5") else ("f32", 4)
    assert _payloads(module, mesh) == {
        ("all-gather", dtype, ("fsdp",), LAYERS): 2 * S * size // 4,
        (reduction, "f32", ("fsdp",), LAYERS): S,
        ("all-reduce", "f32", ("fsdp",), 1): LOSS,
    }
    factor = 1 if reduction == "reduce-scatter" else 2
    layer = 2 * S * size / 4 + factor * S
    assert wire.bytes_sent(module) == (LAYERS * layer + 2 * LOSS) * (g - 1) / g


@_targets("cpu", "h100", "v5e-2x2", "v5p-2x2x2")
def test_tensor_parallelism_all_reduces_activations_forth_and_back(program, target):
    module, mesh = program("tensor_parallel", target), _mesh("tensor_parallel", target)
    data = DEVICES[target] // 2
    activations = BATCH // data * ROW
    assert _payloads(module, mesh) == {
        ("all-reduce", "f32", ("model",), LAYERS): 2 * activations,
        ("all-reduce", "f32", ("data",), LAYERS): S // 2,
        ("all-reduce", "f32", ("data",), 1): LOSS,
    }
    assert wire.bytes_by_axis(module, mesh) == {
        ("model",): LAYERS * 2 * activations,
        ("data",): 2 * (LAYERS * S // 2 + LOSS) * (data - 1) / data,
    }


@_targets("cpu", "h100", "v5e-2x2", "v5e-4x4", "v5p-2x2x2")
def test_each_kind_of_collective_sends_what_the_ring_model_says(program, target):
    module, mesh = program("explicit", target), _mesh("explicit", target)
    data, n = DEVICES[target] // 2, DEVICES[target]
    found = {(c.kind, c.axes): c for c in wire.collectives(module, mesh)}
    expected = {  # payload, group, bytes sent
        ("all-reduce", ("model",)): (8 * ROW, 2, 8 * ROW),
        ("all-gather", ("data",)): (16 * data * ROW, data, 16 * (data - 1) * ROW),
        ("reduce-scatter", ("data",)): (32 * data * ROW, data, 32 * (data - 1) * ROW),
        ("all-to-all", ("data",)): (32 * data * ROW, data, 32 * (data - 1) * ROW),
        ("collective-permute", ("data",)): (40 * ROW, data, 40 * ROW),
        ("all-reduce", ("data", "model")): (48 * ROW, n, 2 * 48 * ROW * _ring(n)),
    }
    assert {key: (c.payload, c.group_size, c.nbytes) for key, c in found.items()} == expected
    assert len(wire.collectives(module)) == len(expected)
    assert all(c.times == 1 and c.exact and not c.conditional for c in found.values())
    by_axis = wire.bytes_by_axis(module, mesh)
    assert set(by_axis) == {("data",), ("model",), ("data", "model")}
    assert sum(by_axis.values()) == wire.bytes_sent(module)


@_targets("cpu", "h100", "v5e-2x2")
def test_a_reduce_scatter_that_tpus_pad_counts_with_its_padding(program, target):
    module, g = program("padded", target), DEVICES[target]
    # TPUs scatter in multiples of 32 rows and then send rows on to where they belong.
    rows, sent_on = (32, 24) if target == "v5e-2x2" else (24, 0)
    assert wire.bytes_sent(module) == (rows * (g - 1) + sent_on) * ROW


@_targets("cpu", "h100", "v5e-2x2")
def test_collectives_in_loops_count_by_trips_and_those_in_branches_are_labelled(program, target):
    module, mesh, n = program("loops", target), _mesh("loops", target), DEVICES[target]
    both = ("data", "model")
    assert sorted(
        (c.kind, c.axes, c.payload, c.times, c.exact, c.conditional)
        for c in wire.collectives(module, mesh)
    ) == [
        ("all-reduce", both, 4, 1, False, False),  # in the test of a loop of unknown length
        ("all-reduce", both, 4, 1, True, False),
        ("all-reduce", ("model",), 16 * ROW, 3, True, False),
        ("collective-permute", ("data",), 8 * ROW, 7, True, False),
        ("collective-permute", ("data",), 16 * ROW, 3 * 5, True, False),
        ("collective-permute", ("data",), 24 * ROW, 1, True, True),
        ("collective-permute", ("data",), 32 * ROW, 1, False, False),
    ]
    always = (8 * 7 + 16 * 15 + 32 + 16 * 3) * ROW + 2 * 2 * 4 * _ring(n)
    assert wire.bytes_sent(module, conditional=False) == always
    assert wire.bytes_sent(module) == always + 24 * ROW


@_targets("h100", "v5e-2x2")
def test_a_ragged_all_to_all_counts_as_if_all_was_sent_and_says_so(program, target):
    (found,) = wire.collectives(program("ragged", target), _mesh("ragged", target))
    g = DEVICES[target]
    assert (found.kind, found.exact, found.axes) == ("ragged-all-to-all", False, ("data",))
    assert found.nbytes == 16 * ROW * (g - 1) / g


def _two_slices():
    """What a mesh of two TPU slices has that matters here; there are no such devices to be had."""
    devices = [[types.SimpleNamespace(slice_index=s) for _ in range(4)] for s in range(2)]
    return types.SimpleNamespace(
        devices=np.array(devices),
        shape={"worker": 2, "data": 4},
        axis_names=("worker", "data"),
        size=8,
    )


def test_traffic_between_tpu_slices_is_told_from_that_within_them(program):
    module = program("between_slices", "v5e-2x2-2")
    found = wire.collectives(module, _two_slices())
    # The sum over both: within each slice, a quarter of it over the network, gathered again.
    assert sorted((c.kind, c.axes, c.payload, c.nbytes) for c in found) == [
        ("all-gather", ("data",), 32 * ROW, 24 * ROW),
        ("all-reduce", ("data",), 32 * ROW, 48 * ROW),
        ("dcn-send", ("worker",), 8 * ROW, 8 * ROW),
        ("dcn-send", ("worker",), 32 * ROW, 32 * ROW),
    ]
    with pytest.raises(
        ValueError, match=r"compiled for 4 devices .* mesh \{'worker': 2, 'data': 4\} with 8"
    ):
        wire.collectives(module, AbstractMesh((2, 4), ("worker", "data")))


def test_a_program_for_several_gpu_slices_numbers_all_devices(program):
    (found,) = wire.collectives(program("data_parallel", "h100"), _two_slices())
    assert (found.axes, found.group_size) == (("worker", "data"), 8)


def test_a_real_mesh_in_another_order_of_devices_is_attributed_by_position():
    devices = np.array(jax.devices())[[3, 1, 0, 2, 7, 6, 5, 4]].reshape(2, 2, 2)
    mesh = Mesh(devices, ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
    spec = jax.sharding.PartitionSpec("a", "b", "c")
    step = jax.shard_map(
        lambda x: (jax.lax.psum(x, ("c", "a")), jax.lax.ppermute(x, ("a", "b"), [(1, 2), (2, 1)])),
        mesh=mesh,
        in_specs=spec,
        out_specs=(jax.sharding.PartitionSpec(None, "b"), spec),
    )
    like = jax.ShapeDtypeStruct((8, 8, 8), np.float32)
    found = wire.collectives(jax.jit(step).lower(like).compile(), mesh)
    assert {(c.kind, c.axes) for c in found} == {
        ("all-reduce", ("a", "c")),
        ("collective-permute", ("a", "b")),
    }


@pytest.mark.parametrize(
    ("notation", "expected"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=2,'b'=2,'c'=2] {'c','a'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (
            "mesh['a'=2,'b'=4], device_ids=([7,6,5,4,3,2,1,0]) {'a'}",
            [[7, 3], [6, 2], [5, 1], [4, 0]],
        ),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("{}", [list(range(8))]),
    ],
)
def test_groups_are_read_in_every_notation(notation, expected):
    attributes = f"channel_id=1, replica_groups={notation}, use_global_device_ids=true"
    assert groups.replica_groups(attributes, 8) == expected


@hypothesis.given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    chosen=st.sets(st.integers(0, 3)),
)
def test_groups_along_axes_are_attributed_to_the_axes_they_were_made_from(sizes, chosen):
    shape = {f"x{at}": size for at, size in enumerate(sizes)}
    axes = [f"x{at}" for at in sorted(chosen) if at < len(sizes)]
    printed = ",".join(f"'{name}'={size}" for name, size in shape.items())
    along = ",".join(f"'{name}'" for name in axes)
    found = groups.replica_groups(f"replica_groups=mesh[{printed}] {{{along}}}", 0)
    mesh = AbstractMesh(tuple(sizes), tuple(shape))
    assert groups.axes_of(found, mesh, num_partitions=mesh.size) == tuple(
        name for name in axes if shape[name] > 1
    )


def test_devices_linked_by_pairs_are_grouped():
    found = groups.linked([[0, 2], [4, 2], [1, 3], [6, 4]])
    assert sorted(sorted(group) for group in found) == [[0, 2, 4, 6], [1, 3]]


@pytest.mark.parametrize(
    ("notation", "message"),
    [
        ("mesh['a'=8] {'a':(1)2,'a':(4)2}", r"two parts of one axis are not read: \{'a'"),
        ("mesh(a=8)", r"unknown notation for groups of devices: 'replica_groups=mesh\(a=8\)"),
        ("[x]", r"unknown notation for groups of devices: '\[x\]'"),
    ],
)
def test_groups_in_a_notation_that_is_not_known_are_refused(notation, message):
    with pytest.raises(ValueError, match=message):
        groups.replica_groups(f"replica_groups={notation}", 8)


ONE = """HloModule one, num_partitions=8
ENTRY %main (a: f32[8,16], b: bf16[16]) -> f32[] {{
  %a = f32[8,16]{{1,0}} parameter(0)
  %b = bf16[16]{{0}} parameter(1)
  ROOT %c = f32[] {line}, metadata={{op_name="jit(f)/psum"}}
}}
"""
EVERYBODY = "channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true"


def _one(line, mesh=None):
    (found,) = wire.collectives(ONE.format(line=line), mesh)
    return found


def test_a_collective_of_one_device_sends_nothing():
    alone = "channel_id=1, replica_groups=[8,1]<=[8], use_global_device_ids=true, to_apply=%add"
    found = _one(f"all-reduce(%a), {alone}", AbstractMesh((8,), ("data",)))
    assert (found.nbytes, found.group_size, found.axes) == (0, 1, ())
    assert _one("collective-permute(%a), source_target_pairs={{0,0},{1,1}}").nbytes == 0


def test_groups_that_are_not_whole_axes_are_not_attributed():
    mesh = AbstractMesh((4, 2), ("data", "model"))
    uneven = "channel_id=1, replica_groups={{0,3},{1,2},{4,7},{5,6}}, use_global_device_ids=true"
    part = "channel_id=1, replica_groups={{0,2},{4,6},{1,3},{5,7}}, use_global_device_ids=true"
    assert _one(f"all-reduce(%a), {uneven}", mesh).axes is None
    assert _one(f"all-reduce(%a), {part}", mesh).axes is None
    text = ONE.format(line=f"all-reduce(%a), {part}")
    assert wire.bytes_by_axis(text, mesh) == {None: 512.0}
    assert _one(f"all-reduce(%a), {part}").axes is None  # without a mesh


def test_a_collective_of_several_arrays_adds_them_up():
    found = _one(f"all-reduce(%a, %b), {EVERYBODY}, to_apply=%add")
    assert (found.dtype, found.payload) == ("bf16+f32", 8 * 16 * 4 + 16 * 2)
    assert found.op_name == "jit(f)/psum"


def test_groups_of_replicas_mean_all_of_their_partitions():
    # Without global ids the groups name replicas, of which an SPMD program has one.
    found = _one("all-reduce(%a), channel_id=1, replica_groups={{0}}, to_apply=%add")
    assert (found.group_size, found.nbytes) == (8, 2 * 512 * 7 / 8)


def test_a_permute_of_slices_sends_the_slices():
    line = "collective-permute(%a, %a, %b, %b), source_target_pairs={{0,1}}, slice_sizes={{1,16}}"
    assert _one(line).nbytes == 64


def test_transfers_to_the_host_are_not_on_the_wire():
    to_host = 'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="io"}'
    assert wire.collectives(ONE.format(line=f"send(%a, %b), channel_id=1, {to_host}")) == []


def test_an_asynchronous_call_of_a_collective_counts_once():
    text = f"""HloModule wrapped, num_partitions=8
%inner (p: f32[8,16]) -> f32[64,16] {{
  %p = f32[8,16]{{1,0}} parameter(0)
  ROOT %gather = f32[64,16]{{1,0}} all-gather(%p), {EVERYBODY}, dimensions={{0}}
}}
ENTRY %main (a: f32[8,16]) -> f32[64,16] {{
  %a = f32[8,16]{{1,0}} parameter(0)
  %start = ((f32[8,16]), f32[64,16], u32[]) async-start(%a), calls=%inner
  %update = ((f32[8,16]), f32[64,16], u32[]) async-update(%start), calls=%inner
  ROOT %done = f32[64,16]{{1,0}} async-done(%update), calls=%inner
}}
"""
    (found,) = wire.collectives(text)
    assert (found.kind, found.payload, found.times) == ("all-gather", 4096, 1)


def test_a_tpu_collective_in_flight_is_counted_where_it_starts(program):
    text = WRITE["read"]("fsdp.v5e-2x2")
    assert text.count(" all-gather(") > text.count('custom_call_target="AsyncCollectiveStart"') > 0
    gathers = [c for c in wire.collectives(text) if c.kind == "all-gather"]
    assert len(gathers) == 4  # two matrices, forth and back


def test_a_mesh_of_another_size_and_text_that_is_no_program_are_refused(program):
    module = program("data_parallel", "cpu")
    with pytest.raises(ValueError, match=r"compiled for 8 devices .* mesh \{'data': 4\} with 4"):
        wire.collectives(module, AbstractMesh((4,), ("data",)))
    with pytest.raises(ValueError, match="begins with 'HloModule'; got 'module @f'"):
        wire.bytes_sent("module @f")


def test_a_compiled_program_its_text_and_its_parsed_text_are_one():
    compiled = WRITE["compiled"]("data_parallel", jax.devices())
    text = compiled.as_text()
    assert wire.collectives(compiled) == wire.collectives(text) == wire.collectives(hlo.parse(text))


def _made_up(nbytes, axes=("worker",), branch=None):
    return wire.Collective(
        "all-reduce", "f32", nbytes, 1, 2, axes, 1, True, branch, "all-reduce.1", ""
    )


def test_branches_count_once_a_round_and_the_largest_step_takes_the_dearest_of_each_conditional():
    found = [
        _made_up(3.0),
        _made_up(40.0, branch=("switch", "first")),
        _made_up(8.0, branch=("switch", "first")),
        _made_up(60.0, branch=("switch", "second")),
        _made_up(500.0, branch=("other", "only")),
    ]
    assert wire.traffic(found, steps=4) == (3 + (40 + 8 + 60 + 500) / 4, 3 + 60 + 500)
    assert wire.traffic(found) == (611, 611)  # how often is not known: the most there can be


def test_a_round_of_workers_says_nothing_of_branches_that_concern_other_axes():
    both = _made_up(10.0, axes=("worker", "model"), branch=("c", "b"))
    alone = _made_up(7.0, axes=("model",), branch=("d", "b"))
    unknown = _made_up(5.0, axes=None, branch=("e", "b"))
    found = [both, alone, unknown]
    assert wire.traffic(found, steps=5, axis="worker") == (7 + 5 + 10 / 5, 7 + 5 + 10)
    assert wire.traffic([], steps=5) == (0, 0)
