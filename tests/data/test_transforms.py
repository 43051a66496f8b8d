"""Transforms against Pillow, torchvision's definitions written out, and each other."""

from __future__ import annotations

import colorsys
import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pymm.data import CLIP_MEAN, CLIP_STD, EvalTransform, TrainTransform
from pymm.data.colour import LUMA, colour_matrices
from pymm.data.images import BadImage, decode_image
from pymm.data.transforms import premultiplied


def image(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth, so that resampling filters agree."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    rng = np.random.default_rng(seed)
    waves = [np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in rng.uniform(0, 1.5, (len(mode), 3))]
    return Image.fromarray((127.5 + 127 * np.stack(waves, -1)).astype(np.uint8), mode)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stacked(*images: Image.Image) -> Tensor:
    arrays = [np.asarray(premultiplied(one)) for one in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def pixels(one: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(one)).permute(2, 0, 1)


# Evaluation


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (16, 16), (9, 50), (16, 17), (101, 64)])
@pytest.mark.parametrize("to", [16, 33])
def test_eval_is_pillow_s_resize_and_torchvision_s_crop(size: tuple[int, int], to: int) -> None:
    source = image(*size)
    width, height = (to * n // min(size) for n in size)
    left, top = round((width - to) / 2), round((height - to) / 2)
    resized = source.resize((width, height), Image.Resampling.BICUBIC)
    expected = pixels(resized.crop((left, top, left + to, top + to)))
    out = EvalTransform(to, output="uint8")([source], generator())[0]
    assert torch.equal(out, expected)


def test_eval_normalizes() -> None:
    source = image(20, 20)
    raw = EvalTransform(16, output="uint8")([source], generator())
    expected = (raw / 255 - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    out = EvalTransform(16)([source], generator())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected)


def test_eval_squash() -> None:
    source = image(40, 20)
    out = EvalTransform(16, crop="squash", output="uint8")([source], generator())
    assert torch.equal(out[0], pixels(source.resize((16, 16), Image.Resampling.BICUBIC)))


def test_eval_of_a_kept_image_is_eval_of_the_image() -> None:
    transform = EvalTransform(16, background=(10, 200, 30))
    images = [image(40, 30, "RGBA", 1), image(17, 23, "RGBA", 2), image(16, 16, "RGB", 3)]
    kept = stacked(*[transform.reduce(one) for one in images])
    assert torch.equal(transform(kept, generator()), transform(images, generator()))


@pytest.mark.parametrize(
    "transform", [EvalTransform(8, output="uint8"), TrainTransform(8, (1, 1), (1, 1), output="uint8")]
)
def test_transparency_shows_the_background(transform: EvalTransform | TrainTransform) -> None:
    source = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    source.paste((0, 0, 255, 255), (0, 0, 4, 8))
    source.paste((0, 255, 0, 51), (4, 0, 8, 4))
    for out in (transform([source], generator()), transform([image(8, 8), source], generator())[1:]):
        assert out[0, :, 6, 0].tolist() == [0, 0, 255]
        assert out[0, :, 6, 7].tolist() == [255, 255, 255]
        assert out[0, :, 1, 7].tolist() == [204, 255, 204]


def test_invisible_colours_do_not_bleed() -> None:
    source = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    source.paste((0, 0, 255, 255), (0, 0, 15, 32))
    for transform in (EvalTransform(8, output="uint8"), TrainTransform(8, output="uint8")):
        out = transform([source], generator())[0].int()
        assert (out[0] <= out[2]).all()  # from blue to white, and never through red
        assert (out[1] == out[0]).all()


def test_eval_refuses_another_size() -> None:
    with pytest.raises(
        ValueError, match=r"images must be uint8 \(B, 3, 16, 16\), got torch.uint8 \(2, 3, 8, 8\)"
    ):
        EvalTransform(16)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), generator())


# Training


