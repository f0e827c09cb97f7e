"""Calls of the raw operators as the public functions make them, on random tensors of a few elements."""

import random

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from effdet_fast import ops

Call = tuple[torch._ops.OpOverload, tuple]


class Recorder(TorchDispatchMode):
    """Keeps the calls of our raw operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "effdet_fast":
            self.calls.append((func, tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)))
        return func(*args, **(kwargs or {}))


class Valid:
    """Valid calls of the public functions, on tensors of a few elements; the numbers come from `rng`."""

    def __init__(self, rng: random.Random, dtypes: list[torch.dtype]):
        self.rng, self.dtypes = rng, dtypes

    def record(self) -> list[Call]:
        makers = [
            self.focal_loss,
            self.detection_loss,
            self.fusion,
            self.depthwise_conv,
            self.depthwise_conv_levels,
            self.batch_norm,
            self.squeeze_excite,
            self.nms,
            self.nms_padded,
            self.match_anchors,
            self.decode,
        ]
        with Recorder() as recorder:
            for make in makers:
                self.dtype = self.rng.choice(self.dtypes)
                make()
        return recorder.calls

    def size(self, *choices: int) -> int:
        return self.rng.choice(choices or (1, 2, 3, 4, 5, 8, 11))

    def tensor(self, *sizes: int, grad: bool = True) -> Tensor:
        x = torch.randn(sizes).to(self.dtype)
        if len(sizes) == 4 and self.rng.random() < 0.5:
            x = x.to(memory_format=torch.channels_last)
        return x.requires_grad_(grad)

    def floats(self, *sizes: int) -> Tensor:
        return torch.rand(sizes, dtype=torch.float64 if self.dtype == torch.float64 else torch.float32)

    def boxes(self, *sizes: int) -> Tensor:
        start = torch.rand(*sizes, 2) * 20
        return torch.cat([start, start + torch.rand(*sizes, 2) * 10], -1)

    def activation(self) -> str | None:
        return self.rng.choice((None, "silu", "relu", "relu6"))

    def backward(self, y: Tensor, *inputs: Tensor | None) -> None:
        wanted = [x for x in inputs if x is not None]
        torch.autograd.grad(y, wanted, torch.randn_like(y), allow_unused=True)

    def focal_loss(self) -> None:
        sizes = [self.size() for _ in range(self.rng.choice((1, 2, 4)))]
        x = self.tensor(*sizes)
        soft = self.rng.random() < 0.5
        targets = torch.rand(sizes).to(self.dtype) if soft else torch.randint(-2, sizes[-1], sizes[:-1])
        weight = self.rng.choice((None, self.floats(sizes[-1])))
        options = {"gamma": self.rng.choice((0.0, 1.5, 2.0, 3.0)), "class_weight": weight}
        for reduction in ("none", "sum"):
            self.backward(ops.sigmoid_focal_loss(x, targets, reduction=reduction, **options), x)

    def detection_loss(self) -> None:
        images, per_cell, classes = self.size(1, 2), self.size(1, 3), self.size(1, 3, 4, 9)
        sizes = [(self.size(), self.size()) for _ in range(self.size(1, 2))]
        cls = [self.tensor(images, per_cell * classes, *size) for size in sizes]
        box = [self.tensor(images, per_cell * 4, *size) for size in sizes]
        anchors = per_cell * sum(h * w for h, w in sizes)
        labels = torch.randint(-2, classes, (images, anchors))
        codes = self.floats(images, anchors, 4)
        options = {
            "num_classes": classes,
            "box_loss": self.rng.choice(("huber", "l1", "smooth_l1", "giou")),
            "normalizer": self.rng.choice(("batch", "per_image")),
            "anchors": self.boxes(anchors).to(codes.dtype),
            "class_weight": self.rng.choice((None, self.floats(classes))),
        }
        total = ops.detection_loss(cls, box, labels, codes, (labels >= 0).sum(1).to(codes.dtype), **options).total
        for _ in range(2):  # hands its buffers out, then computes anew
            torch.autograd.grad(total, [*cls, *box], torch.tensor(0.5, dtype=total.dtype), retain_graph=True)

    def fusion(self) -> None:
        n, c, h, w = self.size(1, 2), self.size(), self.size(), self.size()
        resample = [self.rng.choice(("none", "nearest", "max_pool")) for _ in range(self.size(2, 3))]
        larger = {"none": (h, w), "nearest": (self.size(), self.size()), "max_pool": (2 * h, 2 * w - 1)}
        inputs = [self.tensor(n, c, *larger[how]) for how in resample]
        method = self.rng.choice(("fast", "softmax", "sum"))
        weights = None if method == "sum" else self.floats(len(inputs)).requires_grad_()
        options = {"method": method, "resample": resample, "size": (h, w), "activation": self.activation()}
        self.backward(ops.weighted_fusion(inputs, weights, **options), *inputs, weights)
        with torch.no_grad():
            ops.weighted_fusion(inputs, weights, **options)

    def depthwise_conv(self) -> None:
        c, k = self.size(), self.size(3, 5)
        x, weight = self.tensor(self.size(1, 2), c, self.size(), self.size()), self.tensor(c, 1, k, k)
        bias = self.rng.choice((None, self.tensor(c)))
        padding = self.rng.choice(("same", k // 2, (k, 0, 1, k)))
        padding = "same" if min(x.shape[2:]) < k else padding
        y = ops.depthwise_conv2d(x, weight, bias, self.size(1, 2), padding, prologue=self.activation())
        self.backward(y, x, weight, bias)

    def depthwise_conv_levels(self) -> None:
        c, k = self.size(), self.size(3, 5)
        xs = [self.tensor(self.size(1, 2), c, self.size(), self.size()) for _ in range(self.size(1, 3))]
        weight, bias = self.tensor(c, 1, k, k), self.rng.choice((None, self.tensor(c)))
        ys = ops.depthwise_conv2d_levels(xs, weight, bias, self.size(1, 2), "same", prologue=self.activation())
        self.backward(torch.cat([y.flatten() for y in ys]), *xs, weight, bias)

    def batch_norm(self) -> None:
        c = self.size()
        x = self.tensor(self.size(2, 3), c, self.size(), self.size())
        weight, bias = (self.rng.choice((None, self.floats(c).requires_grad_())) for _ in range(2))
        for training in (True, False):
            running = (self.floats(c), self.floats(c) + 0.1)
            options = {"training": training, "activation": self.activation()}
            self.backward(ops.batch_norm_act(x, *running, weight, bias, **options), x, weight, bias)
            ones = self.floats(c).requires_grad_()
            self.backward(ops.batch_norm_act(x.detach(), *running, ones, bias, **options), ones)
        channels_last = not x.is_contiguous()
        torch.ops.effdet_fast.batch_norm_stats(x.detach(), channels_last)

    def squeeze_excite(self) -> None:
        c, r = self.size(), self.size()
        x = self.tensor(self.size(1, 2), c, self.size(), self.size())
        weights = (self.floats(r, c, 1, 1), self.floats(r), self.floats(c, r, 1, 1), self.floats(c))
        reduce, reduce_bias, expand, expand_bias = (t.requires_grad_() for t in weights)
        reduce_bias, expand_bias = self.rng.choice((None, reduce_bias)), self.rng.choice((None, expand_bias))
        y = ops.squeeze_excite(x, reduce, reduce_bias, expand, expand_bias)
        self.backward(y, x, reduce, reduce_bias, expand, expand_bias)

    def nms(self) -> None:
        n = self.size(1, 7, 40)
        boxes = self.boxes(n).to(self.dtype)
        ops.nms(boxes, torch.rand(n).to(self.dtype), 0.5)
        labels = torch.randint(0, 3, (2, n)).sort(1).values
        torch.ops.effdet_fast.nms(torch.stack([boxes, boxes]), labels, 0.3, self.size())

    def nms_padded(self) -> None:
        batch, n = self.size(1, 2), self.size(1, 7, 40)
        problem = (
            self.boxes(batch, n).to(self.dtype),
            torch.rand(batch, n).to(self.dtype),
            torch.randint(-5, 5, (batch, n)),
        )
        options = {"max_detections": self.size(1, 5, 60), "score_threshold": self.rng.choice((None, 0.3))}
        for method in ("hard", "gaussian", "linear"):
            ops.batched_nms_padded(*problem, 0.4, method=method, **options)

    def match_anchors(self) -> None:
        batch, most, dtype = self.size(1, 2), self.size(1, 5, 40), self.floats(0).dtype
        labels = torch.randint(-1, 4, (batch, most))
        counts = self.rng.choice((None, torch.randint(0, most + 1, (batch,))))
        force = self.rng.choice(((True, False), (False, True), (False, False)))
        options = {"pos_iou": 0.5, "neg_iou": 0.4, "force_match": force[0], "allow_low_quality_matches": force[1]}
        coder = self.rng.choice((None, "effdet", "torchvision"))
        gt_boxes = self.boxes(batch, most).to(dtype) + 0.01
        ops.match_anchors(
            self.boxes(self.size(1, 33, 300)).to(dtype), gt_boxes, labels, counts, box_coder=coder, **options
        )

    def decode(self) -> None:
        images, per_cell, classes = self.size(1, 2), self.size(1, 3), self.size(1, 4)
        sizes = [(self.size(), self.size()) for _ in range(self.size(1, 2))]
        cls = [self.tensor(images, per_cell * classes, *size, grad=False) for size in sizes]
        box = [self.tensor(images, per_cell * 4, *size, grad=False) for size in sizes]
        anchors = self.boxes(per_cell * sum(h * w for h, w in sizes)).to(self.floats(0).dtype)
        clip = self.rng.choice((None, torch.full((images, 2), 16.0, dtype=anchors.dtype)))
        candidates, coder = self.size(1, 20, 5000), self.rng.choice(("effdet", "torchvision"))
        options = {"num_classes": classes, "max_candidates": candidates, "clip_sizes": clip, "box_coder": coder}
        ops.decode_detections(cls, box, anchors, **options)
