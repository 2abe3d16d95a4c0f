"""What is reckoned from machine code: of kernels whose instructions are known, and of text written for the purpose."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clipfast.benchmark.reckoning import ptx
from clipfast.benchmark.reckoning.cards import CARDS
from clipfast.benchmark.reckoning.cost import reckon, resident
from clipfast.benchmark.reckoning.sass import parse

PROBE = Path(__file__).parents[1] / "support" / "reckoning_probe.py"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def probed() -> dict[str, Any]:
    # a fresh process: kernels of this one are interpreted
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, PROBE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def near(value: float) -> Any:
    return pytest.approx(value, rel=0.05)


@needs_triton
def test_a_known_count_of_instructions(probed: dict[str, Any]) -> None:
    # 1,000 trips of 48 sums and an exponential (which is a power of two: one instruction), 2 elements a lane of 4 warps
    found = probed["counted"]
    assert found["instructions"]["fp32"] == near(1000 * 48 * 2)
    assert found["instructions"]["special"] == near(1000 * 2)
    assert found["instructions"]["global store"] == near(1000)
    assert found["clocks"]["fp32"] == near(4 * 32 * 1000 * 48 * 2 / 128)
    assert found["clocks"]["special"] == near(4 * 32 * 1000 * 2 / 16)
    assert found["clocks"]["memory"] == near(1000 * 256 * 4 / 7 / (3.0e12 / 132 / 1.7e9))
    # a few more for the loop and its addresses
    assert 1 < found["clocks"]["issue"] / (1000 * (48 * 2 + 2 + 1)) < 1.1


@needs_triton
def test_another_tile_costs_otherwise(probed: dict[str, Any]) -> None:
    narrow, wide = probed["counted"], probed["wide"]
    for resource in ("issue", "fp32", "special", "memory"):
        assert wide["clocks"][resource] == near(2 * narrow["clocks"][resource]), resource


@needs_triton
def test_products_of_every_kind_take_what_the_tensor_cores_take(probed: dict[str, Any]) -> None:
    for name, products, rate in (
        ("product 80", 64 * 64 * 4096, 1024),
        ("product 90", 128 * 128 * 4096, 2048),
        ("product 100", 128 * 256 * 4096, 4096),
    ):
        assert probed[name]["clocks"]["tensor"] == near(products / rate), name
    # 256 of the 512 columns of tensor memory, and shared memory for two: registers and memory would hold one
    assert probed["product 100"]["resident"] == 1


@needs_triton
def test_a_loop_that_the_assembler_unrolled(probed: dict[str, Any]) -> None:
    # 6,400 rows of 32 floats, 16 bytes a lane: the machine code's loop has four trips of the source's
    assert probed["unrolled"]["instructions"]["global load"] == near(6400 * 32 * 4 / 16 / 256)


@needs_triton
def test_loops_that_are_not_the_kernels_are_refused(probed: dict[str, Any]) -> None:
    assert "found 1 loops where 0 were expected" in probed["refused"]


# two loops in each other, a call that leaves the inner one, a slow path behind a call, lanes that part in a shuffle
CODE = """
	.section	.text.nested,"ax",@progbits
.text.nested:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0020*/                   FFMA R4, R4, R5, R6 ;
        /*0030*/                   BRA.DIV UR4, `(.L_x_9) ;
        /*0040*/                   LDS.128 R8, [R3] ;
        /*0050*/               @P1 CALL.REL.NOINC `(.L_x_3) ;
        /*0060*/                   BRA `(.L_x_2) ;
.L_x_3:
        /*0070*/                   MUFU.EX2 R4, R4 ;
        /*0080*/                   CALL.REL.NOINC `($nested$slow_division) ;
        /*0090*/              @!P0 BRA `(.L_x_1) ;
        /*00a0*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*00b0*/                   EXIT ;
.L_x_9:
        /*00c0*/                   SHFL.BFLY PT, R4, R4, 0x1, 0x1f ;
        /*00d0*/                   BRA `(.L_x_3) ;
