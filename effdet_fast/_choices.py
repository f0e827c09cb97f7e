"""The choices that the kernels know by numbers, and the limits that both sides check: the twin of csrc/common/choices.h.

`_libraries.py` loads no library that was built with others. The ops look numbers up by the names that they take as arguments, in
the tables below the enumerations. Those hold plain ints, as torch.compile would not take a member of an enumeration for one.
"""

import re
from collections.abc import Callable
from enum import IntEnum

import torch.nn.functional as F
from torch import Tensor, nn


class Activation(IntEnum):
    none = 0
    silu = 1
    relu = 2
    relu6 = 3


class BoxCoder(IntEnum):
    none = 0
    effdet = 1
    torchvision = 2


class BoxLoss(IntEnum):
    huber = 0
    l1 = 1
    smooth_l1 = 2
    giou = 3


class ForcedMatch(IntEnum):
    none = 0
    first = 1
    ties = 2


class FusionMethod(IntEnum):
    fast = 0
    softmax = 1
    sum = 2


class LossNormalizer(IntEnum):
    batch = 0
    per_image = 1


class NmsMethod(IntEnum):
    hard = 0
    gaussian = 1
    linear = 2


class Resample(IntEnum):
    none = 0
    nearest = 1
    max_pool = 2


MAX_LEVELS = 8  # of a pyramid that is trained
MAX_DECODED_LEVELS = 16  # of a pyramid that is only read
MAX_FUSION_INPUTS = 4
MAX_DETECTIONS = 1 << 30  # of an image
MAX_KEPT_IN_BLOCK = 1024  # boxes that NMS on a GPU keeps in the shared memory of one block


def _numbers(choices: type[IntEnum]) -> dict[str, int]:
    return {choice.name: choice.value for choice in choices}


def _identity(x: Tensor) -> Tensor:
    return x


# Every activation's number, function and module.
_FORMS: dict[str | None, tuple[Activation, Callable[..., Tensor], type[nn.Module]]] = {
    None: (Activation.none, _identity, nn.Identity),
    "silu": (Activation.silu, F.silu, nn.SiLU),
    "relu": (Activation.relu, F.relu, nn.ReLU),
    "relu6": (Activation.relu6, F.relu6, nn.ReLU6),
}
ACTIVATIONS = {name: number.value for name, (number, _, _) in _FORMS.items()}
ACTIVATION_FUNCTIONS = {name: function for name, (_, function, _) in _FORMS.items()}
ACTIVATION_MODULES = {name: module for name, (_, _, module) in _FORMS.items()}
ACTIVATION_NAMES = tuple(name for name in _FORMS if name is not None)

BOX_CODERS = {name: number for name, number in _numbers(BoxCoder).items() if name != "none"}
BOX_CODERS_OR_NONE = dict[str | None, int]({None: BoxCoder.none.value}, **BOX_CODERS)
BOX_LOSSES = _numbers(BoxLoss)
FORCED_MATCHES = _numbers(ForcedMatch)
FUSION_METHODS = _numbers(FusionMethod)
LOSS_NORMALIZERS = _numbers(LossNormalizer)
NMS_METHODS = _numbers(NmsMethod)
SOFT_NMS_METHODS = {name: number for name, number in NMS_METHODS.items() if name != "hard"}
RESAMPLES = _numbers(Resample)


def told() -> list[str]:
    """As a library tells them: `Name(values)`, `kLimit(value)`."""

    def in_cpp(name: str) -> str:
        return "k" + "".join(word.capitalize() for word in name.split("_"))

    choices = (Activation, BoxCoder, BoxLoss, ForcedMatch, FusionMethod, LossNormalizer, NmsMethod, Resample)
    for each in choices:
        assert [member.value for member in each] == list(range(len(each))), f"{each.__name__} must be numbered from 0"
    limits = {
        "kMaxLevels": MAX_LEVELS,
        "kMaxDecodedLevels": MAX_DECODED_LEVELS,
        "kMaxFusionInputs": MAX_FUSION_INPUTS,
        "kMaxDetections": MAX_DETECTIONS,
        "kMaxKeptInBlock": MAX_KEPT_IN_BLOCK,
    }
    texts = [f"{each.__name__}({', '.join(in_cpp(member.name) for member in each)})" for each in choices]
    return texts + [f"{name}({value})" for name, value in limits.items()]


def difference(theirs: str) -> str | None:
    """How a library's choices and limits differ from this package's, in words; None where they are equal."""
    ours, others = told(), re.findall(r"\w+\([^)]*\)", theirs)
    if not others:
        return "it does not say what its numbers mean"
    foreign = [each for each in others if each not in ours]
    lacking = [each for each in ours if each not in others]
    if not foreign and not lacking:
        return None
    return f"it has {', '.join(foreign) or 'nothing'} where the package has {', '.join(lacking) or 'nothing'}"
