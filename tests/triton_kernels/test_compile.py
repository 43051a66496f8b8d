"""Every Triton configuration compiles without spills and within the GPU's shared memory.

Compiled here are the fewest configurations in which each kernel meets each of its types and the values of its
constants, each GPU, and arguments that are and are no multiples of 16; `PYMM_COMPILE=all` compiles each
configuration for every GPU and both kinds of arguments, which takes half an hour.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
from collections import Counter

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


CONFIGURATIONS = [(m.__name__.rpartition(".")[2], c) for m in _modules() for c in m.compilations()]
# (name of the op, configuration, compute capability, aligned)
EVERY_WAY = [
    (name, c, capability, aligned)
    for name, c in CONFIGURATIONS
    for capability in sorted(c.capabilities)
    for aligned in (True, False)
]


def _facts(name: str, configuration, capability: int, aligned: bool) -> set[tuple]:
    """What compiling a configuration this way tries."""
    kernel, signature = configuration.kernel.__name__, configuration.signature
    switches = {**configuration.constants, "capability": capability, "aligned": aligned}
    return {(name, kernel, key, value) for key, value in switches.items()} | {
        (name, kernel, "type", frozenset(signature.values()))
    }


def _few() -> list[tuple]:
    """Ways in which every value of every constant, type, capability and alignment of each kernel is tried.

    Of equally good ones, those that take most registers: arguments that are not aligned; each GPU in turn.
    """
    chosen: list[int] = []
    used: Counter = Counter()
    left = {way: _facts(*EVERY_WAY[way]) for way in range(len(EVERY_WAY))}

    def value(way: int) -> tuple[int, bool, int]:
        capability, aligned = EVERY_WAY[way][2:]
        return len(left[way]), not aligned, -used[capability]

    while any(left.values()):
        best = max(left, key=value)
        chosen.append(best)
        used[EVERY_WAY[best][2]] += 1
        news = left[best]
        left = {way: facts - news for way, facts in left.items()}
    return [EVERY_WAY[way] for way in sorted(chosen)]


CASES = [
    pytest.param(
        c,
        capability,
        aligned,
        id=f"{name}-{c.label}-{capability}-{'aligned' if aligned else 'ragged'}".replace(" ", "_"),
    )
    for name, c, capability, aligned in (EVERY_WAY if os.environ.get("PYMM_COMPILE") == "all" else _few())
]


# What Triton itself finds out about the arguments of a launch: whether they are multiples of 16.
ALIGNED = [["tt.divisibility", 16]]


@pytest.mark.parametrize(("case", "capability", "aligned"), CASES)
def test_compiles_without_spills(case, capability: int, aligned: bool, capsys, monkeypatch) -> None:
    # The log of the assembler that makes what is launched, under Triton's own options.
    monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    assert {n for n, kind in signature.items() if kind == "constexpr"} == set(case.constants)
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    numbers = [i for i, name in enumerate(names) if signature[name].startswith(("*", "i"))]
    attributes = {(i,): ALIGNED for i in numbers} if aligned else None
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=case.options)
    assert compiled.metadata.shared <= TARGETS[capability]
    log = capsys.readouterr().out
    found = re.findall(r"(\d+) bytes spill", log)
    assert found, f"the assembler says nothing of spills: {log}"
    spilled = sum(map(int, found))
    assert spilled == 0, log
