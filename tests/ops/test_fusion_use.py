"""Weighted fusion in use: layouts, autocast, torch.compile, gradients wanted, determinism, empty and bad input, the module."""

import pytest
import torch

from effdet_fast.nn import WeightedFusion
from effdet_fast.ops import fast_normalized_fusion, weighted_fusion, weighted_fusion_reference
from tests.checks import all_equal, assert_same_in_any_order, assert_same_in_every_run, random_map, with_gradients
from tests.ops.test_fusion import CASES, make

LAST = torch.channels_last


def test_result_has_the_layout_of_the_first_input(backend):
    xs, weights, grad, options = make("bottom up", 8, torch.float32, backend.device)
    expected = weighted_fusion_reference(xs, weights, **options)
    last = [x.to(memory_format=LAST) for x in xs]
    for mixed, is_last in (([last[0], xs[1], xs[2]], True), ([xs[0], last[1], last[2]], False)):
        results = with_gradients(weighted_fusion, (mixed, weights), grad=grad.to(memory_format=LAST), **options)
        assert results[0].is_contiguous(memory_format=LAST if is_last else torch.contiguous_format)
        torch.testing.assert_close(results[0], expected)
        for mine, other in zip(
            results, with_gradients(weighted_fusion, (xs, weights), grad=grad, **options), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (2, 1, 3, 5), (1, 1, 1, 1), (3, 4, 1, 6)], ids=str)
@pytest.mark.parametrize("memory_format", [LAST, torch.contiguous_format], ids=str)
def test_strides_where_both_layouts_are_contiguous(native_backend, shape, memory_format):
    xs = [torch.empty(shape, device=native_backend.device, memory_format=memory_format).normal_() for _ in range(2)]
    out = weighted_fusion(xs, method="sum")
    torch.testing.assert_close(out, xs[0] + xs[1])
    assert out.stride() == xs[0].stride()


