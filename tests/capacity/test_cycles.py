"""capacity/cycles.py on HLO texts as libtpu writes them, shortened to what is read."""

import pytest

from capacity.chips import CHIPS
from capacity.cycles import CycleCount, count_cycles
from capacity.hlo import parse, trip_count

V5E = CHIPS["v5e"]

LOOP = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,8]{1,0})->f32[8,8]{1,0}}

FileNames
1 "f.py"

%inside (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %tanh.1 = f32[8,8]{1,0:T(8,128)} tanh(%p), backend_config={"window_config":{"estimated_cycles":"999"}}
}

%body (carried: (s32[], f32[8,8], s32[])) -> (s32[], f32[8,8], s32[]) {
  %one = s32[]{:T(128)} constant(1)
  %carried = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carried), index=0
  %copied = s32[]{:T(128)S(6)} copy(%i)
  %next = s32[]{:T(128)} add(%copied, %one)
  %x = f32[8,8]{1,0:T(8,128)} get-tuple-element(%carried), index=1
  %fused = f32[8,8]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%inside, \
metadata={op_name="jit(f)/while/body/resnet/tanh" stack_frame_id=5}, backend_config={"estimated_cycles":"100"}
  %limit = s32[]{:T(128)} get-tuple-element(%carried), index=2
  ROOT %out = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%next, %fused, %limit)
}

%condition (carried.1: (s32[], f32[8,8], s32[])) -> pred[] {
  %carried.1 = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carried.1), index=0
  %limit.1 = s32[]{:T(128)} get-tuple-element(%carried.1), index=2
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit.1), direction=LT
}

ENTRY %main (x.1: f32[8,8], n: s32[]) -> f32[8,8] {
  %zero = s32[]{:T(128)} constant(0)
  %START = s32[]{:T(128)} copy(%zero)
  %seven = s32[]{:T(128)} constant(7)
  %n = s32[]{:T(128)} parameter(1)
  %x.1 = f32[8,8]{1,0:T(8,128)} parameter(0)
  %copy-start = (f32[8,8]{1,0:T(8,128)S(1)}, f32[8,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x.1)
  %first = f32[8,8]{1,0:T(8,128)} copy(%x.1), metadata={op_name="x"}, backend_config={"estimated_cycles":"10"}
  %tuple = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%START, %first, %LIMIT)
  %while = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}, s32[]{:T(128)}) while(%tuple), condition=%condition, body=%body
  ROOT %y = f32[8,8]{1,0:T(8,128)} get-tuple-element(%while), index=1
}
"""


def cycles_of(text: str) -> CycleCount:
    return count_cycles(text, V5E)


def loop(limit: str) -> str:
    return LOOP.replace("%START", "%start").replace("%LIMIT", limit)


def test_a_loops_body_counts_once_for_each_iteration() -> None:
    count = cycles_of(loop("%seven"))
    assert count.cycles == {"jit(f)/while/body/resnet/tanh": 700, "x": 10}
    assert (count.total, count.open_loops) == (710, 0)


def test_a_loop_of_unknown_length_counts_once_and_is_reported() -> None:
    count = cycles_of(loop("%n"))
    assert (count.total, count.open_loops) == (110, 1)


def test_a_loop_that_counts_in_other_steps_is_of_unknown_length() -> None:
    text = loop("%seven").replace("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(2)")
    assert cycles_of(text).open_loops == 1


def test_iterations_count_from_where_the_counter_starts() -> None:
    computations, entry = parse(loop("%seven").replace("constant(0)", "constant(3)"))
    around = computations[entry]
    assert trip_count(around.instructions["while"], around, computations) == 4


def test_a_known_trip_count_is_believed() -> None:
    known = 'body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    assert cycles_of(loop("%n").replace("body=%body", known)).total == 310


def test_loops_in_loops_multiply() -> None:
    inner = loop("%seven").split("ENTRY")[0]
    outer = """\
%body.2 (c: (s32[], s32[])) -> (s32[], s32[]) {
  %c = (s32[], s32[]) parameter(0)
  %one.2 = s32[] constant(1)
  %j = s32[] get-tuple-element(%c), index=0
  %next.2 = s32[] add(%j, %one.2)
  %zero.2 = s32[] constant(0)
  %seven.2 = s32[] constant(7)
  %x.2 = f32[8,8] constant({...})
  %t.2 = (s32[], f32[8,8], s32[]) tuple(%zero.2, %x.2, %seven.2)
  %while.2 = (s32[], f32[8,8], s32[]) while(%t.2), condition=%condition, body=%body
  ROOT %out.2 = (s32[], s32[]) tuple(%next.2, %next.2)
}

%condition.2 (d: (s32[], s32[])) -> pred[] {
  %five = s32[] constant(5)
  %d = (s32[], s32[]) parameter(0)
  %k = s32[] get-tuple-element(%d), index=0
  ROOT %less.2 = pred[] compare(%k, %five), direction=LT
}

