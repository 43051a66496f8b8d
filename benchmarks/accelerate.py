"""Whole models of timm and open_clip before and after `pymm.accelerate`.

    python -m pymm.benchmarks.accelerate --only "vit_b16 training bfloat16" --out results.json

Every way, eager and compiled, before and after, takes turns in one process. A training step is forward,
cross-entropy, backward and SGD; `encode_image` runs without gradients. Weights are in the type that is
named, and random: a time does not depend on them. `peak` is how long the model's products (those that torch
counts) would take at the rate of multiply-adds in registers, so no swap can be faster than that.
"""

from __future__ import annotations

import copy
import datetime
import importlib
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import pymm
from pymm.benchmarks.limits import peak
from pymm.benchmarks.load import Load
from pymm.benchmarks.timing import interleaved, times
from pymm.ops._machine import machine

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """Measure models before and after `pymm.accelerate`."""

    only: str = ""
    """A part of the names of the workloads to measure; all by default."""
    seconds: float = 40.0
    """For the rounds of a workload; at least three are made."""
    compiled: bool = True
    """Whether torch.compile takes part, which takes minutes the first time."""
    out: Path | None = None
    """A JSON file, to which the rows are added."""


def _vit() -> nn.Module:
    return importlib.import_module("timm").create_model("vit_base_patch16_224", num_classes=1000)


def _clip() -> nn.Module:
    return importlib.import_module("open_clip").create_model("ViT-B-32")


def _training(
    model: Any, dtype: torch.dtype, batch: int
) -> Callable[[Callable[..., Any]], Callable[[], object]]:
    """A step of the model, given the way to call it."""
    model.train()
    pixels, labels = torch.randn(batch, 3, 224, 224).to(dtype), torch.randint(0, 1000, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def of(run: Callable[..., Any]) -> Callable[[], object]:
        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(run(pixels), labels).backward()
            optimizer.step()

        return step

    return of


def _encoding(
    model: Any, dtype: torch.dtype, batch: int
) -> Callable[[Callable[..., Any]], Callable[[], object]]:
    model.eval()
    pixels = torch.randn(batch, 3, 224, 224).to(dtype)

    def of(run: Callable[..., Any]) -> Callable[[], object]:
        @torch.no_grad()
        def encode() -> object:
            return run(pixels)

        return encode

    return of


@dataclass(frozen=True)
class Workload:
    name: str
    model: Callable[[], nn.Module]
    kind: Callable[..., Any]
    batch: int
    target: float | None
    """The least ratio that pymm sets itself, for bfloat16."""

    def run_of(self, model: Any) -> Callable[..., Any]:
        return model.encode_image if hasattr(model, "encode_image") else model


WORKLOADS = (
    Workload("vit_b16 training", _vit, _training, 8, 2.0),
    Workload("vit_b16 inference", _vit, _encoding, 8, None),
    Workload("clip_vit_b32 encode_image", _clip, _encoding, 16, 1.5),
)


def measure(workload: Workload, dtype: torch.dtype, settings: Settings) -> dict[str, Any]:
    """The row of a workload: times of every way, and the ratio of the best way before to the best after."""
    torch.manual_seed(0)
    before = workload.model().to(dtype)
    after = copy.deepcopy(before)
    report = pymm.accelerate(after)
    calls: dict[str, Callable[[], object]] = {}
    for word, model in (("before", before), ("after", after)):
        of = workload.kind(model, dtype, workload.batch)
        run = workload.run_of(model)
        calls[f"{word}, eager"] = of(run)
        if settings.compiled:
            calls[f"{word}, compiled"] = of(torch.compile(run))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # whose products the counter does not see
    with FlopCounterMode(display=False) as counter:
        calls["before, eager"]()
    torch.backends.mha.set_fastpath_enabled(fast)
    for call in calls.values():
        call()
        call()
    operations = counter.get_total_flops()
    limit = peak(operations, str(dtype).removeprefix("torch."))
    calls["peak"] = limit.call
    load = Load.now()
    taken = interleaved(calls, settings.seconds, CPU)
    factor = {name: limit.factor if name == "peak" else 1.0 for name in taken}
    median = {name: statistics.median(values) * factor[name] for name, values in taken.items()}
    best = {w: min(t for name, t in median.items() if name.startswith(w)) for w in ("before", "after")}
    now = Load.now()
    return {
        "name": f"{workload.name} {str(dtype).removeprefix('torch.')}",
        "batch": workload.batch,
        "times": {name: asdict(times(values, factor[name])) for name, values in taken.items()},
        "operations": operations,
        "speedup_at_peak": best["before"] / median["peak"],
        "speedup": best["before"] / best["after"],
        "speedup_eager": median["before, eager"] / median["after, eager"],
        "target": workload.target if dtype == torch.bfloat16 else None,
        "others": None if load is None or now is None else now.others_since(load),
        "report": str(report),
    }


def main(settings: Settings) -> None:
    chosen = [
        (w, dtype)
        for w in WORKLOADS
        for dtype in (torch.bfloat16, torch.float32)
        if settings.only in f"{w.name} {str(dtype).removeprefix('torch.')}"
    ]
    for workload, dtype in chosen:
        row = measure(workload, dtype, settings)
        for name, t in row["times"].items():
            print(f"{row['name']:<36} {name:<18} {t['p50_ms']:9.1f} ms ({t['samples']} rounds)", flush=True)
        ratio, most = row["speedup"], row["speedup_at_peak"]
        print(
            f"{row['name']:<36} {ratio:.2f} times as fast, {most:.2f} if products were all, at the peak",
            flush=True,
        )
        if settings.out is not None:
            _add(row, settings.out)


def _add(row: dict[str, Any], path: Path) -> None:
    """Put a row into the file, in the place of one of the same name."""
    result = json.loads(path.read_text()) if path.exists() else {"rows": []}
    result |= {"format": 1, "date": datetime.date.today().isoformat(), "machine": machine()}
    result["rows"] = [r for r in result["rows"] if r["name"] != row["name"]] + [row]
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
