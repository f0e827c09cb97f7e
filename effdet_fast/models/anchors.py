"""The anchor boxes of a detector, in the order of its head outputs."""

from __future__ import annotations

import numpy as np
import torch
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor

from effdet_fast.models.config import DetectorConfig


def feature_sizes(image_size: tuple[int, int], min_level: int, max_level: int) -> list[tuple[int, int]]:
    """Compute the (height, width) of each pyramid level; every stride of 2 halves and rounds up."""
    sizes = [image_size]
    for _ in range(max_level):
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes[min_level:]


def generate_anchors(config: DetectorConfig) -> torch.Tensor:
    """Make the anchor boxes of a configuration.

    Their order is level, row, column, anchor of the cell, as in head outputs permuted to [B, H, W, A]. Anchors may reach outside
    of the image. There are two styles, with (x, y) the center of the cell in row i and column j:

    - "efficientdet": ((j + 0.5) * stride_x, (i + 0.5) * stride_y), where a stride is image side / feature side and need not be
      whole. Of a cell's anchors, the aspect ratio changes fastest.
    - "retinanet", torchvision's: (j * stride_x, i * stride_y) with strides rounded down. Sides of square anchors are truncated to
      whole pixels, half sides of all anchors are rounded. The scale changes fastest.

    Args:
        config: Model configuration.

    Returns:
        float32 [N, 4] xyxy in input pixels, on the CPU.
    """
    cells = {"efficientdet": _efficientdet_cells, "retinanet": _retinanet_cells}[config.anchor_style]
    levels = []
    sizes = feature_sizes(config.image_size, config.min_level, config.max_level)
    for level, (height, width) in enumerate(sizes, start=config.min_level):
        first, stride, half = cells(config, level, width, height)
        center_x = first[0] + np.arange(width) * stride[0]
        center_y = first[1] + np.arange(height) * stride[1]
        centers = np.stack(np.meshgrid(center_x, center_y), axis=-1).reshape(-1, 1, 2)
        levels.append(np.concatenate([centers - half, centers + half], axis=-1).reshape(-1, 4))
    return torch.from_numpy(np.concatenate(levels).astype(np.float32))


_Cells = tuple[np.ndarray, np.ndarray, np.ndarray]  # first center [2], stride [2], half sides [A, 2]; each (x, y)


def _efficientdet_cells(config: DetectorConfig, level: int, width: int, height: int) -> _Cells:
    octaves = 2.0 ** (np.arange(config.num_scales) / config.num_scales)
    image_h, image_w = config.image_size
    stride = np.array([image_w / width, image_h / height])
    half = config.anchor_scale * stride * octaves[:, None, None] * np.array(config.aspect_ratios) / 2.0
    return stride / 2.0, stride, half.reshape(-1, 2)


def _retinanet_cells(config: DetectorConfig, level: int, width: int, height: int) -> _Cells:
    octaves = 2.0 ** (np.arange(config.num_scales) / config.num_scales)
    image_h, image_w = config.image_size
    stride = np.array([image_w // width, image_h // height])
    sides = np.trunc(config.anchor_scale * 2**level * octaves)
    half = np.round(np.array(config.aspect_ratios)[:, None] * sides[:, None] / 2.0)
    return np.zeros(2), stride, half.reshape(-1, 2)


class AnchorCache:
    """The anchors of a configuration, kept on each device that asked for them.

    Not a buffer on purpose: anchors of a model cast to half precision stay exact, and the state dict stays as it is.
    """

    def __init__(self, config: DetectorConfig) -> None:
        self.config = config
        self.sizes = feature_sizes(config.image_size, config.min_level, config.max_level)
        self.counts = [height * width * config.anchors_per_cell for height, width in self.sizes]
        self._boxes: dict[torch.device, torch.Tensor] = {}

    def boxes(self, device: torch.device) -> torch.Tensor:
        """Return the anchors, float32 [N, 4] xyxy in input pixels; they are copied to a device once."""
        kept = self._boxes.get(device)
        # One made under FakeTensorMode has no values for the calls after.
        if kept is None or (isinstance(kept, FakeTensor) and kept.fake_mode is not detect_fake_mode()):
            with torch.inference_mode(False):  # or no backward could save them
                self._boxes[device] = generate_anchors(self.config).to(device)
        return self._boxes[device]
