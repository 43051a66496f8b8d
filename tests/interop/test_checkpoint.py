"""`pymm.load` and `pymm.interop.save`: every kind of file, and every kind of bad one."""

from __future__ import annotations

import argparse
import json
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pymm
from pymm.interop import save, to_donor
from pymm.interop.archive import archive_root, read_archive
from pymm.interop.files import read

TINY = "vit_tiny_patch16_224"


def tiny() -> nn.Module:
    """A few megabytes: small pictures, few classes."""
    return pymm.create_model(TINY, image_size=32, num_classes=3).eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("name", ["clip_tiny", "clip_rn_tiny", "vgg_tiny", "lenet5_1998", "resnet18"])
def test_own_files(tmp_path: Path, name: str) -> None:
    """The row, its classes and the weights come back; a name is not needed to write them."""
    model = pymm.create_model(name)
    save(model, tmp_path / "m.safetensors")
    loaded = pymm.load(tmp_path / "m.safetensors")
    assert loaded.arch == name
    assert loaded.load_report.complete
    assert not loaded.training
    assert same(loaded, model)


def test_sizes_are_the_checkpoints(tmp_path: Path) -> None:
    model = tiny()
    save(model, tmp_path / "m.safetensors", TINY)
    loaded = pymm.load(tmp_path / "m.safetensors")
    assert (loaded.num_classes, loaded.image_size) == (3, 32)
    assert same(loaded, model)
    headless = pymm.create_model(TINY, image_size=32, num_classes=0)
    assert pymm.load(headless.state_dict()).num_classes == 0


def test_save_needs_a_row_that_fits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save: arch must be the row of this ResNet, got resnet34"):
        save(pymm.create_model("resnet18"), tmp_path / "m.safetensors", "resnet34")


@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_of_tensors(tmp_path: Path, ending: str, legacy: bool) -> None:
    model, path = tiny(), tmp_path / f"m{ending}"
    state = {f"module.{name}": t for name, t in to_donor(model, "timm").items()}
    torch.save({"epoch": 3, "state_dict": state}, path, _use_new_zipfile_serialization=not legacy)
    loaded = pymm.load(path)
    assert loaded.load_report.donor == "timm"
    assert same(loaded, model)


def test_half_precision_becomes_float32() -> None:
    state = {name: t.half() for name, t in tiny().state_dict().items()}
    loaded = pymm.load(state)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.norm.weight, state["norm.weight"].float())


