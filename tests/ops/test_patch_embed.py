"""patch_embed beyond its record: equality with what timm, MAE and BEiT compute, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pymm import ops
from pymm.ops import patch_embed

B, CIN, C, H, W, PH, PW = 3, 3, 20, 12, 20, 4, 5
N = (H // PH) * (W // PW)
MEAN, STD = (0.48, 0.45, 0.41), (0.27, 0.26, 0.28)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert got.dtype == expected.dtype
    scale = max(expected.abs().max().item(), 1e-3)
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale)


@pytest.fixture
def conv() -> nn.Conv2d:
    return nn.Conv2d(CIN, C, (PH, PW), stride=(PH, PW))


def tokens_of(conv: nn.Module, pixels: Tensor) -> Tensor:
    return conv(pixels).flatten(2).transpose(1, 2)


@BACKENDS
def test_equals_the_convolution_whose_weight_it_takes(conv: nn.Conv2d, backend: str) -> None:
    pixels = torch.randn(B, CIN, H, W)
    with ops.backend(backend):
        close(patch_embed(pixels, conv.weight, conv.bias), tokens_of(conv, pixels))


def test_a_state_dict_of_a_convolution_fits(conv: nn.Conv2d) -> None:
    state = conv.state_dict()
    pixels = torch.randn(1, CIN, H, W)
    close(patch_embed(pixels, state["weight"], state["bias"]), tokens_of(conv, pixels).detach())


@BACKENDS
@pytest.mark.parametrize("registers", [0, 4])
def test_equals_timm_with_a_position_for_every_token(conv: nn.Conv2d, backend: str, registers: int) -> None:
    """timm's VisionTransformer._pos_embed: class and register tokens first, then one table for all."""
    pixels = torch.randn(B, CIN, H, W)
    prefix = torch.randn(1 + registers, C)
    position = torch.randn(1 + registers + N, C)
    expected = torch.cat([prefix.expand(B, -1, -1), tokens_of(conv, pixels)], 1) + position
    with ops.backend(backend):
        close(patch_embed(pixels, conv.weight, conv.bias, prefix=prefix, position=position), expected)


@BACKENDS
def test_equals_timm_with_positions_of_the_patches_only(conv: nn.Conv2d, backend: str) -> None:
    """timm's `no_embed_class`: the table is added before the prefix is joined on."""
    pixels, prefix, position = torch.randn(B, CIN, H, W), torch.randn(5, C), torch.randn(N, C)
    expected = torch.cat([prefix.expand(B, -1, -1), tokens_of(conv, pixels) + position], 1)
    with ops.backend(backend):
        close(patch_embed(pixels, conv.weight, conv.bias, prefix=prefix, position=position), expected)


