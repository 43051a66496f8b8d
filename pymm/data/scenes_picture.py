"""Pictures of boxes: on one image, and a sheet of synthetic scenes."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from pymm.data.scenes import Scenes

COLOURS = ("#2f9e44", "#1971c2", "#e03131", "#f08c00", "#9c36b5", "#0c8599", "#c2255c", "#5c940d")
INK = "#1f2933"
TEXT = 12


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    names: Sequence[str],
    scores: Sequence[float] | None = None,
    enlarge: int = 1,
) -> Image.Image:
    """A copy of the image with boxes and their names on it.

    Args:
        image: any mode.
        boxes: left, top, right, bottom in pixels of `image`.
        names: one for each box; boxes of one name have one colour.
        scores: shown behind the names.
        enlarge: the copy is so many times as large.
    """
    size = (image.width * enlarge, image.height * enlarge)
    shown = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    draw, font = ImageDraw.Draw(shown), ImageFont.load_default(TEXT)
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}
    for i, (box, name) in enumerate(zip(boxes, names, strict=True)):
        left, top, right, bottom = (round(side * enlarge) for side in box)
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), None, colour[name], 2)
        text = name if scores is None else f"{name} {scores[i]:.2f}"
        width = round(draw.textlength(text, font)) + 6
        x, y = max(0, min(left, size[0] - width)), max(0, top - TEXT - 4)
        draw.rectangle((x, y, x + width, y + TEXT + 4), colour[name])
        draw.text((x + 3, y + 1), text, "white", font)
    return shown


def sheet(scenes: Scenes, start: int = 0, rows: int = 3, columns: int = 4) -> Image.Image:
    """Synthetic scenes with their true boxes, names and first captions."""
    font = ImageFont.load_default(TEXT)
    side = scenes.settings.size * max(1, 256 // scenes.settings.size)
    gap, head, foot = 12, 30, 2 * TEXT + 12
    size = (columns * (side + gap) + gap, head + rows * (side + foot + gap))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    draw.text((gap, 8), "Synthetic scenes: emoji on drawn textures, boxes and captions exact", INK, font)
    for i in range(rows * columns):
        scene = scenes[start + i]
        x, y = gap + i % columns * (side + gap), head + i // columns * (side + foot + gap)
        boxes, names = [one.box for one in scene.objects], [one.name for one in scene.objects]
        page.paste(draw_boxes(scene.image, boxes, names, enlarge=side // scenes.settings.size), (x, y))
        lines = _wrapped(draw, font, scene.captions[0], side)
        draw.multiline_text((x, y + side + 4), "\n".join(lines[:2]), INK, font)
    return page


def _wrapped(
    draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str, width: int
) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
