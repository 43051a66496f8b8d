"""LeNet-5, AlexNet and VGG: what they promise, and LeNet-5 against its paper written out."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pymm
from pymm.layers import Linear
from pymm.models import ConvNet, ConvNetSpec, describe
from pymm.models.convnet import Conv, Pool
from pymm.models.lenet import CONNECTIONS, PartialConv2d, RadialBasis, Subsampling

SMALL = ("lenet5", "lenet5_1998", "alexnet_tiny", "vgg_tiny")
ROWS = [row for name in pymm.list_models() if isinstance(row := describe(name), ConvNetSpec)]
# Depth of each VGG, and its 3x3 convolutions per stage (Simonyan and Zisserman 2015, table 1).
VGG = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}

small = pytest.mark.parametrize("name", SMALL)


def create(name: str, **sizes: int) -> ConvNet:
    model = pymm.create_model(name, **sizes)
    assert isinstance(model, ConvNet)
    return model


def pixels(model: ConvNet, batch: int = 4) -> Tensor:
    return torch.randn(batch, len(model.mean), model.image_size, model.image_size)


def squash(x: Tensor) -> Tensor:
    return 1.7159 * torch.tanh(2 * x / 3)


@small
def test_contract(name: str) -> None:
    model = create(name).eval()
    x, named = pixels(model), dict[str, Tensor]()
    y = model(x, intermediates=named)
    assert y.shape == (4, model.num_classes) == (4, 10)
    features = model.forward_features(x)
    assert list(named) == [f"stages.{i}" for i in range(len(model.stages))]
    assert torch.equal(named[list(named)[-1]], features)
    for stage, (before, after) in zip(model.stages[1:], pairwise(named.values()), strict=True):
        assert torch.equal(stage(before), after)  # so nothing was changed in place after it was named
    assert features.shape[:2] == (4, model.num_features)
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (4, model.head_hidden_size)
    assert torch.equal(model.head(hidden), y)
    assert model.no_weight_decay() == set()


@small
def test_classifier(name: str) -> None:
    model = create(name, num_classes=0).eval()
    x = pixels(model)
    assert model.num_classes == 0
    assert model(x).shape == (4, model.head_hidden_size)
    model.double().reset_classifier(7)
    assert model.num_classes == 7
    assert model(x.double()).shape == (4, 7)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model.reset_classifier(0)
    assert model.num_classes == 0


@small
def test_bytes_are_normalized(name: str) -> None:
    model = create(name).eval()
    raw = torch.randint(0, 256, pixels(model).shape, dtype=torch.uint8)
    mean, std = (torch.tensor(t).view(-1, 1, 1) for t in (model.mean, model.std))
    torch.testing.assert_close(model(raw), model((raw / 255 - mean) / std))


def test_lenet_sees_the_papers_grey_values() -> None:
    model = create("lenet5")
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    torch.testing.assert_close(model.normalize(ends, torch.float32).flatten(), torch.tensor([-0.1, 1.175]))


@small
def test_gradients_reach_every_parameter(name: str) -> None:
    model = create(name)
    F.cross_entropy(model(pixels(model)), torch.arange(4)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@small
def test_checkpointing_changes_nothing(name: str) -> None:
    model = create(name)
    again = deepcopy(model)
    again.set_grad_checkpointing()
    x = pixels(model)
    for m in (model, again):
        torch.manual_seed(1)  # of dropout
        m(x).square().sum().backward()
    for (parameter_name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, msg=parameter_name)
    for (buffer_name, a), b in zip(model.named_buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=buffer_name)


@small
def test_smallest_size(name: str) -> None:
    model = create(name).eval()
    side, channels = model.smallest_size, len(model.mean)
    assert model.forward_features(torch.randn(1, channels, side, side + 1)).shape[2] == 1
    assert model(torch.randn(1, channels, side + 40, side)).shape == (1, 10)
    with pytest.raises(RuntimeError):  # not because we say so
        nn.Sequential(*model.stages)(torch.randn(1, channels, side - 1, side))
    message = rf"ConvNet: pixels must be \(B, {channels}, H, W\) with H and W at least {side}"
    with pytest.raises(ValueError, match=message):
        model(torch.randn(1, channels, side, side - 1))
    with pytest.raises(ValueError, match=f"ConvNet: image_size must be at least {side} for {name}, got 7"):
        pymm.create_model(name, image_size=7)
    assert pymm.create_model(name, image_size=side).image_size == side


@small
def test_wrong_channels(name: str) -> None:
    model = create(name)
    with pytest.raises(ValueError, match=rf"Normalize: pixels must be \(B, {len(model.mean)}, H, W\)"):
        model(torch.randn(1, 2, model.image_size, model.image_size))


@small
def test_empty_batch(name: str) -> None:
    model = create(name).eval()
    assert model(pixels(model, 0)).shape == (0, 10)


@small
def test_half_precision(name: str) -> None:
    model = create(name).eval()
    x = pixels(model)
    truth, got = model(x), deepcopy(model).bfloat16()(x)
    assert got.dtype == torch.bfloat16
    assert (got.float() - truth).abs().max() < 0.05 * truth.abs().max()


@pytest.mark.parametrize("name", ["alexnet_tiny", "vgg_tiny"])
def test_dropout_only_in_training(name: str) -> None:
    model = create(name)
    for module in model.modules():  # whose statistics differ between the modes as well
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = pixels(model)
    features = model.forward_features(x)
    hidden = model.forward_head(features, pre_logits=True)
    assert not torch.equal(hidden, model.forward_head(features, pre_logits=True))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_hidden_activations_are_what_drops() -> None:
    """Half of what the head takes is zero in training, and the rest is doubled."""
    model = create("alexnet_tiny")
    hidden = torch.ones(1000, model.head_hidden_size)
    dropped = model.mlp[-1](hidden)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)


def test_lenet_written_out() -> None:
    model = create("lenet5")
    w = model.state_dict()
    x = pixels(model)
    y = torch.tanh(F.conv2d(x, w["stages.0.0.weight"], w["stages.0.0.bias"]))
    y = (y[..., ::2, ::2] + y[..., 1::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 4
    y = torch.tanh(F.conv2d(y, w["stages.1.3.weight"], w["stages.1.3.bias"]))
    y = (y[..., ::2, ::2] + y[..., 1::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 4
    y = torch.tanh(F.linear(y.flatten(1), w["stages.2.6.weight"].flatten(1), w["stages.2.6.bias"]))
    y = torch.tanh(F.linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
    torch.testing.assert_close(model(x), F.linear(y, w["head.weight"], w["head.bias"]))


def test_original_lenet_written_out() -> None:
    """Each unit from the sentences of sec. II.B, map by map."""
    model = create("lenet5_1998").double()
    w = model.state_dict()
    x = pixels(model).double()

    def halved(maps: Tensor, layer: str) -> Tensor:
        sums = sum(maps[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
        assert isinstance(sums, Tensor)
        return squash(sums * w[f"{layer}.weight"][:, None, None] + w[f"{layer}.bias"][:, None, None])

    s2 = halved(squash(F.conv2d(x, w["stages.0.c1.weight"], w["stages.0.c1.bias"])), "stages.0.s2")
    kernels, c3 = iter(w["stages.1.c3.weight"]), []
    for seen, bias in zip(CONNECTIONS, w["stages.1.c3.bias"], strict=True):
        parts = [F.conv2d(s2[:, [j]], next(kernels)[None, None]) for j in seen]
        c3.append(squash(torch.stack(parts).sum(0) + bias))
    s4 = halved(torch.cat(c3, 1), "stages.1.s4")
    c5 = squash(F.linear(s4.flatten(1), w["stages.2.c5.weight"].flatten(1), w["stages.2.c5.bias"]))
    f6 = squash(F.linear(c5, w["mlp.f6.weight"], w["mlp.f6.bias"]))
    distances = torch.stack([(f6 - code).square().sum(1) for code in w["head.code"]], 1)
    torch.testing.assert_close(model(x), -distances)


def test_original_lenet_has_the_papers_parameters() -> None:
    """Sec. II.B counts them layer by layer."""
    model = create("lenet5_1998")
    counts = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, Subsampling, PartialConv2d, Linear, RadialBasis))
    }
    assert counts == {
        "stages.0.c1": 156,
        "stages.0.s2": 12,
        "stages.1.c3": 1516,
        "stages.1.s4": 32,
        "stages.2.c5": 48_120,
        "mlp.f6": 10_164,
        "head": 0,
    }
    assert [len(seen) for seen in CONNECTIONS] == [3] * 6 + [4] * 9 + [6]
    assert len(set(CONNECTIONS)) == 16
    assert [sum(j in seen for seen in CONNECTIONS) for j in range(6)] == [10] * 6


def test_original_lenet_begins_as_the_paper_says() -> None:
    w = create("lenet5_1998").state_dict()
    for name, inputs in {"stages.0.c1": 25, "stages.0.s2": 4, "stages.2.c5": 400, "mlp.f6": 120}.items():
        largest = w[f"{name}.weight"].abs().max()
        assert 0.5 * 2.4 / inputs < largest <= 2.4 / inputs, name
    sizes = [len(seen) for seen in CONNECTIONS]
    for size, weight in zip(sizes, w["stages.1.c3.weight"].split(sizes), strict=True):
        assert 0.8 * 2.4 / (25 * size) < weight.abs().max() <= 2.4 / (25 * size)
    assert set(w["head.code"].unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize(("depth", "convolutions"), VGG.items())
@pytest.mark.parametrize("norm", ["", "_bn"])
def test_vgg_table(depth: int, convolutions: tuple[int, ...], norm: str) -> None:
    with torch.device("meta"):
        model = create(f"vgg{depth}{norm}")
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, Linear))]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(layers) == depth
    assert len(norms) == (depth - 3 if norm else 0)
    for stage, count, width in zip(model.stages, convolutions, (64, 128, 256, 512, 512), strict=True):
        convs = [m for m in stage.modules() if isinstance(m, nn.Conv2d)]
        assert [(m.out_channels, m.kernel_size) for m in convs] == [(width, (3, 3))] * count
    features = model.forward_features(torch.empty(2, 3, 224, 224, device="meta"))
    assert features.shape == (2, 512, 7, 7)


def test_vgg_begins_as_torchvisions() -> None:
    model = create("vgg_tiny")
    conv, fc = model.stages[2][0], model.mlp.fc1
    assert conv.weight.std().item() == pytest.approx((2 / (9 * conv.out_channels)) ** 0.5, rel=0.05)
    assert fc.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not conv.bias.any()
    assert not fc.bias.any()
    assert not model.head.bias.any()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_make_sense(row: ConvNetSpec) -> None:
    assert all(isinstance(stage[0], Conv) for stage in row.stages)
    pools = [sum(isinstance(layer, Pool) for layer in stage) for stage in row.stages]
    assert set(pools[:-1]) == {1}
    with torch.device("meta"):
        model = create(row.name)
        x = torch.empty(1, len(row.mean), row.image_size, row.image_size)
        assert model.forward_features(x).shape[2:] == (row.grid, row.grid)


@small
def test_names_are_stable(name: str) -> None:
    """What a checkpoint of ours is made of; a change here makes old files unreadable."""
    layers = {
        "lenet5": ["stages.0.0", "stages.1.3", "stages.2.6", "mlp.fc1", "head"],
        "lenet5_1998": ["stages.0.c1", "stages.0.s2", "stages.1.c3", "stages.1.s4", "stages.2.c5", "mlp.f6"],
        "alexnet_tiny": [
            "stages.0.0", "stages.1.3", "stages.2.6", "stages.2.8", "stages.2.10",
            "mlp.fc1", "mlp.fc2", "head",
        ],
        "vgg_tiny": [f"stages.{i}.{4 * i}" for i in range(4)] + ["mlp.fc1", "mlp.fc2", "head"],
    }  # fmt: skip
    names = {f"{layer}.{part}" for layer in layers[name] for part in ("weight", "bias")}
    if name == "lenet5_1998":
        names.add("head.code")
    if name == "vgg_tiny":
        parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        names |= {f"stages.{i}.{4 * i + 1}.{part}" for i in range(4) for part in parts}
    assert set(create(name).state_dict()) == names


@small
def test_learns_by_heart(name: str) -> None:
    model = create(name)
    x, labels = pixels(model, 10), torch.arange(10)
    for module in model.modules():  # which is there to hinder this
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    if name == "vgg_tiny":  # batch norm's running statistics of one batch, exactly
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()
        with torch.no_grad():
            model.forward_features(x)
    assert (model.eval()(x).argmax(1) == labels).float().mean() > 0.8


@small
def test_compiles_in_one_graph(name: str) -> None:
    model = create(name).eval()
    x = pixels(model)
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