def test_without_randomness_train_is_eval() -> None:
    images = [image(24, 24, seed=i) for i in range(70)]
    still = TrainTransform(16, (1.0, 1.0), (1.0, 1.0))
    torch.testing.assert_close(still(images, generator()), EvalTransform(16)(images, generator()))
    same = TrainTransform(24, (1.0, 1.0), (1.0, 1.0), output="uint8")
    assert torch.equal(same(stacked(*images), generator()), stacked(*images))


def test_every_row_has_its_own_choices_and_the_generator_all_of_them() -> None:
    transform = TrainTransform(
        16,
        (0.3, 1.0),
        flip=0.5,
        rotate=30,
        brightness=0.5,
        contrast=0.5,
        saturation=0.5,
        hue=0.3,
        random_background=1.0,
    )
    images = [image(20, 20, "RGBA")] * 130
    for source in (images, stacked(*images)):
        out = transform(source, generator(1))
        assert torch.equal(out, transform(source, generator(1)))
        assert not torch.equal(out, transform(source, generator(2)))
        assert len({row.sum().item() for row in out}) == 130
        assert torch.isfinite(out).all()


def test_stack_and_list_agree_on_smooth_images() -> None:
    transform = TrainTransform(24, (0.2, 0.9), flip=0.5, brightness=0.3, hue=0.2)
    images = [image(48, 40, seed=i) for i in range(9)]
    apart = transform(stacked(*images), generator(3)) - transform(images, generator(3))
    assert apart.abs().mean() < 0.03


def test_flip() -> None:
    source = image(8, 8)
    for one in ([source], stacked(source)):
        flipped = TrainTransform(8, (1, 1), (1, 1), flip=1.0, output="uint8")(one, generator())
        assert torch.equal(flipped[0], pixels(source).flip(-1))


@pytest.mark.parametrize("form", ["list", "stack"])
def test_moves_go_where_they_should(form: str) -> None:
    """A dot right of the middle: turned it stays as far away, zoomed out it is nearer, moved it moves."""
    source = Image.new("RGB", (33, 33), (0, 0, 0))
    source.paste((255, 255, 255), (23, 15, 26, 18))  # centre (24, 16)

    def centre(seed: int = 0, **settings: object) -> tuple[float, float]:
        transform = TrainTransform(
            33, (1, 1), (1, 1), background=(0, 0, 0), mean=(0, 0, 0), std=(1, 1, 1), **settings
        )  # type: ignore[arg-type]
        out = transform([source] if form == "list" else stacked(source), generator(seed))[0, 0]
        at = torch.arange(33.0)
        return float(out.sum(0) @ at / out.sum()), float(out.sum(1) @ at / out.sum())

    assert centre() == pytest.approx((24, 16), abs=0.01)
    for seed in range(4):
        x, y = centre(seed, rotate=90.0)
        assert ((x - 16) ** 2 + (y - 16) ** 2) ** 0.5 == pytest.approx(8, abs=0.1)
        x, y = centre(seed, translate=0.2)
        assert abs(x - 24) <= 0.2 * 33
        assert abs(y - 16) <= 0.2 * 33
        assert (x, y) != pytest.approx((24, 16), abs=0.01)
    assert centre(zoom=(0.5, 0.5)) == pytest.approx((20, 16), abs=0.1)
    assert centre(zoom=(0.5, 0.5), flip=1.0) == pytest.approx((12, 16), abs=0.1)
    turned = {round(centre(seed, rotate=90.0)[1] - 16) > 0 for seed in range(8)}
    assert turned == {True, False}


