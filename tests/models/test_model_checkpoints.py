"""Loading weights: every naming we know, all or nothing, and errors that name what does not fit."""

from __future__ import annotations

import argparse
import copy

import pytest
import torch

from effdet_fast.models import Mismatch, create_model, load_backbone_checkpoint, load_checkpoint
from tests.models.effdet_models import effdet, model_pair
from tests.models.foreign_weights import classifier, underscored

SIZE = (136, 200)
NAME = "efficientdet_lite0"


@pytest.fixture
def model():
    return create_model(NAME, image_size=SIZE)


@pytest.fixture(scope="module")
def weights():
    """A detector's state dict with every value different from a fresh model's."""
    return model_pair(NAME, SIZE).peer.state_dict()


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model, state_dict):
    own = model.state_dict()
    assert own.keys() == state_dict.keys()
    for key, value in own.items():
        assert torch.equal(value, state_dict[key]), key


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3, "arch": "x"},
        lambda weights: {"model": weights},
        lambda weights: {"format": 1, "model": NAME, "class_names": ["a"], "state_dict": weights},
        lambda weights: {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
        lambda weights: {f"module.model.{key}": value for key, value in weights.items()},
        lambda weights: {**{f"model.{key}": value for key, value in weights.items()}, "anchors.boxes": torch.zeros(1)},
        lambda weights: {"state_dict": weights, "args": argparse.Namespace(lr=0.1)},
    ],
)
def test_wrapped_files(wrap, model, weights, tmp_path):
    torch.save(wrap(weights), tmp_path / "weights.pth")
    assert load_checkpoint(model, tmp_path / "weights.pth") == Mismatch([], [], [])
    assert_same(model, weights)


def test_averaged_weights_are_preferred(model, weights):
    averaged = {key: value + 1 for key, value in weights.items()}
    file = {"state_dict": weights, "state_dict_ema": averaged}
    load_checkpoint(model, file)
    assert_same(model, averaged)
    load_checkpoint(model, file, use_ema=False)
    assert_same(model, weights)


def test_effdet_training_bench(model, weights):
    bench = effdet.DetBenchTrain(copy.deepcopy(model_pair(NAME, SIZE).peer))
    load_checkpoint(model, bench.state_dict())
    assert_same(model, weights)


def test_level_first_heads(model, weights):
    peer = copy.deepcopy(model_pair(NAME, SIZE).peer)
    peer.toggle_head_bn_level_first()
    assert peer.state_dict().keys() != weights.keys()
    load_checkpoint(model, peer.state_dict())
    assert_same(model, weights)


def test_create_model_loads_a_file(weights, tmp_path):
    torch.save(weights, tmp_path / "weights.pth")
    assert_same(create_model(NAME, image_size=64, checkpoint=tmp_path / "weights.pth"), weights)


def test_old_files_lack_batch_counters(model, weights):
    load_checkpoint(model, {key: value for key, value in weights.items() if "num_batches" not in key})
    assert torch.equal(model.state_dict()["fpn.resample.3.conv.bn.running_mean"],
                       weights["fpn.resample.3.conv.bn.running_mean"])  # fmt: skip


@pytest.fixture
def broken(weights):
    """With an entry that is missing, one that is too many and one of another shape."""
    others = {"fpn.extra": torch.zeros(1), "backbone.conv_stem.weight": torch.zeros(8, 3, 3, 3)}
    return {key: value for key, value in {**weights, **others}.items() if key != "box_net.predict.conv_pw.bias"}


def test_misfit_names_everything_and_loads_nothing(model, broken):
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        load_checkpoint(model, broken)
    message = str(error.value)
    assert "nothing was loaded" in message
    assert "1 missing: box_net.predict.conv_pw.bias" in message
    assert "1 unexpected: fpn.extra" in message
    assert "backbone.conv_stem.weight is [8, 3, 3, 3], the model has [32, 3, 3, 3]" in message
    assert_same(model, before)


