"""What records or reads an accelerated model, `torch.fx` and TorchScript, finds the original's graph; what compiles it, ours."""

import copy
import functools
from contextlib import nullcontext

import pytest
import timm
import torch
import torchvision
from timm.models._features_fx import create_feature_extractor as timms_feature_extractor
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.models.feature_extraction import create_feature_extractor

import effdet_fast
from tests.acceleration.effdet_benches import effdet, images, tiny
from tests.acceleration.test_accelerate import Model
from tests.acceleration.test_retinanet import plain_model

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated", "ignore:.*:torch.jit.TracerWarning")


def efficientnet():
    return timm.create_model("efficientnet_b0")


def efficientdet():
    model = tiny()
    model.toggle_head_bn_level_first()  # before that, effdet's heads cannot be scripted
    return model


def bench():
    return effdet.DetBenchPredict(efficientdet())


def detector():
    return plain_model("retinanet_resnet50_fpn")


class Swapped(nn.Module):
    """A chain, and classes that PyTorch's tracer keeps whole and such that it does not."""

    def __init__(self):
        super().__init__()
        self.norm = timm.layers.BatchNormAct2d(3)
        self.convs = nn.Sequential(
            nn.Conv2d(3, 3, 3, groups=3), nn.BatchNorm2d(3), nn.SiLU(), nn.Conv2d(3, 3, 3, groups=3)
        )

    def forward(self, x):
        return self.convs(self.norm(x))


def both(create):
    """The plain model in evaluation mode, with random statistics, and an accelerated copy."""
    torch.manual_seed(0)
    plain = create().eval()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    model = copy.deepcopy(plain)
    assert effdet_fast.accelerate(model).swapped
    return plain, model


def check(make, create, *inputs, expected=lambda plain: plain):
    """What is made of the accelerated model gives the plain one's numbers, and leaves the model as it was; both returned."""
    plain, model = both(create)
    classes = [type(module) for module in model.modules()]
    made = make(model)
    assert [type(module) for module in model.modules()] == classes
    torch.testing.assert_close(made(*inputs), expected(plain)(*inputs), rtol=1e-5, atol=1e-5)
    return made, plain


def targets_of(graph):
    return {str(node.target) for node in graph.nodes}


def of_backbone(make):
    return lambda model: make(model.backbone)


symbolic_trace = torch.fx.symbolic_trace


@pytest.mark.parametrize(
    ("create", "make"),
    [
        (efficientnet, symbolic_trace),
        (detector, of_backbone(symbolic_trace)),
        (efficientdet, of_backbone(symbolic_trace)),
        (Model, symbolic_trace),
        (Swapped, symbolic_trace),
    ],
)
def test_torch_fx_records_the_original(create, make):
    traced, plain = check(make, create, images(2, (64, 64)), expected=make)
    assert targets_of(traced.graph) == targets_of(make(plain).graph)


@pytest.mark.parametrize("root", ["stem", "block", "head"])
def test_torch_fx_records_a_chain_by_itself(root):
    x = images(2, (16, 16))[:, :1].expand(-1, 3 if root == "stem" else 8, -1, -1)
    check(symbolic_trace, lambda: Model().get_submodule(root), x)


def test_torch_fx_records_a_node_of_a_pyramid():
    maps = [torch.randn(1, channels, side, side) for channels, side in ((32, 8), (48, 4), (64, 2), (64, 1), (64, 1))]
    check(symbolic_trace, lambda: efficientdet().fpn.cell[0].fnode[0], maps)


@pytest.mark.parametrize(
    ("create", "extractor", "nodes"),
    [
        (efficientnet, timms_feature_extractor, {"blocks.3.0.conv_dw": "dw", "bn2": "last"}),
        (efficientnet, create_feature_extractor, {"blocks.1": "early", "blocks.5": "late"}),
        (torchvision.models.mobilenet_v2, create_feature_extractor, {"features.3": "early", "features.18": "late"}),
    ],
)
def test_features_are_extracted(create, extractor, nodes):
    make = functools.partial(extractor, return_nodes=nodes)
    check(make, create, images(2, (64, 64)), expected=make)


def test_features_of_a_detectors_backbone_are_extracted():
    nodes = {"body.layer2": "layer2", "body.layer4.2.relu_2": "last"}
    make = of_backbone(functools.partial(create_feature_extractor, return_nodes=nodes))
    check(make, detector, images(2, (64, 64)), expected=make)


def test_torch_fx_records_constants_that_pass_a_module():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = Swapped()
            self.register_buffer("image", images(1, (16, 16)))

        def forward(self, x):
            return x + self.convs(self.image)

    check(symbolic_trace, Constant, torch.zeros(1))


@pytest.mark.parametrize("create", [efficientnet, bench, Model, Swapped])
@pytest.mark.parametrize("how", ["trace", "script"])
def test_torchscript_compiles_the_original(create, how):
    x = images(1, (64, 64))
    make = torch.jit.script if how == "script" else lambda model: torch.jit.trace(model, x)
    made, _ = check(make, create, x)
    assert "effdet_fast::" not in str(made.inlined_graph)


@pytest.mark.parametrize(("accelerated", "patched"), [(False, True), (True, False), (True, True)])
def test_a_detector_of_torchvision_is_scripted(accelerated, patched):
    plain, model = both(detector)
    image = torch.rand(3, 64, 64)
    with effdet_fast.patch_torchvision() if patched else nullcontext():
        scripted = torch.jit.script(model if accelerated else plain)
    (found,), (expected,) = scripted([image])[1], plain([image])
    assert len(expected["boxes"]) > 3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["nms", "batched_nms", "sigmoid_focal_loss"])
def test_patched_functions_are_scripted(name):
    original = getattr(torchvision.ops, name)
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
    arguments = {
        "nms": (boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5),
        "batched_nms": (boxes, torch.tensor([0.5, 0.9, 0.1]), torch.tensor([0, 0, 1]), 0.5),
        "sigmoid_focal_loss": (boxes / 30, boxes / 40),
    }[name]
    with effdet_fast.patch_torchvision():
        scripted = torch.jit.script(getattr(torchvision.ops, name))
        torch.testing.assert_close(scripted(*arguments), original(*arguments))


def test_torch_fx_records_torchvisions_functions_while_patched():
    with effdet_fast.patch_torchvision():
        traced = symbolic_trace(lambda logits, targets: torchvision.ops.sigmoid_focal_loss(logits, targets))
    logits, targets = torch.randn(4, 3), torch.rand(4, 3)
    torch.testing.assert_close(traced(logits, targets), torchvision.ops.sigmoid_focal_loss(logits, targets))


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_export_and_make_fx_keep_our_ops(strict):
    x = images(2, (16, 16))
    plain, model = both(Swapped)
    exported = torch.export.export(model, (x,), strict=strict)
    recorded = make_fx(model)(x)
    for graph in (exported.graph, recorded.graph):
        assert {"effdet_fast.depthwise_conv.default", "effdet_fast.batch_norm_act.default"} <= targets_of(graph)
    torch.testing.assert_close(exported.module()(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(recorded(x), plain(x), rtol=1e-5, atol=1e-5)