def test_boxes_have_the_area_and_shape_asked_for() -> None:
    transform = TrainTransform(8, crop_scale=(0.2, 0.5), crop_ratio=(0.5, 2.0))
    table = torch.rand(1000, 18, generator=generator())
    boxes = transform._boxes(table, torch.tensor([[100, 80]]).expand(1000, 2))
    side = boxes[:, 2:] - boxes[:, :2]
    area, ratio = side.prod(1) / 8000, side[:, 0] / side[:, 1]
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([100, 80, 100, 80])).all()
    assert 0.2 <= area.min() < 0.22
    assert 0.48 < area.max() <= 0.5001
    assert 0.499 <= ratio.min() < 0.55
    assert 1.9 < ratio.max() <= 2.001
    assert boxes[:, 0].min() < 3
    assert boxes[:, 2].max() > 97


def test_reduce_keeps_enough_for_the_smallest_crop() -> None:
    transform = TrainTransform(16, crop_scale=(0.25, 1.0))
    assert transform.reduce(image(100, 64)).size == (50, 32)
    assert transform.reduce(image(30, 31)).size == (30, 31)
    assert transform.reduce(image(30, 31, "RGBA")).mode == "RGBa"


def test_random_backgrounds_differ_and_cover_the_cube() -> None:
    clear = [Image.new("RGBA", (4, 4), (9, 9, 9, 0))] * 200
    out = TrainTransform(4, random_background=1.0, output="uint8")(clear, generator())
    colours = out[:, :, 0, 0].float()
    assert (out == out[:, :, :1, :1]).all()
    assert colours.min() < 10
    assert colours.max() > 245
    assert (colours.mean(0) - 127).abs().max() < 20


def test_the_share_of_random_backgrounds() -> None:
    clear = [Image.new("RGBA", (4, 4), (9, 9, 9, 0))] * 400
    plain = (1, 200, 3)
    out = TrainTransform(4, background=plain, random_background=0.25, output="uint8")(clear, generator())
    random = (out[:, :, 0, 0] != torch.tensor(plain, dtype=torch.uint8)).any(1)
    assert 70 < random.sum() < 130


# Colours


def torchvision_style(x: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """torchvision's adjust_* written out for (3, h, w), without cutting in between."""
    luma = torch.tensor(LUMA).view(3, 1, 1)
    x = brightness * x
    x = contrast * x + (1 - contrast) * (luma * x).sum(0).mean()
    return saturation * x + (1 - saturation) * (luma * x).sum(0)


def apply(matrix: Tensor, offset: Tensor, x: Tensor) -> Tensor:
    return (matrix[0] @ x.flatten(1) + offset[0][:, None]).view_as(x)


def test_brightness_contrast_saturation_are_torchvision_s() -> None:
    x = 255 * torch.rand(3, 7, 5)
    for b, c, s in itertools.product((0.4, 1.0, 1.5), repeat=3):
        factors = [torch.tensor([v]) for v in (b, c, s, 0.0)]
        matrix, offset = colour_matrices(*factors, torch.tensor([False]), x.mean((1, 2))[None])
        torch.testing.assert_close(
            apply(matrix, offset, x), torchvision_style(x, b, c, s), rtol=1e-4, atol=1e-2
        )


def test_hue_turns_the_circle_and_keeps_the_luma() -> None:
    x = torch.tensor([[200.0, 60.0, 50.0]]).T[:, :, None]
    one, luma = torch.ones(1), torch.tensor(LUMA)

    def turned(turns: float) -> Tensor:
        matrix, offset = colour_matrices(
            one, one, one, torch.tensor([turns]), torch.tensor([False]), x.mean((1, 2))[None]
        )
        return apply(matrix, offset, x)[:, 0, 0]

    torch.testing.assert_close(turned(1.0), x[:, 0, 0], rtol=1e-4, atol=1e-2)
    hues = []
    for turns in (0.0, 0.1, 0.2, 0.3):
        colour = turned(turns)
        assert float(luma @ colour) == pytest.approx(float(luma @ x[:, 0, 0]), rel=1e-4)
        hues.append(colorsys.rgb_to_hsv(*(colour.clamp(0, 255) / 255).tolist())[0])
    steps = [(b - a + 0.5) % 1 - 0.5 for a, b in itertools.pairwise(hues)]
    assert all(0.03 < abs(step) < 0.25 for step in steps)
    assert len({step > 0 for step in steps}) == 1


def test_grayscale() -> None:
    out = TrainTransform(8, (1, 1), (1, 1), grayscale=1.0, mean=(0, 0, 0), std=(1, 1, 1))(
        [image(8, 8)], generator()
    )
    torch.testing.assert_close(out[:, 0], out[:, 1])
    expected = (pixels(image(8, 8)) * torch.tensor(LUMA).view(3, 1, 1)).sum(0) / 255
    torch.testing.assert_close(out[0, 0], expected, rtol=1e-4, atol=1e-4)


def test_jitter_leaves_alone_whom_it_should() -> None:
    images = stacked(*[image(8, 8)] * 400)
    settings = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.5, "output": "uint8"}
    out = TrainTransform(8, (1, 1), (1, 1), jitter=0.3, **settings)(images, generator())
    changed = (out != images).flatten(1).any(1).float().mean()
    assert 0.2 < changed < 0.4
    assert torch.equal(TrainTransform(8, (1, 1), (1, 1), jitter=0.0, **settings)(images, generator()), images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be positive"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale must be at most 1"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale must be a rising range"),
        ({"zoom": (2.0, 1.0)}, "zoom must be a rising range"),
        ({"flip": 1.5}, r"flip must be in \[0, 1\]"),
        ({"hue": 0.6}, r"hue must be in \[0, 0.5\]"),
        ({"rotate": -1.0}, "rotate must be at least 0"),
        ({"random_background": 1.5}, r"random_background must be in \[0, 1\], got 1.5"),
        ({"std": (0.0, 1.0, 1.0)}, "std must be positive"),
        ({"output": "half"}, 'output must be "float32" or "uint8"'),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"TrainTransform: {message}"):
        TrainTransform(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="EvalTransform: crop must be"):
        EvalTransform(8, crop="none")  # type: ignore[arg-type]


