"""Pictures of a run: its loss curve, and a sheet of retrievals. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

PAPER, INK, GREY, GREEN, LINE = "#ffffff", "#1f2933", "#8a94a3", "#2f9e44", "#e1e5ea"
FONT = "DejaVu Sans"  # comes with matplotlib, and has the accents of the captions


@dataclass(frozen=True)
class Retrieval:
    """One query and what was found for it.

    Attributes:
        text: the query.
        pictures: uint8 `(K, 3, H, W)`, best first.
        right: for each picture, whether it is a right one.
        place: of the best right picture among all candidates, from 1.
    """

    text: str
    pictures: Tensor
    right: Sequence[bool]
    place: int


def require_matplotlib() -> None:
    """Raise now what the first picture would raise after minutes of training.

    Raises:
        ImportError: naming the extra that brings matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("the pictures need matplotlib: pip install 'pymm[demo]'") from error


def loss_curve(path: Path, steps: Sequence[int], losses: Sequence[float], title: str) -> None:
    """Draw a loss over steps, as it was and smoothed.

    Args:
        path: of the PNG to write.
        steps, losses: at least one of each.
        title: above it.
    """
    figure, axes = new_figure(8, 4.5)
    average, smooth = losses[0], []
    for loss in losses:
        average += 0.1 * (loss - average)
        smooth.append(average)
    axes.plot(steps, losses, color=GREEN, alpha=0.3, linewidth=1, label="logged steps")
    axes.plot(steps, smooth, color=GREEN, linewidth=2, label="smoothed")
    axes.set_title(title, loc="left", color=INK, fontsize=13, pad=12)
    axes.set_xlabel("step", color=GREY)
    axes.set_ylabel("contrastive loss", color=GREY)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=LINE)
    axes.tick_params(colors=GREY, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.legend(frameon=False, labelcolor=INK)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def retrieval_sheet(
    path: Path, columns: Sequence[tuple[str, str, Sequence[Retrieval]]], title: str, note: str
) -> None:
    """Draw retrievals side by side: the query, its pictures, the right ones in a green frame.

    Args:
        path: of the PNG to write.
        columns: heading, line below it, and retrievals of each column; equally many in all.
        title, note: above and below everything.
    """
    from matplotlib.patches import FancyBboxPatch

    rows = max(len(found) for _, _, found in columns)
    shown = max(len(one.right) for _, _, found in columns for one in found)
    wide, row, top, foot = shown + 0.9, 1.62, 1.75, 0.55
    width, height = wide * len(columns) - 0.3, row * rows + top + foot
    figure, axes = new_figure(width * 0.95, height * 0.95)
    axes.set_position((0, 0, 1, 1))
    axes.set_xlim(-0.4, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.text(0.04, 0.55, title, color=INK, fontsize=20, weight="bold", va="center")
    for c, (heading, below, found) in enumerate(columns):
        left = c * wide
        axes.text(left + 0.04, 1.12, heading, color=INK, fontsize=13, weight="bold", va="center")
        axes.text(left + 0.04, 1.42, below, color=GREY, fontsize=9.5, va="center")
        for r, one in enumerate(found):
            y = top + r * row
            axes.text(left + 0.04, y + 0.2, _short(one.text), color=INK, fontsize=12.5, va="center")
            where = f"place {one.place}"
            axes.text(left + shown - 0.08, y + 0.2, where, color=GREY, fontsize=9.5, va="center", ha="right")
            for i, right in enumerate(one.right):
                x = left + i
                axes.imshow(
                    one.pictures[i].permute(1, 2, 0).numpy(),
                    extent=(x + 0.14, x + 0.82, y + 1.32, y + 0.52),
                    interpolation="bicubic",
                    aspect="auto",
                )
                axes.add_patch(
                    FancyBboxPatch(
                        (x + 0.04, y + 0.42),
                        0.88,
                        1.0,
                        boxstyle="round,pad=0,rounding_size=0.12",
                        fill=False,
                        edgecolor=GREEN if right else LINE,
                        linewidth=3.5 if right else 1,
                    )
                )
    axes.set_xlim(-0.4, width)
    axes.set_ylim(height, 0)
    axes.text(0.04, height - 0.28, note, color=GREY, fontsize=9.5, va="center")
    figure.savefig(path, dpi=130)


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure in the colours and the font of all our pictures, and its axes."""
    require_matplotlib()
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rcParams["font.family"] = FONT
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    FigureCanvasAgg(figure)  # no window, no display
    axes = figure.add_subplot()
    axes.set_facecolor(PAPER)
    return figure, axes


def _short(text: str, most: int = 34) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
