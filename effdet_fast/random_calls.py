"""Calls of every op with random tensors, of any sizes and options.

`Draw` says of which dtype, in which layout and on which device; a function for each op makes a call of it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effdet_fast import ops
from effdet_fast.ops._layout import in_layout


class Call(NamedTuple):
    """An op, the tensors that can have gradients, and the rest of its tensors."""

    function: Callable[..., Any]  # of all tensors
    differentiable: tuple[Tensor, ...] = ()
    others: tuple[Tensor, ...] = ()

    def __call__(self, *differentiable: Tensor) -> Any:
        return self.function(*differentiable, *self.others)


class Draw:
    """Random tensors, drawn on the CPU: every device gets the same."""

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        generator: torch.Generator | None = None,
    ):
        self.device, self.dtype, self.channels_last = device, dtype, channels_last
        self.generator = generator or torch.Generator().manual_seed(0)

    @property
    def wide(self) -> torch.dtype:
        """What an op of this dtype computes in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def layouts(self) -> tuple["Draw", "Draw"]:
        first, second = (Draw(self.device, self.dtype, last, self.generator) for last in (False, True))
        return first, second

    def map(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        x = (self.normal(*shape) * scale + mean).to(self.dtype)
        return in_layout(x, self.channels_last) if len(shape) == 4 else x

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=self.wide).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=self.wide).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def labels(self, classes: int, *shape: int) -> Tensor:
        """Half of them background, -1, and some to be ignored, -2."""
        some = self.integers(-2, classes, *shape)
        return some.where(self.uniform(*shape) < 0.5, -1)

    def boxes(self, *shape: int, extent: float = 40.0) -> Tensor:
        corner, side = extent * self.uniform(*shape, 2), 20 * self.uniform(*shape, 2)
        return torch.cat([corner, corner + 10 + side], -1)


