"""`pymm doctor`: what was built, what serves each op on this machine, what is missing and what mends it."""

from __future__ import annotations

import importlib.util
import json
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pymm import __version__, ops
from pymm.ops import _gpu
from pymm.ops._extension import EXTENSION, PROBLEM
from pymm.ops._machine import processor

# What each optional module is for, and the command that brings it.
OPTIONAL = {
    "matplotlib": ("pictures and plots", "pip install 'pymm[plot]'"),
    "tensorboard": ("TensorBoard logs", "pip install 'pymm[log]'"),
    "faiss": ("other libraries beside pymm in benchmarks", "pip install 'pymm[bench]'"),
    "fsspec": ("shards in object stores", "pip install 'pymm[remote]'"),
    "triton": ("Triton kernels on a GPU", "pip install triton"),
}


@dataclass(frozen=True)
class DoctorSettings:
    """What `pymm doctor` prints."""

    json: bool = False
    """Print JSON instead of tables."""


@dataclass(frozen=True)
class Finding:
    """Something that is missing: what, what it is good for, and the command that mends it."""

    missing: str
    purpose: str
    command: str


def examine() -> dict[str, Any]:
    """Everything that `pymm doctor` says, as plain data."""
    build: dict[str, Any] = {"extension": PROBLEM or "loaded"}
    sets: dict[str, Any] = {}
    if EXTENSION is not None:
        build |= EXTENSION.build_info()
        sets = {
            "compiled": EXTENSION.compiled_isas(),
            "available": EXTENSION.available_isas(),
            "in use": EXTENSION.isa(),
        }
    return {
        "pymm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "build": build,
        "instruction sets": sets,
        "gpu": _gpu_state(),
        "ops": [asdict(served(name)) for name in sorted(ops.REGISTRY)],
        "missing": [asdict(finding) for finding in _findings()],
    }


def served(name: str) -> ops.Explanation:
    """Which backend runs the first sample of an op, in float32 on the CPU."""
    op = ops.REGISTRY[name]
    sample = next(iter(op.samples(torch.float32)))
    return ops.explain(op.function, *sample.args, **sample.kwargs)


def _gpu_state() -> dict[str, Any]:
    found = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if found else None,
        "cuda kernels": _gpu.load_cuda_library() or "loaded",
        "triton": "installed" if importlib.util.find_spec("triton") else "not installed",
        "measured": "no kernel of pymm has run on a GPU yet: tested by an interpreter and an emulation only",
    }


def _findings() -> list[Finding]:
    found = []
    if EXTENSION is None:
        command = "pip install --force-reinstall --no-deps . (needs g++)"
        found.append(Finding("pymm._C", "the C++ kernels; the reference runs instead", command))
    for module, (purpose, command) in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            found.append(Finding(module, purpose, command))
    return found


def run(settings: DoctorSettings) -> int:
    """Print the examination; 1 when the C++ extension is missing, else 0."""
    state = examine()
    if settings.json:
        print(json.dumps(state, indent=2))
    else:
        _print(state)
    return 0 if EXTENSION is not None else 1


def _print(state: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table("what", "is", title="pymm doctor", title_justify="left")
    for key in ("pymm", "python", "torch", "threads", "processor"):
        facts.add_row(key, str(state[key]))
    for part in ("build", "instruction sets", "gpu"):
        for key, value in state[part].items():
            facts.add_row(f"{part}: {key}", ", ".join(value) if isinstance(value, list) else str(value))
    console.print(facts)
    table = Table("op", "backend", "why", title="Who serves each op on the CPU", title_justify="left")
    for row in state["ops"]:
        table.add_row(row["op"], row["backend"], row["reason"])
    console.print(table)
    if state["missing"]:
        missing = Table("missing", "for", "mend it with", title="Missing", title_justify="left")
        for row in state["missing"]:
            missing.add_row(row["missing"], row["purpose"], row["command"])
        console.print(missing)
    else:
        console.print("Nothing is missing.")
