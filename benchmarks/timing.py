"""Times of calls that take turns."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch

from pymm.benchmarks.schema import Times

Call = Callable[[], object]
LEAST_ROUNDS = 3
MOST_ROUNDS = 2000


def timed(call: Call, device: torch.device) -> float:
    """Seconds of one call; on a GPU until its work is done."""
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def interleaved(calls: dict[str, Call], seconds: float, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, taken in rounds in which every call has one turn, in an order drawn anew.

    So a drift of the machine meets all of them alike, and none always follows the same other one. There are
    at least three rounds, more while `seconds` last.
    """
    order = random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    end = time.perf_counter() + seconds
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() >= end:
            break
        order.shuffle(names)
        for name in names:
            taken[name].append(timed(calls[name], device))
    return taken


def times(seconds: list[float], factor: float = 1.0) -> Times:
    """The median and the 20th and 80th percentile, in milliseconds, each times `factor`."""
    values = [s * 1e3 * factor for s in seconds]
    if len(values) == 1:
        return Times(values[0], values[0], values[0], 1)
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return Times(cuts[0], statistics.median(values), cuts[3], len(values))