ENTRY %main.2 () -> s32[] {
  %zero.3 = s32[] constant(0)
  %t.3 = (s32[], s32[]) tuple(%zero.3, %zero.3)
  %while.3 = (s32[], s32[]) while(%t.3), condition=%condition.2, body=%body.2
  ROOT %r = s32[] get-tuple-element(%while.3), index=0
}
"""
    assert cycles_of(inner + outer).total == 5 * 7 * 100


def test_a_conditional_counts_as_its_most_expensive_branch() -> None:
    text = """\
%expensive (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  ROOT %b = f32[8] negate(%a), backend_config={"estimated_cycles":"50"}
}

%cheap (d: f32[8]) -> f32[8] {
  %d = f32[8] parameter(0)
  ROOT %e = f32[8] copy(%d), backend_config={"estimated_cycles":"5"}
}

ENTRY %main (p: s32[], x: f32[8]) -> f32[8] {
  %p = s32[] parameter(0)
  %x = f32[8] parameter(1)
  ROOT %c = f32[8] conditional(%p, %x, %x), branch_computations={%cheap, %expensive}
}
"""
    assert cycles_of(text).total == 50


def test_kernels_are_counted_apart_and_what_has_no_estimate_is_reported() -> None:
    text = """\
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  %room = f32[8] custom-call(), custom_call_target="AllocateBuffer"
  %k = f32[8] custom-call(%x), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/self-attention/pallas_call"}
  %k2 = f32[8] custom-call(%k), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/self-attention/pallas_call"}, backend_config={"estimated_cycles":"40"}
  %e = f32[8] fusion(%k2), kind=kOutput, calls=%none, backend_config={"estimated_cycles":"9223372036854775807"}
  %s = f32[8] sort(%e), dimensions={0}, to_apply=%compare
  ROOT %all = f32[32] all-gather(%s), dimensions={0}
}
"""
    count = cycles_of(text)
    assert count.kernels == {"jit(f)/self-attention/pallas_call": 2}
    assert count.kernel_cycles == {"jit(f)/self-attention/pallas_call": 40}
    assert count.unpriced == {"fusion": 1, "sort": 1, "all-gather": 1}
    assert count.total == 40


def test_a_custom_call_without_an_estimate_is_reported_by_its_target() -> None:
    text = """\
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  %joined = f32[8] custom-call(%x, %x), custom_call_target="ConcatBitcast", backend_config={"flag_configs":[]}
  ROOT %most = f32[8] custom-call(%joined), custom_call_target="PartialReduce"
}
"""
    assert cycles_of(text).unpriced == {"custom-call PartialReduce": 1}


def test_line_breaks_in_an_instruction_end_no_computation() -> None:
    """As in the metadata of splash attention."""
    text = """\
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  %k = f32[8] custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(f)/self-attention/pallas_call"}, backend_config={"estimated_cycles":"40"}
  ROOT %y = f32[8] negate(%k), backend_config={"estimated_cycles":"50"}
}
"""
    count = cycles_of(text)
    assert (count.cycles.total(), count.kernel_cycles) == (50, {"jit(f)/self-attention/pallas_call": 40})


@pytest.mark.parametrize("estimate, cycles", [("100", 1024), ("5000", 5000)])
def test_a_fusion_costs_no_less_than_the_products_nested_in_it(estimate: str, cycles: int) -> None:
    text = f"""\
%inner (a: bf16[2,512,128], w: bf16[128,256,1]) -> bf16[2,512,256] {{
  %a = bf16[2,512,128]{{2,1,0:T(8,128)(2,1)}} parameter(0)
  %w = bf16[128,256,1]{{1,0,2:T(8,128)(2,1)}} parameter(1)
  ROOT %p = bf16[2,512,256]{{2,1,0:T(8,128)(2,1)}} convolution(%a, %w), window={{size=1}}, dim_labels=0bf_io0->0bf
}}

%outer (b: bf16[2,512,128], x: bf16[128,256,1]) -> bf16[2,512,128] {{
  %b = bf16[2,512,128]{{2,1,0:T(8,128)(2,1)}} parameter(0)
  %x = bf16[128,256,1]{{1,0,2:T(8,128)(2,1)}} parameter(1)
  %first = bf16[2,512,256]{{2,1,0:T(8,128)(2,1)}} fusion(%b, %x), kind=kOutput, calls=%inner
  ROOT %q = bf16[2,512,128]{{2,1,0:T(8,128)(2,1)}} convolution(%first, %x), window={{size=1}}, dim_labels=0bf_oi0->0bf
}}

ENTRY %main (c: bf16[2,512,128], y: bf16[128,256,1]) -> bf16[2,512,128] {{
  %c = bf16[2,512,128]{{2,1,0:T(8,128)(2,1)}} parameter(0)
  %y = bf16[128,256,1]{{1,0,2:T(8,128)(2,1)}} parameter(1)
  ROOT %both = bf16[2,512,128]{{2,1,0:T(8,128)(2,1)}} fusion(%c, %y), kind=kOutput, calls=%outer, \
backend_config={{"estimated_cycles":"{estimate}"}}
}}
"""
    assert cycles_of(text).total == cycles  # 2 products of 1024 x 128 x 256 on 4 units of 128 x 128


def test_a_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        cycles_of("nothing")
