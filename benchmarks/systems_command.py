"""`pymm results`: train the systems of the table, judge them and their baselines, write the table."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from pymm.benchmarks.load import DISTURBED, Load
from pymm.benchmarks.systems import ROWS, System
from pymm.ops._checks import fail
from pymm.ops._machine import machine
from pymm.training.files import write_atomically
from pymm.training.log import LOG, read_log
from pymm.training.rundir import SETTINGS, WEIGHTS

FORMAT = 1
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # in the files, and no parameters
FASHION = "/usr/share/datasets/fashion-mnist"


@dataclass(frozen=True)
class ResultsSettings:
    """Train the systems of the results table and compare each with its baseline."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Rows; by default all of them."""
    list: bool = False
    """List the rows instead of training them."""
    seconds: float = 150.0
    """Of training, for each row and each baseline that is trained; where the steps do not fit, the learning
    rate comes down sooner and the row says so."""
    again: bool = False
    """Train anew what is there already."""
    runs: str = "runs/systems"
    """Where the runs are."""
    out: str = "benchmarks/results/systems.json"
    """The scores; those of other rows are kept."""
    table: str = "benchmarks/systems.md"
    """The table, made of all scores."""
    fashion_mnist: str = FASHION
    """The folder of Fashion-MNIST's IDX files; Debian's package dataset-fashion-mnist brings them. Rows that
    need it are left out where it is not."""
    threads: int | None = None
    """CPU threads; by default torch's."""


@dataclass(frozen=True)
class Judged:
    """A run, or what takes its place, and what it reached."""

    score: float
    train_s: float
    steps: int | None = None
    asked_steps: int | None = None
    parameters: int | None = None
    others: float | None = None
    """The share of the processor that other programs took meanwhile."""

    @property
    def cut(self) -> bool:
        """Whether the time was up before the steps were done."""
        return self.steps is not None and self.asked_steps is not None and self.steps < self.asked_steps


@dataclass(frozen=True)
class Result:
    """A row of the file. The system's words are kept as they were when it was measured."""

    name: str
    system: str
    data: str
    metric: str
    command: str
    baseline: str
    pymm: Judged
    other: Judged
    date: str
    machine: dict[str, Any]


def run(settings: ResultsSettings) -> int:
    """0; 1 when a row could not be trained.

    Raises:
        ValueError: for an unknown name, or files that hold no results.
    """
    rows = _chosen(settings.names)
    if settings.list:
        for row in rows:
            print(f"{row.name:<18} {row.system}: {row.data}; against {row.baseline.label}")
        return 0
    failed = []
    for row in rows:
        missing = any("{fashion}" in word for word in row.train) and not Path(settings.fashion_mnist).is_dir()
        if missing:
            print(f"{row.name}: left out, {settings.fashion_mnist} is not there")
            continue
        try:
            result = _measure(row, settings)
        except subprocess.CalledProcessError as error:
            failed.append(row.name)
            print(f"{row.name}: {' '.join(error.cmd[2:6])} ... ended with {error.returncode}")
            continue
        kept = {one.name: one for one in load(Path(settings.out))} | {row.name: result}
        save(Path(settings.out), _in_order(kept))
        write_atomically(Path(settings.table), render(_in_order(kept)).encode())
        ours, other = result.pymm.score, result.other.score
        print(f"{row.name}: {row.metric} {ours:.3f}, and {other:.3f} of {row.baseline.label}")
    return 1 if failed else 0


def _chosen(names: Sequence[str]) -> list[System]:
    known = {row.name: row for row in ROWS}
    for name in names:
        if name not in known:
            fail("results", "names", f"among {', '.join(known)}", repr(name))
    return [row for row in ROWS if not names or row.name in names]


def _in_order(kept: dict[str, Result]) -> list[Result]:
    """As the registry has them; a result whose row is gone comes last."""
    order = [row.name for row in ROWS]
    return sorted(kept.values(), key=lambda one: order.index(one.name) if one.name in order else len(order))


def _measure(row: System, settings: ResultsSettings) -> Result:
    _train_needed(row, settings)
    ours = _judged(row, row.train, row.name, settings)
    if row.baseline.score is not None:
        began = time.monotonic()
        score = row.baseline.score(Path(settings.runs) / row.name)
        other = Judged(score, round(time.monotonic() - began, 1))
    else:
        other = _judged(row, row.baseline.train, f"{row.name}-baseline", settings)
    return Result(
        row.name,
        row.system,
        row.data,
        row.metric,
        f"pymm train {' '.join(_filled(row.train, FASHION, 'runs/systems'))}",
        row.baseline.label,
        ours,
        other,
        time.strftime("%Y-%m-%d"),
        machine(),
    )


