"""The operators as modules."""

from effdet_fast.nn.focal_loss import FocalLoss

__all__ = ["FocalLoss"]
