"""AlexNet and VGG against torchvision, and VGG against timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pymm
from pymm.interop import load_state
from pymm.models import ConvNetSpec, convnet, describe
from pymm.models.convnet import Conv, Pool
from tests.interop.compare import compare, error, randomize

# Two convolutions in the first stage, one in the others.
PLAN = [8, 8, "M", 12, "M", 16, "M"]
STAGES = (
    (Conv(8, 3, padding=1), Conv(8, 3, padding=1), Pool(2, 2)),
    (Conv(12, 3, padding=1), Pool(2, 2)),
    (Conv(16, 3, padding=1), Pool(2, 2)),
)


@pytest.fixture
def torchvision() -> Any:
    return pytest.importorskip("torchvision")


def spec(batch_norm: bool, mlp: tuple[int, int], grid: int) -> ConvNetSpec:
    return ConvNetSpec("test", STAGES, grid, mlp, 0, "test", batch_norm=batch_norm, dropout=0, num_classes=10)


def small_vgg(torchvision: Any, batch_norm: bool) -> nn.Module:
    """torchvision's VGG, whose fully connected layers are of one size only, with smaller ones."""
    vgg = torchvision.models.vgg
    with torch.device("meta"):
        model = vgg.VGG(nn.Identity(), num_classes=10, dropout=0.0)
    model.features = vgg.make_layers(PLAN, batch_norm)
    model.avgpool = nn.AdaptiveAvgPool2d(3)
    for i, (inputs, outputs) in {0: (16 * 9, 24), 3: (24, 20), 6: (20, 10)}.items():
        assert isinstance(model.classifier[i], nn.Linear)
        model.classifier[i] = nn.Linear(inputs, outputs)
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_vgg(torchvision: Any, batch_norm: bool, training: bool) -> None:
    # In training, batch norm divides by spreads of few numbers, which multiplies float32's rounding.
    dtype = torch.float64 if training else torch.float32
    theirs = small_vgg(torchvision, batch_norm).train(training).to(dtype)
    ours = convnet.build(spec(batch_norm, (24, 20), 3)).train(training).to(dtype)
    pixels = torch.randn(4, 3, 32, 40, dtype=dtype)  # a map of 4 by 5, pooled to 3 by 3

    def run(model: nn.Module) -> tuple[Tensor, ...]:
        features = getattr(model, "forward_features", getattr(model, "features", None))
        return model(pixels), features(pixels)

    compare(ours, theirs, run)
    for name, buffer in ours.named_buffers():  # batch norms' statistics moved alike
        stage, _, rest = name.removeprefix("stages.").partition(".")
        assert stage.isdigit()
        assert error(buffer.double(), theirs.get_buffer(f"features.{rest}").double()) < 1e-5, name


def test_alexnet(torchvision: Any) -> None:
    """Of the published size, there being no other."""
    theirs = torchvision.models.alexnet(num_classes=10).eval()
    pixels = torch.randn(2, 3, 224, 224)
    ours = pymm.create_model("alexnet", num_classes=10).eval()
    compare(ours, theirs, lambda m: (m(pixels),))


def test_alexnet_other_resolution(torchvision: Any) -> None:
    theirs = torchvision.models.alexnet(num_classes=10).eval()
    ours = pymm.create_model("alexnet", num_classes=10).eval()
    assert load_state(ours, theirs.state_dict()).complete
    pixels = torch.randn(2, 3, 130, 300)
    assert error(ours(pixels), theirs(pixels)) < 1e-5


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_timm_vgg(torchvision: Any, batch_norm: bool, side: int) -> None:
    """timm's fully connected layers are convolutions; the vector behind them is 4096 wide at least."""
    timm = pytest.importorskip("timm")
    norm = nn.BatchNorm2d if batch_norm else None
    plan = [*PLAN, "M", "M"]
    theirs = timm.models.vgg.VGG(plan, num_classes=10, mlp_ratio=0.01, norm_layer=norm).eval()
    stages = (*STAGES[:-1], (*STAGES[-1], Pool(2, 2), Pool(2, 2)))
    row = ConvNetSpec("test", stages, 7, (40, 4096), 0, "test", batch_norm=batch_norm, num_classes=10)
    ours = convnet.build(row).eval()
    pixels = torch.randn(2, 3, side, side)

    def run(model: Any) -> tuple[Tensor, ...]:
        features = model.forward_features(pixels)
        return model(pixels), features, model.forward_head(features, pre_logits=True).flatten(1)

    compare(ours, theirs, run)


def test_rows_are_torchvisions(torchvision: Any) -> None:
    """Names, shapes, published counts and normalization of every row, on the meta device."""
    names = ["alexnet", *(name for name in pymm.list_models("vgg*") if name != "vgg_tiny")]
    assert len(names) == 9
    for name in names:
        row = describe(name)
        with torch.device("meta"):
            theirs, ours = torchvision.models.get_model(name), pymm.create_model(name)
        report = load_state(ours, theirs.state_dict())
        assert report.complete, f"{name}: {report}"
        weights = torchvision.models.get_model_weights(name).DEFAULT
        assert weights.meta["num_params"] == row.parameters, name
        preset = weights.transforms()
        assert (tuple(preset.mean), tuple(preset.std)) == (row.mean, row.std), name
        assert preset.crop_size == [row.image_size], name


def test_another_number_of_classes(torchvision: Any) -> None:
    """All but the head is placed, and the report says so: the start of transfer learning."""
    theirs = small_vgg(torchvision, True)
    randomize(theirs)
    ours = convnet.build(spec(True, (24, 20), 3))
    ours.reset_classifier(3)
    before = ours.head.weight.clone()
    report = load_state(ours, theirs.state_dict())
    assert [line.partition(":")[0] for line in report.mismatched] == ["head.weight", "head.bias"]
    assert not report.missing
    assert not report.unused
    assert torch.equal(ours.head.weight, before)
    assert torch.equal(ours.mlp.fc1.weight, theirs.classifier[0].weight)


def test_a_file_of_torchvisions_weights(torchvision: Any, tmp_path: Path) -> None:
    """As it is downloaded: a pickle, from which `pymm.load` makes the model."""
    theirs = torchvision.models.resnet18().eval()
    randomize(theirs)
    torch.save(theirs.state_dict(), tmp_path / "resnet18-f37072fd.pth")
    ours = pymm.load(tmp_path / "resnet18-f37072fd.pth")
    assert (ours.arch, ours.load_report.donor) == ("resnet18", "torchvision or timm")
    pixels = torch.randn(2, 3, 96, 96)
    assert error(ours(pixels), theirs(pixels)) < 1e-5
