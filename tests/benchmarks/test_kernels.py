"""How machine code is read and played, and the figures of kernels that must not get worse, each with a damage that is noticed."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cuobjdump
from benchmarks.hot_kernels import rounds_of
from benchmarks.kernel_pages import BEGIN, END, PAGES
from benchmarks.kernels import measured
from benchmarks.launches import Call
from benchmarks.machine_code import Accesses, Code, Instruction, instructions_of
from benchmarks.prediction import (
    COPY_BYTES_A_SECOND,
    HERTZ,
    MEMORY_LATENCY,
    blocks_on_multiprocessor,
    cycles_of_round,
    predict,
    walk,
)
from benchmarks.records import Record, Row, Timing
from benchmarks.table import between
from effdet_fast import _libraries
from tests.emulation.build import ROOT

NVCC = "13.0.88"  # that the figures are of
needs_machine_code = pytest.mark.skipif(
    "cuda" not in _libraries.native_device_types() or cuobjdump.find_cuobjdump() is None,
    reason="needs the CUDA kernels, and cuobjdump",
)

RESOURCES = """
arch = sm_90
 Function _Z3addPf:
  REG:14 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:544 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z5spillPf:
  REG:255 STACK:48 SHARED:1024 LOCAL:0 CONSTANT[0]:544 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
LISTING = """
arch = sm_90
\t\tFunction : _Z3addPf
\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;   /* 0x000000ff00017b82 */
                                                                               /* 0x000ea2000c1e9d00 */
        /*0010*/              @!P0 FADD R4, R4, 1 ;                            /* 0x000000ff00017b82 */
                                                                               /* 0x004fe20000000000 */
        /*0020*/              @!P0 STG.E.U16 desc[UR4][R2.64], R4 ;            /* 0x000000ff00017b82 */
                                                                               /* 0x000fe2000c101504 */
        /*0030*/               @P1 BRA 0x0 ;                                   /* 0xfffffffc00f81947 */
                                                                               /* 0x000fea000383ffff */
        /*0040*/                   EXIT ;                                      /* 0x000000000000794d */
                                                                               /* 0x000fea0003800000 */
\t\tFunction : _Z5spillPf
        /*0000*/                   EXIT ;                                      /* 0x000000000000794d */
                                                                               /* 0x000fea0003800000 */
"""


@pytest.fixture
def tool(tmp_path):
    """A program that prints what cuobjdump prints."""
    program = tmp_path / "cuobjdump"
    (tmp_path / "-res-usage").write_text(RESOURCES)
    (tmp_path / "-sass").write_text(LISTING)
    program.write_text('#!/bin/sh\ncat "$(dirname "$0")/$1"\n')
    program.chmod(0o755)
    return str(program)


def test_a_library_is_read(tool):
    found = cuobjdump.resources(Path("any.so"), tool)
    assert found["_Z3addPf", "sm_90"] == cuobjdump.Resources(14, 0)
    assert found["_Z5spillPf", "sm_90"] == cuobjdump.Resources(255, 48)
    add, spill = cuobjdump.codes(Path("any.so"), tool)
    assert add[:2] == ("_Z3addPf", "sm_90") and len(add[2].instructions) == 5
    assert spill[:2] == ("_Z5spillPf", "sm_90") and len(spill[2].instructions) == 1


def test_instructions_carry_their_schedule():
    load, add, store, branch, end = instructions_of(LISTING.splitlines()[4:14])
    assert (load.name, load.bytes, load.sets, load.waits, load.pause) == ("LDG", 16, 2, 0, 1)
    assert (add.predicate, add.sets, add.waits, add.pause) == ("!P0", None, 0b100, 1)
    assert (store.name, store.bytes) == ("STG", 2)
    assert (branch.target, branch.goes_on, branch.pause) == (0, True, 5)
    assert (end.target, end.goes_on) == (None, False)


def test_a_failing_cuobjdump_is_an_error(tmp_path):
    program = tmp_path / "cuobjdump"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(RuntimeError, match="ended with exit status 3"):
        cuobjdump.resources(Path("any.so"), str(program))


