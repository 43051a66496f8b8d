"""Peak memory of one call.

On a CPU it is the growth of the process's resident set. The allocator gives back what it holds
(`malloc_trim`), Linux resets the peak (5 in /proc/self/clear_refs), and the call's peak (VmHWM) is read
above what was resident before (VmRSS). That counts everything, whoever allocates it, the libraries' own
buffers too. The call has been made before, so what is paid once (threads, code, weights that a library
packs and keeps) is not counted. It is exact to some hundred KiB. On a GPU it is what torch's allocator gave
out above what it had given out before.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import torch

from pymm.benchmarks.timing import Call


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Bytes that a call takes at its peak, results included; None where that cannot be measured."""
    return _on_gpu(call, device) if device.type == "cuda" else _on_cpu(call)


def _on_gpu(call: Call, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _on_cpu(call: Call) -> int | None:
    gc.collect()
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
        trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(name + ":"))
    return int(line.split()[1]) << 10