$nested$slow_division:
        /*00e0*/                   FMUL R4, R4, R4 ;
        /*00f0*/                   RET.REL.NODEC R20 `(nested) ;
"""


@dataclass(frozen=True)
class Loop:
    trips: float
    inside: tuple[Loop, ...] = ()


def test_control_flow() -> None:
    kernel = parse(CODE)["nested"]
    assert [str(nest) for nest in kernel.loops] == ["0x10(0x20)"]
    runs = {instruction.name: often for instruction, often in kernel.runs([Loop(3, (Loop(5),))])}
    assert runs["MOV"] == runs["STG.E.U16"] == 1
    assert runs["LDG.E.128"] == runs["MUFU.EX2"] == 3
    assert runs["FFMA"] == runs["LDS.128"] == 15
    assert not {"SHFL.BFLY", "FMUL"} & runs.keys()
    for loops in ((), (Loop(3),), (Loop(3), Loop(5)), (Loop(3, (Loop(5), Loop(1))),)):
        with pytest.raises(ValueError, match="expected"):
            kernel.runs(loops)


def test_clocks_by_resource() -> None:
    kernel = parse(CODE)["nested"]
    kernel.registers = 64
    cost = reckon(kernel, CARDS[90], 8, [Loop(3, (Loop(5),))], moved=1000.0)
    assert cost.clocks["issue"] == 8 * (2 + 1 + 3 * 4 + 15 * 5) / 4
    assert cost.clocks["fp32"] == 8 * 15 * 32 / 128
    assert cost.clocks["special"] == 8 * 3 * 32 / 16
    assert cost.clocks["shared"] == 8 * 15 * 32 * 16 / 128
    assert cost.clocks["memory"] == 1000 / (3.0e12 / 132 / 1.7e9)
    assert (cost.binding, cost.ceiling("issue"), cost.resident) == ("shared", 180 / 480, 4)
    # half the lanes of an H100
    assert reckon(kernel, CARDS[80], 8, [Loop(3, (Loop(5),))]).clocks["fp32"] == 8 * 15 * 32 / 64


def test_programs_of_a_multiprocessor() -> None:
    hopper, ada, blackwell = CARDS[90], CARDS[89], CARDS[100]
    assert resident(hopper, registers=255, warps=4, shared_memory=0) == 2
    assert resident(hopper, registers=32, warps=4, shared_memory=0) == 16
    assert resident(hopper, registers=16, warps=1, shared_memory=0) == 32
    # each takes a kilobyte more
    assert resident(hopper, registers=32, warps=4, shared_memory=75 * 1024) == 3
    assert resident(hopper, registers=32, warps=4, shared_memory=76 * 1024) == 2
    assert resident(ada, registers=32, warps=4, shared_memory=0) == 12
    assert resident(ada, registers=32, warps=4, shared_memory=100 * 1024) == 0
    assert resident(blackwell, registers=32, warps=4, shared_memory=0, columns=512) == 1


def test_a_cycle_with_two_entries_is_refused() -> None:
    inside = CODE.replace("MOV R1, c[0x0][0x28] ;", "@P3 BRA `(.L_x_2) ;")
    with pytest.raises(ValueError, match="two entries"):
        _ = parse(inside)["nested"].loops


# the inner loop once: the machine code above has it once too, and below twice
SOURCE = """
.visible .entry nested(
)
{
$L__BB0_1:
	ld.global.v4.b32 {%r1}, [%rd1];
$L__BB0_2:
	cp.async.cg.shared.global [%r1], [%rd2], 0x10, 0x10;
	@%p1 bra $L__BB0_2;
	@%p2 bra $L__BB0_1;
	ret;
}
"""


def test_unrolled_loops_are_told_from_the_source() -> None:
    (source,) = ptx.parse(SOURCE).values()
    assert [str(nest) for nest in source.loops] == ["0x0(0x1)"]
    for copies in (1, 3):
        machine = parse(CODE.replace("LDS.128 R8, [R3] ;", "LDGSTS.E.128 [R3], desc[UR4][R2.64] ;"))["nested"]
        body = machine.instructions
        place = next(index for index, instruction in enumerate(body) if instruction.base == "LDGSTS")
        body[place:place] = [body[place]] * (copies - 1)
        ptx.mark_unrolled(machine, source)
        (outer,) = machine.loops
        assert (outer.unrolled, outer.inside[0].unrolled) == (1, copies)
        runs = sum(o for i, o in machine.runs([Loop(1, (Loop(11),))]) if i.base == "LDGSTS")
        # of 11 trips the last copies - 1 stand behind the loop
        assert runs == 11 - (copies - 1)


# what docs/kernels.md says of LayerNorm, written anew, and what configurations were chosen for
PAGE = """
import importlib.util, sys
import triton
from clipfast.kernels import bias_gelu, layer_norm
from clipfast.kernels.aot import capture
from clipfast.benchmark.reckoning.launches import reckon_job

spec = importlib.util.spec_from_file_location("reckoning_table", sys.argv[1])
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
page = script.PAGE.read_text(encoding="utf-8")
assert script.cards() in page, "scripts/reckoning_table.py --write writes it anew"
line = next(line for line in script.lines() if line.name.startswith("layer_norm"))
forward, backward, sums = script.reckoned(line, 90)
if f"with Triton {triton.__version__};" in page:
    assert script.rows(line, [forward, backward, sums]) in page, "scripts/reckoning_table.py --write writes it anew"

# memory binds, by a wide margin
assert forward.cost.binding == backward.cost.binding == "memory"
assert forward.cost.clocks["issue"] < 0.7 * forward.cost.clocks["memory"]
# the second stage of the smallest model's batch of 256
_, few, few_sums = (reckon_job(job) for job in capture(layer_norm.aot_call(12800, 768, False, *["bf16"] * 3), 90))
assert few_sums.seconds < 0.1 * few.seconds, (few_sums.seconds, few.seconds)
erf = reckon_job(capture(bias_gelu.aot_call(50432, 3072, "none", "bf16", "bf16"), 90)[0])
assert erf.cost.ceiling() >= 0.9
"""


@needs_triton
def test_the_page_and_what_it_is_for(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "reckoning_table.py"
    (tmp_path / "page.py").write_text(PAGE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, tmp_path / "page.py", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
