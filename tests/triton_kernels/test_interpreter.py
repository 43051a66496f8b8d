"""The Triton kernels against the reference, run by Triton's interpreter on the samples of every record.

The interpreter's `dot` is wrong on bfloat16, so bfloat16 is left to a GPU.
"""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import pymm.triton_kernels

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
OPS = sorted(m.name for m in pkgutil.iter_modules(pymm.triton_kernels.__path__) if not m.name.startswith("_"))


@pytest.mark.parametrize("name", OPS)
def test_op_in_the_interpreter(name: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYMM_BACKEND": f"{name}=triton"}
    chosen = f"test_kernel_equals and portable and (torch.float32 or torch.float16) and {name}-"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_records.py"]
    done = subprocess.run(
        [*command, "-k", chosen], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
