"""The reader of optimised HLO text: what it makes of the grammar, and how it counts executions."""

import pathlib
import re
import runpy
import time

import jax
import jax.numpy as jnp
import pytest

from jaxopt_suite.parallel import hlo

PROGRAMS = pathlib.Path(__file__).parent / "programs"
WRITE = runpy.run_path(str(PROGRAMS / "write.py"))
STORED = sorted({file.name.split(".txt")[0] for file in PROGRAMS.glob("*.txt*")})

TEXT = """HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), \
{1,2}: (3, {1}, must-alias) }, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, num_partitions=8

FileNames
1 "step.py"

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main.1_spmd (x: f32[8]) -> (f32[8], (s4[3,5], pred[])) {
  %x = f32[8]{0:T(128)S(1)} parameter(0), metadata={op_name="f(x)=\\"y\\", body=z" stack_frame_id=1}
  %table = f32[2,2]{1,0} constant({ { 1, 2 },
    { 3, (4) } })
  %start = ((f32[8]{0:T(128)}, /*index=1*/f32[8]{0}), bf16[2,4]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
all-reduce-start(f32[8]{0:T(128)S(1)} %x, /*index=1*/%x), replica_groups=[2,4]<=[8], to_apply=%add
  %loop.2 = (f32[8]{0}) while(%start), condition=%add, body=%add, metadata={op_name="calls=%no"}
  ROOT %out = (f32[8]{0}, (s4[3,5]{1,0}, pred[])) fusion(x, f32[2,2]{1,0} table), kind=kLoop, \
calls=%add
}, execution_thread="main"
"""


def test_the_header_of_a_module_is_read():
    module = hlo.parse(TEXT)
    assert (module.name, module.entry) == ("jit_step", "main.1_spmd")
    assert (module.num_partitions, module.is_scheduled) == (8, True)
    assert module.input_output_alias == (
        hlo.Alias((0,), 0, (), "may-alias"),
        hlo.Alias((1, 2), 3, (1,), "must-alias"),
    )
    assert list(module.computations) == ["add", "main.1_spmd"]


def test_instructions_are_read_with_their_shapes_operands_and_calls():
    entry = hlo.parse(TEXT).computations["main.1_spmd"]
    x, table, start, loop, out = entry.instructions
    assert x.op_name == """f(x)=\\"y\\", body=z"""
    assert x.called == ()
    assert x.shapes == (hlo.Shape("f32", (8,), "{0:T(128)S(1)}"),)
    assert x.shapes[0].memory_space == 1
    assert (table.arguments, table.operands) == ("{ { 1, 2 },    { 3, (4) } }", ())
    assert [s.dtype for s in start.shapes] == ["f32", "f32", "bf16", "u32"]
    assert start.shapes[2].layout == "{1,0:T(8,128)(2,1)}"
    assert start.operands == ("x", "x")
    assert start.called == ("add",)
    assert (loop.computation("body"), loop.computation("condition")) == ("add", "add")
    assert loop.called == ("add", "add")
    assert out.operands == ("x", "table")
    assert [s.dims for s in out.shapes] == [(8,), (3, 5), ()]
    assert entry.root is out
    assert entry.parameters == (x,)
    assert [user.name for user in entry.users["x"]] == ["start", "out"]


@pytest.mark.parametrize(
    ("dtype", "nbytes"),
    [
        ("f32", 60),
        ("bf16", 30),
        ("pred", 15),
        ("s4", 8),
        ("u4", 8),
        ("f4e2m1fn", 8),
        ("f8e4m3fn", 15),
        ("c64", 120),
        ("token", 0),
    ],
)
def test_bytes_of_a_shape_are_exact_and_unpadded(dtype, nbytes):
    assert hlo.Shape(dtype, (3, 5), "{1,0:T(8,128)}").nbytes == nbytes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got ''"),
        ("module @jit_f attributes {}", r"got 'module @jit_f attributes \{\}' \(StableHLO: comp"),
        ("HloModule empty\n", "HloModule empty has no ENTRY|HLO module empty has no ENTRY"),
        ("HloModule m\nENTRY %main () -> f32[] {\n  %x = nonsense\n}\n", "not an HLO instruction"),
        ("HloModule m\nENTRY %main () -> f32[] {\n  %x = f32[] f(((\n}\n", "do not close"),
    ],
)
def test_text_that_is_not_optimised_hlo_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        hlo.parse(text)


def test_bytes_are_refused_for_text():
    with pytest.raises(TypeError, match="expected HLO text, got bytes"):
        hlo.parse(b"HloModule m")


