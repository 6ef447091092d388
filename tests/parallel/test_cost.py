"""Operations and memory traffic of programs, against the compiler's figures and closed forms."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from jaxopt_suite.parallel import cost, hlo

WRITE = runpy.run_path(str(pathlib.Path(__file__).parent / "programs" / "write.py"))
LAYERS, WIDTH, HIDDEN, BATCH = (WRITE[name] for name in ("LAYERS", "WIDTH", "HIDDEN", "BATCH"))
DEVICES = {"h100": 8, "v5e-2x2": 4, "v5p-2x2x2": 8}


def _array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _compiled(f, *arguments, **options):
    return jax.jit(f, **options).lower(*arguments).compile()


def _module(f, *arguments, **options):
    return hlo.parse(_compiled(f, *arguments, **options).as_text())


def _conv(x, kernel, strides=(1, 1), padding="SAME", **options):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=layout, **options
    )


IMAGE, KERNEL = _array(4, 15, 16, 8), _array(3, 5, 8, 16)


@pytest.mark.parametrize(
    ("f", "arguments"),
    [
        (jnp.matmul, (_array(64, 96), _array(96, 32))),
        (jnp.matmul, (_array(8, 64, 96), _array(8, 96, 32))),
        (lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k), (_array(4, 64, 4, 32),) * 2),
        (
            lambda p, v: jnp.einsum("bhqk,bkhd->bqhd", p, v),
            (_array(2, 4, 8, 8), _array(2, 8, 4, 6)),
        ),
        (_conv, (IMAGE, KERNEL)),
        (lambda x, k: _conv(x, k, (2, 3), "VALID"), (IMAGE, KERNEL)),
        (lambda x, k: _conv(x, k, rhs_dilation=(2, 3)), (IMAGE, KERNEL)),
        (lambda x, k: _conv(x, k, padding=((1, 1), (4, 2)), lhs_dilation=(2, 1)), (IMAGE, KERNEL)),
        (lambda x, k: _conv(x, k, feature_group_count=4), (IMAGE, _array(3, 3, 2, 16))),
        (lambda x, k: _conv(x, k, batch_group_count=2), (IMAGE, _array(3, 3, 8, 16))),
    ],
)
def test_products_and_convolutions_count_as_the_compiler_counts_them(f, arguments):
    compiled = _compiled(f, *arguments)
    found = cost.flops(hlo.parse(compiled.as_text()))
    assert (found.total, found.uncounted, found.exact) == (
        compiled.cost_analysis()["flops"],
        {},
        True,
    )


def _layers(n, unroll=1):
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w, unroll=unroll)[0]

    return _module(f, _array(16, 32), _array(n, 32, 32))


def test_a_scan_of_eight_layers_computes_eight_times_one_layer():
    one = 2 * 16 * 32 * 32
    assert cost.flops(_layers(1)).total == one
    assert cost.flops(_layers(8)).total == 8 * one
    assert cost.flops(_layers(8, unroll=8)).total == 8 * one


def test_a_gradient_computes_two_products_more_for_each():
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w))
    module = _module(jax.grad(loss, argnums=(0, 1)), _array(32, 48), _array(16, 32))
    assert cost.flops(module).total == 3 * 2 * 16 * 32 * 48


@pytest.mark.parametrize("target", ["h100", "v5e-2x2", "v5p-2x2x2"])
@pytest.mark.parametrize(
    ("case", "products"),
    [
        ("data_parallel", 5),  # two forth, three back: none for the gradient of the input
        ("zero1", 5),
        ("fsdp", 7 * LAYERS),  # two forth, four back, and one of the two forth again
        ("tensor_parallel", 6 * LAYERS),
    ],
)
def test_products_of_tpu_and_gpu_programs_are_those_of_the_algorithm(case, products, target):
    found = cost.flops(hlo.parse(WRITE["read"](f"{case}.{target}")))
    work = products * 2 * BATCH * WIDTH * HIDDEN
    assert (found.total, found.uncounted, found.exact) == (work / DEVICES[target], {}, True)


@pytest.mark.parametrize(
    ("target", "form"), [("v5e-2x2", "lhs_dilate="), ("h100", "__cublas$lt$matmul")]
)
def test_products_in_the_forms_of_tpus_and_gpu_libraries_are_counted(target, form):
    text = WRITE["read"](f"products.{target}")
    assert form in text  # a batch dimension as a dilated convolution; a call of cuBLAS
    work = 2 * 64 * WIDTH * HIDDEN + 2 * 4 * 4 * 64 * 64 * 32
    assert cost.flops(hlo.parse(text)) == cost.Flops(work, {}, True)


def _main(*lines, tile=""):
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.parse(
        f"""HloModule main
