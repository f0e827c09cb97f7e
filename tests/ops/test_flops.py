"""PyTorch's FLOP counter finds in our ops what it finds in the convolutions they replace, and nothing imports it unasked."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import effdet_fast
from effdet_fast import nn, ops
from effdet_fast.ops._flops import FORMULAS
from effdet_fast.ops._library import SCHEMAS
from tests.acceleration.effdet_benches import images, tiny

ROOT = Path(__file__).parents[2]


def flops(function, *inputs, backward):
    """The total, and the names of our ops that were counted."""
    with FlopCounterMode(display=False) as counter:
        outputs = function(*inputs)
        if backward:
            sum(x.sum() for x in tree_leaves(outputs)).backward()
    counted = {str(op) for op in counter.get_flop_counts()["Global"]}
    return counter.get_total_flops(), {op.removeprefix("effdet_fast.") for op in counted if "effdet_fast" in op}


def test_every_convolution_has_a_formula():
    assert set(FORMULAS) == {name for name in SCHEMAS if "conv" in name or "squeeze" in name}


FORWARD = {"depthwise_conv", "squeeze_excite"}
BACKWARD = {"depthwise_conv_grad_input", "depthwise_conv_grad_weight", "squeeze_excite_backward"}


@pytest.mark.parametrize("create", [lambda: timm.create_model("efficientnet_b0"), tiny])
def test_accelerated_models_count_as_before(create):
    plain, x = create(), images(2, (64, 64))
    model = copy.deepcopy(plain)
    effdet_fast.accelerate(model)
    for backward, names in ((False, FORWARD), (True, FORWARD | BACKWARD)):
        expected, _ = flops(plain, x, backward=backward)
        assert flops(model, x, backward=backward) == (expected, names) and expected > 0


def test_our_models_count_as_their_references():
    model, x = effdet_fast.create_model("efficientdet_d0", image_size=128), images(2, (128, 128))
    for backward in (False, True):
        total, names = flops(model, x, backward=backward)
        assert names == (set(FORMULAS) if backward else FORWARD | {"depthwise_conv_levels"})
        with ops.use_reference():
            assert flops(model, x, backward=backward) == (total, set())


@pytest.mark.parametrize("frozen", [(), ("weight",), ("x",), ("conv_reduce",), ("conv_expand",), ("conv_reduce", "x")])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", ["depthwise", "squeeze_excite"])
def test_gradients_that_nobody_needs_do_not_count(frozen, several, kind):
    if kind == "depthwise":
        module = nn.DepthwiseConv2d(8, 3, 2, "same", bias=False)
    else:
        module = nn.SqueezeExcite(8, 3)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.partition(".")[0] not in frozen)
    x = torch.randn(2, 8, 9, 7, requires_grad="x" not in frozen)
    inputs = [x, torch.randn(3, 8, 4, 4, requires_grad=True)] if several and kind == "depthwise" else x
    backward = any(x.requires_grad for x in (*tree_leaves(inputs), *module.parameters()))
    total, names = flops(module, inputs, backward=backward)
    assert names
    with ops.use_reference():
        assert flops(module, inputs, backward=backward) == (total, set())


def run(code):
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_nobody_imports_the_counter_unasked():
    """It imports Triton, which crashes after TensorFlow."""
    imports = "import effdet_fast, effdet_fast.ops, effdet_fast.nn, effdet_fast.acceleration, sys"
    assert run(f"{imports}; print(*({{'torch.utils.flop_counter', 'triton'}} & sys.modules.keys()))") == []


COUNT = """
import importlib, inspect, sys

def count():
    import effdet_fast.ops, torch.utils.flop_counter
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        effdet_fast.ops.depthwise_conv2d(torch.ones(1, 2, 5, 5), torch.ones(2, 1, 3, 3))
    print(counter.get_total_flops())

count()
importlib.reload(sys.modules["torch.utils.flop_counter"])
count()
importlib.reload(sys.modules["effdet_fast.ops"])
count()
del sys.modules["torch.utils.flop_counter"], torch.utils.flop_counter
count()
print("def" in inspect.getsource(torch.utils.flop_counter.mm_flop))
"""


@pytest.mark.parametrize(
    "imports", ["import torch.utils.flop_counter, effdet_fast.ops", "import effdet_fast.ops, torch.utils.flop_counter"]
)
def test_imports_and_reloads_in_any_order(imports):
    two_channels = str(2 * 2 * 9 * 9)  # 3 x 3 pixels and taps, a multiplication and an addition
    assert run(imports + COUNT) == [two_channels] * 4 + ["True"]


def test_imports_by_several_threads():
    threads = """
import threading, effdet_fast.ops, torch

def look():
    import torch.utils.flop_counter
    found.append(torch.ops.effdet_fast.squeeze_excite in torch.utils.flop_counter.flop_registry)

found = []
threads = [threading.Thread(target=look) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(found == [True] * 8)
"""
    assert run(threads) == ["True"]
