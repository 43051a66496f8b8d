"""The memory of the Triton kernels' host functions at sizes of a GPU, counted on tensors without data.

The kernels allocate nothing, so what torch is asked for is what a GPU would have to hold.
"""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that are alive."""

    def __init__(self, *held: torch.Tensor) -> None:
        super().__init__()
        self._known: dict[int, int] = {}
        self.bytes = self.peak = 0
        self._count(held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._count(tree_leaves(out))
        return out

    def _count(self, values: Any) -> None:
        for value in values:
            if not isinstance(value, torch.Tensor):
                continue
            storage = value.untyped_storage()
            if storage._cdata not in self._known:
                self._known[storage._cdata] = storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self.bytes)

    def _free(self, key: int) -> None:
        self.bytes -= self._known.pop(key, 0)


class Launches:
    """In the place of a kernel: `kernel[grid](...)` runs nothing."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.count += 1

        return launch


def test_info_nce_of_262144_pairs_fits_into_two_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("pymm.triton_kernels.info_nce")
    n, e = 262144, 512
    forward, backward = Launches(), Launches()
    monkeypatch.setattr(module, "info_nce_fwd_kernel", forward)
    monkeypatch.setattr(module, "info_nce_bwd_kernel", backward)
    x, y = (torch.empty(n, e, dtype=torch.bfloat16, device="meta") for _ in range(2))
    scale = torch.empty((), device="meta")
    options = (None, None, None, None, None, True, True, 0.0, 0.0)
    with Peak(x, y) as memory:
        losses, lse = module.IMPLEMENTATIONS["info_nce"](x, y, scale, *options)
        assert losses.shape == (n,)
        needs = (True, True, True, False, False)
        gradients = module.IMPLEMENTATIONS["info_nce_backward"](losses, lse, x, y, scale, *options, needs)
    assert [g.shape for g in gradients[:2]] == [(n, e), (n, e)]
    assert forward.count == 1
    assert backward.count >= (n // module.BUFFER_ROWS) ** 2
    held = x.nbytes + y.nbytes
    assert memory.peak > 3 * held  # the inputs, their gradients, and sums of these in float32
    assert memory.peak < 2e9, f"{memory.peak / 1e9:.2f} GB with the inputs"