@BACKENDS
def test_equals_mae(conv: nn.Conv2d, backend: str) -> None:
    """MAE's forward_encoder: positions first, then the visible patches, then the class token with its own."""
    pixels, cls, position = torch.randn(B, CIN, H, W), torch.randn(1, C), torch.randn(1 + N, C)
    keep = torch.rand(B, N).argsort(1)[:, : N // 4]
    visible = (tokens_of(conv, pixels) + position[1:]).gather(1, keep[..., None].expand(-1, -1, C))
    expected = torch.cat([(cls + position[:1]).expand(B, -1, -1), visible], 1)
    with ops.backend(backend):
        got = patch_embed(pixels, conv.weight, conv.bias, prefix=cls, position=position, keep=keep)
    close(got, expected)


@BACKENDS
def test_equals_beit(conv: nn.Conv2d, backend: str) -> None:
    """BEiT: masked patches become the token, which has a position but no bias."""
    pixels, cls, token = torch.randn(B, CIN, H, W), torch.randn(1, C), torch.randn(C)
    position, mask = torch.randn(1 + N, C), torch.rand(B, N) < 0.4
    w = mask[..., None].float()
    mixed = tokens_of(conv, pixels) * (1 - w) + token * w
    expected = torch.cat([cls.expand(B, -1, -1), mixed], 1) + position
    with ops.backend(backend):
        got = patch_embed(
            pixels, conv.weight, conv.bias, prefix=cls, position=position, mask=mask, mask_token=token
        )
    close(got, expected)


def test_masked_pixels_are_never_read(conv: nn.Conv2d) -> None:
    pixels, mask = torch.randn(1, CIN, H, W), torch.zeros(1, N, dtype=torch.bool)
    mask[0, 2] = True  # the patch in the first line, third column
    clean = patch_embed(pixels, conv.weight, conv.bias, mask=mask, mask_token=torch.zeros(C))
    pixels[..., :PH, 2 * PW : 3 * PW] = torch.nan
    torch.testing.assert_close(
        patch_embed(pixels, conv.weight, conv.bias, mask=mask, mask_token=torch.zeros(C)), clean
    )


@BACKENDS
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_bytes_equal_normalized_floats(backend: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    pixels = torch.randint(0, 256, (B, CIN, H, W), dtype=torch.uint8).contiguous(memory_format=layout)
    weight = (torch.randn(C, CIN, PH, PW) / 8).to(dtype)
    acc = torch.promote_types(dtype, torch.float32)
    mean, std = torch.tensor(MEAN, dtype=acc), torch.tensor(STD, dtype=acc)
    floats = ((pixels.to(acc) / 255 - mean[:, None, None]) / std[:, None, None]).to(dtype)
    with ops.backend(backend):
        got = patch_embed(pixels, weight, mean=MEAN, std=STD)
        expected = patch_embed(floats, weight)
    close(got, expected, max(1e-5, 2 * torch.finfo(dtype).eps) if dtype != torch.float64 else 1e-12)


@BACKENDS
def test_float_pixels_are_normalized_without_255(conv: nn.Conv2d, backend: str) -> None:
    pixels = torch.rand(B, CIN, H, W)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    with ops.backend(backend):
        got = patch_embed(pixels, conv.weight, conv.bias, mean=mean, std=std)
        half = patch_embed(pixels, conv.weight, conv.bias, std=STD)
    close(got, tokens_of(conv, (pixels - mean[:, None, None]) / std[:, None, None]))
    close(half, tokens_of(conv, pixels / std[:, None, None]))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.flip(3),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: t[:, :1].expand(-1, CIN, -1, -1),
        lambda t: torch.cat([t, t], 3)[..., ::2],
    ],
    ids=["channels last", "flipped", "columns first", "gray expanded", "every second column"],
)
def test_pixels_of_any_strides_are_read_in_place(conv: nn.Conv2d, view: Any) -> None:
    pixels = view(torch.randn(B, CIN, H, W))
    close(patch_embed(pixels, conv.weight, conv.bias), tokens_of(conv, pixels.contiguous()))


def test_gradcheck_of_every_argument() -> None:
    def rand(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, requires_grad=True)

    leaves = (rand(2, 2, 4, 6), rand(3, 2, 2, 3), rand(3), rand(2, 3), rand(6, 3), rand(3))
    keep, mask = torch.tensor([[3, 0, 3], [1, 2, 0]]), torch.tensor([[1, 0, 0, 0], [0, 0, 1, 0]]).bool()

    def function(pixels, weight, bias, prefix, position, mask_token):
        return patch_embed(
            pixels,
            weight,
            bias,
            prefix=prefix,
            position=position,
            keep=keep,
            mask=mask,
            mask_token=mask_token,
            mean=(0.1, 0.2),
            std=(0.5, 0.7),
        )

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_only_wanted_gradients_are_computed(conv: nn.Conv2d) -> None:
    pixels = torch.randn(B, CIN, H, W)
    conv.weight.requires_grad_(False)
    patch_embed(pixels, conv.weight, conv.bias).sum().backward()
    assert pixels.grad is None
    assert conv.weight.grad is None
    close(conv.bias.grad, torch.full((C,), float(B * N)))


