"""Makes the donors importable beside a CPU build of torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _torchvision() -> Iterator[None]:
    """timm and open_clip import torchvision, whose wheel is for CUDA.

    Beside a CPU torch its library does not load, and the import ends at the first operator that it would have
    defined. The schemas of those operators are enough here.
    """
    library = None
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield
    del library