class Writer:
    """Writes a kernel, an instruction at a time."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []

    def add(self, text: str, sets: int = 7, waits: int = 0, pause: int = 1) -> "Writer":
        predicate, rest = (text[1:].split(" ", 1)) if text.startswith("@") else ("", text)
        name, _, operands = rest.partition(" ")
        name, *modifiers = name.split(".")
        control = pause | sets << 5 | waits << 11
        address = 16 * len(self.instructions)
        self.instructions.append(Instruction(address, predicate, name, tuple(modifiers), operands, control))
        return self

    def __call__(self) -> Code:
        return Code(self.instructions)


def loop(ahead: bool, products: int = 20) -> Code:
    """A round loads 4 bytes, multiplies and stores; waits before the products, or (`ahead`) behind them for the next round's."""
    writer = Writer().add("MOV R1, c[0x0][0x28]")
    if ahead:
        writer.add("LDG.E R2, desc[UR4][R8.64]", sets=0)
        writer.add("MOV R3, R2", waits=1).add("LDG.E R2, desc[UR4][R8.64]", sets=0)
        start = writer.instructions[-2].address
    else:
        writer.add("LDG.E R2, desc[UR4][R8.64]", sets=0)
        start = writer.instructions[-1].address
    for _ in range(products):
        writer.add("FFMA R4, R3, R3, R4", waits=0 if ahead else 1)
    return writer.add("STG.E desc[UR4][R8.64], R4").add(f"@P0 BRA {start:#x}").add("EXIT")()


def test_the_main_path_is_a_round_of_the_loop():
    way_in, path = loop(ahead=False).main()
    assert [one.name for one in way_in] == ["MOV"]
    assert [one.name for one in path] == ["LDG", *["FFMA"] * 20, "STG", "BRA"]


def test_branches_that_skip_or_add_work_are_not_on_the_path():
    writer = Writer().add("LDG.E R2, desc[UR4][R8.64]", sets=0)
    writer.add("@P1 BRA 0x60")  # no row: no products
    writer.add("@P2 BRA 0x50").add("MUFU.EX2 R3, R2").add("MUFU.RCP R3, R2")  # an activation
    writer.add("FFMA R4, R3, R3, R4")
    code = writer.add("STG.E desc[UR4][R8.64], R4").add("@P0 BRA 0x0").add("EXIT")()
    assert [one.name for one in code.main()[1]] == ["LDG", "BRA", "BRA", "FFMA", "STG", "BRA"]
    assert [one.name for one in code.main(activated=True)[1]].count("MUFU") == 2
    assert code.main(Accesses(4, 2, 1)) == ([], [])  # nowhere two loads


def test_the_end_of_a_kernel_that_adds_partials_is_not_its_main_path():
    writer = Writer()
    for modifiers in ("", ".64.STRONG.GPU"):
        start = writer.add(f"LDG.E{modifiers} R2, desc[UR4][R8.64]", sets=0).instructions[-1].address
        writer.add("FADD R4, R4, R2", waits=1).add(f"@P0 BRA {start:#x}")
    path = writer.add("STG.E desc[UR4][R8.64], R4").add("EXIT")().main()[1]
    assert walk(path).loads == [4]


def test_what_a_warp_waits_for_is_seen():
    waits, hides = walk(loop(ahead=False).main()[1]), walk(loop(ahead=True).main()[1])
    assert (waits.loads, waits.stores, waits.instructions) == ([4], [4], 23)
    assert waits.ahead == [1] and hides.ahead == [23]
    assert waits.waits == hides.waits == [(1, 4)]
    assert waits.cycles == MEMORY_LATENCY + 22 and hides.cycles == MEMORY_LATENCY + 1


def test_loads_in_flight_are_those_before_the_first_wait():
    def batch(size: int, batches: int) -> Code:
        writer = Writer()
        for _ in range(batches):
            for _ in range(size):
                writer.add("LDG.E.128 R4, desc[UR4][R8.64]", sets=0)
            writer.add("FADD R4, R4, R4", waits=1)
        return writer.add("@P0 BRA 0x0").add("EXIT")()

    together, one_by_one = walk(batch(4, 1).main()[1]), walk(batch(1, 4).main()[1])
    assert (together.loads_in_flight, together.bytes_in_flight) == (4, 64)
    assert (one_by_one.loads_in_flight, one_by_one.bytes_in_flight) == (1, 16)
    assert one_by_one.cycles > 3.9 * together.cycles