def test_autocast_casts_all_but_bytes(conv: nn.Conv2d) -> None:
    pixels = torch.randint(0, 256, (B, CIN, H, W), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        got = patch_embed(pixels, conv.weight, conv.bias, mean=MEAN, std=STD)
    assert got.dtype == torch.bfloat16
    weight, bias = conv.weight.bfloat16(), conv.bias.bfloat16()
    assert torch.equal(got, patch_embed(pixels, weight, bias, mean=MEAN, std=STD))
    got.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32


def test_dropped_patches_have_no_gradient(conv: nn.Conv2d) -> None:
    pixels = torch.randn(1, CIN, H, W, requires_grad=True)
    keep = torch.tensor([[0, 5]])
    patch_embed(pixels, conv.weight, keep=keep).sum().backward()
    patches = pixels.grad.reshape(CIN, H // PH, PH, W // PW, PW).abs().amax((0, 2, 4)).flatten()
    assert torch.equal(patches.nonzero().flatten(), keep[0])


GOOD: dict[str, Any] = {"pixels": torch.zeros(2, 3, 8, 12), "weight": torch.zeros(5, 3, 4, 4)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"pixels": torch.zeros(2, 3, 9, 12)},
            "pixels must be (B, 3, a multiple of 4, a multiple of 4), got (2, 3, 9, 12)",
        ),
        (
            {"pixels": torch.zeros(2, 1, 8, 12)},
            "pixels must be (B, 3, a multiple of 4, a multiple of 4), got (2, 1, 8, 12)",
        ),
        (
            {"pixels": torch.zeros(3, 8, 12)},
            "pixels must be (B, 3, a multiple of 4, a multiple of 4), got (3, 8, 12)",
        ),
        (
            {"pixels": torch.zeros(2, 3, 8, 12).double()},
            "pixels must be uint8 or of weight's type torch.float32, got torch.float64",
        ),
        (
            {"pixels": torch.zeros(2, 3, 8, 12).int()},
            "pixels must be uint8 or of weight's type torch.float32, got torch.int32",
        ),
        ({"pixels": [1.0]}, "pixels must be a tensor, got list"),
        ({"weight": torch.zeros(5, 48)}, "weight must be (C, Cin, ph, pw) with ph, pw >= 1, got (5, 48)"),
        (
            {"weight": torch.zeros(5, 3, 4, 4).int()},
            "weight must be float32, bfloat16, float16 or float64, got torch.int32",
        ),
        ({"bias": torch.zeros(4)}, "bias must be (5,), got (4,)"),
        (
            {"bias": torch.zeros(5).bfloat16()},
            "bias must be of weight's type torch.float32, got torch.bfloat16",
        ),
        ({"prefix": torch.zeros(5)}, "prefix must be (P, 5), got (5,)"),
        ({"position": torch.zeros(7, 5)}, "position must be (6, 5), got (7, 5)"),
        (
            {"prefix": torch.zeros(2, 5), "position": torch.zeros(7, 5)},
            "position must be (6, 5) or (8, 5), got (7, 5)",
        ),
        ({"keep": torch.zeros(2, 3)}, "keep must be of an integer type, got torch.float32"),
        ({"keep": torch.zeros(1, 3).long()}, "keep must be (2, K), got (1, 3)"),
        (
            {"mask": torch.zeros(2, 6), "mask_token": torch.zeros(5)},
            "mask must be of type torch.bool, got torch.float32",
        ),
        ({"mask": torch.zeros(2, 5).bool(), "mask_token": torch.zeros(5)}, "mask must be (2, 6), got (2, 5)"),
        ({"mask": torch.zeros(2, 6).bool()}, "mask_token must be given with mask, got None"),
        ({"mask_token": torch.zeros(1, 5)}, "mask_token must be (5,), got (1, 5)"),
        ({"mean": (0.5,)}, "mean must be (3,), got (1,)"),
        (
            {"std": torch.ones(3, requires_grad=True)},
            "std must be a constant, for it has no gradient, got a tensor that requires one",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        patch_embed(**{**GOOD, **changed})
    assert str(caught.value) == f"patch_embed: {message}"


@pytest.mark.parametrize("bad", [-1, 6])
def test_keep_outside_the_image_is_an_error(bad: int) -> None:
    with pytest.raises(RuntimeError, match=rf"patch_embed: keep must be in \[0, 6\), got {bad}"):
        patch_embed(**GOOD, keep=torch.tensor([[0, 1], [2, bad]]))
    with pytest.raises(RuntimeError), ops.backend("reference"):
        patch_embed(**GOOD, keep=torch.tensor([[0, 1], [2, bad]]))


def test_devices_are_not_mixed() -> None:
    with pytest.raises(ValueError, match="patch_embed: pixels must be on weight's device cpu, got meta"):
        patch_embed(GOOD["pixels"].to("meta"), GOOD["weight"])
