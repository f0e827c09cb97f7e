"""The counts of `summary`: beside a count by hooks on effdet's model, beside the paper's, and without side effects."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from effdet_fast.cli.main import main
from effdet_fast.models import create_model, list_models, summary
from tests.models.effdet_models import model_pair

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
from models_page import PUBLISHED


def meta_model(name: str, *arguments, **settings):
    with torch.device("meta"):
        return create_model(name, *arguments, **settings)


@pytest.mark.parametrize(("name", "size"), [("efficientdet_d0", (128, 128)), ("efficientdet_lite0", (136, 200))])
def test_counts_are_those_of_effdets_convolutions(name, size):
    """A convolution puts out `output.numel()` values, each of `weight[0].numel()` multiply-adds."""
    pair = model_pair(name, size)
    parts = {"backbone": "backbone", "fpn": "neck", "class_net": "class head", "box_net": "box head"}
    multiply_adds, activations = dict.fromkeys(parts.values(), 0), dict.fromkeys(parts.values(), 0)
    handles = []
    for key, module in pair.peer.named_modules():
        if isinstance(module, nn.Conv2d):
            name_of_part = parts[key.partition(".")[0]]

            def count(conv, inputs, output, part=name_of_part):
                multiply_adds[part] += output.numel() * conv.weight[0].numel()
                activations[part] += output.numel()

            handles.append(module.register_forward_hook(count))
    with torch.no_grad():
        pair.peer(torch.zeros(1, 3, *size))
    for handle in handles:
        handle.remove()
    found = summary(pair.ours)
    assert {part.name: part.multiply_adds for part in found.parts} == multiply_adds
    assert {part.name: part.activations for part in found.parts} == activations
    assert found.total.multiply_adds == sum(multiply_adds.values())
    assert found.total.parameters == sum(parameter.numel() for parameter in pair.peer.parameters())


QUICK = ("efficientdet_d0", "retinanet_resnet50_fpn")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in PUBLISHED])
def test_multiply_adds_are_the_published_ones(name):
    total, published = summary(meta_model(name)).total, PUBLISHED[name] * 1e9
    if name.startswith("retinanet"):
        assert total.multiply_adds == pytest.approx(published, rel=1e-4)
    else:
        assert total.multiply_adds == pytest.approx(published, rel=0.03)
        # The paper counts one operation more for each value that a convolution puts out.
        assert total.multiply_adds + total.activations == pytest.approx(published, rel=0.0025)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_every_model_has_a_summary(name):
    model = meta_model(name)
    found = summary(model)
    assert found.total.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert all(part.parameters > 0 and part.multiply_adds > 0 and part.activations > 0 for part in found.parts)
    assert found.anchors == len(model.anchors("cpu"))


def test_levels_are_those_of_the_anchors():
    model = create_model("efficientdet_lite0", 2, image_size=(96, 160), fpn_cells=1)
    found = summary(model)
    assert [(level.level, level.height, level.width) for level in found.levels] == [
        (3, 12, 20),
        (4, 6, 10),
        (5, 3, 5),
        (6, 2, 3),
        (7, 1, 2),
    ]
    assert [level.anchors for level in found.levels] == [2160, 540, 135, 54, 18]
    assert found.anchors == len(model.anchors())


def test_the_model_stays_as_it_was():
    model = create_model("efficientdet_lite0", 2, image_size=64, fpn_cells=1).half()
    model.backbone.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert summary(model) == summary(meta_model("efficientdet_lite0", 2, image_size=64, fpn_cells=1))
    assert model.training and not model.backbone.training
    assert not model.backbone._forward_pre_hooks
    for key, value in model.state_dict().items():
        assert value.device.type == "cpu" and torch.equal(value, before[key])


def test_the_command_prints_both_tables(capsys):
    command = ["summary", "efficientdet_lite0", "--num-classes", "3", "--image-size", "320", "200"]
    assert main([*command, "--model-option", "fusion=fast", "--model-option", "fpn_cells=1"]) == 0
    printed = capsys.readouterr().out
    model = meta_model("efficientdet_lite0", 3, image_size=(320, 200), fusion="fast", fpn_cells=1)
    assert printed == f"{summary(model)}\n"
    assert "efficientdet_lite0, 3 classes, one image of 320 x 200" in printed
    assert "box head" in printed and "12,204" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["efficientdet_d9"], "unknown model 'efficientdet_d9'"),
        (["efficientdet_d0", "--model-option", "fusion"], "--model-option takes FIELD=VALUE, got 'fusion'"),
        (["efficientdet_d0", "--model-option", "fusion=mean"], "fusion must be one of"),
        (["efficientdet_d0", "--model-option", "cells=3"], "unknown configuration field"),
        (["efficientdet_d0", "--num-classes", "0"], "num_classes must be an integer in [1, 100000], got 0"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, capsys):
    assert main(["summary", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
