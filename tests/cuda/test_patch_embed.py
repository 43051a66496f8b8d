"""What the samples of patch embedding's record cannot ask of its CUDA kernel."""

from __future__ import annotations

import pytest
import torch

from pymm import ops
from pymm.ops import _dispatch, _gpu


@pytest.mark.usefixtures("emulated")
def test_a_patch_that_does_not_exist_stops_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_allowed", lambda kind: ("cuda",))
    monkeypatch.setattr(_gpu, "problem_of", lambda candidate, op: None)
    keep = torch.tensor([[0, 4]])
    with ops.backend("cuda"), pytest.raises(RuntimeError, match="trapped"):
        ops.patch_embed(torch.rand(1, 3, 8, 8), torch.rand(5, 3, 4, 4), keep=keep)
