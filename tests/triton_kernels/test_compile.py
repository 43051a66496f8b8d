"""Every Triton configuration compiles without spills and within the GPU's shared memory.

Each is compiled for one GPU here, in turn, and every fourth also for arguments that are no multiples of 16;
`PYMM_COMPILE=all` compiles each for every GPU and both kinds of arguments, which takes half an hour.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import pymm.triton_kernels  # noqa: E402

# Compute capability -> shared memory that one block may have, in bytes (CUDA C++ programming guide, appendix
# on compute capabilities).
TARGETS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


def _modules():
    names = sorted(
        m.name for m in pkgutil.iter_modules(pymm.triton_kernels.__path__) if not m.name.startswith("_")
    )
    return [importlib.import_module(f"pymm.triton_kernels.{name}") for name in names]


def _ways(number: int, configuration) -> list[tuple[int, bool]]:
    """`(compute capability, aligned)` for which configuration `number` is compiled."""
    capabilities = sorted(configuration.capabilities)
    if os.environ.get("PYMM_COMPILE") == "all":
        return [(c, aligned) for c in capabilities for aligned in (True, False)]
    ways = [(capabilities[number % len(capabilities)], True)]
    if number % 4 == 0:
        ways.append((capabilities[number // 4 % len(capabilities)], False))
    return ways


CONFIGURATIONS = [(m.__name__.rpartition(".")[2], c) for m in _modules() for c in m.compilations()]
CASES = [
    pytest.param(
        c,
        capability,
        aligned,
        id=f"{name}-{c.label}-{capability}-{'aligned' if aligned else 'ragged'}".replace(" ", "_"),
    )
    for number, (name, c) in enumerate(CONFIGURATIONS)
    for capability, aligned in _ways(number, c)
]


# Registers of a thread at most, and bytes that the assembler may spill while it leaves registers unused: it
# gives up a few to fit one block more on a multiprocessor. A kernel that needs every register may spill none.
REGISTERS, FEW_BYTES = 255, 64


def _assembled(compiled, tmp_path: Path) -> tuple[int, int]:
    """Registers, and bytes of spilled ones stored and loaded, as ptxas counts them for the kernel's PTX."""
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    capability = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"])[1]
    # Triton ships two assemblers; the newer one reads every PTX version.
    ptxas = getattr(triton.knobs.nvidia, "ptxas_blackwell", triton.knobs.nvidia.ptxas)
    done = subprocess.run(
        [ptxas.path, "-v", f"-arch={capability}", str(ptx), "-o", str(tmp_path / "kernel.cubin")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr))
    return int(re.search(r"Used (\d+) registers", done.stderr)[1]), spilled


# What Triton itself finds out about the arguments of a launch: whether they are multiples of 16.
ALIGNED = [["tt.divisibility", 16]]


@pytest.mark.parametrize(("case", "capability", "aligned"), CASES)
def test_compiles_without_spills(case, capability: int, aligned: bool, tmp_path: Path) -> None:
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    assert {n for n, kind in signature.items() if kind == "constexpr"} == set(case.constants)
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    numbers = [i for i, name in enumerate(names) if signature[name].startswith(("*", "i"))]
    attributes = {(i,): ALIGNED for i in numbers} if aligned else None
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=case.options)
    assert compiled.metadata.shared <= TARGETS[capability]
    registers, spilled = _assembled(compiled, tmp_path)
    assert spilled <= (FEW_BYTES if registers < REGISTERS else 0), f"{registers} registers, {spilled} bytes"
