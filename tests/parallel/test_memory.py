"""The peak of a device's memory: by hand on small programs, against the compiler on real ones."""

import gzip
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxopt_suite.parallel import hlo, memory
from jaxopt_suite.parallel.buffers import padded_bytes
from jaxopt_suite.parallel.hlo import Shape
from jaxopt_suite.parallel.meshes import make_mesh
from jaxopt_suite.parallel.train_step import make_train_step

K = 4 * 1024  # bytes of f32[1024]


def _peak(body: str, *, alias: str = "", others: str = "") -> memory.Memory:
    """The peak of a program whose entry has these lines."""
    header = f"HloModule m, is_scheduled=true{alias and f', input_output_alias={{ {alias} }}'}"
    entry = "ENTRY %main (p: f32[1024]) -> f32[1024] {\n" + body + "\n}\n"
    return memory.peak(hlo.parse(f"{header}\n\n{others}\n{entry}"))


def test_an_array_lives_from_its_making_to_its_last_use():
    # a and b are needed for c; when d is made only c is, besides the argument.
    found = _peak("""
  %p = f32[1024]{0} parameter(0)
  %a = f32[1024]{0} reverse(%p), dimensions={0}
  %b = f32[2048]{0} pad(%a), padding=0_1024
  %c = f32[4096]{0} concatenate(%b, %b), dimensions={0}
  ROOT %d = f32[1024]{0} slice(%c), slice={[0:1024]}""")
    assert found.total == K + 2 * K + 4 * K
    assert found.at == "c"


def test_an_elementwise_result_takes_the_place_of_an_operand_that_nobody_needs_any_more():
    last_use = _peak("""
  %p = f32[1024]{0} parameter(0)
  %a = f32[1024]{0} reverse(%p), dimensions={0}
  ROOT %b = f32[1024]{0} negate(%a)""")
    assert last_use.total == 2 * K
    used_again = _peak("""
  %p = f32[1024]{0} parameter(0)
  %a = f32[1024]{0} reverse(%p), dimensions={0}
  %b = f32[1024]{0} negate(%a)
  ROOT %c = f32[1024]{0} add(%a, %b)""")
    assert used_again.total == 3 * K


def test_views_and_tuples_need_nothing():
    found = _peak("""
  %p = f32[1024]{0} parameter(0)
  %v = f32[32,32]{1,0} bitcast(%p)
  %t = (f32[32,32]{1,0}, f32[1024]{0}) tuple(%v, %p)
  %g = f32[1024]{0} get-tuple-element(%t), index=1
  ROOT %r = f32[1024]{0} reverse(%g), dimensions={0}""")
    assert found.total == 2 * K


def test_a_donated_argument_and_its_result_are_one_array():
    body = """
  %p = f32[1024]{0} parameter(0)
  ROOT %r = f32[1024]{0} reverse(%p), dimensions={0}"""
    assert _peak(body).total == 2 * K
    assert _peak(body, alias="{}: (0, {}, may-alias)").total == K


def test_what_a_loop_carries_is_in_one_place_and_its_intermediate_results_come_on_top():
    loop = """
%cond (c: (s32[], f32[1024])) -> pred[] {
  %c = (s32[], f32[1024]{0}) parameter(0)
  %n = s32[] constant(3)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (b: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %b = (s32[], f32[1024]{0}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%j, %one)
  %x = f32[1024]{0} get-tuple-element(%b), index=1
  %wide = f32[8192]{0} pad(%x), padding=0_7168
  %y = f32[1024]{0} slice(%wide), slice={[0:1024]}
  ROOT %out = (s32[], f32[1024]{0}) tuple(%next, %y)
}
"""
    found = _peak(
        """
  %p = f32[1024]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = f32[1024]{0} reverse(%p), dimensions={0}
  %init = (s32[], f32[1024]{0}) tuple(%zero, %start)
  %w = (s32[], f32[1024]{0}) while(%init), condition=%cond, body=%body
  ROOT %r = f32[1024]{0} get-tuple-element(%w), index=1""",
        others=loop,
    )
    small = 4 + 4  # the counter, whose place %next takes; and %less is gone by then
    assert found.total == pytest.approx(K + K + 8 * K, abs=small)
    assert found.at == "wide"


