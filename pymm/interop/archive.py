"""The tensors of a TorchScript archive, without its code.

Such an archive is a zip file: `code/` holds the program, `data.pkl` the tree of its modules, `data/` the
numbers. Only the tree is read, by an unpickler that knows tensors and empty objects and nothing else, so
nothing of the archive is ever called.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LISTS = {"build_intlist", "build_doublelist", "build_boollist", "build_tensorlist"}


class _Module:
    """A module of the program: what it holds, and none of what it does."""

    def __setstate__(self, state: Any) -> None:
        self.held = state if isinstance(state, dict) else {}


def _plain(value: Any, *_: Any) -> Any:
    return value


def _tensor(numbers: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return numbers.as_strided(size, stride, offset)  # which refuses to leave the numbers


class _Reader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _TYPES:
            return _TYPES[name]
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter") or module == "torch.jit._pickle":
            if name in _LISTS or name in ("restore_type_tag", "_rebuild_parameter"):
                return _plain
        elif (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"the reference {kind!r}")
        data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        if len(data) < count * dtype.itemsize:
            raise EOFError(f"data/{key} is too short")
        return torch.frombuffer(data, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


def archive_root(path: Path) -> str | None:
    """The folder inside a TorchScript archive, or None where the file is something else."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    root = names[0].partition("/")[0] if names else ""
    parts = {f"{root}/data.pkl", f"{root}/constants.pkl"}
    return root if parts <= set(names) and any(n.startswith(f"{root}/code/") for n in names) else None


def read_archive(path: Path, root: str) -> dict[str, Tensor]:
    """The tensors by the names that the program's `state_dict()` would give.

    Raises:
        UnpicklingError: when the tree holds more than tensors, lists and numbers.
    """
    with zipfile.ZipFile(path) as archive:
        tree = _Reader(archive, root).load()
    return dict(_walk("", tree))


def _walk(prefix: str, node: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in getattr(node, "held", {}).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _walk(f"{prefix}{name}.", value)
