"""Ops on more than 2^31 elements: a pattern repeated until no int32 holds its indices gives the pattern's own result, repeated.

python -m tests.ops.huge_tensors BACKEND CASE runs one case, in a process of its own as it needs up to 15 GB.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from effdet_fast import ops
from effdet_fast.ops._layout import in_layout
from tests.conftest import enter

HALF = torch.bfloat16
BORDER = 2**31
PATTERN = (4, 64, 64, 64)  # images, each on its own
ROWS = (1, 64, 16, 1024)  # of one image
FEW = 4  # copies of the pattern in the problem that tells what to expect


def random_map(shape: tuple[int, ...], device: torch.device, channels_last: bool) -> Tensor:
    return in_layout(torch.randn(shape, device=device).to(HALF), channels_last)


def random_anchors(count: int, device: torch.device) -> Tensor:
    corner = torch.rand(count, 2, device=device) * 400
    return torch.cat([corner, corner + 60], 1)


def repeated(pattern: Tensor, copies: int, dim: int = 0) -> Tensor:
    """`copies` of the pattern one after the other, in its memory format."""
    order = [0, 2, 3, 1] if pattern.dim() == 4 and pattern.is_contiguous(memory_format=torch.channels_last) else None
    x = pattern if order is None else pattern.permute(order)
    where = dim if order is None else order.index(dim)
    x = x.repeat([copies if d == where else 1 for d in range(x.dim())])
    return x if order is None else x.permute(0, 3, 1, 2)


def assert_repeats(large: Tensor, few: Tensor, dim: int = 0, close: bool = False) -> None:
    """The first and the last block of `large` are those of `few`, and all between are as the second of `few`."""
    size = few.shape[dim] // FEW
    blocks, expected = large.split(size, dim), few.split(size, dim)
    for i, block in enumerate(blocks):
        other = expected[0] if i == 0 else expected[-1] if i == len(blocks) - 1 else expected[1]
        if close:  # but for a rounding: sums over more elements are not the same to the last bit
            same = torch.allclose(block, other, rtol=2**-7, atol=2**-10)
        else:
            same = torch.equal(block, other)
        assert same, f"block {i} of {len(blocks)} differs"


def assert_proportional(large: Tensor, few: Tensor, copies: int) -> None:
    """A parameter's gradient is that of one copy, many times; but for the image's borders, where copies meet."""
    expected = few.double() * (copies / FEW)
    torch.testing.assert_close(large.double(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


def copies_of(pattern: tuple[int, ...]) -> int:
    return BORDER // torch.Size(pattern).numel() + 1


def on_maps(
    run: Callable[..., Tensor],
    parameters: list[Tensor],
    *,
    channels_last: bool,
    shape: tuple[int, ...] = PATTERN,
    dim: int = 0,
    close: bool = False,
) -> None:
    """`run(x, *parameters)` and the gradients; x itself is the upstream gradient too, thinned out to the output's shape."""
    pattern = random_map(shape, parameters[0].device, channels_last)
    copies = copies_of(shape)
    results = []
    for count in (FEW, copies):
        x = repeated(pattern, count, dim)
        leaves = [p.detach().requires_grad_() for p in (x, *parameters)]
        y = run(*leaves)
        step = x.shape[2] // y.shape[2]
        upstream = in_layout(x[:, :, ::step, ::step], channels_last)
        grads = torch.autograd.grad(y, leaves, upstream)
        results.append((y.detach(), grads))
        del x, y, leaves, upstream
    (few, few_grads), (large, large_grads) = results
    assert large_grads[0].numel() > BORDER
    assert_repeats(large, few, dim, close)
    assert_repeats(large_grads[0], few_grads[0], dim, close)
    for ours, expected in zip(large_grads[1:], few_grads[1:], strict=True):
        assert_proportional(ours, expected, copies)


def depthwise_conv(device: torch.device, **options) -> None:
    filters = torch.randn(64, 1, 3, 3, device=device).to(HALF)
    on_maps(lambda x, weight: ops.depthwise_conv2d(x, weight, padding=1), [filters], **options)


def depthwise_conv_levels(device: torch.device, **options) -> None:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        return ops.depthwise_conv2d_levels([x.detach()[:1, :, :8, :8], x], weight, padding=1)[1]

    on_maps(run, [torch.randn(64, 1, 3, 3, device=device).to(HALF)], **options)


def batch_norm_act(device: torch.device, **options) -> None:
    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.batch_norm_act(x, None, None, weight, bias, True, activation="silu")

    parameters = [torch.linspace(0.5, 2, 64, device=device), torch.linspace(-1, 1, 64, device=device)]
    on_maps(run, parameters, close=True, **options)


def squeeze_excite(device: torch.device, **options) -> None:
    shapes = (4, 64, 1, 1), (4,), (64, 4, 1, 1), (64,)
    parameters = [torch.randn(shape, device=device).to(HALF) for shape in shapes]
    on_maps(ops.squeeze_excite, parameters, close=True, **options)


def fusion_nearest(device: torch.device, **options) -> None:
    def run(x: Tensor, weights: Tensor) -> Tensor:
        inputs = [x, x.detach()[:, :, ::2, ::2]]
        return ops.weighted_fusion(inputs, weights, resample=["none", "nearest"], activation="silu")

    on_maps(run, [torch.tensor([0.5, 1.0], device=device)], **options)


