"""What was read and what was left behind, by reason."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

logger = logging.getLogger("pymm.data")


@dataclass
class Report:
    """Counts of one epoch.

    Attributes:
        read: samples delivered in batches.
        left_out: samples that `select` refused; nothing is wrong with them.
        skipped: samples, members and shard ends that could not be used, by reason.
        examples: where each reason was seen first.
        repeated: rows of fixed-size batches that repeat a sample because another one did not decode.
    """

    read: int = 0
    left_out: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    repeated: int = 0

    def skip(self, reason: str, where: str) -> None:
        self.skipped[reason] += 1
        self.examples.setdefault(reason, where)

    def add(self, other: Report) -> None:
        """Count what another report counted as well."""
        self.read += other.read
        self.left_out += other.left_out
        self.repeated += other.repeated
        self.skipped.update(other.skipped)
        for reason, where in other.examples.items():
            self.examples.setdefault(reason, where)

    def __str__(self) -> str:
        text = f"{self.read} read, {self.skipped.total()} skipped"
        if self.skipped:
            each = (
                f"{n} {reason} (first: {self.examples[reason]})" for reason, n in self.skipped.most_common()
            )
            text += f": {'; '.join(each)}"
        if self.left_out:
            text += f"; {self.left_out} left out by select"
        if self.repeated:
            text += f"; {self.repeated} rows repeated in place of undecodable ones"
        return text