def test_not_strict_loads_what_fits(model, weights, broken):
    before = snapshot(model)
    mismatch = load_checkpoint(model, broken, strict=False)
    assert mismatch == Mismatch(
        ["box_net.predict.conv_pw.bias"], ["fpn.extra"], [("backbone.conv_stem.weight", (8, 3, 3, 3), (32, 3, 3, 3))]
    )
    kept = {key: before[key] for key in ("box_net.predict.conv_pw.bias", "backbone.conv_stem.weight")}
    assert_same(model, {**weights, **kept})


def test_long_lists_are_cut_and_counted(model):
    with pytest.raises(ValueError, match=r"\d{3} missing: backbone.conv_stem.weight, .* and \d{3} more"):
        load_checkpoint(model, {"fpn.resample.3.conv.bn.bias": torch.zeros(64)})


def test_other_number_of_classes(weights):
    model = create_model(NAME, 5, image_size=64)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"class_net.predict.conv_pw.weight is \[810, 64, 1, 1\], .*reset_head=True"):
        load_checkpoint(model, weights)
    assert_same(model, before)
    assert not load_checkpoint(model, weights, reset_head=True)
    layer = "class_net.predict.conv_pw."
    assert_same(model, {**weights, **{key: before[key] for key in before if key.startswith(layer)}})


def test_reset_head_does_not_hide_other_misfits(weights):
    model = create_model(NAME, 5, image_size=64)
    with pytest.raises(ValueError, match="1 missing: box_net.predict.conv_pw.bias$"):
        broken = {key: value for key, value in weights.items() if key != "box_net.predict.conv_pw.bias"}
        load_checkpoint(model, broken, reset_head=True)


def test_files_that_are_no_checkpoint(model, tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError):
        load_checkpoint(model, path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="weights.pth: cannot be read as a checkpoint"):
        load_checkpoint(model, path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="weights.pth holds a list, not a state dict"):
        load_checkpoint(model, path)
    with pytest.raises(ValueError, match="the state dict holds no tensors; its keys are epoch"):
        load_checkpoint(model, {"epoch": 3})


@pytest.mark.parametrize(
    ("detector", "backbone"), [(NAME, "efficientnet_lite0"), ("efficientdet_d1", "efficientnet_b1")]
)
@pytest.mark.parametrize("naming", ["timm", "underscored", "detector"])
def test_backbone_weights_give_timms_features(detector, backbone, naming):
    peer = classifier(backbone)
    state_dict = peer.state_dict()
    if naming == "underscored":
        state_dict = underscored(state_dict)
    elif naming == "detector":
        other = create_model(detector, 1, image_size=64)
        load_backbone_checkpoint(other, state_dict)
        state_dict = {f"model.{key}": value for key, value in other.state_dict().items()}
    model = create_model(detector, 3, image_size=64).eval()
    head_before = model.class_net.predict.conv_pw.weight.clone()
    assert not load_backbone_checkpoint(model, {"state_dict": state_dict})
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model.backbone(x)
        expected = peer.forward_intermediates(x, indices=[2, 3, 4], intermediates_only=True)
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.class_net.predict.conv_pw.weight, head_before)


def test_backbone_of_another_size_does_not_fit():
    model = create_model("efficientdet_d0", 1, image_size=64)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"load_backbone_checkpoint: .* does not fit, nothing was loaded. .*unexpected"
    ):
        load_backbone_checkpoint(model, classifier("efficientnet_b1").state_dict())
    lite = underscored(classifier("efficientnet_lite0").state_dict())
    with pytest.raises(ValueError, match=r"missing: blocks.0.0.se.conv_reduce.weight"):
        load_backbone_checkpoint(model, lite)
    assert_same(model, before)


def test_create_model_loads_a_backbone_file(tmp_path):
    torch.save(classifier("efficientnet_lite0").state_dict(), tmp_path / "backbone.pth")
    model = create_model(NAME, 2, image_size=64, backbone_checkpoint=tmp_path / "backbone.pth")
    weights = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert torch.equal(model.backbone.conv_stem.weight, weights["conv_stem.weight"])
