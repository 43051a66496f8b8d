"""Build, test and measure the CUDA and Triton kernels on a GPU, in one call and in bounded time.

    python benchmarks/gpu.py --out results

Needs torch, Triton and, for the CUDA kernels, nvcc; pymm need not be installed, and nothing is downloaded.
Writes `gpu.json` after every part, so that a run which is cut off leaves what it found. Without a GPU,
`TRITON_INTERPRET=1 python benchmarks/gpu.py --device cpu` runs the tests in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from gpu_tests import ROOT, moved, print_tests, run_tests
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pymm import ops
from pymm.ops import _gpu
from pymm.ops._record import REGISTRY, Op, Workload

BF16 = torch.bfloat16
DEVICE = "cuda"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the results")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--ops", nargs="*", default=sorted(REGISTRY), choices=sorted(REGISTRY))
    parser.add_argument("--leave-out", help="test no sample whose label has this in it")
    parser.add_argument("--test-seconds", type=float, default=240, help="when to stop testing")
    parser.add_argument("--seconds", type=float, default=500, help="when to stop measuring")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1))
    settings = parser.parse_args()
    begin = time.monotonic()
    settings.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"format": 1, "machine": machine(settings.device)}

    def keep(part: str, value: Any) -> None:
        result[part] = value
        result["seconds"] = round(time.monotonic() - begin, 1)
        (settings.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")

    print(", ".join(f"{k} {v}" for k, v in result["machine"].items()), flush=True)
    if settings.device == "cuda":
        keep("build", build_cuda())
        print(f"CUDA kernels: {result['build']['status']}", flush=True)
    tests = run_tests(settings, begin + settings.test_seconds)
    keep("tests", tests)
    print_tests(tests)
    if settings.device == "cuda":
        rows: list[dict[str, Any]] = []
        for op, workload, compiled in gpu_workloads():
            if op.name not in settings.ops:
                continue
            if time.monotonic() > begin + settings.seconds:
                rows.append({"op": op.name, "workload": workload.label, "left_out": "no time was left"})
            else:
                rows.append(measured(op, workload, compiled))
                print_row(rows[-1])
            keep("workloads", rows)
    return int(any(t["status"] in ("wrong", "error") for t in tests))


def machine(device: str) -> dict[str, Any]:
    """What a figure depends on."""
    import triton

    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    found |= {"triton": triton.__version__, "python": sys.version.split()[0]}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "cuda": torch.version.cuda}
        found |= {"multiprocessors": gpu.multi_processor_count, "memory_bytes": gpu.total_memory}
    return found


def build_cuda() -> dict[str, Any]:
    """Compile csrc/cuda for this GPU with nvcc, beside the package; what ptxas says of each kernel."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return {"status": "left out: no nvcc"}
    major, minor = torch.cuda.get_device_capability()
    target = f"{major}{minor}" + ("a" if major >= 9 else "")
    package = Path(torch.__file__).parent
    command = [nvcc, "-std=c++20", "-O3", "-shared", "-Xcompiler", "-fPIC", "-Xptxas", "-v", "-lineinfo"]
    command += [f"-I{ROOT / 'csrc'}", "-isystem", str(package / "include"), "-cudart", "static"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-DUSE_CUDA"]
    command += ["-gencode", f"arch=compute_{target},code=sm_{target}", "--threads", "0"]
    command += [str(p) for p in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    command += [f"-L{package / 'lib'}", "-ltorch_cpu", "-o", str(ROOT / "pymm" / "libpymm_cuda.so")]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "status": "built" if done.returncode == 0 else "failed",
        "seconds": round(time.monotonic() - begin, 1),
        "target": f"sm_{target}",
        "log": done.stderr[-20_000:],
    }


# Measurements: forward, and forward + backward, beside what torch has.


def gpu_workloads() -> Iterator[tuple[Op, Workload, bool]]:
    """Op, workload, and whether `torch.compile` of eager stands beside it; the most telling first."""

    def attention(b: int, h: int, t: int, s: int, d: int, hkv: int = 0, **kwargs: Any) -> Any:
        def make(dtype: torch.dtype) -> Any:
            q, k, v = (torch.randn(b, n, m, d).to(dtype) for n, m in ((h, t), (hkv or h, s), (hkv or h, s)))
            bias = torch.randn(1, h, t, s).to(dtype) if kwargs.get("bias") else None
            return (q, k, v, bias), {k: v for k, v in kwargs.items() if k != "bias"}

        label = f"B{b} H{h} T{t} S{s} D{d}" + "".join(f" {k}" for k in kwargs)
        return Workload(label, BF16, make, gemm=(b * h * t, s, d), gemms=2, gemms_backward=5)

    def pairs(n: int, e: int, **kwargs: Any) -> Any:
        def make(dtype: torch.dtype) -> Any:
            extra = {k: torch.randn(v, e).to(dtype) for k, v in kwargs.items()}
            return (torch.randn(n, e).to(dtype), torch.randn(n, e).to(dtype), torch.tensor(14.0)), extra

        label = f"N={n} E={e}" + "".join(f" {k}={v}" for k, v in kwargs.items())
        return Workload(label, BF16, make, gemm=(n, n, e), gemms=1, gemms_backward=3)

    def of(op: str, label: str, gemm: Any, make: Any) -> tuple[Op, Workload]:
        return REGISTRY[op], Workload(label, BF16, lambda dtype: make(), gemm=gemm)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size).to(BF16)

    for t in (197, 257, 577, 50, 1025):
        yield REGISTRY["attention"], attention(max(1, 16384 // t), 12, t, t, 64), t == 197
    yield REGISTRY["info_nce"], pairs(32768, 1024), True
    yield REGISTRY["info_nce"], pairs(8192, 512), False
    patches = {"prefix": (1, 768), "position": (197, 768)}
    yield *of("patch_embed", "B=256 224x224 p=16 C=768", (256 * 196, 768, 768), lambda: (
        (rand(256, 3, 224, 224), rand(768, 3, 16, 16), rand(768)),
        {k: rand(*v) for k, v in patches.items()},
    )), True  # fmt: skip
    yield *of("cosine_similarity", "8192x8192x768", (8192, 8192, 768), lambda: (
        (rand(8192, 768), rand(8192, 768)), {})), True  # fmt: skip
    for mining, n in (("hard", 8192), ("semi-hard", 1024), ("all", 1024)):
        yield *of("mined_triplet_loss", f"{n}x512 {mining}", (n, n, 512), lambda n=n, mining=mining: (
            (rand(n, 512), torch.arange(n) // 4), {"mining": mining})), False  # fmt: skip
    for d in (72, 80, 88, 96, 128):
        yield REGISTRY["attention"], attention(64, 16, 257, 257, d), False
    yield REGISTRY["attention"], attention(64, 12, 197, 197, 64, bias=True), False
    yield REGISTRY["attention"], attention(2, 16, 8192, 8192, 128, is_causal=True), False
    yield REGISTRY["attention"], attention(8, 32, 1, 8192, 128, 8, enable_gqa=True), False
    yield REGISTRY["sigmoid_contrastive"], _with_bias(pairs(32768, 768)), False
    yield REGISTRY["info_nce"], pairs(4096, 256, negatives_x=65536, negatives_y=65536), False
    yield *of("cosine_topk", "1024x1000000x512 k=10", (1024, 1_000_000, 512), lambda: (
        (rand(1024, 512), rand(1_000_000, 512), 10), {})), False  # fmt: skip
    yield *of("linear", "50432x768->3072 gelu", (50432, 3072, 768), lambda: (
        (rand(50432, 768), rand(3072, 768), rand(3072), "gelu"), {})), True  # fmt: skip
    yield *of("triplet_loss", "65536x512", None, lambda: (
        tuple(rand(65536, 512) for _ in range(3)), {})), False  # fmt: skip
    lengths = torch.tensor([64, 197, 577, 256, 128, 400, 196, 50] * 16)
    starts = F.pad(lengths.cumsum(0), (1, 0))
    total = int(starts[-1])
    gemm = (12 * int((lengths**2).sum()) // 64, 64, 64)
    yield *of("attention_varlen", f"{len(lengths)} sequences of 50 to 577, H12 D64", gemm, lambda: (
        (*(rand(total, 12, 64) for _ in range(3)), starts.clone(), starts.clone()), {})), False  # fmt: skip
    yield REGISTRY["info_nce"], pairs(262144, 512), False
    # Without a kernel for a GPU: what their references take there.
    for name in ("roi_align", "roi_pool", "nms"):
        for workload in REGISTRY[name].workloads():
            yield REGISTRY[name], workload, False


def _with_bias(workload: Workload) -> Workload:
    def make(dtype: torch.dtype) -> Any:
        args, kwargs = workload.make(dtype)
        return (*args, torch.tensor(-10.0)), kwargs

    return Workload(workload.label, workload.dtype, make, workload.gemm, 1, 3)


def measured(op: Op, workload: Workload, compiled: bool) -> dict[str, Any]:
    """One row: milliseconds (median, 20th, 80th percentile) of every contestant, and ours' peak memory."""
    dtype = str(workload.dtype).removeprefix("torch.")
    row: dict[str, Any] = {"op": op.name, "workload": workload.label, "dtype": dtype}
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    args, kwargs = workload.make(workload.dtype)
    args, kwargs = moved(args, DEVICE), moved(kwargs, DEVICE)
    for backward in (False, True) if op.backward is not None else (False,):
        times: dict[str, Any] = {}
        for name, function, context in _contestants(op, args, compiled):
            try:
                call = _call(workload.fixed, function, context, args, kwargs, backward)
                call()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                times[name] = _time(call) | {"extra_bytes": torch.cuda.max_memory_allocated() - before}
            except (RuntimeError, ValueError, NotImplementedError, torch.cuda.OutOfMemoryError) as error:
                times[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
                torch.cuda.empty_cache()
        times |= _limits(workload, args, kwargs, backward)
        row["forward_backward" if backward else "forward"] = times
    return row


def _contestants(op: Op, args: Any, compiled: bool) -> Iterator[tuple[str, Callable[..., Any], Any]]:
    for backend in ("triton", "cuda"):
        if _gpu.problem_of(backend, op.name) is None:
            yield backend, op.function, lambda backend=backend: ops.backend(backend)
    if op.eager is None:
        return
    if op.name == "attention":
        for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
            choice = getattr(SDPBackend, name)
            yield name.lower(), op.eager, lambda choice=choice: sdpa_kernel(choice)
    else:
        yield "eager", op.eager, nullcontext
    if compiled:
        torch._dynamo.reset()
        yield "compiled", torch.compile(op.eager), nullcontext


def _call(
    fixed: tuple[int | str, ...], function: Any, context: Any, args: Any, kwargs: Any, backward: bool
) -> Callable[[], Any]:
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if not backward or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    args = [a if i in fixed else leaf(a) for i, a in enumerate(args)]
    kwargs = {k: v if k in fixed else leaf(v) for k, v in kwargs.items()}

    def forward() -> Tensor:
        with context():
            out = function(*args, **kwargs)
        return out[0] if isinstance(out, (tuple, list)) else out

    if not backward:
        return forward
    cotangent = torch.randn_like(forward())

    def both() -> None:
        torch.autograd.grad(forward(), leaves, cotangent, allow_unused=True)

    return both


def _time(call: Callable[[], Any]) -> dict[str, float]:
    from triton.testing import do_bench

    median, low, high = do_bench(call, warmup=25, rep=150, quantiles=[0.5, 0.2, 0.8])
    return {"p20_ms": low, "p50_ms": median, "p80_ms": high}


def _limits(workload: Workload, args: Any, kwargs: Any, backward: bool) -> dict[str, Any]:
    """The op's matrix products alone, as one bare product times their number, and a copy of the arguments."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    source = torch.randint(0, 255, (sum(t.nbytes for t in tensors),), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    limits: dict[str, Any] = {"copy": _time(lambda: target.copy_(source))}
    if workload.gemm is not None:
        m, n, k = workload.gemm
        # A product whose result would not fit is measured by a part of its rows.
        part = min(m, (1 << 31) // n)
        a, b = torch.randn(part, k, device=DEVICE).to(BF16), torch.randn(n, k, device=DEVICE).to(BF16)
        count = (workload.gemms + (workload.gemms_backward if backward else 0)) * m / part
        limits["gemm"] = {key: value * count for key, value in _time(lambda: a @ b.T).items()}
    return limits


def print_row(row: dict[str, Any]) -> None:
    for key in ("forward", "forward_backward"):
        if key in row:
            cells = [f"{k} {v['p50_ms']:.3f}" if "p50_ms" in v else f"{k} -" for k, v in row[key].items()]
            print(
                f"{row['op']:20s} {row['workload']:36s} {'fwd' if key == 'forward' else 'f+b'} ms: "
                + ", ".join(cells)
            )
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