def _train_needed(row: System, settings: ResultsSettings) -> None:
    """Train what a row begins with, and what that begins with, where it is not there yet."""
    if row.needs is None:
        return
    donor = next(other for other in ROWS if other.name == row.needs)
    if not (Path(settings.runs) / donor.name / WEIGHTS).is_file():
        _train_needed(donor, settings)
        _train(donor.train, donor.name, settings)


def _filled(words: Sequence[str], fashion: str, runs: str) -> list[str]:
    return [word.replace("{fashion}", fashion).replace("{runs}", runs) for word in words]


def _pymm(*arguments: str) -> None:
    # This package, wherever it is from.
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pymm.cli", *arguments]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})


def _train(words: Sequence[str], name: str, settings: ResultsSettings) -> Path:
    out = Path(settings.runs) / name
    if settings.again and out.exists():
        shutil.rmtree(out)
    threads = [] if settings.threads is None else ["--run.threads", str(settings.threads)]
    where = ["--schedule.max-seconds", str(settings.seconds), "--out", str(out)]
    _pymm("train", *_filled(words, settings.fashion_mnist, settings.runs), *where, *threads)
    return out


def _evaluated(row: System, out: Path) -> float:
    """The row's metric from `pymm eval`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scores.json"
        _pymm("eval", str(out), *row.evaluate, "--out", str(file))
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    for key in row.metric.split("."):
        found = found[key]
    return float(found)


def _judged(row: System, words: Sequence[str], name: str, settings: ResultsSettings) -> Judged:
    """Train a run, or go on with it, and evaluate it."""
    from safetensors import safe_open

    before = Load.now()
    out = _train(words, name, settings)
    now = Load.now()
    others = round(now.others_since(before), 2) if now is not None and before is not None else None
    found = row.judge(out) if row.judge is not None else _evaluated(row, out)
    last = [line for line in read_log(out / LOG) if "loss" in line][-1]
    asked = json.loads((out / SETTINGS).read_text(encoding="utf-8"))["schedule"]["steps"]
    with safe_open(out / WEIGHTS, "pt") as weights:
        names = [name for name in weights.keys() if not name.endswith(_STATISTICS)]  # noqa: SIM118
        sizes = [weights.get_slice(name).get_shape() for name in names]
    parameters = sum(math.prod(size) for size in sizes)
    return Judged(found, round(last["elapsed_s"], 1), last["step"], asked, parameters, others)


def load(path: Path) -> list[Result]:
    """The results of a file; none where there is no file.

    Raises:
        ValueError: when it holds something else.
    """
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            fail("results", str(path), f"of format {FORMAT}", data["format"])
        return [
            Result(**(one | {"pymm": Judged(**one["pymm"]), "other": Judged(**one["other"])}))
            for one in data["rows"]
        ]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"results: {path} must be a file of results, got {error!r}") from error


def save(path: Path, results: Sequence[Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"format": FORMAT, "rows": [asdict(result) for result in results]}
    write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())


def render(results: Sequence[Result]) -> str:
    """The table and its commands, as Markdown."""
    headings = (
        "system",
        "trained and tested on",
        "metric",
        "pymm",
        "baseline",
        "which is",
        "weights",
        "training",
    )
    lines = [
        "# Systems against their baselines",
        "",
        "`pymm results` trains every row and writes this file: one run each, seed 0, the better score bold.",
        "",
        f"| {' | '.join(headings)} |",
        "|---|---|---|---:|---:|---|---:|---:|",
    ]
    for one in results:
        better = one.pymm.score > one.other.score
        ours, other = f"{one.pymm.score:.3f}", f"{one.other.score:.3f}"
        ours, other = (f"**{ours}**", other) if better else (ours, f"**{other}**")
        time_s = f"{one.pymm.train_s:.0f} s"
        if one.pymm.cut:
            time_s += f", cut at step {one.pymm.steps} of {one.pymm.asked_steps}"
        if one.pymm.others is not None and one.pymm.others > DISTURBED:
            time_s += f", {one.pymm.others:.0%} of the processor taken by others"
        weights = "" if one.pymm.parameters is None else f"{one.pymm.parameters / 1e6:.2f} M"
        cells = (one.system, one.data, one.metric, ours, other, one.baseline, weights, time_s)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Commands, with `--schedule.max-seconds` and `--out` behind them:", "", "```sh"]
    lines += [one.command for one in results]
    lines += ["```", ""]
    for words, names in _machines(results).items():
        lines.append(f"Measured on {words}: {', '.join(names)}.")
    return "\n".join(lines) + "\n"


def _machines(results: Sequence[Result]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for one in results:
        m = one.machine
        words = f"{m['processor']}, {m['cores']} cores, {m['threads']} threads, {m['instruction_set']}"
        found.setdefault(f"{words}, torch {m['torch']}, {one.date}", []).append(one.name)
    return found