def test_a_donated_argument_that_waits_for_its_new_value_is_lent_to_an_array_of_its_size():
    body = """
  %p = f32[1024]{{0}} parameter(0)
  %wide = f32[2048]{{0}} pad(%p), padding=0_1024
  %lent = f32[{size}]{{0}} slice(%wide), slice={{[0:{size}]}}
  %wider = f32[4096]{{0}} pad(%lent), padding=0_{rest}
  ROOT %r = f32[1024]{{0}} slice(%wider), slice={{[0:1024]}}"""
    donated = "{}: (0, {}, may-alias)"
    assert _peak(body.format(size=1024, rest=3072), alias=donated).total == K + 4 * K
    assert _peak(body.format(size=512, rest=3584), alias=donated).total == K + K // 2 + 4 * K


def test_an_updated_slice_is_written_in_place():
    found = _peak("""
  %p = f32[1024]{0} parameter(0)
  %big = f32[4096]{0} pad(%p), padding=0_3072
  %at = s32[] constant(7)
  %u = f32[4096]{0} dynamic-update-slice(%big, %p, %at)
  ROOT %r = f32[1024]{0} slice(%u), slice={[0:1024]}""")
    assert found.total == K + 4 * K + K


def test_a_branch_s_intermediate_results_do_not_add_to_those_of_the_other():
    branch = """
%{name} (a: f32[1024]) -> f32[1024] {{
  %a = f32[1024]{{0}} parameter(0)
  %wide.{name} = f32[{size}]{{0}} pad(%a), padding=0_1
  ROOT %back = f32[1024]{{0}} slice(%wide.{name}), slice={{[0:1024]}}
}}
"""
    found = _peak(
        """
  %p = f32[1024]{0} parameter(0)
  %which = s32[] constant(1)
  ROOT %r = f32[1024]{0} conditional(%which, %p, %p), branch_computations={%one, %two}""",
        others=branch.format(name="one", size=4096) + branch.format(name="two", size=8192),
    )
    # One result for both branches, there from the first one's end.
    assert found.total == K + 8 * K + K
    assert found.at in ("wide.two", "back")


def test_memory_on_the_chip_does_not_count_and_the_host_s_counts_apart():
    found = _peak("""
  %p = f32[1024]{0:T(1024)} parameter(0)
  %h = f32[2048]{0:T(1024)S(5)} parameter(1)
  %s = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%p)
  %d = f32[1024]{0:T(1024)S(1)} copy-done(%s)
  ROOT %r = f32[1024]{0:T(1024)} reverse(%d), dimensions={0}""")
    assert found.total == 2 * K
    assert found.host == 2 * K


@pytest.mark.parametrize(
    ("dtype", "dims", "layout", "expected"),
    [
        ("f32", (10, 100), "{1,0}", 10 * 100 * 4),
        ("f32", (10, 100), "{1,0:T(8,128)}", 16 * 128 * 4),
        ("f32", (10, 100), "{0,1:T(8,128)}", 104 * 128 * 4),  # the first dimension is the minor
        ("bf16", (3, 5, 200), "{2,1,0:T(8,128)(2,1)}", 3 * 8 * 256 * 2),
        ("f32", (), "{:T(128)}", 128 * 4),
        ("f32", (5,), "{0:T(1024)S(1)}", 1024 * 4),
        ("f32", (5,), "{0:T(8,128)}", 8 * 128 * 4),
        ("pred", (7,), "", 7),
    ],
)
def test_a_tiled_layout_fills_up_its_last_dimensions(dtype, dims, layout, expected):
    assert padded_bytes(Shape(dtype, dims, layout)) == expected


def test_a_program_without_an_order_is_refused():
    text = (
        "HloModule m\n\nENTRY %e (p: f32[2]) -> f32[2] {\n  ROOT %p = f32[2]{0} parameter(0)\n}\n"
    )
    with pytest.raises(ValueError, match="not scheduled"):
        memory.peak(hlo.parse(text))


# A multi-layer perceptron whose layers are looped over, wide enough that activations matter.
LAYERS, WIDTH, BATCH = 4, 128, 2048
SPLIT = {"into": None, "layers": PartitionSpec(None, None, "model")}


def _loss(params, batch):
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    x, _ = jax.lax.scan(layer, batch @ params["into"], params["layers"])
    return jnp.mean(jnp.square(x))


