"""Who else uses the processor while something is measured."""

from __future__ import annotations

import os
from dataclasses import dataclass

DISTURBED = 0.1  # of the processor's time; above it a row is marked


@dataclass(frozen=True)
class Load:
    """Processor seconds since the machine's start: of all cores, of those not idle, and of this process."""

    total: float
    busy: float
    own: float

    @staticmethod
    def now() -> Load | None:
        """What Linux says; None elsewhere."""
        try:
            with open("/proc/stat") as file:
                ticks = [int(word) for word in file.readline().split()[1:9]]
        except (OSError, ValueError):
            return None
        second = os.sysconf("SC_CLK_TCK")
        idle = ticks[3] + ticks[4]
        t = os.times()
        own = t.user + t.system + t.children_user + t.children_system
        return Load(sum(ticks) / second, (sum(ticks) - idle) / second, own)

    def others_since(self, before: Load) -> float:
        """The share of all cores' time since then that other processes, or other machines on it, took."""
        total = self.total - before.total
        if total <= 0:
            return 0.0
        return min(1.0, max(0.0, (self.busy - before.busy - (self.own - before.own)) / total))
