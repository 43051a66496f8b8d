"""Every sample of every op's record on a GPU, with every backend, against the reference in float64."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import pymm  # noqa: E402
from pymm import ops  # noqa: E402
from pymm.ops import _gpu  # noqa: E402
from pymm.ops._record import REGISTRY, Op  # noqa: E402
from pymm.ops._tolerance import allowed, error  # noqa: E402

if not (ROOT / "pymm" / "triton_kernels").exists():
    pymm.__path__.append(str(ROOT))  # the folders that an installed pymm has inside

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # the last for CUDA C++ only


def run_tests(settings: argparse.Namespace, end: float) -> list[dict[str, Any]]:
    """Rows of op, sample, type and backend: ok, wrong, error, left out, or not reached in time."""
    tasks = []
    for name in settings.ops:
        for backend in ("triton", "cuda") if settings.device == "cuda" else ("triton",):
            problem = _gpu.problem_of(backend, name)
            if problem is None:
                torch.manual_seed(0)
                samples = [s.label for s in REGISTRY[name].samples(torch.float32)]
                tasks += [
                    (name, backend, i, label)
                    for i, label in enumerate(samples)
                    if not settings.leave_out or settings.leave_out not in label
                ]
    if settings.workers == 1:
        return [row for task in tasks for row in _tested(*task, settings.device, end)]
    rows = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.workers, context) as pool:
        waiting = [pool.submit(_tested, *task, settings.device, end) for task in tasks]
        for done in as_completed(waiting):
            rows += done.result()
    return rows


def _tested(name: str, backend: str, index: int, label: str, device: str, end: float) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [
        {"op": name, "backend": backend, "sample": label, "dtype": str(dtype).removeprefix("torch.")}
        | (
            {"status": "not reached"}
            if time.monotonic() > end
            else _compared(name, backend, index, dtype, device)
        )
        for dtype in DTYPES
    ]


def _compared(name: str, backend: str, index: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    op = REGISTRY[name]
    torch.manual_seed(0)
    sample = list(op.samples(dtype))[index]
    args, kwargs = moved(sample.args, device), moved(sample.kwargs, device)
    with ops.backend(backend):
        try:
            ops.explain(name, *args, **kwargs)
        except ValueError as problem:
            return {"status": "left out", "why": str(problem)}
    try:
        truth = _results(op, op.function, args, kwargs, "reference", torch.float64)
        got = _results(op, op.function, args, kwargs, backend)
        again = _results(op, op.function, args, kwargs, backend)
        errors = {key: error(got[key], value) for key, value in truth.items()}
        bounds = _allowed(op, args, kwargs, dtype, truth)
    except Exception as problem:  # a kernel that does not run is a finding of this program
        return {"status": "error", "why": f"{type(problem).__name__}: {problem}"[:2000]}
    worst = max(errors, key=lambda key: errors[key] / bounds[key])
    same = all(torch.equal(got[k].nan_to_num(), again[k].nan_to_num()) for k in got)
    status = "wrong" if errors[worst] > bounds[worst] or not same else "ok"
    row = {"status": status, "of": worst, "error": errors[worst], "allowed": bounds[worst]}
    return row if same else {**row, "why": "the bits of a rerun differ"}


def moved(values: Any, device: str) -> Any:
    if isinstance(values, dict):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}
    # A strided sample stays strided: `to` keeps strides of dense tensors only.
    moved = []
    for v in values:
        if isinstance(v, Tensor) and v.device.type != device:
            copy = torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=device)
            v = (
                copy.copy_(v)
                if all(s or n <= 1 for s, n in zip(v.stride(), v.shape, strict=True))
                else v.to(device)
            )
        moved.append(v)
    return tuple(moved)


def _results(
    op: Op,
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
    backend: str,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Outputs, and the gradients of all floating arguments under fixed cotangents of the inputs' own type."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        leaves[name] = value.detach().to(dtype or value.dtype).requires_grad_()
        return leaves[name]

    own = next(v.dtype for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point())
    args = [leaf(str(i), a) for i, a in enumerate(args)]
    kwargs = {k: leaf(k, v) for k, v in kwargs.items()}
    torch.manual_seed(1)
    with ops.backend(backend):
        out = function(*args, **kwargs)
        outputs = tuple(out) if isinstance(out, (tuple, list)) else (out,)
        found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
        roots = [o for o in outputs if o.requires_grad]
        cotangents = []
        for i, o in enumerate(roots):
            generator = torch.Generator().manual_seed(i)
            cotangents.append(torch.randn(o.shape, generator=generator, dtype=torch.float64).to(own).to(o))
        if roots:
            gradients = torch.autograd.grad(roots, list(leaves.values()), cotangents, allow_unused=True)
            found |= {f"gradient of {k}": g for k, g in zip(leaves, gradients, strict=True) if g is not None}
    return found


def _allowed(
    op: Op, args: Any, kwargs: Any, dtype: torch.dtype, truth: dict[str, Tensor]
) -> dict[str, float]:
    plain: dict[str, Tensor] = {}
    if dtype not in op.tolerance:
        try:
            plain = _results(op, op.eager or op.function, args, kwargs, "reference")
        except (NotImplementedError, RuntimeError):
            plain = _results(op, op.function, args, kwargs, "reference")
    return {key: allowed(op.tolerance, dtype, plain.get(key), value) for key, value in truth.items()}


def print_tests(rows: list[dict[str, Any]]) -> None:
    for (op, backend), count in sorted(Counter((r["op"], r["backend"]) for r in rows).items()):
        of = Counter(r["status"] for r in rows if (r["op"], r["backend"]) == (op, backend))
        print(f"{op:22s} {backend:7s} {count:4d} tests: " + ", ".join(f"{n} {s}" for s, n in of.items()))
    for r in [r for r in rows if r["status"] in ("wrong", "error")][:20]:
        said = r.get("why") or f"{r['of']}: error {r['error']:.1e}, allowed {r['allowed']:.1e}"
        print(f"  {r['status']}: {r['op']} {r['backend']} {r['sample']} {r['dtype']}: {said[:200]}")
    sys.stdout.flush()
