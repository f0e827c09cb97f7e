"""Decoding of pictures of many formats and modes to upright 8-bit RGB."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
# Nothing else is decoded, whatever a file is called: for PostScript Pillow would run a program on it.
_DECODED = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "TGA")

DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras give to a gray value

Size = tuple[int, int]


def open_image(
    path: str | os.PathLike[str],
    annotated_size: Size | None = None,
    wanted_size: Size | Callable[[Size], Size] | None = None,
    depth: int | None = None,
) -> tuple[Image.Image, Size]:
    """Decode a file to an upright RGB picture.

    The EXIF orientation is applied, so that the picture is as a viewer shows it. The exception: where `annotated_size` fits
    the stored pixels and not the turned ones, the boxes were drawn on the stored pixels, and these are kept.
    Transparency is dropped, and of several frames the first one is taken.

    Args:
        path: image file: JPEG, PNG, BMP, GIF, TIFF, WebP, PPM, JPEG 2000, AVIF or TGA.
        annotated_size: (height, width) from the annotations file, if known.
        wanted_size: (height, width) that is enough, or a function of the full size that gives it; a JPEG may then be
            decoded at 1/2, 1/4 or 1/8 of its size, never smaller than that.
        depth: bits of the values of a gray picture of more than 8 bits: 8, 10, 12, 14 or 16; the upper 8 are kept. None takes 8
            if no value of the picture has more, else 16.

    Returns:
        The picture, and its upright (height, width) before any reduction.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be decoded, or has another size than `annotated_size`. The message names the file.
    """
    with _opened(path) as image:
        turn = _turn(image, annotated_size)
        size = _turned_size(image, turn)
        _check_size(path, size, annotated_size)
        if wanted_size is not None and image.format == "JPEG":
            height, width = wanted_size(size) if callable(wanted_size) else wanted_size
            image.draft("", (height, width) if _swaps(turn) else (width, height))
        return _settled(to_rgb(image if turn is None else image.transpose(turn), depth)), size


def read_header(path: str | os.PathLike[str], annotated_size: Size | None = None) -> tuple[Size, bool]:
    """Read the upright (height, width) without decoding, and whether the picture `is_deep`; the errors are `open_image`'s."""
    with _opened(path) as image:
        deep, size = is_deep(image), (image.height, image.width)
        # Looking for EXIF data decodes a PNG; mostly the sizes agree and there is no need.
        if annotated_size is None or size != tuple(annotated_size):
            size = _turned_size(image, _turn(image, annotated_size))
            _check_size(path, size, annotated_size)
    return size, deep


def largest_value(path: str | os.PathLike[str]) -> int:
    """Find the largest value of a deep picture; the errors are `open_image`'s."""
    with _opened(path) as image:
        return int(np.asarray(image).max(initial=0))


def is_deep(image: Image.Image) -> bool:
    """Whether a picture is gray with integers of more than 8 bits."""
    return image.mode.startswith("I")


def depth_of(value: int) -> int:
    """Find the smallest of `DEPTHS` that fits a value."""
    return next((depth for depth in DEPTHS if value < 1 << depth), DEPTHS[-1])


def to_rgb(image: Image.Image, depth: int | None = None) -> Image.Image:
    """Convert a Pillow picture to 8-bit RGB; transparency is dropped.

    `depth` says how many bits the values of a deep gray picture have, one of `DEPTHS`: the upper 8 are kept, and a value with
    more bits becomes white. None takes 8 if no value has more, else 16; two pictures of one camera may then differ.
    """
    if image.mode == "RGB":
        image.load()
        return image
    if is_deep(image):
        # Pillow's own conversion saturates at 255, which turns most 16-bit pictures white.
        values = np.asarray(image)
        bits = depth or (16 if values.max(initial=0) > 255 else 8)
        return Image.fromarray((np.clip(values, 0, (1 << bits) - 1) >> (bits - 8)).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; convert the picture to 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def as_picture(image: Any, depth: int | None = None) -> Image.Image:
    """Make an RGB Pillow picture, upright by its EXIF data, of a Pillow picture or a uint8 array [H, W, 3] or [H, W].

    Args:
        image: the picture.
        depth: see `to_rgb`.

    Raises:
        TypeError: `image` is neither, or the array has another dtype.
        ValueError: the array has another shape.
    """
    if isinstance(image, Image.Image):
        turn = _turn(image, None)
        return _settled(to_rgb(image if turn is None else image.transpose(turn), depth))
    if not isinstance(image, np.ndarray):
        raise TypeError(f"predict: image must be a path, a PIL image or a NumPy array, got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise TypeError(f"predict: image array must be uint8, got {image.dtype}")
    if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)) or 0 in image.shape:
        raise ValueError(f"predict: image array must have shape [H, W, 3] (RGB) or [H, W], got {list(image.shape)}")
    return to_rgb(Image.fromarray(np.ascontiguousarray(image)))


class _SizeMismatch(ValueError):
    pass


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _DECODED if name in Image.OPEN)  # this Pillow may have been built without one


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for whoever writes to it
            raise ValueError("it is not a regular file")
        with Image.open(path, formats=_formats()) as image:
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image file") from None
    except _SizeMismatch:
        raise
    # Pillow's decoders raise whatever they come across in a broken file: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise ValueError(f"{path}: cannot be decoded: {error}") from error


def _check_size(path: str | os.PathLike[str], size: Size, annotated_size: Size | None) -> None:
    if annotated_size is not None and size != tuple(annotated_size):
        raise _SizeMismatch(f"{path}: is {_wh(size)} pixels, but its annotations say {_wh(annotated_size)}")


def _turn(image: Image.Image, annotated_size: Size | None) -> Image.Transpose | None:
    if image.format == "TIFF":  # Pillow turns these by itself
        return None
    try:
        turn = _TRANSPOSE.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken metadata says nothing about the pixels
        return None
    if _swaps(turn) and annotated_size is not None:
        height, width = annotated_size
        if (image.height, image.width) == (height, width) and height != width:
            return None
    return turn


def _settled(picture: Image.Image) -> Image.Image:
    # A picture that still carries its orientation would be turned again by whoever gets it next.
    if _turn(picture, None) is not None:
        picture = picture.copy()
        picture.info = {}
    return picture


def _swaps(turn: Image.Transpose | None) -> bool:
    return turn is not None and turn not in (_TRANSPOSE[2], _TRANSPOSE[3], _TRANSPOSE[4])


def _turned_size(image: Image.Image, turn: Image.Transpose | None) -> Size:
    return (image.width, image.height) if _swaps(turn) else (image.height, image.width)


def _wh(size: Size) -> str:
    return f"{size[1]} x {size[0]}"