def _call(function: Callable[..., Any], differentiable: Sequence[Tensor | None], *others: Tensor | None) -> Call:
    """Of a function that takes None in the places where there is no tensor."""
    there = [x is not None for x in (*differentiable, *others)]

    def filled(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return function(*(next(given) if each else None for each in there))

    first, rest = (tuple(x for x in given if x is not None) for given in (differentiable, others))
    return Call(filled if not all(there) else function, first, rest)


def focal_loss(draw: Draw, *shape: int, soft: bool = False, **options: Any) -> Call:
    """Of logits [..., classes]."""
    targets = draw.uniform(*shape).to(draw.dtype) if soft else draw.labels(shape[-1], *shape[:-1])
    return Call(lambda x, t: ops.sigmoid_focal_loss(x, t, **options), (draw.map(*shape),), (targets,))


def detection_loss(
    draw: Draw,
    sizes: Sequence[tuple[int, int]],
    images: int = 2,
    per_cell: int = 2,
    classes: int = 9,
    whole: bool = False,
    **options: Any,
) -> Call:
    """`whole` takes the three losses together, else there is a gradient from the total alone."""
    levels, count = len(sizes), per_cell * sum(h * w for h, w in sizes)
    outputs = [draw.map(images, per_cell * classes, *size) for size in sizes]
    outputs += [draw.map(images, per_cell * 4, *size, scale=0.3) for size in sizes]
    labels = draw.labels(classes, images, count)
    deltas, positives = draw.normal(images, count, 4) * 0.3, (labels >= 0).sum(1).to(draw.wide)

    def loss(*tensors: Tensor) -> Tensor:
        *outputs, labels, deltas, positives, anchors = tensors
        heads, given = (outputs[:levels], outputs[levels:]), {"num_classes": classes, "anchors": anchors, **options}
        losses = ops.detection_loss(*heads, labels, deltas, positives, **given)
        return losses.total + losses.cls + losses.box if whole else losses.total

    return Call(loss, tuple(outputs), (labels, deltas, positives, draw.boxes(count)))


def fusion(
    draw: Draw,
    resample: Sequence[str],
    size: tuple[int, int],
    images: int = 2,
    channels: int = 8,
    nearest: tuple[int, int] | None = None,
    method: str = "fast",
    **options: Any,
) -> Call:
    """`nearest` is the size of what is resampled so."""
    (h, w), count = size, len(resample)
    sizes = {"none": size, "nearest": nearest or ((h + 1) // 2, (w + 1) // 2), "max_pool": (2 * h, 2 * w - 1)}
    inputs = [draw.map(images, channels, *sizes[how]) for how in resample]
    options = {"resample": resample, "size": size, "method": method, **options}
    weights = None if method == "sum" else draw.uniform(count) + 0.1
    return _call(lambda *xs: ops.weighted_fusion(xs[:-1], xs[-1], **options), [*inputs, weights])


def _filters(draw: Draw, channels: int, kernel: int, bias: bool) -> list[Tensor | None]:
    return [draw.map(channels, 1, kernel, kernel), draw.map(channels) if bias else None]


def depthwise_conv(draw: Draw, *shape: int, kernel: int = 3, bias: bool = True, **options: Any) -> Call:
    inputs = [draw.map(*shape), *_filters(draw, shape[1], kernel, bias)]
    return _call(lambda *xs: ops.depthwise_conv2d(*xs, **options), inputs)


def depthwise_conv_levels(
    draw: Draw, sizes: Sequence[tuple[int, int, int]], channels: int, kernel: int = 3, bias: bool = True, **options: Any
) -> Call:
    """Of maps of the sizes (images, height, width); what they give, in a row."""

    def convolved(*tensors: Tensor) -> Tensor:
        *maps, weight, bias = tensors
        return torch.cat([y.flatten() for y in ops.depthwise_conv2d_levels(maps, weight, bias, **options)])

    maps = [draw.map(n, channels, h, w) for n, h, w in sizes]
    return _call(convolved, [*maps, *_filters(draw, channels, kernel, bias)])


def separable_conv(draw: Draw, *shape: int, outputs: int, **options: Any) -> Call:
    inputs = draw.map(*shape), draw.map(shape[1], 1, 3, 3), draw.map(outputs, shape[1], 1, 1)
    return Call(lambda x, d, p: ops.depthwise_separable_conv2d(x, d, p, **options), inputs)


def batch_norm(
    draw: Draw, *shape: int, training: bool = True, weight: bool = True, bias: bool = True, **options: Any
) -> Call:
    channels = shape[1]
    inputs = (
        draw.map(*shape, scale=2.0, mean=3.0),
        draw.normal(channels) if weight else None,
        draw.normal(channels) if bias else None,
    )
    running = draw.normal(channels), draw.uniform(channels) + 0.5
    options = {"training": training, **options}
    return _call(lambda x, w, b, mean, var: ops.batch_norm_act(x, mean, var, w, b, **options), inputs, *running)


def squeeze_excite(
    draw: Draw, *shape: int, squeezed: int, biases: tuple[bool, bool] = (True, True), **options: Any
) -> Call:
    channels = shape[1]
    reduce, expand = draw.normal(squeezed, channels, 1, 1), draw.normal(channels, squeezed, 1, 1)
    reduce_bias, expand_bias = (
        draw.normal(n) if there else None for n, there in zip((squeezed, channels), biases, strict=True)
    )
    inputs = draw.map(*shape, mean=0.5), reduce, reduce_bias, expand, expand_bias
    return _call(lambda *xs: ops.squeeze_excite(*xs, **options), inputs)


def _scored(draw: Draw, *shape: int, classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and classes. Of several images the last has its boxes apart and in one class: nearly all stay."""
    boxes, labels = draw.boxes(*shape, extent=100.0), draw.integers(0, classes, *shape)
    if len(shape) > 1:
        boxes[-1:] += 99 * boxes[-1:, :, :2].repeat(1, 1, 2)
        labels[-1:] = 0
    return boxes.to(draw.dtype), draw.uniform(*shape).to(draw.dtype), labels


def nms(draw: Draw, count: int) -> Call:
    return Call(lambda b, s: ops.nms(b, s, 0.5), (), _scored(draw, count)[:2])


def batched_nms(draw: Draw, count: int) -> Call:
    return Call(lambda b, s, k: ops.batched_nms(b, s, k, 0.5), (), _scored(draw, count))


def nms_padded(draw: Draw, images: int, count: int, classes: int = 3, **options: Any) -> Call:
    return Call(
        lambda b, s, k: ops.batched_nms_padded(b, s, k, 0.5, **options),
        (),
        _scored(draw, images, count, classes=classes),
    )


def soft_nms(draw: Draw, count: int, **options: Any) -> Call:
    return Call(lambda *t: ops.soft_nms(*t, **options), (), _scored(draw, count))


def match_anchors(draw: Draw, anchors: int, images: int, max_boxes: int, counted: bool = True, **options: Any) -> Call:
    """Objects that lie near an anchor each, padding among them."""
    given = draw.boxes(anchors)
    boxes = given[draw.integers(0, anchors, images, max_boxes)] + draw.normal(images, max_boxes, 4)
    labels, counts = (
        draw.integers(-1, 5, images, max_boxes),
        draw.integers(0, max_boxes + 1, images) if counted else None,
    )
    return _call(lambda *t: ops.match_anchors(*t, **options), [], given, boxes, labels, counts)


def decode_detections(
    draw: Draw,
    sizes: Sequence[tuple[int, int]],
    images: int = 2,
    per_cell: int = 2,
    classes: int = 4,
    clipped: bool = False,
    **options: Any,
) -> Call:
    """With coarse logits, some of which are equal."""
    levels = len(sizes)
    cls = [(draw.map(images, per_cell * classes, *size, scale=4.0).round() / 4) for size in sizes]
    box = [draw.map(images, per_cell * 4, *size, scale=0.3) for size in sizes]
    anchors = draw.boxes(per_cell * sum(h * w for h, w in sizes))
    clip = torch.full((images, 2), 40.0, dtype=draw.wide, device=draw.device) if clipped else None

    def decode(*tensors: Tensor) -> Any:
        *outputs, anchors, clip = tensors
        heads = outputs[:levels], outputs[levels:]
        return ops.decode_detections(*heads, anchors, num_classes=classes, clip_sizes=clip, **options)

    return _call(decode, [], *cls, *box, anchors, clip)
