"""Towers exported through the reference path: graphs of torch's own operators, and ONNX files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pymm
from pymm import cli
from pymm.interop import save
from pymm.interop.export import export, export_onnx
from pymm.models import beit, resnet, vit
from tests.interop.compare import randomize

IMAGE, TEXT = ("clip_tiny", "image"), ("clip_tiny", "text")


def made(name: str) -> Any:
    model = pymm.create_model(name)
    randomize(model)
    return model.eval()


def expected(model: Any, tower: str | None, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.encode_text(x) if tower == "text" else getattr(model, "encode_image", model)(x)


def batches(model: Any, tower: str | None) -> list[Tensor]:
    """Of several sizes."""
    if tower != "text":
        return [torch.randn(n, len(model.mean), model.image_size, model.image_size) for n in (1, 3)]
    found = []
    for n, length in ((1, 5), (4, 24), (2, 1)):
        tokens = torch.randint(1, model.vocab_size - 1, (n, length))
        tokens[:, -1] = model.vocab_size - 1
        tokens[n // 2 :, length // 2 + 1 :] = 0  # padding, for those that know it
        found.append(tokens)
    return found


@pytest.mark.parametrize(
    ("name", "tower"), [IMAGE, TEXT, ("clip_tiny_bert", "text"), ("vgg_tiny", None)], ids=str
)
def test_graph(name: str, tower: Any) -> None:
    model = made(name)
    program = export(model, tower)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls
    assert not [call for call in calls if "pymm" in str(call)]
    for x in batches(model, tower):
        y = expected(model, tower, x)
        assert (program.module()(x) - y).abs().max() < 1e-5 * max(1.0, float(y.abs().max()))


@pytest.mark.parametrize(("name", "tower"), [IMAGE, TEXT], ids=str)
def test_onnx(tmp_path: Path, name: str, tower: Any) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = made(name), tmp_path / "model.onnx"
    export_onnx(model, path, tower)
    session = runtime.InferenceSession(path)
    (given,) = session.get_inputs()
    assert given.name == ("tokens" if tower == "text" else "pixels")
    for x in batches(model, tower):
        (got,) = session.run(["features"], {given.name: x.numpy()})
        y = expected(model, tower, x)
        assert (torch.from_numpy(got) - y).abs().max() < 1e-5 * max(1.0, float(y.abs().max()))


def small(name: str) -> Any:
    """Few layers of each kind, as exporting takes its time for each of them."""
    models: dict[str, Callable[[], Any]] = {
        "vit": lambda: vit.build(
            replace(row("vit_mini_patch8_64"), width=24, depth=1, heads=3, mlp_width=48, prefix=2)
        ),
        "beit": lambda: beit.build(replace(row("beit_mini_patch8_64"), width=24, depth=1)),
        "resnet": lambda: resnet.build(replace(row("resnet18"), depths=(1, 1, 1, 1), num_classes=5)),
        "clip": lambda: pymm.create_model("clip_rn_tiny"),
    }
    torch.manual_seed(0)
    model = models[name]()
    randomize(model)
    return model.eval()


def row(name: str) -> Any:
    return pymm.models.describe(name)


@pytest.mark.parametrize("name", ["vit", "beit", "resnet", "clip"])
def test_any_size(tmp_path: Path, name: str) -> None:
    """One graph, and one file, for two sizes that are not square, and for the model's own."""
    model, tower = small(name), "image" if name == "clip" else None
    program = export(model, tower, any_size=True)
    step = 8 if name in ("vit", "beit") else 11
    sides = ((4 * step, 9 * step), (10 * step, 5 * step), (model.image_size, model.image_size))
    samples = [torch.randn(n, 3, *side) for n, side in zip((1, 3, 2), sides, strict=True)]
    for x in samples:
        y = expected(model, tower, x)
        assert (program.module()(x) - y).abs().max() < 1e-5 * max(1.0, float(y.abs().max()))
    if name not in ("vit", "resnet"):
        return
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_onnx(model, tmp_path / "m.onnx", tower, any_size=True)
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    for x in samples:
        (got,) = session.run(None, {"pixels": x.numpy()})
        y = expected(model, tower, x)
        assert (torch.from_numpy(got) - y).abs().max() < 1e-5 * max(1.0, float(y.abs().max()))


@pytest.mark.parametrize(("name", "kind"), [("vgg_tiny", "ConvNet"), ("lenet5", "ConvNet")])
def test_a_graph_that_depends_on_the_size_is_refused(name: str, kind: str) -> None:
    with pytest.raises(ValueError) as caught:
        export(made(name), any_size=True)
    text = str(caught.value)
    assert text.startswith(f"export: any_size must be False for {kind}, whose graph depends on the size")
    assert "\n" not in text


def test_command(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = pymm.create_model("lenet5").eval()
    save(model, tmp_path / "m.safetensors")
    out = tmp_path / "m.onnx"
    assert cli.main(["export", str(tmp_path / "m.safetensors"), "--out", str(out)]) == 0
    (x,) = batches(model, None)[1:]
    (got,) = runtime.InferenceSession(out).run(None, {"pixels": x.numpy()})
    assert (torch.from_numpy(got) - expected(model, None, x)).abs().max() < 1e-5


def test_what_cannot_be_exported() -> None:
    with pytest.raises(ValueError, match="export: tower must be 'image' or 'text' for CLIP, got None"):
        export(pymm.create_model("clip_tiny"))
    with pytest.raises(ValueError, match="export: tower must be 'image' or None for ConvNet, got 'text'"):
        export(pymm.create_model("vgg_tiny"), "text")
    with pytest.raises(ValueError, match="export: model must be a model of images, or CLIP, got Linear"):
        export(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="export: any_size must be False for the text tower, got True"):
        export(pymm.create_model("clip_tiny"), "text", any_size=True)


def test_the_model_stays_as_it_was() -> None:
    model = pymm.create_model("vgg_tiny").train()
    export(model)
    assert model.training
    x = batches(model, None)[1]
    assert model(x).requires_grad
