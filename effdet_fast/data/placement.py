"""The placement of a picture in the model's input, for pixels and boxes, and back for the boxes of detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from effdet_fast.data.image_io import Size

# A JPEG is decoded at no less than this many times the size it is scaled to, and other pictures are box-averaged down
# to it first. 2 cannot be told from a full decode (Pillow's own choice for thumbnails), 1 is good enough to train on.
EXACT_GAP = 2.0
TRAINING_GAP = 1.0


@dataclass(frozen=True)
class Placement:
    """The place of a picture in the model's input: mirrored, scaled, cropped, and put at the top left of a padded output.

    All sizes are (height, width) in pixels.

    Attributes:
        size: of the picture.
        scaled: of the scaled picture.
        output: of the model's input.
        offset: (y, x) in the scaled picture at which it is cropped.
        mirror_x: mirror left and right first.
        mirror_y: mirror top and bottom first.
    """

    size: Size
    scaled: Size
    output: Size
    offset: Size = (0, 0)
    mirror_x: bool = False
    mirror_y: bool = False

    @classmethod
    def letterbox(cls, size: Size, output: Size) -> Placement:
        """Place the whole picture, as large as fits and with its aspect ratio, at the top left, as effdet and automl do.

        Args:
            size: (height, width) of the picture.
            output: (height, width) of the model's input.
        """
        return cls(size, fit(size, output), output)

    @property
    def visible(self) -> Size:
        """The (height, width) of the part of the output that the picture covers."""
        return (
            min(self.output[0], self.scaled[0] - self.offset[0]),
            min(self.output[1], self.scaled[1] - self.offset[1]),
        )

    def mirrored(self, x: bool = False, y: bool = False) -> Placement:
        """Mirror the picture left and right (`x`), top and bottom (`y`), or both."""
        return replace(self, mirror_x=self.mirror_x ^ x, mirror_y=self.mirror_y ^ y)

    def decode_size(self, gap: float) -> Size:
        """Return the (height, width) that a reduced decode of the picture must not fall below, at most the full size.

        Args:
            gap: the decode is at least this many times the scaled size.
        """
        return (
            max(1, min(self.size[0], int(np.ceil(self.scaled[0] * gap)))),
            max(1, min(self.size[1], int(np.ceil(self.scaled[1] * gap)))),
        )

    def render(self, picture: Image.Image, out: np.ndarray, gap: float = EXACT_GAP) -> None:
        """Write the pixels of a picture to the model's input.

        The picture is averaged down to `gap` times its final size, then resampled by Pillow's bilinear filter, whose support
        grows with the reduction, so that it does not alias.

        Args:
            picture: RGB picture of `size`, or a decode of it at 1/2, 1/4 or 1/8.
            out: uint8 [H, W, 3] of size `output`, already filled with padding.
            gap: 2 cannot be told from resampling all pixels, 1 is good enough to train on.

        Raises:
            ValueError: the picture has another size.
        """
        height, width = self.visible
        reduction = self._reduction(picture)
        step_y = self.size[0] / self.scaled[0] / reduction
        step_x = self.size[1] / self.scaled[1] / reduction
        y0, y1 = self.offset[0] * step_y, (self.offset[0] + height) * step_y
        x0, x1 = self.offset[1] * step_x, (self.offset[1] + width) * step_x
        if self.mirror_y:
            y0, y1 = self.size[0] / reduction - y1, self.size[0] / reduction - y0
        if self.mirror_x:
            x0, x1 = self.size[1] / reduction - x1, self.size[1] / reduction - x0
        box = (max(x0, 0.0), max(y0, 0.0), min(x1, float(picture.width)), min(y1, float(picture.height)))
        if box != (0, 0, width, height) or picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BILINEAR, box=box, reducing_gap=max(gap, 1.0))
        if self.mirror_y:
            picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        if self.mirror_x:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        out[:height, :width] = np.asarray(picture)

    def apply_boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Map boxes from the picture to the output.

        Args:
            boxes: [n, 4] xyxy in pixels of the picture.

        Returns:
            float32 [n, 4] xyxy in pixels of the output, clipped to `visible`.
        """
        boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        if self.mirror_x:
            boxes[:, [0, 2]] = self.size[1] - boxes[:, [2, 0]]
        if self.mirror_y:
            boxes[:, [1, 3]] = self.size[0] - boxes[:, [3, 1]]
        boxes = boxes * self._scale() - np.array([self.offset[1], self.offset[0]] * 2)
        height, width = self.visible
        return np.clip(boxes, 0, np.array([width, height, width, height])).astype(np.float32)

    def undo_boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Map boxes from the output back to the picture.

        Args:
            boxes: [n, 4] xyxy in pixels of the output.

        Returns:
            float64 [n, 4] xyxy in pixels of the picture, clipped to it.
        """
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        boxes = (boxes + np.array([self.offset[1], self.offset[0]] * 2)) / self._scale()
        if self.mirror_x:
            boxes[:, [0, 2]] = self.size[1] - boxes[:, [2, 0]]
        if self.mirror_y:
            boxes[:, [1, 3]] = self.size[0] - boxes[:, [3, 1]]
        return np.clip(boxes, 0, np.array([self.size[1], self.size[0]] * 2))

    def _reduction(self, picture: Image.Image) -> int:
        # A JPEG decoded at 1 / n has ceil(size / n) pixels of n x n each, the last of which may stick out.
        for n in (1, 2, 4, 8):
            if (-(-self.size[0] // n), -(-self.size[1] // n)) == (picture.height, picture.width):
                return n
        raise ValueError(f"Placement: is for a picture of {self.size}, got one of {(picture.height, picture.width)}")

    def _scale(self) -> np.ndarray:
        # Per axis, from the rounded size: a single scale would leave the boxes up to half a pixel off the picture.
        return np.array([self.scaled[1] / self.size[1], self.scaled[0] / self.size[0]] * 2)


def fit(size: Size, output: Size, factor: float = 1.0) -> Size:
    """Compute the largest (height, width) with the aspect ratio of `size` inside `factor` times `output`, at least 1 x 1."""
    scale = min(output[0] / size[0], output[1] / size[1]) * factor
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def blank_input(image_size: Size, mean: Sequence[float]) -> np.ndarray:
    """Make an input full of padding, uint8 [H, W, 3]: the mean color (given in 0..1), which normalizes to about 0."""
    color = np.clip(np.round(np.asarray(mean, dtype=np.float64) * 255), 0, 255).astype(np.uint8)
    return np.tile(color, (*image_size, 1))
