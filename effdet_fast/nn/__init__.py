"""The operators as modules, with the parameter names of the modules that they can replace."""

from effdet_fast.nn.batch_norm_act import (
    BatchNormAct2d,
    FrozenBatchNormAct2d,
    freeze_batch_norm,
    synchronize_batch_norm,
)
from effdet_fast.nn.depthwise_conv import DepthwiseConv2d, SeparableConv2d
from effdet_fast.nn.focal_loss import FocalLoss
from effdet_fast.nn.fusion import WeightedFusion
from effdet_fast.nn.recompute import BlockSequence
from effdet_fast.nn.squeeze_excite import SqueezeExcite

__all__ = [
    "BatchNormAct2d",
    "BlockSequence",
    "DepthwiseConv2d",
    "FocalLoss",
    "FrozenBatchNormAct2d",
    "SeparableConv2d",
    "SqueezeExcite",
    "WeightedFusion",
    "freeze_batch_norm",
    "synchronize_batch_norm",
]
