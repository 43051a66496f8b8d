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
    drawn, captions = [], []
    for i in range(rows * columns):
        scene = scenes[start + i]
        boxes, names = [one.box for one in scene.objects], [one.name for one in scene.objects]
        enlarge = max(1, 256 // scenes.settings.size)
        drawn.append(draw_boxes(scene.image, boxes, names, enlarge=enlarge))
        captions.append(scene.captions[0])
    title = "Synthetic scenes: emoji on drawn textures, boxes and captions exact"
    return page_of(drawn, captions, title, columns)


def page_of(
    pictures: Sequence[Image.Image], captions: Sequence[str], title: str, columns: int = 4
) -> Image.Image:
    """Pictures of one size in rows, each over its caption, of which two lines are shown."""
    font = ImageFont.load_default(TEXT)
    width, height = pictures[0].size
    gap, head, foot = 12, 30, 2 * TEXT + 12
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (width + gap) + gap, head + rows * (height + foot + gap)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((gap, 8), title, INK, font)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = gap + i % columns * (width + gap), head + i // columns * (height + foot + gap)
        page.paste(picture, (x, y))
        lines = _wrapped(draw, font, caption, width)
        draw.multiline_text((x, y + height + 4), "\n".join(lines[:2]), INK, font)
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
