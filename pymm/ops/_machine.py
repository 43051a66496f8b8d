"""What a figure depends on: the processor, the threads, the versions."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from pymm.ops._extension import EXTENSION


def processor() -> str:
    """The processor's name, as Linux tells it, else what Python knows."""
    return _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """The machine, its software and the settings in force, as plain data."""
    memory = _field("/proc/meminfo", "MemTotal")
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1) if memory else None,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "instruction_set": EXTENSION.isa() if EXTENSION is not None else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _field(path: str, name: str) -> str | None:
    """The value of the first line `name: value` of a file of the kernel's."""
    try:
        with open(path) as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith(name))
    except (OSError, StopIteration):
        return None
