"""Boxes from their codes (ty, tx, th, tw), as EfficientDet's box head says them. `ops.match_anchors` makes the codes."""

from __future__ import annotations

import torch


def decode_boxes(codes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Boxes [..., 4] xyxy from codes (ty, tx, th, tw) and their anchors (xyxy). Nothing is clamped."""
    ty, tx, th, tw = codes.unbind(-1)
    x0, y0, x1, y1 = anchors.unbind(-1)
    anchor_w, anchor_h = x1 - x0, y1 - y0
    half_w, half_h = torch.exp(tw) * anchor_w / 2.0, torch.exp(th) * anchor_h / 2.0
    centre_x = tx * anchor_w + (x0 + x1) / 2.0
    centre_y = ty * anchor_h + (y0 + y1) / 2.0
    return torch.stack([centre_x - half_w, centre_y - half_h, centre_x + half_w, centre_y + half_h], dim=-1)
