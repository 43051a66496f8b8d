"""What a peer is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Function = Callable[..., Any]
# What makes a peer's function of the arguments `(args, kwargs)` of a workload.
Make = Callable[[tuple[Any, ...], dict[str, Any]], Function]


class Unsuitable(Exception):
    """A peer has no such option, or would not fit; the message says which."""


@dataclass(frozen=True)
class Peer:
    """Another way to compute an op.

    Args:
        name: in the table.
        make: `(args, kwargs)` -> the function; it may prepare what a user prepares once, and may raise
            Unsuitable.
        module: what has to be installed.
        backward: whether it has gradients.
        compiled: measure torch.compile of it too.
    """

    name: str
    make: Make
    module: str | None = None
    backward: bool = True
    compiled: bool = False