def test_any_strides(backend):
    big = torch.randn(2, 12, 7, 9, device=backend.device, dtype=torch.float64)
    views = [
        big[:, 2:10],
        big.to(memory_format=LAST)[:, 2:10],
        big[:, 2:10].transpose(2, 3).contiguous().transpose(2, 3),
        big[:, 2:10].flip(3),
        big[:1, :1, :1, :1].expand(2, 8, 7, 9),
        big.repeat(1, 1, 2, 2)[:, :8, ::2, ::2],
    ]
    weights = torch.tensor([1.0, 0.5], device=backend.device, dtype=torch.float64)
    grad = big[:1, :1, :1, :1].expand(2, 8, 7, 9)
    for x in views:
        ours = with_gradients(weighted_fusion, ([x, views[0]], weights), grad=grad, activation="silu")
        plain = with_gradients(
            weighted_fusion, ([x.contiguous(), views[0].contiguous()], weights), grad=grad, activation="silu"
        )
        for mine, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    assert weighted_fusion(views[1:3], weights).is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("case", ["top down", "bottom up", "two sizes of nearest"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_only_where_wanted(native_backend, case, activation):
    xs, weights, grad, options = make(case, 8, torch.float32, native_backend.device)
    options["activation"] = activation
    everything = with_gradients(weighted_fusion, (xs, weights), grad=grad, **options)[1:]
    for wanted in range(1, 2 ** (len(xs) + 1)):
        leaves = [x.detach().requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate([*xs, weights])]
        out = weighted_fusion(leaves[:-1], leaves[-1], **options)
        out.backward(grad)
        for leaf, expected in zip(leaves, everything, strict=True):
            assert (leaf.grad is None) == (not leaf.requires_grad)
            assert leaf.grad is None or torch.equal(leaf.grad, expected)
    with torch.no_grad():
        assert not weighted_fusion(leaves[:-1], leaves[-1], **options).requires_grad


def test_second_backward_gives_the_same(native_backend):
    xs, weights, grad, options = make("bottom up", 8, torch.float32, native_backend.device)
    leaves = [x.requires_grad_() for x in [*xs, weights]]
    out = weighted_fusion(xs, weights, activation="silu", **options)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    doubled = torch.autograd.grad(out, leaves, 2 * grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad)
    assert all_equal(first, second) and all_equal([2 * a for a in first], doubled)


@pytest.mark.parametrize("channels_last", [False, True])
def test_same_bits_every_time(native_backend, channels_last):
    small = native_backend.name == "emulated"
    size = 12 if small else 61
    sizes = [(size, size), (size // 2, size // 3), (2 * size, 2 * size - 1)]
    xs = [random_map((2, 16, *s), device=native_backend.device, channels_last=channels_last) for s in sizes]
    weights, grad = torch.tensor([1.0, 0.3, 0.7], device=native_backend.device), torch.randn_like(xs[0])
    options = {"resample": ("none", "nearest", "max_pool"), "activation": "silu"}
    run = lambda: with_gradients(weighted_fusion, (xs, weights), grad=grad, **options)  # noqa: E731
    assert_same_in_every_run(run, 4 if small else 20)


@pytest.mark.parametrize("case", ["top down", "two sizes of nearest"])
def test_any_order_of_threads(case):
    xs, weights, grad, options = make(case, 16, torch.float32, channels_last=True)
    options["activation"] = "silu"
    assert_same_in_any_order(lambda: with_gradients(weighted_fusion, (xs, weights), grad=grad, **options))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", ["top down", "bottom up, odd", "two sizes of nearest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device, case, channels_last, dtype):
    xs, weights, grad, options = make(case, 8, dtype, device, channels_last=channels_last)
    numbers = [{"none": 0, "nearest": 1, "max_pool": 2}[how] for how in options["resample"]]
    grad = grad.to(memory_format=LAST) if channels_last else grad
    raw = torch.ops.effdet_fast
    for method in (0, 1, 2):
        given = None if method == 2 else weights
        arguments = (xs, given, method, 1e-4, numbers, *options["size"], 1, channels_last)
        torch.library.opcheck(raw.fusion.default, arguments)
        torch.library.opcheck(raw.fusion_train.default, arguments)
        out, *kept = raw.fusion_train(*arguments)
        assert torch.equal(out, raw.fusion(*arguments)) and len(kept) == 2 * numbers.count(2)
        for needs in ([True] * len(xs) + [method != 2], [False, True] + [False] * (len(xs) - 1)):
            arguments = (grad, xs, kept, given, method, 1e-4, numbers, 1, channels_last, needs)
            torch.library.opcheck(raw.fusion_backward.default, arguments)


def test_raw_op_guards_itself():
    x = torch.zeros(1, 2, 4, 4)
    for xs, numbers, size in (
        ([x, x], [0, 0], (4, 5)),
        ([x, x.transpose(2, 3)], [0, 0], (4, 4)),
        ([x, x.double()], [0, 0], (4, 4)),
        ([x, x], [2, 0], (4, 4)),
        ([x, x], [0, 3], (4, 4)),
        ([x] * 5, [0] * 5, (4, 4)),
    ):
        with pytest.raises(RuntimeError, match="fusion: "):
            torch.ops.effdet_fast.fusion(xs, None, 2, 1e-4, numbers, *size, 0, False)
    small, taps = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2, dtype=torch.uint8)
    for kept in ([], [small], [small, small], [taps, taps], [x, taps], [small.double(), taps]):
        with pytest.raises(RuntimeError, match="fusion_backward: kept must be "):
            torch.ops.effdet_fast.fusion_backward(
                small, [small, x], kept, None, 2, 1e-4, [0, 2], 0, False, [True, True, False]
            )


@pytest.mark.compiles
@pytest.mark.parametrize("case", ["top down", "bottom up, odd"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_compiles_without_a_break(device, case, channels_last):
    xs, weights, grad, options = make(case, 4, torch.float32, device, channels_last=channels_last)

    def function(xs, weights, **options):
        return weighted_fusion(xs, weights, activation="silu", **options) * 2

    compiled = torch.compile(function, fullgraph=True)
    for mine, other in zip(
        with_gradients(compiled, (xs, weights), grad=grad, **options),
        with_gradients(function, (xs, weights), grad=grad, **options),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
        assert mine.stride() == other.stride()


@pytest.mark.compiles
def test_compiles_with_one_tensor_twice(device):
    x = torch.randn(1, 2, 3, 3, device=device, requires_grad=True)
    weights = torch.ones(2, device=device)
    y = torch.compile(weighted_fusion, backend="aot_eager", fullgraph=True)([x, x], weights)
    assert torch.equal(y, weighted_fusion([x, x], weights))
    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], torch.tensor(2 / 2.0001, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("half_input", [0, 1])
def test_autocast_promotes_to_the_widest(backend, dtype, half_input):
    xs, weights, grad, options = make("top down", 8, torch.float32, backend.device, channels_last=True)
    halves = [x.to(dtype) for x in xs]
    xs[half_input] = halves[half_input]
    with torch.autocast(backend.device.type, dtype):
        mixed = with_gradients(weighted_fusion, (xs, weights), grad=grad, activation="silu", **options)
        assert weighted_fusion(halves, weights, **options).dtype == dtype
    assert [x.dtype for x in mixed] == [torch.float32, *[x.dtype for x in xs], torch.float32]
    assert mixed[0].is_contiguous(memory_format=LAST)
    plain = with_gradients(weighted_fusion, ([x.float() for x in xs], weights), grad=grad, activation="silu", **options)
    assert torch.equal(mixed[0], plain[0])
    with pytest.raises(TypeError, match="weighted_fusion: inputs must have one dtype outside autocast, got "):
        weighted_fusion(xs, weights, **options)


def test_weights_of_another_dtype(backend):
    xs, weights, grad, options = make("top down", 8, torch.bfloat16, backend.device)
    results = with_gradients(weighted_fusion, (xs, weights.bfloat16()), grad=grad, **options)
    expected = with_gradients(weighted_fusion, (xs, weights.bfloat16().float()), grad=grad, **options)
    assert torch.equal(results[0], expected[0]) and torch.equal(results[-1], expected[-1].bfloat16())


@pytest.mark.parametrize("empty", ["batch", "channels", "size"])
@pytest.mark.parametrize("case", ["top down", "bottom up"])
def test_empty(backend, empty, case):
    resample, sizes, out = CASES[case]
    batch, channels = (0 if empty == "batch" else 2), (0 if empty == "channels" else 3)
    sizes = [(0, w) for _, w in sizes] if empty == "size" else sizes
    xs = [torch.randn(batch, channels, *size, device=backend.device) for size in sizes]
    weights = torch.ones(len(xs), device=backend.device)
    grad = torch.zeros(batch, channels, 0 if empty == "size" else out[0], out[1], device=backend.device)
    result, *grads = with_gradients(weighted_fusion, (xs, weights), grad=grad, resample=resample, activation="silu")
    assert result.shape == grad.shape and all(g.shape == x.shape for g, x in zip(grads, [*xs, weights], strict=True))
    assert not grads[-1].any()


X = torch.zeros(2, 3, 4, 5)
W = torch.ones(2)
SMALL, LARGE = torch.zeros(2, 3, 2, 3), torch.zeros(2, 3, 8, 10)
ERRORS = [
    (dict(inputs=X), TypeError, "inputs must be a list or tuple of tensors, got Tensor"),
    (dict(inputs=[X]), ValueError, "inputs must be 2 to 4 tensors, got 1"),
    (dict(inputs=[X] * 5), ValueError, "inputs must be 2 to 4 tensors, got 5"),
    (dict(inputs=[X, 1.0]), TypeError, r"inputs\[1\] must be a Tensor, got float"),
    (dict(inputs=[X, X.int()]), TypeError, r"inputs\[1\] must be float16, .* got int32"),
    (dict(inputs=[X, X.double()]), TypeError, "inputs must have one dtype outside autocast, got float32, float64"),
    (dict(inputs=[X, X[0]]), ValueError, r"inputs\[1\] must have shape \[N, C, H, W\], got \[3, 4, 5\]"),
    (
        dict(inputs=[X, X[:, :2]]),
        ValueError,
        r"inputs\[1\] must have shape \[2, 3, H, W\] .*, got \[2, 2, 4, 5\]",
    ),
    (dict(inputs=[X, X.to("meta")]), ValueError, r"inputs\[1\] must be on the device of inputs\[0\], cpu, got meta"),
    (dict(inputs=[X, SMALL]), ValueError, r"inputs\[1\] must fit the size \(4, 5\), got \[2, 3, 2, 3\] is \(2, 3\)"),
    (
        dict(inputs=[X, X], resample=("none", "max_pool")),
        ValueError,
        r"inputs\[1\] must fit the size \(4, 5\), got \[2, 3, 4, 5\] is \(2, 3\) after max_pool",
    ),
    (dict(size=(4, 4)), ValueError, r"inputs\[0\] must fit the size \(4, 4\), got"),
    (dict(size=4), TypeError, r"size must be a pair \(height, width\), got 4"),
    (dict(size=(4, -5)), ValueError, r"size must not be negative, got \(4, -5\)"),
    (dict(resample=("nearest", "nearest")), ValueError, "size must be given when every input has resample 'nearest'"),
    (
        dict(inputs=[X, X[:, :, :0]], resample=("none", "nearest")),
        ValueError,
        r"inputs\[1\] must not be empty to be resampled to \(4, 5\), got \[2, 3, 0, 5\]",
    ),
    (dict(resample="none"), TypeError, "resample must be a list or tuple of strings, got str"),
    (dict(resample=("none",)), ValueError, "resample must have one entry for each of the 2 inputs, got 1"),
    (dict(resample=("none", "linear")), ValueError, r"resample\[1\] must be one of 'none', .* got 'linear'"),
    (dict(method="mean"), ValueError, "method must be one of 'fast', 'softmax', 'sum', got 'mean'"),
    (dict(activation="gelu"), ValueError, "activation must be one of None, 'silu', 'relu', 'relu6', got 'gelu'"),
    (dict(eps=-1.0), ValueError, "eps must be >= 0, got -1.0"),
    (dict(eps=float("nan")), ValueError, "eps must be >= 0, got nan"),
    (dict(weights=None), TypeError, "weights must be a Tensor, got NoneType"),
    (dict(weights=torch.ones(3)), ValueError, r"weights must have shape \[2\], got \[3\]"),
    (dict(weights=torch.ones(2).long()), TypeError, "weights must be float16, .* got int64"),
    (dict(weights=W.to("meta")), ValueError, r"weights must be on the device of inputs, cpu, got meta"),
    (dict(method="sum"), ValueError, "weights must be None with method='sum', got Tensor"),
]


@pytest.mark.parametrize("change,error,message", ERRORS, ids=[m[:40] for _, _, m in ERRORS])
def test_bad_input(change, error, message):
    arguments = dict(inputs=[X, X], weights=W) | change
    with pytest.raises(error, match=f"weighted_fusion: {message}"):
        weighted_fusion(**arguments)
    if "method" not in change:
        with pytest.raises(error, match=f"fast_normalized_fusion: {message}"):
            fast_normalized_fusion(**arguments)


def test_raw_operators_refuse_one_input(native_backend):
    x, weights = torch.zeros(1, 8, 4, 4, device=native_backend.device), torch.ones(1, device=native_backend.device)
    ops, options = torch.ops.effdet_fast, (0, 1e-4, [0])  # method, eps, resample
    for forward in (ops.fusion, ops.fusion_train):
        with pytest.raises(RuntimeError, match="fusion: 2 to 4 inputs"):
            forward([x], weights, *options, 4, 4, 0, False)
    with pytest.raises(RuntimeError, match="fusion: 2 to 4 inputs"):
        ops.fusion_backward(x, [x], [], weights, *options, 0, False, [True, True])


@pytest.mark.parametrize("method", ["fast", "softmax", "sum"])
def test_module_is_the_function(method):
    xs, weights, _, options = make("bottom up", 4, torch.float32)
    module = WeightedFusion(3, method, options["resample"], "silu", eps=0.01)
    if method == "sum":
        assert module.edge_weights is None and not module.state_dict()
    else:
        assert torch.equal(module.edge_weights, torch.ones(3)) and list(module.state_dict()) == ["edge_weights"]
        module.load_state_dict({"edge_weights": weights})
    given = None if method == "sum" else weights
    expected = weighted_fusion(xs, given, method=method, activation="silu", eps=0.01, **options)
    assert torch.equal(module(xs), expected) and torch.equal(module(xs, options["size"]), expected)
    assert f"method={method!r}" in repr(module) and "max_pool" in repr(module)
    assert module.half()([x.half() for x in xs]).dtype == torch.float16


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((1,), "num_inputs must be 2 to 4, got 1"),
        ((2, "mean"), "method must be one of .* got 'mean'"),
        ((2, "fast", ("none",)), "resample must have 2 entries, got 1"),
        ((2, "fast", ("none", "up")), r"resample\[1\] must be one of .* got 'up'"),
        ((2, "fast", None, "gelu"), "activation must be one of .* got 'gelu'"),
        ((2, "fast", None, None, -1), "eps must be >= 0, got -1"),
    ],
)
def test_bad_module(arguments, message):
    with pytest.raises(ValueError, match=f"WeightedFusion: {message}"):
        WeightedFusion(*arguments)
