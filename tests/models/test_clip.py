"""CLIP as a whole: contract, types, compilation, checkpointing."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pymm
from pymm.models import CLIP, CLIPSpec, describe
from pymm.models.bert import BertSpec
from pymm.models.clip import build
from pymm.models.resnet import ResNetTower
from pymm.models.text import TextTower, trim
from pymm.models.vit import ViTSpec, ViTTower
from pymm.ops import info_nce

TEXT = TextTower(32, 2, 2, context_length=9, vocab_size=50)
VIT = CLIPSpec("vit", ViTTower(24, 8, 32, 2, 2, 64), TEXT, 16, "gelu", 0, "test")
RN = CLIPSpec("rn", ResNetTower(64, (1, 1, 1, 1), 8), TEXT, 16, "gelu", 0, "test")
# An image model as it classifies, and a BERT with one segment, so that every parameter has a gradient.
LOCKED = CLIPSpec(
    "locked",
    ViTSpec("vit", 8, 32, 2, 2, 64, 0, "test", image_size=24),
    BertSpec("bert", 32, 2, 2, 64, 0, "test", pooling="class", vocab_size=50, context_length=9, types=1),
    16,
    "gelu",
    0,
    "test",
)
BOTH = pytest.mark.parametrize("row", [VIT, RN], ids=["vit", "resnet"])
ALL = pytest.mark.parametrize("row", [VIT, RN, LOCKED], ids=["vit", "resnet", "locked"])


def inputs(row: CLIPSpec, batch: int = 4) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(1, 49, (batch, 9))
    for i in range(batch):
        tokens[i, 2 + i % 7 :] = 0
        tokens[i, 2 + i % 7] = 49
    return torch.randn(batch, 3, row.image_size, row.image_size), tokens


def loss(outputs: tuple[Tensor, ...]) -> Tensor:
    image, text, scale = outputs[:3]
    logits = scale * image.float() @ text.float().T
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))


@ALL
def test_contract(row: CLIPSpec) -> None:
    model = build(row).eval()
    pixels, tokens = inputs(row)
    image, text, scale = model(pixels, tokens)
    assert image.shape == text.shape == (4, 16)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(scale, torch.tensor(1 / 0.07))
    features = model.encode_image(pixels)
    torch.testing.assert_close(features / features.norm(dim=1, keepdim=True), image)
    torch.testing.assert_close(model.encode_text(tokens, normalize=True), text)
    assert (model.image_size, model.context_length, model.vocab_size, model.embed_dim) == (
        row.image_size, 9, 50, 16,
    )  # fmt: skip
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert model.logit_bias is None


def test_sigmoid_row() -> None:
    model = pymm.create_model("clip_tiny_sigmoid")
    assert isinstance(model, CLIP)
    row = describe("clip_tiny_sigmoid")
    assert isinstance(row, CLIPSpec)
    tokens = torch.zeros(2, model.context_length, dtype=torch.int64)
    *_, scale, bias = model(torch.randn(2, 3, model.image_size, model.image_size), tokens)
    torch.testing.assert_close(scale, torch.tensor(10.0))
    assert bias is model.logit_bias
    assert bias.item() == -10


@ALL
def test_gradients_reach_every_parameter(row: CLIPSpec) -> None:
    model = build(row)
    for parameter in model.parameters():  # zeros at the start, such as the last scales, stop gradients
        torch.nn.init.normal_(parameter, mean=0.1, std=0.1)
    loss(model(*inputs(row))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@ALL
def test_empty_batch(row: CLIPSpec) -> None:
    image, text, _ = build(row).eval()(*(t[:0] for t in inputs(row)))
    assert image.shape == text.shape == (0, 16)


def test_tokens_after_the_end_do_not_matter() -> None:
    model, (_, tokens) = build(VIT), inputs(VIT)
    before = model.encode_text(tokens)
    changed = tokens.clone()
    changed[0, 3:] = 7
    torch.testing.assert_close(model.encode_text(changed), before)
    changed[0, 1] = 8
    assert (model.encode_text(changed)[0] - before[0]).abs().max() > 1e-3
    torch.testing.assert_close(model.encode_text(tokens[:1, :3]), before[:1])  # shorter than the context
    short = trim(tokens[:3])
    assert short.shape == (3, 5)  # the ends stand at 2, 3 and 4
    torch.testing.assert_close(model.encode_text(short), before[:3])
    assert trim(tokens[:0]).shape == (0, 9)


def test_fake_tensors_pass() -> None:
    """Ids are not looked at where there are none."""
    model, batch = build(VIT), inputs(VIT)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        image, text, _ = model(*(mode.from_tensor(t) for t in batch))
    assert image.shape == text.shape == (4, 16)


@ALL
def test_bytes_are_normalized_floats(row: CLIPSpec) -> None:
    model = build(row).eval()
    raw = torch.randint(0, 256, (2, 3, row.image_size, row.image_size), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.mean, model.std))
    got, truth = model.encode_image(raw), model.encode_image((raw / 255 - mean) / std)
    torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5)


@ALL
@pytest.mark.parametrize("raw", [True, False], ids=["bytes", "floats"])
def test_low_precision(row: CLIPSpec, raw: bool) -> None:
    """bfloat16 weights and autocast stay near float32, forward and backward."""
    model = build(row)
    pixels, tokens = inputs(row)
    if raw:
        pixels = (pixels * 40 + 128).clamp(0, 255).to(torch.uint8)
    truth = model(pixels, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(pixels, tokens)
    low = deepcopy(model).bfloat16()
    pure = low(pixels, tokens)
    for outputs in (mixed, pure):
        for got, true in zip(outputs[:2], truth[:2], strict=True):
            assert got.dtype == torch.bfloat16
            assert (got.float() - true).abs().max() < 0.06
    loss(mixed).backward()
    loss(pure).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in low.parameters())


@ALL
def test_checkpointing_changes_nothing(row: CLIPSpec) -> None:
    plain, batch = build(row), inputs(row)
    again = deepcopy(plain)
    again.set_grad_checkpointing()
    for model in (plain, again):
        loss(model(*batch)).backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad), name
    for (name, a), (_, b) in zip(plain.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_same_seed_same_run() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(5)
        model, batch = pymm.create_model("clip_tiny"), None
        assert isinstance(model, CLIP)
        tokens = torch.randint(0, model.vocab_size, (3, model.context_length))
        batch = (torch.randn(3, 3, model.image_size, model.image_size), tokens)
        loss(model(*batch)).backward()
        return [g for p in model.parameters() for g in (p.detach(), p.grad) if g is not None]

    first, second = run(), run()
    assert len(first) == len(second) > 50
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@BOTH
def test_intermediates(row: CLIPSpec) -> None:
    model = build(row).eval()
    batch = inputs(row)
    named: dict[str, Tensor] = {}
    outputs = model(*batch, intermediates=named)
    assert torch.equal(outputs[0], model(*batch)[0])
    assert torch.equal(named["visual.features"], outputs[0])
    assert torch.equal(named["text.features"], outputs[1])
    middle = (
        ["embed", "blocks.0", "blocks.1", "norm"]
        if row is VIT
        else ["stem", *(f"stages.{i}" for i in range(4))]
    )
    assert list(named) == [f"visual.{n}" for n in [*middle, "features"]] + [
        f"text.{n}" for n in ("embed", "blocks.0", "blocks.1", "norm", "features")
    ]
    last = named["visual.norm" if row is VIT else "visual.stages.3"]
    assert torch.equal(model.visual.forward_head(last), model.encode_image(batch[0]))


@pytest.mark.parametrize(
    ("row", "backend"),
    [
        pytest.param(VIT, "inductor", id="vit", marks=pytest.mark.slow),
        # Inductor spends minutes in g++ on the many convolutions; that there is one graph shows here as well.
        pytest.param(RN, "aot_eager", id="resnet", marks=pytest.mark.slow),
    ],
)
def test_compiles_in_one_graph(row: CLIPSpec, backend: str) -> None:
    model, batch = build(row), inputs(row)
    compiled = torch.compile(deepcopy(model), fullgraph=True, backend=backend)
    got, truth = compiled(*batch), model(*batch)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    loss(got).backward()
    loss(truth).backward()
    for (name, a), (_, b) in zip(compiled.named_parameters(), model.named_parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_clip_tiny_compiles_with_everything() -> None:
    """Bytes, autocast, checkpointing, named intermediates and another resolution in one graph."""
    model = pymm.create_model("clip_tiny")
    assert isinstance(model, CLIP)
    model.set_grad_checkpointing()
    side = model.image_size + 16
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    tokens = torch.randint(0, model.vocab_size, (2, model.context_length))

    def step(pixels: Tensor, tokens: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        named: dict[str, Tensor] = {}
        outputs = model(pixels, tokens, intermediates=named)
        return outputs, named["visual.blocks.0"]

    with torch.autocast("cpu", torch.bfloat16):
        outputs, block = torch.compile(step, fullgraph=True, backend="aot_eager")(pixels, tokens)
        truth, truth_block = step(pixels, tokens)
    assert (outputs[0] - truth[0]).abs().max() < 0.05
    assert (block - truth_block).abs().max() < 0.1 * truth_block.abs().max()
    loss(outputs).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_errors() -> None:
    model = build(VIT)
    pixels, tokens = inputs(VIT)
    with pytest.raises(ValueError, match="PatchEmbed: pixels must be"):
        model.encode_image(pixels[:, :, :20])
    with pytest.raises(ValueError, match="TokenEmbed: tokens must be ids in"):
        model.encode_text(tokens + 1)
    with pytest.raises(ValueError, match=r"TokenEmbed: tokens must be \(B, L\) with L <= 9"):
        model.encode_text(torch.zeros(1, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ResNet: pixels must be .* at least 32"):
        build(RN).encode_image(torch.zeros(1, 3, 31, 64))
    with pytest.raises(ValueError, match="CLIP: text must be of the image tower's size 16, got 8"):
        CLIP(model.visual, build(CLIPSpec("", VIT.image, TEXT, 8, "gelu", 0, "")).text)


def test_names_are_stable() -> None:
    """What a checkpoint of ours is made of; a change here makes old files unreadable."""
    names = set(build(VIT).state_dict())
    blocks = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    towers = {
        f"{tower}.blocks.{i}.{layer}.{part}"
        for tower in ("visual", "text")
        for i in range(2)
        for layer in blocks
        for part in ("weight", "bias")
    }
    ends = {f"visual.{n}.{part}" for n in ("norm_pre", "norm") for part in ("weight", "bias")}
    assert names == towers | ends | {
        "logit_scale",
        "visual.embed.weight",
        "visual.embed.prefix",
        "visual.embed.position",
        "visual.head.weight",
        "text.embed.weight",
        "text.embed.position",
        "text.norm.weight",
        "text.norm.bias",
        "text.head.weight",
    }
    assert build(VIT).no_weight_decay() == {
        "visual.embed.prefix",
        "visual.embed.position",
        "text.embed.position",
    }
    resnet = set(build(RN).visual.state_dict())
    assert {"stem.conv1.weight", "stages.0.0.downsample.conv.weight", "pool.kv.weight", "head.bias"} <= resnet
    assert all(name in names or name.startswith("visual.") for name in build(RN).state_dict())


@BOTH
def test_learns_pairs_by_heart(row: CLIPSpec) -> None:
    model = build(row)
    pixels, tokens = inputs(row, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(25):
        value = info_nce(*model(pixels, tokens))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[0] > 1.5
    assert losses[-1] < 0.3