%taken (p: f32[1000], i: s32[]) -> f32[10] {{
  %p = f32[1000]{{0}} parameter(0)
  %i = s32[] parameter(1)
  ROOT %slice = f32[10]{{0}} dynamic-slice(%p, %i), dynamic_slice_sizes={{10}}
}}
ENTRY %main (a: f32[1000], i: s32[]) -> f32[] {{
  %a = f32[1000]{{0{tile}}} parameter(0)
  %i = s32[] parameter(1)
{body}
}}
"""
    )


def test_what_cannot_be_counted_is_named():
    found = cost.flops(
        _main(
            '%k = f32[1000]{0} custom-call(%a), custom_call_target="tpu_custom_call"',
            '%l = f32[1000]{0} custom-call(%k), custom_call_target="tpu_custom_call"',
            '%m = f32[1000]{0} custom-call(%l), custom_call_target="MoveToHost"',
            "ROOT %f = c64[501]{0} fft(%m), fft_type=RFFT, fft_length={1000}",
        )
    )
    assert found == cost.Flops(0.0, {"tpu_custom_call": 2, "fft": 1}, True)


def test_products_in_a_loop_of_unknown_length_are_labelled():
    loop = lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ x, x)
    found = cost.flops(_module(loop, _array(16, 16)))
    assert (found.total, found.exact) == (2 * 16**3, False)


def test_an_elementwise_update_reads_its_inputs_and_writes_its_output_once():
    n = 128 * 1024
    update = lambda p, m, v: p - 0.1 * m / (jnp.sqrt(v) + 1e-8)
    assert cost.hbm_bytes(_module(update, *[_array(n)] * 3)) == (3 + 1) * 4 * n


def test_slices_gathers_and_updates_move_what_they_touch_and_not_the_table():
    table, row, index = _array(50_000, 512), 4 * 512, _array(dtype=jnp.int32)
    taken = _module(lambda t, i: jax.lax.dynamic_slice_in_dim(t, i, 8) * 2, table, index)
    assert cost.hbm_bytes(taken) == 2 * 8 * row + 4
    put = _module(
        lambda t, u, i: jax.lax.dynamic_update_slice_in_dim(t, u * 2, i, 0),
        *(table, _array(8, 512), index),
        donate_argnums=0,
    )
    assert cost.hbm_bytes(put) == 2 * 8 * row + 4
    indices = _array(128, dtype=jnp.int32)
    rows = _module(lambda t, i: t[i], table, indices)
    assert 2 * 128 * row < cost.hbm_bytes(rows) < 2.1 * 128 * row  # and the indices, twice or so
    add = _module(
        lambda t, i, u: t.at[i].add(u), table, indices, _array(128, 512), donate_argnums=0
    )
    assert 3 * 128 * row < cost.hbm_bytes(add) < 3.1 * 128 * row


def test_a_scan_reads_each_layer_once_and_not_all_layers_in_each_turn():
    stack, x = 32 * 32 * 4, 16 * 32 * 4
    eight, sixteen = (cost.hbm_bytes(_layers(n)) for n in (8, 16))
    # A turn: the layer is taken out of the stack and read, and the product and its tanh move x.
    assert 3 * stack <= (sixteen - eight) / 8 <= 3 * stack + 8 * x


def test_buffers_on_the_chip_of_a_tpu_are_not_memory_traffic_and_those_of_gpus_are():
    prefetch = (
        "%s = (f32[1000]{0:T(128)S(1)}, f32[1000]{0:T(128)}, u32[]{:S(2)}) copy-start(%a)",
        "%d = f32[1000]{0:T(128)S(1)} copy-done(%s)",
        "%n = f32[1000]{0:T(128)S(1)} negate(%d)",
        "ROOT %o = f32[1000]{0:T(128)} negate(%n)",
    )
    assert cost.hbm_bytes(_main(*prefetch, tile=":T(128)")) == 4000 + 4000
    untiled = (line.replace(":T(128)S(1)", ":S(1)").replace(":T(128)", "") for line in prefetch)
    assert cost.hbm_bytes(_main(*untiled)) == 6 * 4000
    host = "ROOT %h = f32[1000]{0:S(5)} copy(%a)"
    assert cost.hbm_bytes(_main(host)) == 4000


def test_a_fusion_reads_what_it_takes_also_through_another_fusion_or_asynchronously():
    direct = "ROOT %f = f32[10]{0} fusion(%a, %i), kind=kLoop, calls=%taken"
    assert cost.hbm_bytes(_main(direct)) == 40 + 40 + 4
    start = "%s = ((f32[1000]{0}, s32[]), f32[10]{0}, u32[]) dynamic-slice-start(%a, %i)"
    done = "ROOT %d = f32[10]{0} dynamic-slice-done(%s)"
    assert cost.hbm_bytes(_main(start, done)) == 40 + 40 + 4


def test_a_collective_reads_its_operand_and_writes_its_result_in_either_form():
    sync = "ROOT %r = f32[8000]{0} all-gather(%a), dimensions={0}"
    assert cost.hbm_bytes(_main(sync)) == 4000 + 32000
    start = "%s = (f32[1000]{0}, f32[8000]{0}) all-gather-start(%a), dimensions={0}"
    done = "ROOT %d = f32[8000]{0} all-gather-done(%s)"
    assert cost.hbm_bytes(_main(start, done)) == 4000 + 32000


def test_a_tpu_collective_in_flight_moves_its_data_once():
    shards = LAYERS * 4 * 2 * WIDTH * HIDDEN // 4
    moved = cost.hbm_bytes(hlo.parse(WRITE["read"]("fsdp.v5e-2x2")))
    # All that does not fit on the chip: the parameters come in, and the new ones go out.
    assert 2 * shards <= moved <= 1.5 * 2 * shards
