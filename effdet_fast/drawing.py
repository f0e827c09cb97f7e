"""Drawing of boxes and labels on a picture."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]


def class_color(label: int) -> Color:
    """Choose a bright RGB color for a class, far from those of the classes next to it."""
    # Steps of the golden ratio never come close to an earlier hue; two brightnesses part those that do after many.
    hue = (label * 0.61803398875 + 0.02) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, 1.0 if label % 2 == 0 else 0.8)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(
    image: Image.Image | np.ndarray,
    boxes: Any,
    texts: Sequence[str] | None = None,
    colors: Sequence[Color] | None = None,
    width: int | None = None,
) -> Image.Image:
    """Draw boxes on a copy of a picture.

    Args:
        image: RGB picture or uint8 [H, W, 3].
        boxes: [n, 4] xyxy in pixels.
        texts: one label per box, drawn on a plate of the box's color above it, or inside where there is no room.
        colors: one per box; by default that of class 0.
        width: of the lines; by default it grows with the picture.

    Raises:
        ValueError: `texts` or `colors` have another length than `boxes`.
    """
    picture = image.convert("RGB") if isinstance(image, Image.Image) else Image.fromarray(image)
    picture = picture.copy()
    rows = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    for name, values in (("texts", texts), ("colors", colors)):
        if values is not None and len(values) != len(rows):
            raise ValueError(f"draw_boxes: {len(rows)} boxes need as many {name}, got {len(values)}")
    draw = ImageDraw.Draw(picture)
    side = max(picture.size)
    line = max(1, round(side / 400)) if width is None else width
    font = ImageFont.load_default(size=max(10, round(side / 55)))
    # Backwards, so that the first, and most certain, box ends up on top.
    for i in reversed(range(len(rows))):
        color = class_color(0) if colors is None else colors[i]
        x0, y0, x1, y1 = np.clip(rows[i], 0, [picture.width - 1, picture.height - 1] * 2).tolist()
        if x1 < x0 or y1 < y0:
            continue
        draw.rectangle((x0, y0, x1, y1), outline=color, width=line)
        if texts is not None and texts[i]:
            _draw_plate(draw, picture.size, (x0, y0), texts[i], color, font)
    return picture


def _draw_plate(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], corner: tuple[float, float], text: str, color: Color, font: Any
) -> None:
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = max(0.0, min(corner[0], size[0] - width))
    y = corner[1] - height if corner[1] >= height else corner[1]
    draw.rectangle((x, y, x + width, y + height), fill=color)
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    draw.text((x + 2 - left, y + 2 - top), text, fill=(0, 0, 0) if luminance > 140 else (255, 255, 255), font=font)
