"""Towers as graphs of plain torch operators, and as ONNX files."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from pymm.layers import PatchEmbed
from pymm.models import CLIP
from pymm.ops import REGISTRY
from pymm.ops._checks import fail
from pymm.ops._record import NAMESPACES

Tower = Literal["image", "text"]


class _Part(nn.Module):
    """The part of a model that is exported, as a model of one argument."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model, self.method)(x)


def export(
    model: nn.Module, tower: Tower | None = None, *, any_size: bool = False
) -> torch.export.ExportedProgram:
    """A model, or a tower of CLIP, as a graph of torch's own operators, through the ops' references.

    The number of samples is dynamic, and that of tokens up to the context length. Images have the size that
    the model is made for, or with `any_size` any other, are float and normalized. The graph is that of
    evaluation mode, without gradients; it needs no pymm where it runs.

    Args:
        model: of `pymm.models`, from pixels or tokens to one tensor, on the CPU.
        tower: `"image"` or `"text"` for CLIP, whose graph is that of `encode_image` or `encode_text`.
        any_size: let height and width change, each for itself: at least two patches long and multiples of the
            patch size where the model has patches, whose positions are interpolated, else at least 33.

    Raises:
        ValueError: when the model is no such model, the tower is not one of its, or its graph depends on the
            size of the images, as that of AlexNet and VGG does.
    """
    part, example, dynamic = _part(model, tower, any_size)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            program = torch.export.export(part, (example,), dynamic_shapes=(dynamic,))
            return program.run_decompositions(_references())
    except Exception as error:  # whatever the size stops on its way through the model
        if not any_size:
            raise
        expected = f"False for {type(model).__name__}, whose graph depends on the size of its images"
        fail("export", "any_size", expected, f"True ({str(error).strip().partition(chr(10))[0][:160]})")
    finally:
        model.train(training)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    tower: Tower | None = None,
    *,
    any_size: bool = False,
) -> None:
    """Write what `export` gives as an ONNX file; large weights go to a file beside it.

    Its input is `pixels` or `tokens`, its output `features`. Needs `pip install "pymm[onnx]"`.

    Args:
        model, tower, any_size: as for `export`.
        path: the file.

    Raises:
        ImportError: when onnx or onnxscript is not installed.
        ValueError: as `export`.
    """
    try:
        for needed in ("onnx", "onnxscript"):
            importlib.import_module(needed)
    except ImportError as error:
        raise ImportError(f'export_onnx: needs pip install "pymm[onnx]" ({error})') from error
    program = export(model, tower, any_size=any_size)
    name = "tokens" if tower == "text" else "pixels"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        written = torch.onnx.export(
            program, dynamo=True, input_names=[name], output_names=["features"], verbose=False
        )
    assert written is not None
    written.save(os.fspath(path))


def _part(model: nn.Module, tower: str | None, any_size: bool) -> tuple[nn.Module, Tensor, dict[int, Any]]:
    """What is traced, an example of its input, and the sizes that may change."""
    batch = torch.export.Dim("batch")
    if isinstance(model, CLIP):
        if tower not in ("image", "text"):
            fail("export", "tower", "'image' or 'text' for CLIP", repr(tower))
        if tower == "text":
            if any_size:
                fail("export", "any_size", "False for the text tower", any_size)
            length = torch.export.Dim("length", max=model.context_length)
            tokens = torch.ones(2, model.context_length, dtype=torch.int64)
            return _Part(model, "encode_text"), tokens, {0: batch, 1: length}
    elif tower == "text":
        fail("export", "tower", f"'image' or None for {type(model).__name__}", repr(tower))
    if not hasattr(model, "image_size") or not hasattr(model, "mean"):
        fail("export", "model", "a model of images, or CLIP", type(model).__name__)
    like = next(model.parameters())
    size: Any = (model.image_size, model.image_size)
    dynamic: dict[int, Any] = {0: batch}
    if any_size:
        size, dynamic[2], dynamic[3] = _free_sizes(model.visual if isinstance(model, CLIP) else model)
    pixels = torch.zeros(2, len(model.mean), *size, dtype=like.dtype)  # type: ignore[arg-type]
    return _Part(model, "encode_image" if isinstance(model, CLIP) else "forward"), pixels, dynamic


def _free_sizes(model: nn.Module) -> tuple[tuple[int, int], Any, Any]:
    """A size that is none's own, for the trace, and the sizes that are allowed."""
    embed = getattr(model, "embed", None)
    if isinstance(embed, PatchEmbed):
        p = embed.patch_size
        rows, columns = (torch.export.Dim(name, min=2) for name in ("rows", "columns"))
        return (5 * p, 7 * p), p * rows, p * columns
    height, width = (torch.export.Dim(name, min=33) for name in ("height", "width"))
    return (70, 100), height, width


def _references() -> dict[Any, Callable[..., Any]]:
    """The plain-torch program of every op, under each name that a trace may hold."""
    return {
        getattr(getattr(torch.ops, space), name).default: op.forward.reference
        for name, op in REGISTRY.items()
        for space in (NAMESPACES["cpu"], NAMESPACES["reference"])
    }


@dataclass(frozen=True)
class ExportSettings:
    """Write a model as ONNX."""

    path: tyro.conf.Positional[str]
    """A checkpoint of any donor, as `pymm.load` takes it."""
    out: str
    """The ONNX file."""
    tower: Tower | None = None
    """Which tower of CLIP."""
    arch: str | None = None
    """The model's name, where the checkpoint does not show it."""
    any_size: bool = False
    """Let the height and the width of images change."""


def run(settings: ExportSettings) -> int:
    from pymm.interop.checkpoint import load

    model = load(settings.path, settings.arch)
    export_onnx(model, settings.out, settings.tower, any_size=settings.any_size)
    print(settings.out)
    return 0
