"""Towers exported through the reference path: graphs of torch's own operators, and ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pymm
from pymm import cli
from pymm.interop import save
from pymm.interop.export import export, export_onnx
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


def test_the_model_stays_as_it_was() -> None:
    model = pymm.create_model("vgg_tiny").train()
    export(model)
    assert model.training
    x = batches(model, None)[1]
    assert model(x).requires_grad
