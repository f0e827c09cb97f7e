"""Can tools that look into a model take ours: inspect.getmembers, torch.jit.trace?"""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from effdet_fast import nn as fast_nn
from effdet_fast.models import create_model, list_models
from effdet_fast.nn import BatchNormAct2d

SMALL = {"backbone": "efficientnet:0.2,0.1", "fpn_cells": 1, "head_repeats": 1, "fpn_channels": 16}
MODULES = [
    BatchNormAct2d(4, activation="silu"),
    BatchNormAct2d(4),
    fast_nn.FrozenBatchNormAct2d(4, activation="relu"),
    fast_nn.DepthwiseConv2d(4, 3),
]


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    options = SMALL if name.startswith("efficientdet") else {"head_repeats": 1}
    return create_model(name, 5, image_size=64, **options)


@pytest.mark.parametrize("name", list_models())
def test_members_of_models(name):
    with torch.device("meta"):
        model = small(name)
    for mode in (True, False):
        for module in model.train(mode).modules():
            assert "forward" in dict(inspect.getmembers(module))


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_members_of_modules(module):
    for mode in (True, False):
        assert dict(inspect.getmembers(module.train(mode)))["training"] is mode
        assert not hasattr(module, "qconfig")


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm])
def test_no_conversion_drops_an_activation(convert):
    with pytest.raises(TypeError, match="would drop the activation 'silu'; use effdet_fast.nn.synchronize_batch_norm"):
        convert(nn.Sequential(nn.Sequential(BatchNormAct2d(4, activation="silu"))))
    assert type(convert(BatchNormAct2d(4))) is nn.SyncBatchNorm


QUICK = ("efficientdet_lite0", "retinanet_resnet18_fpn")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in list_models()])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_trace_gives_the_outputs_of_the_model(name, gradients, tmp_path):
    """With PyTorch's operators alone, for any batch."""
    model = small(name).eval()
    with torch.no_grad():
        for head in (model.class_net, model.box_net):
            for parameter in head.predict.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, torch.randn(1, 3, 64, 64))
    assert "effdet_fast::" not in str(traced.inlined_graph)
    torch.jit.save(traced, tmp_path / "traced.pt")
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        actual, expected = torch.jit.load(tmp_path / "traced.pt")(images), model(images)
    for ours, traced_ones in zip(expected, actual, strict=True):
        assert max(float(x.std()) for x in ours) > 0.01
        torch.testing.assert_close(list(traced_ones), ours, rtol=1e-4, atol=1e-4)


def test_no_import_brings_triton():
    """It is slow to import, and crashes in a process that has imported TensorFlow."""
    code = (
        "import sys, effdet_fast.models, effdet_fast.training, effdet_fast.export\n"
        "print([name for name in ('torch.utils.flop_counter', 'triton') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