def shards(folder: Path, state: dict[str, Tensor]) -> None:
    names = sorted(state)
    places = {name: f"model-{1 + i % 2}-of-2.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: state[name].contiguous() for name in names if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_hub_directory_with_shards(tmp_path: Path) -> None:
    """transformers' layout: shards, and a configuration that says what shapes do not show."""
    model = pymm.create_model("clip_tiny").eval()
    state = to_donor(model, "transformers")
    shards(tmp_path, state)
    config = {"model_type": "clip", "vision_config": {"hidden_act": "gelu"}, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = pymm.load(tmp_path)
    assert loaded.load_report.donor == "transformers"
    assert same(loaded, model)
    os.remove(tmp_path / "model-2-of-2.safetensors")
    with pytest.raises(ValueError, match=r"load: path must be complete, with model-2-of-2.safetensors"):
        pymm.load(tmp_path)


def test_shards_stay_beside_their_index(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(ValueError, match="load: path must be an index of files beside it"):
        pymm.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "config"),
    [
        ("config.json", {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}),
        ("open_clip_config.json", {"preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}),
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}),
    ],
)
def test_normalization_of_the_configuration(tmp_path: Path, file: str, config: dict[str, Any]) -> None:
    save_file(to_donor(tiny(), "timm"), tmp_path / "model.safetensors")
    (tmp_path / file).write_text(json.dumps(config))
    loaded = pymm.load(tmp_path)
    assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_layer_norms_of_the_configuration(tmp_path: Path) -> None:
    save_file(to_donor(tiny(), "transformers"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "vit", "layer_norm_eps": 1e-12}')
    assert pymm.load(tmp_path).norm.eps == 1e-12


def test_activation_of_clip_is_asked_for() -> None:
    """Shapes do not show it, and the wrong one gives wrong features."""
    with torch.device("meta"):
        state = to_donor(pymm.create_model("clip_rn50"), "open_clip")
    from pymm.interop.identify import identify

    with pytest.raises(ValueError, match="load: arch must be one of clip_rn50, clip_rn50_quickgelu, which"):
        identify(state, {})
    facts = dict.fromkeys(("input_resolution", "context_length", "vocab_size"), torch.tensor(1))
    assert identify({**state, **facts}, {}).arch == "clip_rn50_quickgelu"


@pytest.mark.parametrize(
    "name",
    ["vit_base_patch16_384", "resnet101", "alexnet", "clip_vit_base_patch16_sigmoid"],
)
def test_rows_are_told_apart(name: str) -> None:
    """On the meta device, in every donor's names."""
    from pymm.interop.identify import identify

    with torch.device("meta"):
        model = pymm.create_model(name)
    donors = {"vit": "transformers", "res": "timm", "ale": "torchvision", "cli": "open_clip"}
    found = identify(to_donor(model, donors[name[:3]]), {"model_cfg": {}} if "clip" in name else {})
    assert (found.arch, found.num_classes, found.image_size) == (name, None, None)


def test_incomplete_is_refused() -> None:
    state = tiny().state_dict()
    del state["blocks.4.mlp.fc1.bias"]
    state["teacher.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"got 1 missing \(blocks.4.mlp.fc1.bias\); 1 unused \(teacher.w"):
        pymm.load(state, TINY)
    report = pymm.load(state, TINY, strict=False).load_report
    assert report.missing == ("blocks.4.mlp.fc1.bias",)
    assert report.unused == ("teacher.weight",)


def test_mismatched_shapes() -> None:
    state = tiny().state_dict()
    state["blocks.0.norm1.bias"] = torch.zeros(5)
    with pytest.raises(
        ValueError, match=r"1 mismatched \(blocks.0.norm1.bias: expected \(192,\), got \(5,\)\)"
    ):
        pymm.load(state, TINY)


@pytest.mark.parametrize(
    ("arch", "text"),
    [
        ("resnet18", "load: path must be a complete checkpoint of resnet18, or strict False, got 120 missi"),
        ("lenet5_1998", "load_state: state must be a state dict for ConvNet, got the names"),
        ("vit_small_patch16_224", "load: path must be a complete checkpoint of vit_small_patch16_224, or"),
        ("vit_of_mine", "create_model: name must be one of list_models"),
    ],
)
def test_wrong_architecture(arch: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        pymm.load(tiny().state_dict(), arch)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    state = tiny().state_dict()
    state["blocks.2.attn.qkv.weight"][5, 7] = value
    with pytest.raises(ValueError, match=r"finite weights, got NaN or infinity in blocks.2.attn.qkv.weight"):
        pymm.load(state)


class _Bomb:
    """What an attacker puts into a pickle: unpickling it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("load: path must be ")
    return text


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_with_code_is_not_run(tmp_path: Path, legacy: bool) -> None:
    path, trace = tmp_path / "m.pt", tmp_path / "trace"
    torch.save({"a": torch.ones(2), "b": _Bomb(trace)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError) as error:
        pymm.load(path)
    assert "a pickle of tensors alone, for anything else could run code, got" in one_line(error)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the pickle of the test would have run code"


def test_pickle_of_other_objects(tmp_path: Path) -> None:
    torch.save({"model": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "m.pth")
    with pytest.raises(ValueError) as error:
        pymm.load(tmp_path / "m.pth")
    assert one_line(error).endswith("with argparse.Namespace")


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_truncated(tmp_path: Path, ending: str, part: float) -> None:
    path = tmp_path / f"m{ending}"
    if ending == ".safetensors":
        save(tiny(), path, TINY)
    else:
        torch.save(tiny().state_dict(), path, _use_new_zipfile_serialization=ending == ".pt")
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError) as error:
        pymm.load(path)
    assert "load: path must be a whole checkpoint" in one_line(error)


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".bin"])
def test_damaged_anywhere(tmp_path: Path, ending: str) -> None:
    """Bytes overwritten at random: the tensors, or one line."""
    path, state = tmp_path / f"m{ending}", {"a.weight": torch.randn(3, 4), "b": torch.ones(2).half()}
    if ending == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=ending == ".pt")
    data, draw = path.read_bytes(), random.Random(0)
    refused: list[str] = []
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read(path)
        except ValueError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 200
    assert all(text.startswith("load: path must be ") and "\n" not in text for text in refused)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"load: .* does not exist"):
        pymm.load(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match=r"load: path must be a directory with one of model.safetensors"):
        pymm.load(tmp_path)
    (tmp_path / "m.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"load: path must be a directory or a file ending in"):
        pymm.load(tmp_path / "m.txt")
    torch.save([torch.ones(2)], tmp_path / "m.pt")
    with pytest.raises(ValueError, match="a file with a dictionary of tensors"):
        pymm.load(tmp_path / "m.pt")
    with pytest.raises(ValueError, match="load: path must be a checkpoint with tensors"):
        pymm.load({"epoch": 3})


def traced(model: nn.Module, path: Path) -> None:
    tensors = {**to_donor(model, "open_clip")}

    class Archive(nn.Module):
        """Holds tensors under dotted names, as a model does."""

        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    root = Archive()
    for name, t in tensors.items():
        *parents, leaf = name.split(".")
        node: nn.Module = root
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, Archive())
            node = getattr(node, parent)
        node.register_parameter(leaf, nn.Parameter(t.half()))
    for fact in ("input_resolution", "context_length", "vocab_size"):
        root.register_buffer(fact, torch.tensor(24))
    torch.jit.trace(root, torch.ones(1)).save(path)


@pytest.fixture
def archive(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A TorchScript archive with the names of OpenAI's, of a tiny CLIP."""
    model, path = pymm.create_model("clip_tiny"), tmp_path / "ViT-tiny.pt"
    traced(model, path)
    return model, path


def rewritten(path: Path, change: Any) -> None:
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in parts.items():
            new.writestr(name, change(name, data))


def test_torchscript_archive_without_its_code(archive: tuple[nn.Module, Path]) -> None:
    """The tensors come out though the program in it is none."""
    model, path = archive
    rewritten(path, lambda name, data: b"import os; os.abort()" if "/code/" in name else data)
    root = archive_root(path)
    assert root is not None
    tensors = read_archive(path, root)
    expected = to_donor(model, "open_clip")
    assert tensors.keys() - expected.keys() == {"input_resolution", "context_length", "vocab_size"}
    for name, t in expected.items():
        assert torch.equal(tensors[name], t.half()), name
    with pytest.raises(ValueError, match="load_state: model must be a _quickgelu row"):
        pymm.load(path, "clip_tiny")


def test_torchscript_archive_with_code_in_its_tree(archive: tuple[nn.Module, Path], tmp_path: Path) -> None:
    import pickle

    _, path = archive
    trace = tmp_path / "trace"
    bomb = pickle.dumps(_Bomb(trace), protocol=2)
    rewritten(path, lambda name, data: bomb if name.endswith("/data.pkl") else data)
    with pytest.raises(ValueError) as error:
        pymm.load(path)
    assert "a pickle of tensors alone" in one_line(error)
    assert not trace.exists()
    pickle.loads(bomb)
    assert trace.exists(), "the pickle of the test would have run code"


def test_torchscript_archive_whose_tensors_leave_their_numbers(archive: tuple[nn.Module, Path]) -> None:
    _, path = archive
    rewritten(path, lambda name, data: data[:-2] if name.endswith("/data/3") else data)
    with pytest.raises(ValueError) as error:
        pymm.load(path)
    assert "a whole checkpoint" in one_line(error)