def fusion_max_pool(device: torch.device, **options) -> None:
    def run(x: Tensor, weights: Tensor) -> Tensor:
        inputs = [x.detach()[:, :, ::2, ::2], x]
        return ops.weighted_fusion(inputs, weights, resample=["none", "max_pool"], activation="silu")

    on_maps(run, [torch.tensor([0.5, 1.0], device=device)], **options)


def focal_loss(device: torch.device) -> None:
    pattern, labels = torch.randn(8192, 90, device=device).to(HALF), torch.randint(-2, 90, (8192,), device=device)
    copies, results = copies_of(pattern.shape), []
    for count in (FEW, copies):
        x = repeated(pattern, count).requires_grad_()
        loss = ops.sigmoid_focal_loss(x, repeated(labels, count), reduction="sum")
        results.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    (few, few_grad), (large, large_grad) = results
    torch.testing.assert_close(large, few * (copies / FEW), rtol=2**-7, atol=0)
    assert_repeats(large_grad, few_grad)


def detection_loss(device: torch.device, *, channels_last: bool) -> None:
    pattern, deltas = (random_map((16, 9 * n, 16, 16), device, channels_last) for n in (90, 4))
    labels = torch.randint(-2, 90, (16, 2304), device=device)
    targets = torch.randn(16, 2304, 4, device=device)
    copies, results = copies_of(pattern.shape), []
    for count in (FEW, copies):
        cls, box = repeated(pattern, count).requires_grad_(), repeated(deltas, count).requires_grad_()
        given = repeated(labels, count), repeated(targets, count), torch.tensor(1e3, device=device)
        loss = ops.detection_loss([cls], [box], *given, num_classes=90).total
        results.append((loss.detach(), torch.autograd.grad(loss, [cls, box])))
        del cls, box
    (few, few_grads), (large, large_grads) = results
    torch.testing.assert_close(large, few * (copies / FEW), rtol=1e-4, atol=0)
    for ours, expected in zip(large_grads, few_grads, strict=True):
        assert_repeats(ours, expected)


def match_anchors(device: torch.device) -> None:
    anchors = random_anchors(49104, device)
    boxes, labels = anchors[:12].view(4, 3, 4) + 3, torch.randint(0, 90, (4, 3), device=device)
    copies = copies_of((4, 49104, 4))
    few, large = (ops.match_anchors(anchors, repeated(boxes, n), repeated(labels, n)) for n in (FEW, copies))
    assert large.boxes.numel() > BORDER
    for ours, expected in zip(large, few, strict=True):
        assert_repeats(ours, expected)


def decode_detections(device: torch.device, *, channels_last: bool) -> None:
    heads = [random_map((16, 9 * n, 16, 16), device, channels_last) for n in (90, 4)]
    anchors = random_anchors(2304, device)
    few, large = (
        ops.decode_detections(*([repeated(x, n)] for x in heads), anchors, num_classes=90, max_candidates=500)
        for n in (FEW, copies_of(heads[0].shape))
    )
    for ours, expected in zip(large, few, strict=True):
        assert_repeats(ours, expected)


def decode_detections_of_one_image(device: torch.device, *, channels_last: bool) -> None:
    side = 1632
    cls = torch.full((1, 810, side, side), -4.0, dtype=HALF, device=device)
    box = torch.zeros(1, 36, side, side, dtype=HALF, device=device)
    if channels_last:
        cls, box = (x.view(1, side, side, -1).permute(0, 3, 1, 2) for x in (cls, box))
    assert cls.numel() > BORDER
    cls[0, 8 * 90 + 89, -1, -1] = 3.0
    cls[0, 5, 0, 1] = 2.0
    corner = torch.arange(9 * side * side, device=device).float()[:, None].expand(-1, 2)
    got = ops.decode_detections([cls], [box], torch.cat([corner, corner + 1], 1), num_classes=90, max_candidates=2)
    assert got.indices[0, :2].tolist() == [9 * side * side - 1, 9] and got.labels[0, :2].tolist() == [89, 5]


def batched_nms(device: torch.device) -> None:
    corner = (torch.rand(8, 1000, 2, device=device) * 60).round()
    boxes = torch.cat([corner, corner + 20], 2).to(HALF)
    scores, labels = torch.rand(8, 1000, device=device).to(HALF), torch.randint(0, 5, (8, 1000), device=device)
    few, large = (
        ops.batched_nms_padded(*(repeated(x, n) for x in (boxes, scores, labels)), 0.5, max_detections=10)
        for n in (FEW, copies_of(boxes.shape))
    )
    for ours, expected in zip(large, few, strict=True):
        assert_repeats(ours, expected)


LAYOUTS = {"NCHW": False, "channels_last": True}
LONG = {"shape": ROWS, "dim": 2}
CASES: dict[str, Callable[[torch.device], None]] = {
    "focal_loss": focal_loss,
    "match_anchors": match_anchors,
    "batched_nms": batched_nms,
}
for layout, channels_last in LAYOUTS.items():
    for case in (
        depthwise_conv,
        depthwise_conv_levels,
        batch_norm_act,
        squeeze_excite,
        fusion_nearest,
        fusion_max_pool,
    ):
        CASES[f"{case.__name__} {layout}"] = partial(case, channels_last=channels_last)
        CASES[f"{case.__name__} {layout}, one image"] = partial(case, channels_last=channels_last, **LONG)
    for case in (detection_loss, decode_detections, decode_detections_of_one_image):
        CASES[f"{case.__name__} {layout}"] = partial(case, channels_last=channels_last)


if __name__ == "__main__":
    for backend in enter(sys.argv[1]):
        torch.manual_seed(0)
        CASES[sys.argv[2]](backend.device)
