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


# Words of the labels of the samples that are tried in float16 too, at least one of every op: what differs is
# how a tile is rounded, not which way the kernel takes.
FLOAT16 = "ragged or oblong or strided or dropout or gelu_"
# Attention of several tiles takes the interpreter half a minute; test_paths.py has it at smaller sizes. A
# patch of 32 takes no other way than one of 16.
LEFT_OUT = {
    "attention": " and not several",
    "attention_varlen": " and not several",
    "patch_embed": " and not patch_of_32",
}


def _passes(environment: dict[str, str], *arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("name", OPS)
def test_op_in_the_interpreter(name: str) -> None:
    types = f"(torch.float32 or torch.float16 and ({FLOAT16}))"
    chosen = f"test_kernel_equals and portable and {name}- and {types}"
    chosen += LEFT_OUT.get(name, "")
    _passes({"PYMM_BACKEND": f"{name}=triton"}, "tests/ops/test_records.py", "-k", chosen)


@pytest.mark.parametrize("name", ["attention", "info_nce or sigmoid", "mining or topk or not_take"])
def test_paths_that_the_samples_are_too_small_for(name: str) -> None:
    _passes({}, "tests/triton_kernels/test_paths.py", "-k", name)
