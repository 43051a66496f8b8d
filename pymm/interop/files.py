"""Checkpoint files as names and tensors; none of them can run code."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pymm.interop.archive import archive_root, read_archive
from pymm.ops._checks import fail

# What a directory may hold, best first: transformers' and timm's names, and open_clip's.
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
_CONFIGS = ("open_clip_config.json", "config.json")
_PREPROCESSOR = "preprocessor_config.json"
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """What a file, or several, hold.

    Args:
        state: names to tensors, or a dictionary that has them under a name such as `"state_dict"`.
        config: the donor's configuration that lies beside the file, with that of transformers' preprocessor
            under `"preprocessor"`; empty where there is none.
        metadata: of a safetensors file.
    """

    state: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def read(path: Path) -> Checkpoint:
    """Read a file, a set of shards by their index, or a directory that holds either.

    Raises:
        FileNotFoundError: when nothing is there.
        ValueError: when it is no checkpoint, is damaged, or would need to run code.
    """
    if not path.exists():
        raise FileNotFoundError(f"load: {path} does not exist")
    file = path
    if path.is_dir():
        found = next((path / name for name in _NAMES if (path / name).is_file()), None)
        if found is None:
            fail("load", "path", f"a directory with one of {', '.join(_NAMES)}", path)
        file = found
    config = next((file.parent / name for name in _CONFIGS if (file.parent / name).is_file()), None)
    beside = {} if config is None else _json(config)
    if (file.parent / _PREPROCESSOR).is_file():
        beside["preprocessor"] = _json(file.parent / _PREPROCESSOR)
    if file.name.endswith(".index.json"):
        return Checkpoint(_shards(file), beside)
    state, metadata = _whole(file)
    return Checkpoint(state, beside, metadata)


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a configuration; empty where it is missing or something else."""
    part = config.get(name)
    return part if isinstance(part, Mapping) else {}


def read_json(path: Path) -> Any:
    """What a file beside a checkpoint says.

    Raises:
        ValueError: when it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail("load", "path", f"beside a readable {path.name}", _line(error))


def _json(path: Path) -> dict[str, Any]:
    value = read_json(path)
    return value if isinstance(value, dict) else {}


def _shards(index: Path) -> dict[str, Tensor]:
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        fail("load", "path", "an index with a weight_map", index)
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            fail("load", "path", "an index of files beside it", f"{index} with {name}")
        if not (index.parent / name).is_file():
            fail("load", "path", f"complete, with {name} of {index.name}", "no such file")
        state |= _whole(index.parent / name)[0]
    if missing := [name for name in places if name not in state]:
        fail("load", "path", f"complete, with {missing[0]} in {places[missing[0]]}", "no such tensor")
    return state


def _whole(path: Path) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    if path.suffix == ".safetensors":
        return _guarded(path, lambda: _safetensors(path))
    if path.suffix not in _PICKLES:
        fail("load", "path", f"a directory or a file ending in .safetensors, {', '.join(_PICKLES)}", path)
    root = _guarded(path, lambda: archive_root(path))
    if root is not None:
        return _guarded(path, lambda: read_archive(path, root)), {}
    state = _guarded(path, lambda: torch.load(path, map_location="cpu", weights_only=True))
    if not isinstance(state, Mapping):
        fail("load", "path", "a file with a dictionary of tensors", f"{path} with {type(state).__name__}")
    return state, {}


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    """One line for whatever is wrong with a file."""
    try:
        return read()
    except pickle.UnpicklingError as error:
        text = str(error)
        wanted = re.search(r"(?:Unsupported global: GLOBAL|Unsupported class) (\S+)", text)
        what = wanted.group(1) if wanted else _line(error)
        if wanted is None and "Unsupported" not in text and "." not in what:
            fail("load", "path", "a whole checkpoint", f"{path}: {what}")
        fail(
            "load",
            "path",
            "a pickle of tensors alone, for anything else could run code",
            f"{path} with {what}",
        )
    except Exception as error:  # a damaged file can fail anywhere in its reader
        fail("load", "path", "a whole checkpoint", f"{path}: {_line(error)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