# Decoding


def encoded(one: Image.Image, format: str, **settings: object) -> bytes:
    out = io.BytesIO()
    one.save(out, format, **settings)
    return out.getvalue()


def test_every_mode_becomes_rgb_or_rgba() -> None:
    gray = image(6, 5).convert("L")
    deep = Image.fromarray(np.array(gray).astype(np.uint16) * 257)
    cases = [
        (gray, "PNG", "RGB"),
        (gray.convert("1"), "PNG", "RGB"),
        (image(6, 5, "RGBA"), "PNG", "RGBA"),
        (image(6, 5, "RGBA"), "WEBP", "RGBA"),
        (image(6, 5, "RGBA").convert("LA"), "PNG", "RGBA"),
        (image(6, 5).convert("P"), "GIF", "RGB"),
        (image(6, 5).convert("CMYK"), "JPEG", "RGB"),
        (image(6, 5), "BMP", "RGB"),
        (deep, "PNG", "RGB"),
    ]
    for source, format, mode in cases:
        decoded = decode_image(encoded(source, format), 100)
        assert (decoded.mode, decoded.size) == (mode, (6, 5))
    assert decode_image(encoded(deep, "PNG"), 100).tobytes() == gray.convert("RGB").tobytes()
    palette = image(6, 5).convert("P")
    assert decode_image(encoded(palette, "PNG", transparency=0), 100).mode == "RGBA"


def test_limits_hold_at_the_header() -> None:
    data = encoded(image(6, 5), "PNG")
    assert decode_image(data, 30).size == (6, 5)
    with pytest.raises(BadImage, match="too many pixels"):
        decode_image(data, 29)
    with pytest.raises(BadImage, match="not an image"):
        decode_image(encoded(image(6, 5), "TIFF"), 30)
    with pytest.raises(BadImage, match="not an image"):
        decode_image(b"", 30)
