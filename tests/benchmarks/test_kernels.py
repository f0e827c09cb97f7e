"""What the machine code of the built library must look like, and how it is read."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks import kernels
from effdet_fast import _libraries

needs_machine_code = pytest.mark.skipif(
    "cuda" not in _libraries.native_device_types() or kernels.find_cuobjdump() is None,
    reason="needs the CUDA kernels, and cuobjdump",
)

RESOURCES = """
arch = sm_90
 Function _Z3addPf:
  REG:14 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:544 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z5spillPf:
  REG:255 STACK:48 SHARED:1024 LOCAL:0 CONSTANT[0]:544 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CODE = """
arch = sm_90
\t\tFunction : _Z3addPf
        /*0000*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E R8, desc[UR4][R2.64+0x10] ;
        /*0020*/              @!P0 STG.E.U16 desc[UR4][R2.64], R4 ;
\t\tFunction : _Z5spillPf
        /*0000*/                   STL.128 [R1], R4 ;
        /*0010*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
"""


@pytest.fixture
def listing(tmp_path):
    """A program that prints what cuobjdump prints."""
    program = tmp_path / "cuobjdump"
    (tmp_path / "-res-usage").write_text(RESOURCES)
    (tmp_path / "-sass").write_text(CODE)
    program.write_text('#!/bin/sh\ncat "$(dirname "$0")/$1"\n')
    program.chmod(0o755)
    return str(program)


def test_registers_stack_and_widths_are_read(listing):
    add, spill = kernels.kernels(Path("any.so"), listing, widths=True)
    assert (add.name, add.architecture, add.registers, add.stack) == ("_Z3addPf", "sm_90", 14, 0)
    assert (add.loads, add.stores) == (Counter({16: 1, 4: 1}), Counter({2: 1}))
    assert (spill.registers, spill.stack, spill.loads, spill.stores) == (255, 48, Counter({8: 1}), Counter())


def test_a_failing_cuobjdump_is_an_error(tmp_path):
    program = tmp_path / "cuobjdump"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(RuntimeError, match="ended with exit status 3"):
        kernels.kernels(Path("any.so"), str(program))


@needs_machine_code
def test_no_kernel_spills():
    found = kernels.kernels(_libraries.path_of("cuda"), kernels.find_cuobjdump())
    assert len(found) >= 100
    spilling = [kernel for kernel in found if kernel.stack]
    assert not list(zip(kernels.readable([k.name for k in spilling]), [k.stack for k in spilling], strict=True))
