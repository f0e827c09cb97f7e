"""Accelerated models of timm give the original's outputs, gradients and statistics."""

import copy
import functools

import pytest
import timm
import torch

import effdet_fast
from tests.checks import distance

QUICK = ["efficientnet_b0", "tf_efficientnet_lite0", "mobilenetv3_small_100"]
NAMES = [
    *(f"{prefix}efficientnet_b{size}" for prefix in ("", "tf_") for size in range(5)),
    *(f"{prefix}efficientnet_lite{size}" for prefix in ("", "tf_") for size in range(5)),
    *("efficientnetv2_s", "tf_efficientnetv2_s", "efficientnetv2_rw_s", "mobilenetv2_100"),
    *("mobilenetv3_large_100", "mobilenetv3_small_100", "tf_mobilenetv3_large_100", "tf_mobilenetv3_small_100"),
]
MODELS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in QUICK)]
DROPPING = {"drop_rate": 0.3, "drop_path_rate": 0.3}


@functools.cache
def _cached(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **DROPPING)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.8, 1.2)
            norm.bias.normal_(0, 0.1)
            norm.momentum = 1.0
        model.train()(images(8))  # statistics that fit, or else activations explode in eval mode
    for norm in norms:
        norm.momentum = 0.1
    return model


def plain_model(name):
    return copy.deepcopy(_cached(name))


def accelerated(model):
    model = copy.deepcopy(model)
    effdet_fast.accelerate(model)
    return model


def images(batch=4):
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def run(model, training, dtype):
    """Outputs, gradients, buffers; which samples and values are dropped is always the same."""
    model = copy.deepcopy(model).to(dtype).train(training)
    torch.manual_seed(2)
    outputs = model(images().to(dtype))
    outputs.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"outputs": outputs.detach()}, gradients, dict(model.named_buffers())


def rounded(model, seed):
    """A copy whose weights are off by float32's round-off; the model itself for seed 0."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters() if seed else ():
            parameter.mul_(1 + 2**-24 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_outputs_gradients_and_statistics_stay(name, training, one_thread):
    """They are equal in float64; in float32 they are as near to that as the original's. With dropout and drop path.

    Rounding decides on which side of a ReLU's kink a value falls, which moves gradients by up to a hundredth, in either model.
    """
    plain = plain_model(name)
    model = accelerated(plain)
    exact = run(plain, training, torch.float64)
    for ours, truth in zip(run(model, training, torch.float64), exact, strict=True):
        assert distance(ours, truth) < 1e-9
    single = run(model, training, torch.float32)
    # The error of a single run is a draw that varies threefold; round-off in the weights draws again.
    originals = [run(rounded(plain, seed), training, torch.float32) for seed in range(4)]
    kinks = 0.02 if "lite" in name or "mobilenet" in name else 1e-6
    for ours, truth, slack, *theirs in zip(single, exact, (1e-6, kinks, 1e-6), *originals, strict=True):
        assert distance(ours, truth) <= 2 * max(distance(each, truth) for each in theirs) + slack


@pytest.mark.parametrize("name", MODELS)
def test_every_candidate_is_swapped_or_has_a_known_reason(name):
    report = effdet_fast.accelerate(plain_model(name))
    families = {"batch_norm_act", "depthwise_conv"}
    if "lite" not in name and "mobilenet" not in name:
        families.add("squeeze_excite")
    assert {row.family for row in report.swapped} == families
    reasons = {row.reason for row in report.left_alone}
    assert reasons == ({"activation Hardswish", "gate Hardsigmoid"} if "mobilenetv3" in name else set())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_no_graph_breaks(name, training):
    model = accelerated(plain_model(name)).train(training)
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(model)(images())
    assert (explanation.graph_break_count, explanation.graph_count) == (0, 1), explanation.break_reasons


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_compiled_it_gives_the_same(name):
    """Equal in float64; in float32, which leaves three to five digits of a gradient, as near to that as the original."""
    plain = plain_model(name)
    plain.drop_rate = 0.0
    for module in plain.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    torch._dynamo.reset()

    def results(model, dtype=torch.float32):
        outputs = model.train()(images().to(dtype))
        outputs.square().mean().backward()
        return {"outputs": outputs.detach()}, {"gradient": model.get_parameter("conv_stem.weight").grad}

    exact = results(copy.deepcopy(plain).double(), torch.float64)
    double = results(torch.compile(accelerated(plain).double(), fullgraph=True), torch.float64)
    originals = [results(rounded(plain, seed)) for seed in range(4)]
    single = results(torch.compile(accelerated(plain), fullgraph=True))
    for truth, ours, rounded_ours, *theirs in zip(exact, double, single, *originals, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-4)
        assert distance(ours, truth) < 1e-7  # torch.compile puts the gradient of PyTorch's own Hardswish off by 7e-9
        assert distance(rounded_ours, truth) <= 2 * max(distance(each, truth) for each in theirs) + 1e-6


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_100", *(pytest.param(n, marks=pytest.mark.slow) for n in QUICK[:2])]
)
def test_bfloat16_autocast_and_channels_last(name):
    """No further from float64 than twice the original's error."""
    plain = plain_model(name).eval()
    with torch.no_grad():
        exact = plain_model(name).double().eval()(images().double())
    errors = []
    for model in (accelerated(plain), plain):
        model = model.to(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs = model(images().to(memory_format=torch.channels_last))
        assert outputs.dtype == torch.bfloat16
        errors.append(float((outputs.double() - exact).norm() / exact.norm()))
    assert errors[0] <= 2 * errors[1] + 2**-9