LOOP = """HloModule loop
%compared (p.0: s32[], p.1: s32[]) -> pred[] {{
  %p.0 = s32[] parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %less = pred[] compare(%p.0, %p.1), direction={direction}
}}
%cond (c: (s32[], f32[], s32[])) -> pred[] {{
  %c = (s32[], f32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %constant = s32[] constant({bound})
  %carried = s32[] get-tuple-element(%c), index=2
  {condition}
}}
%body (b: (s32[], f32[], s32[])) -> (s32[], f32[], s32[]) {{
  %b = (s32[], f32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[] get-tuple-element(%b), index=1
  %n = s32[] get-tuple-element(%b), index=2
  %step = s32[] constant({step})
  %next = s32[] add(%step, %i)
  ROOT %out = (s32[], f32[], s32[]) tuple(%next, %x, {kept})
}}
ENTRY %main (x: f32[]) -> (s32[], f32[], s32[]) {{
  %x = f32[] parameter(0)
  %zero = s32[] constant({init})
  %begin = s32[] copy(%zero)
  %end = s32[] constant({bound})
  %tuple = (s32[], f32[], s32[]) tuple(%begin, %x, %end)
  ROOT %loop = (s32[], f32[], s32[]) while(%tuple), condition=%cond, body=%body{notes}
}}
"""
PLAIN = "ROOT %less = pred[] compare(%i, %constant), direction={direction}"
FLIPPED = "ROOT %less = pred[] compare(%constant, %i), direction={direction}"
CARRIED = "ROOT %less = pred[] compare(%i, %carried), direction={direction}"
FUSED = "ROOT %less = pred[] fusion(%i, %constant), kind=kLoop, calls=%compared"
DATA = 'ROOT %less = pred[] custom-call(%i), custom_call_target="whatever"'


NOTE = ', backend_config={"known_trip_count":{"n":"9"}}'


def _loop(init, step, bound, direction="LT", condition=PLAIN, kept="%n", notes=""):
    values = {"init": init, "step": step, "bound": bound, "direction": direction}
    return LOOP.format(condition=condition.format(**values), kept=kept, notes=notes, **values)


@pytest.mark.parametrize(
    ("text", "trips"),
    [
        (_loop(0, 1, 7), 7),
        (_loop(0, 2, 7), 4),
        (_loop(3, 1, 3), 0),
        (_loop(5, 1, 3), 0),
        (_loop(0, 3, 6, "LE"), 3),
        (_loop(9, -2, 0, "GT"), 5),
        (_loop(9, -2, 1, "GE"), 5),
        (_loop(0, 2, 8, "NE"), 4),
        (_loop(0, 1, 7, "GT", FLIPPED), 7),
        (_loop(0, 1, 7, condition=CARRIED), 7),
        (_loop(9, 2**32 - 2, 1, "GT").replace("s32", "u32"), 4),
        (_loop(0, 1, 7, condition=FUSED), 7),
        (
            _loop(0, 1, 7, condition=DATA, notes=', backend_config={"known_trip_count":{"n":"9"}}'),
            9,
        ),
    ],
)
def test_trips_of_a_loop_are_read_from_its_text(text, trips):
    times = hlo.executions(hlo.parse(text))
    assert times["body"] == hlo.Times(trips, True, None)
    assert times["cond"] == hlo.Times(trips + 1, True, None)


@pytest.mark.parametrize(
    "text",
    [
        _loop(0, 1, 7, condition=DATA),
        _loop(0, 1, 7, condition=CARRIED, kept="%next"),  # the bound moves with the counter
        _loop(0, 3, 7, "NE"),  # steps over its bound
        _loop(9, 2**32 - 2, 0, "GT").replace("s32", "u32"),  # 9, 7, ..., 1, 4294967295, ...
        _loop(0, 1, 7).replace("s32", "f32"),  # rounds
        _loop(0, 0, 7),
        _loop(0, -1, 7),
    ],
)
def test_a_loop_that_ends_when_data_say_counts_once_and_is_labelled(text):
    assert hlo.executions(hlo.parse(text))["body"] == hlo.Times(1, False, None)


@pytest.mark.parametrize(
    ("kept", "trips"), [("%m", hlo.Times(5 * 7, True, None)), ("%j", hlo.Times(5, False, None))]
)
def test_a_bound_in_the_unchanging_carry_of_an_outer_loop_is_followed(kept, trips):
    inner, _, _ = _loop(0, 1, 7, condition=CARRIED).partition("ENTRY")
    text = (
        inner
        + f"""
%outer_cond (d: (s32[], s32[])) -> pred[] {{
  %d = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%d), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%j, %five), direction=LT
}}
%outer_body (e: (s32[], s32[])) -> (s32[], s32[]) {{
  %e = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%e), index=0
  %m = s32[] get-tuple-element(%e), index=1
  %zero = s32[] constant(0)
  %one = s32[] constant(1)
  %x = f32[] constant(0)
  %tuple = (s32[], f32[], s32[]) tuple(%zero, %x, %m)
  %loop = (s32[], f32[], s32[]) while(%tuple), condition=%cond, body=%body
  %next = s32[] add(%j, %one)
  ROOT %out = (s32[], s32[]) tuple(%next, {kept})
}}
ENTRY %main () -> (s32[], s32[]) {{
  %nought = s32[] constant(0)
  %seven = s32[] constant(7)
  %begin = (s32[], s32[]) tuple(%nought, %seven)
  ROOT %outer = (s32[], s32[]) while(%begin), condition=%outer_cond, body=%outer_body
}}
"""
    )
    assert hlo.executions(hlo.parse(text))["body"] == trips


