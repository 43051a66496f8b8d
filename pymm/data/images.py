"""Encoded bytes to a picture, without trust in the bytes."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

# Pillow knows many more. These are decoded by libraries that are fuzzed, and none of them starts a program
# (EPS would run Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class BadImage(Exception):
    """An image that cannot be used; the text is the reason that the report counts."""


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header only: format and size are known to be fine, nothing is decoded.

    Raises:
        BadImage: "not an image", "too many pixels" or "damaged image".
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadImage("not an image") from error
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels") from error
    except Exception as error:  # a decoder may raise anything on bytes made to hurt it
        raise BadImage("damaged image") from error
    if image.width * image.height > max_pixels:
        raise BadImage("too many pixels")
    if image.width == 0 or image.height == 0:
        raise BadImage("damaged image")
    return image


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decode the first frame to mode RGB, or to RGBA where the image has transparency.

    16-bit grey values keep their high byte.

    Raises:
        BadImage: as `open_image`, and "damaged image" when the pixels are cut off or wrong.
    """
    image = open_image(data, max_pixels)
    try:
        image.load()
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except Exception as error:  # as above
        raise BadImage("damaged image") from error