@pytest.mark.parametrize("ahead", [False, True])
def test_rounds_follow_from_the_loads_of_a_warp(ahead):
    """A warp that loads ten times goes through ten rounds, whether the first load stands before the loop or in it."""
    way_in, path = loop(ahead).main()
    before = walk(way_in, rounds=1, before_loop=True)
    assert len(before.loads) == ahead and rounds_of(path, before, 10) == 10


def test_warps_share_the_issue_and_hide_each_others_waits():
    path = loop(ahead=False, products=200).main()[1]
    alone, two, many = (cycles_of_round(path, warps) for warps in (1, 2, 16))
    assert alone == pytest.approx(walk(path).cycles, rel=0.01)
    assert two < 1.3 * alone
    assert many == pytest.approx(16 * len(path), rel=0.1)  # each cycle issues


@pytest.mark.parametrize(
    "threads, registers, shared, blocks",
    # As the CUDA occupancy calculator has it for compute capability 9.0.
    [(128, 102, 0, 4), (128, 160, 0, 3), (128, 233, 0, 2), (256, 64, 0, 4), (256, 40, 0, 6), (128, 32, 26624, 8)]
    + [(64, 16, 0, 32), (1024, 64, 0, 1), (128, 255, 227 << 10, 1)],
)
def test_blocks_on_a_multiprocessor(threads, registers, shared, blocks):
    assert blocks_on_multiprocessor(threads, registers, shared) == blocks


def test_a_prediction_keeps_to_its_limits():
    path = loop(ahead=True).main()[1]
    launch = {"threads": 256, "on_multiprocessor": 8, "before": 0.0, "rounds": 100.0}
    blocks = 132 * 8 * 4
    moved = blocks * 256 * 100 * 8.0
    whole = predict(path, blocks=blocks, floor_bytes=moved, **launch)
    assert whole.waves == 4 and 50 < whole.percent_of_copy < 100
    assert whole.microseconds > moved / COPY_BYTES_A_SECOND * 1e6
    one_more = predict(path, blocks=blocks + 1, floor_bytes=moved, **launch)
    assert one_more.microseconds > whole.microseconds + 100 * MEMORY_LATENCY / HERTZ * 1e6  # a wave for one block


def test_a_page_has_one_table():
    assert between("page", f"a\n{BEGIN}\nold\n{END}\nb\n", BEGIN, END, "new") == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    for broken in ("a", f"{BEGIN}", f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"):
        with pytest.raises(ValueError, match="page: must have exactly one"):
            between("page", broken, BEGIN, END, "new")
    for page in PAGES:
        text = (ROOT / f"docs/kernels/{page}.md").read_text()
        assert between(page, text, BEGIN, END, "new") != text and f"nvcc {NVCC}" in text


def test_what_a_gpu_measured_stands_beside_the_prediction():
    call = Call("fusion", "P3", "forward", [], 0, 0)

    def record(device: str, **changes) -> Record:
        where = {
            "op": "fusion",
            "case": "P3",
            "dtype": "bfloat16",
            "layout": "channels_last",
            "phase": "forward",
            **changes,
        }
        row = Row(**where, bytes=1, timings={"effdet_fast": Timing.of([25e-6]), "eager": Timing.of([1.0])})
        return Record({"device": {"type": device, "name": "H200", "slug": "h200"}, "date": "2026"}, [row])

    def said(*everything: Record) -> str:
        return measured(call, "bfloat16", "channels_last", list(everything))

    assert said(record("cuda")) == ", 25 us measured on H200"
    assert said(record("cpu"), record("cuda", phase="backward"), record("cuda", dtype="float32")) == ""


@needs_machine_code
@pytest.mark.slow
def test_the_tables_of_the_pages_are_current():
    path, tool = _libraries.path_of("cuda"), cuobjdump.find_cuobjdump()
    if cuobjdump.compiler(path) != NVCC or cuobjdump.architectures(path, tool) != ["sm_90"]:
        pytest.skip(f"the tables are of nvcc {NVCC} and sm_90")
    command = [sys.executable, "-m", "benchmarks.kernels", "--docs", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_machine_code
def test_no_kernel_spills():
    found = cuobjdump.resources(_libraries.path_of("cuda"), cuobjdump.find_cuobjdump())
    assert len(found) >= 100
    assert [symbol for (symbol, _), kernel in found.items() if kernel.stack] == []
