"""How much memory a call takes, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys

# The first call pays for what the process keeps: threads, code, the autograd engine. What the allocator holds
# back is given back before the peak is counted; the gradients that stay are not counted.
_SCRIPT = """
import ctypes, gc, torch
from pymm import ops

torch.set_num_threads({threads})

def status(key):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(key + ":"))

def inputs(n):
    torch.manual_seed(0)
    x, y = (torch.randn(n, {d}).to(torch.{dtype}).requires_grad_() for _ in range(2))
    return x, y, *(torch.tensor(v, requires_grad=True) for v in {numbers})

def step(*arguments):
    ops.{op}(*arguments).backward()

step(*inputs(64))
arguments = inputs({n})
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
step(*arguments)
print(status("VmHWM") - before - sum(a.grad.nbytes for a in arguments))
"""


def peak_beside_gradients(op: str, n: int, d: int, dtype: str, numbers: list[float], threads: int) -> int:
    """Bytes that `op(x, y, *numbers)` and its backward take beside inputs and gradients, at the peak."""
    script = _SCRIPT.format(op=op, n=n, d=d, dtype=dtype, numbers=numbers, threads=threads)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)
