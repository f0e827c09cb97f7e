"""Fast, exact operators for RetinaNet and EfficientDet, and the models, training and evaluation on top of them."""

from effdet_fast.version import __version__

__all__ = ["__version__"]
