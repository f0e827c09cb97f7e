"""Calls of the raw operators as the public functions make them, on random tensors of a few elements."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from effdet_fast import random_calls
from effdet_fast.random_calls import Call, Draw
from effdet_fast.self_tests import results_of

RawCall = tuple[torch._ops.OpOverload, tuple]


class Recorder(TorchDispatchMode):
    """Keeps the calls of our raw operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[RawCall] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "effdet_fast":
            self.calls.append((func, tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)))
        return func(*args, **(kwargs or {}))


def valid_calls(rng: random.Random, dtypes: list[torch.dtype]) -> list[RawCall]:
    """Of every op some, with sizes and options from `rng`."""
    with Recorder() as recorder:
        for make in MAKERS:
            for call in make(AnySize(rng, dtypes)):
                results_of(call)
    return recorder.calls


class AnySize(Draw):
    """Of one of the dtypes, with maps of either layout; sizes and options come from `rng`."""

    def __init__(self, rng: random.Random, dtypes: list[torch.dtype]):
        generator = torch.Generator().manual_seed(rng.getrandbits(31))
        super().__init__(dtype=rng.choice(dtypes), generator=generator)
        self.one_of = rng.choice

    def map(self, *shape: int, **options: Any) -> Tensor:
        self.channels_last = self.one_of((False, True))
        return super().map(*shape, **options)

    def size(self, *choices: int) -> int:
        return self.one_of(choices or (1, 2, 3, 4, 5, 8, 11))

    def pyramid(self) -> list[tuple[int, int]]:
        return [(self.size(), self.size()) for _ in range(self.size(1, 2))]

    def activation(self) -> str | None:
        return self.one_of((None, "silu", "relu", "relu6"))

    def yes(self) -> bool:
        return self.one_of((False, True))


def focal_losses(draw: AnySize) -> list[Call]:
    shape = [draw.size() for _ in range(draw.size(1, 2, 4))]
    weight = draw.uniform(shape[-1]) if draw.yes() else None
    options = {"soft": draw.yes(), "gamma": draw.one_of((0.0, 1.5, 2.0, 3.0)), "class_weight": weight}
    return [random_calls.focal_loss(draw, *shape, reduction=reduction, **options) for reduction in ("none", "sum")]


def detection_losses(draw: AnySize) -> list[Call]:
    classes = draw.size(1, 3, 4, 9)
    options = {
        "box_loss": draw.one_of(("huber", "l1", "smooth_l1", "giou")),
        "normalizer": draw.one_of(("batch", "per_image")),
        "class_weight": draw.uniform(classes) if draw.yes() else None,
    }
    sizes = {"images": draw.size(1, 2), "per_cell": draw.size(1, 3), "classes": classes}
    return [random_calls.detection_loss(draw, draw.pyramid(), **sizes, **options)]


def fusions(draw: AnySize) -> list[Call]:
    resample = [draw.one_of(("none", "nearest", "max_pool")) for _ in range(draw.size(2, 3))]
    size, nearest = (draw.size(), draw.size()), (draw.size(), draw.size())
    options = {"method": draw.one_of(("fast", "softmax", "sum")), "activation": draw.activation()}
    sizes = {"images": draw.size(1, 2), "channels": draw.size(), "nearest": nearest}
    return [random_calls.fusion(draw, resample, size, **sizes, **options)]


def depthwise_convs(draw: AnySize) -> list[Call]:
    kernel, height, width = draw.size(3, 5), draw.size(), draw.size()
    padding = draw.one_of(("same", kernel // 2, (kernel, 0, 1, kernel)))
    padding = "same" if min(height, width) < kernel else padding
    options = {"bias": draw.yes(), "stride": draw.size(1, 2), "padding": padding, "prologue": draw.activation()}
    return [random_calls.depthwise_conv(draw, draw.size(1, 2), draw.size(), height, width, kernel=kernel, **options)]


def depthwise_convs_of_levels(draw: AnySize) -> list[Call]:
    sizes = [(draw.size(1, 2), draw.size(), draw.size()) for _ in range(draw.size(1, 2, 3))]
    options = {"bias": draw.yes(), "stride": draw.size(1, 2), "padding": "same", "prologue": draw.activation()}
    return [random_calls.depthwise_conv_levels(draw, sizes, draw.size(), draw.size(3, 5), **options)]


def of_parameters_alone(call: Call) -> Call:
    """The first tensor wants no gradient."""
    x, *parameters = call.differentiable
    count = len(parameters)
    return Call(lambda *t: call.function(t[count], *t[:count], *t[count + 1 :]), tuple(parameters), (x, *call.others))


def batch_norms(draw: AnySize) -> list[Call]:
    shape, calls = (draw.size(2, 3), draw.size(), draw.size(), draw.size()), []
    for training in (True, False):
        options = {"training": training, "activation": draw.activation()}
        calls.append(random_calls.batch_norm(draw, *shape, weight=draw.yes(), bias=draw.yes(), **options))
        calls.append(of_parameters_alone(random_calls.batch_norm(draw, *shape, **options)))
    stats = torch.ops.effdet_fast.batch_norm_stats
    return [*calls, Call(lambda x: stats(x, not x.is_contiguous()), (), (draw.map(*shape),))]


def excitations(draw: AnySize) -> list[Call]:
    shape = draw.size(1, 2), draw.size(), draw.size(), draw.size()
    return [random_calls.squeeze_excite(draw, *shape, squeezed=draw.size(), biases=(draw.yes(), draw.yes()))]


def suppressions(draw: AnySize) -> list[Call]:
    images, count, max_kept = draw.size(1, 2), draw.size(1, 7, 40), draw.size()
    single = random_calls.nms(draw, count)
    boxes, labels = single.others[0], draw.integers(0, 3, 2, count).sort(1).values
    raw = Call(lambda b, k: torch.ops.effdet_fast.nms(b, k, 0.3, max_kept), (), (torch.stack([boxes, boxes]), labels))
    options = {"max_detections": draw.size(1, 5, 60), "score_threshold": draw.one_of((None, 0.3))}
    methods = ("hard", "gaussian", "linear")
    return [single, raw, *(random_calls.nms_padded(draw, images, count, method=m, **options) for m in methods)]


def matches(draw: AnySize) -> list[Call]:
    force = draw.one_of(((True, False), (False, True), (False, False)))
    options = {"pos_iou": 0.5, "neg_iou": 0.4, "force_match": force[0], "allow_low_quality_matches": force[1]}
    options |= {"box_coder": draw.one_of((None, "effdet", "torchvision")), "counted": draw.yes()}
    return [random_calls.match_anchors(draw, draw.size(1, 33, 300), draw.size(1, 2), draw.size(1, 5, 40), **options)]


def decodings(draw: AnySize) -> list[Call]:
    options = {"max_candidates": draw.size(1, 20, 5000), "box_coder": draw.one_of(("effdet", "torchvision"))}
    sizes = {"images": draw.size(1, 2), "per_cell": draw.size(1, 3), "classes": draw.size(1, 4)}
    return [random_calls.decode_detections(draw, draw.pyramid(), **sizes, clipped=draw.yes(), **options)]


MAKERS: tuple[Callable[[AnySize], list[Call]], ...] = (
    focal_losses, detection_losses, fusions, depthwise_convs, depthwise_convs_of_levels, batch_norms, excitations,
    suppressions, matches, decodings,
)  # fmt: skip
