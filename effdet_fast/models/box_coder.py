"""Boxes as offsets from anchors: (ty, tx, th, tw), the code of EfficientDet's box head."""

from __future__ import annotations

import torch

EPS = 1e-7


def encode_boxes(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Codes (ty, tx, th, tw) [..., 4] of boxes relative to anchors.

    ty = (yc - yc_a) / h_a, th = log(h / h_a), and so for x; 1e-7 is added to every side, so that an empty box has a
    finite code.

    Args:
        boxes: [..., 4] xyxy.
        anchors: xyxy, broadcastable to `boxes`.
    """
    centre, size = _centre_size(boxes)
    anchor_centre, anchor_size = _centre_size(anchors)
    anchor_size = anchor_size + EPS
    size = size + EPS
    offset = (centre - anchor_centre) / anchor_size
    return torch.cat([offset, torch.log(size / anchor_size)], dim=-1)


def decode_boxes(codes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Boxes [..., 4] xyxy from codes (ty, tx, th, tw) and their anchors (xyxy). Nothing is clamped."""
    ty, tx, th, tw = codes.unbind(-1)
    x0, y0, x1, y1 = anchors.unbind(-1)
    anchor_w, anchor_h = x1 - x0, y1 - y0
    half_w, half_h = torch.exp(tw) * anchor_w / 2.0, torch.exp(th) * anchor_h / 2.0
    centre_x = tx * anchor_w + (x0 + x1) / 2.0
    centre_y = ty * anchor_h + (y0 + y1) / 2.0
    return torch.stack([centre_x - half_w, centre_y - half_h, centre_x + half_w, centre_y + half_h], dim=-1)


def _centre_size(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres (y, x) and sizes (height, width), [..., 2] each, of xyxy boxes."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    height, width = y1 - y0, x1 - x0
    return torch.stack([y0 + height / 2.0, x0 + width / 2.0], dim=-1), torch.stack([height, width], dim=-1)