def _compiled(mesh_sizes, **options):
    params = {
        "into": jax.ShapeDtypeStruct((WIDTH, WIDTH), np.float32),
        "layers": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), np.float32),
    }
    step = make_train_step(_loss, optax.adamw(1e-3), make_mesh(mesh_sizes), **options)
    batch = jax.ShapeDtypeStruct((BATCH, WIDTH), np.float32)
    compiled = step.lower(params, batch).compile()
    return compiled, step.abstract_state(params)


def _shard_bytes(tree) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"data": 8}, {}),
        ({"data": 8}, {"shard_state_over": ("data",)}),
        ({"data": 2, "model": 4}, {"param_specs": SPLIT}),
        ({"data": 8}, {"accumulate": 4}),
        ({"data": 8}, {"remat": True}),
    ],
)  # fmt: skip
def test_the_peak_is_the_compiler_s_figure_and_the_state_is_exact(sizes, options):
    compiled, state = _compiled(sizes, **options)
    found = memory.peak(hlo.parse(compiled.as_text()))
    # Where XLA on CPU lends donated arguments to other arrays we follow it in part: seen 6 % more.
    assert found.total == pytest.approx(memory.compiler_figures(compiled, "cpu")["sum"], rel=0.1)
    assert found.parts["parameters"] == _shard_bytes(state.params)
    assert found.parts["optimizer state"] == _shard_bytes(state.opt_state)


def test_gradients_and_activations_are_told_apart():
    compiled, _ = _compiled({"data": 8})
    shapes = {(WIDTH, WIDTH), (LAYERS, WIDTH, WIDTH)}
    found = memory.peak(hlo.parse(compiled.as_text()), gradient_shapes=shapes)
    residual = LAYERS * (BATCH // 8) * WIDTH * 4  # tanh of every layer, kept for the backward pass
    # XLA on CPU keeps three copies of them, and a layer's inputs; the factor leaves room for that.
    assert residual <= found.parts["activations"] <= 4 * residual
    assert found.parts["gradients"] >= LAYERS * WIDTH * WIDTH * 4
    assert sum(found.parts.values()) == found.total == sum(a.nbytes for a in found.arrays)


# The largest that the compiler says is held, as tests/parallel/plans/write.py printed it.
TPU_PEAKS = {
    "data.v5e-2x2": 960505856,
    "data-model.v5e-2x2": 1052782592,
    "zero1-remat.v5e-2x2": 911227904,
}


def _stored(name: str) -> memory.Memory:
    path = pathlib.Path(__file__).parent / "plans" / f"{name}.txt.gz"
    shapes = {(1024, 1024), (4, 1024, 1024), (4, 1024, 512)}
    return memory.peak(
        hlo.parse(gzip.decompress(path.read_bytes()).decode()), gradient_shapes=shapes
    )


@pytest.mark.parametrize("name", TPU_PEAKS)
def test_on_a_tpu_the_peak_is_the_compiler_s_own(name):
    # A few kilobytes of constants and of the compiler's own are not in the program.
    assert _stored(name).total == pytest.approx(TPU_PEAKS[name], rel=1e-4)


def test_the_parts_on_a_tpu_are_those_of_the_layout():
    mib = 2**20
    whole = 5 * 4 * mib  # five matrices of 1024 by 1024
    counter = 512  # an integer fills a tile
    data, split = _stored("data.v5e-2x2").parts, _stored("data-model.v5e-2x2").parts
    assert data["parameters"] == whole
    assert data["optimizer state"] == 2 * whole + counter
    assert data["batch"] == 64 * mib  # a quarter of 65536 rows
    assert split["parameters"] == whole - 8 * mib  # half of every layer's
    assert _stored("zero1-remat.v5e-2x2").parts["optimizer state"] == 2 * whole // 4 + counter
    assert data["activations"] >= 2 * 4 * 64 * mib  # what goes into and out of every layer's tanh


def test_what_is_computed_again_for_the_backward_pass_is_activations():
    kept, again = _stored("data.v5e-2x2").parts, _stored("zero1-remat.v5e-2x2").parts
    # With the whole loss computed again, as much is held as if it had been kept.
    assert again["activations"] >= kept["activations"]