def test_trips_of_live_loops_are_those_python_counts():
    def program(x):
        x = jax.lax.fori_loop(2, 9, lambda i, x: jnp.sin(x) * i, x)
        goes_on = lambda c: c[0] > jnp.uint32(3)
        x = jax.lax.while_loop(goes_on, lambda c: (c[0] - 5, jnp.cos(c[1])), (jnp.uint32(40), x))[1]
        inner = lambda x, w: (jax.lax.scan(lambda x, v: (jnp.tan(x * v), None), x, w)[0], None)
        return jax.lax.scan(inner, x, jnp.ones((3, 4)))[0]

    module = hlo.parse(jax.jit(program).lower(1.0).compile().as_text())
    times = hlo.executions(module)
    counts = {
        opcode: sum(
            times[c.name].count * sum(i.opcode == opcode for i in c.instructions)
            for c in module.computations.values()
            if c.name in times
        )
        for opcode in ("sine", "cosine", "tan")
    }
    assert counts == {"sine": 7, "cosine": len(range(40, 3, -5)), "tan": 3 * 4}


def test_branches_are_labelled_and_shared_functions_add_up():
    text = """HloModule m
%leaf (l: f32[]) -> f32[] {
  ROOT %l = f32[] parameter(0)
}
%yes (y: f32[]) -> f32[] {
  %y = f32[] parameter(0)
  %inner = f32[] call(%y), to_apply=%only
  ROOT %call = f32[] call(%inner), to_apply=%leaf
}
%only (o: f32[]) -> f32[] {
  ROOT %o = f32[] parameter(0)
}
ENTRY %main (p: pred[], x: f32[]) -> f32[] {
  %p = pred[] parameter(0)
  %x = f32[] parameter(1)
  %a = f32[] fusion(%x), kind=kLoop, calls=%leaf
  %sum = f32[] reduce(%a, %x), dimensions={}, to_apply=%unused
  ROOT %branch = f32[] conditional(%p, %x, %x), true_computation=%yes, false_computation=%leaf
}
%unused (u: f32[]) -> f32[] {
  ROOT %u = f32[] parameter(0)
}
"""
    times = hlo.executions(hlo.parse(text))
    assert times["yes"] == hlo.Times(1, True, ("branch", "yes"))
    assert times["only"] == hlo.Times(1, True, ("branch", "yes"))
    # The fusion, the call in one branch, the other branch.
    assert times["leaf"] == hlo.Times(3, True, ("branch", "leaf"))
    assert "unused" not in times


@pytest.mark.parametrize("name", STORED)
def test_stored_programs_of_every_backend_are_read_whole(name):
    text = WRITE["read"](name)
    module = hlo.parse(text)
    lines = re.findall(r"^ +(?:ROOT )?%[\w.\-]+ = ", text, re.MULTILINE)
    assert sum(len(c.instructions) for c in module.computations.values()) == len(lines)
    for computation in module.computations.values():
        assert computation.root
        for instruction in computation.instructions:
            assert set(instruction.operands) <= set(computation.by_name)
            assert set(instruction.called) <= set(module.computations)
            assert instruction.shapes


@pytest.mark.parametrize("name", [n for n in STORED if n.startswith(("fsdp", "tensor"))])
def test_the_scan_over_layers_turns_once_a_layer_on_every_backend(name):
    module = hlo.parse(WRITE["read"](name))
    times = hlo.executions(module)
    loops = [i for c in module.computations.values() for i in c.instructions if i.opcode == "while"]
    assert [times[loop.computation("body")] for loop in loops] == [
        hlo.Times(WRITE["LAYERS"], True, None)
    ] * 2


def test_a_text_of_megabytes_is_read_in_seconds():
    header, body = WRITE["read"]("fsdp.v5e-2x2").split("\n\n", 1)
    text = header + "\n\n" + body * (8_000_000 // len(body))
    begin = time.perf_counter()
    hlo.parse(text)
    assert time.perf_counter() - begin < 8  # 0.5 s were measured
