"""Gradients have their parameters' strides, also along sizes of 1, or else DistributedDataParallel warns."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from effdet_fast import nn, ops

MAP = (2, 8, 9, 9)


class Fusion(nn.WeightedFusion):
    def forward(self, x):
        return super().forward([x, x])


class Levels(nn.DepthwiseConv2d):
    def forward(self, x):
        return sum(y.sum() for y in super().forward([x, x[:, :, :4, :5]]))


MODULES = {
    "depthwise 3x3": lambda: nn.DepthwiseConv2d(8, 3, padding=1, prologue="silu"),
    "depthwise 5x5": lambda: nn.DepthwiseConv2d(8, 5, 2, "same", bias=False),
    "depthwise 7x7": lambda: nn.DepthwiseConv2d(8, 7, padding=3),
    "depthwise dilated": lambda: nn.DepthwiseConv2d(8, 3, dilation=2),
    "separable": lambda: nn.SeparableConv2d(8, 6),
    "levels": lambda: Levels(8, 3, padding="same"),
    "squeeze_excite": lambda: nn.SqueezeExcite(8, 3),
    "squeeze_excite to one": lambda: nn.SqueezeExcite(8, 1),
    "batch_norm": lambda: nn.BatchNormAct2d(8, activation="silu"),
    "fusion": lambda: Fusion(2),
}
modules = pytest.mark.parametrize("name", MODULES)
layouts = pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])


def module_and_input(name, layout, dtype=torch.float32):
    module = MODULES[name]().to(dtype=dtype, memory_format=layout)
    return module, torch.randn(MAP, dtype=dtype).contiguous(memory_format=layout)


def assert_same_strides(module):
    strides = {name: parameter.stride() for name, parameter in module.named_parameters()}
    assert {name: parameter.grad.stride() for name, parameter in module.named_parameters()} == strides and strides


@modules
@layouts
def test_gradients_have_the_strides_of_their_parameters(name, layout, backend):
    module, x = module_and_input(name, layout)
    module, x = module.to(backend.device), x.to(backend.device)
    for _ in range(2):  # the second is added to the first
        module(x).sum().backward()
        assert_same_strides(module)
    for parameter in module.parameters():
        parameter.grad.detach_().zero_()  # no view of anything


@pytest.mark.parametrize("name", ["depthwise 3x3", "depthwise 5x5", "levels", "squeeze_excite"])
def test_of_a_module_that_is_called_twice(name):
    module, x = module_and_input(name, torch.channels_last)
    (module(x).sum() + module(x).sum()).backward()
    assert_same_strides(module)


@modules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reference", [False, True])
def test_of_other_dtypes(name, dtype, reference):
    module, x = module_and_input(name, torch.channels_last, dtype)
    if reference:
        with ops.use_reference():
            module(x).sum().backward()
    else:
        module(x).sum().backward()
    assert_same_strides(module)


@modules
@pytest.mark.parametrize("reference", [False, True])
def test_under_autocast(name, reference):
    module, x = module_and_input(name, torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        if reference:
            with ops.use_reference():
                y = module(x)
        else:
            y = module(x)
    y.float().sum().backward()
    assert_same_strides(module)


@modules
@pytest.mark.compiles
def test_compiled(name):
    module, x = module_and_input(name, torch.channels_last)
    torch.compile(module, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert_same_strides(module)


class Copies(TorchDispatchMode):
    """The shapes of what is copied."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::clone", "aten::copy_", "aten::_to_copy", "aten::contiguous"):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["depthwise 3x3", "depthwise 5x5", "separable", "levels", "squeeze_excite"])
def test_no_gradient_is_copied(name):
    module, x = module_and_input(name, torch.channels_last)
    loss = module(x).sum()
    with Copies() as copies:
        loss.backward()
    assert not {tuple(parameter.shape) for parameter in module.parameters()} & set(copies.shapes)


class Unlike(torch.autograd.Function):
    """A gradient with other strides."""

    @staticmethod
    def forward(ctx, weight):
        return weight.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous().flatten().view(grad.shape)


@pytest.fixture
def warnings_of_ddp():
    """What `DistributedDataParallel` warns of in two steps of a module; one process is as good as several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)

    def steps(module, x):
        model = torch.nn.Sequential(torch.nn.BatchNorm2d(8), module)  # its broadcast cannot send one parameter alone
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                parallel(x).sum().backward()
        return [str(each.message) for each in seen if "strides" in str(each.message)]

    yield steps
    torch.set_warn_always(always)
    dist.destroy_process_group()


def test_ddp_has_nothing_to_warn_of(warnings_of_ddp):
    for name in MODULES:
        assert not warnings_of_ddp(*module_and_input(name, torch.channels_last)), name
        with ops.use_reference():
            assert not warnings_of_ddp(*module_and_input(name, torch.channels_last)), name


def test_ddp_would_warn(warnings_of_ddp):
    class Model(nn.DepthwiseConv2d):
        def forward(self, x):
            return ops.depthwise_conv2d(x, Unlike.apply(self.weight))

    module = Model(8, 3, bias=False).to(memory_format=torch.channels_last)
    assert "Grad strides do not match" in warnings_of_ddp(module, torch.randn(MAP))[0]
