"""Checkpoints between projects: exact round trips, the same numbers as the source, and errors that list the keys."""

from __future__ import annotations

import copy
import pickle
import re
import sys

import pytest
import torch

import effdet_fast
from effdet_fast.checkpoints import convert
from effdet_fast.checkpoints.convert import convert_state_dict
from effdet_fast.checkpoints.names import recognize
from effdet_fast.cli.convert_command import TARGETS
from effdet_fast.cli.main import main
from effdet_fast.models import create_model, list_models, load_backbone_checkpoint, load_checkpoint
from tests.models.effdet_models import model_pair
from tests.models.foreign_weights import Zylo117, classifier, underscored, zylo117_d0
from tests.models.torchvision_models import model_pair as torchvision_pair

NAME, SIZE = "efficientdet_lite0", (136, 200)
RETINANETS = ["retinanet_resnet18_fpn", "retinanet_resnet18_fpn_v2"]


@pytest.fixture(scope="module")
def effdet_weights():
    return model_pair(NAME, SIZE).peer.state_dict()


@pytest.fixture(scope="module")
def zylo117_weights():
    return zylo117_d0(num_classes=3)


def assert_identical(actual, expected):
    """Keys, their order, types and every bit."""
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and torch.equal(actual[key], value), key


def load(path):
    return torch.load(path, weights_only=True)


def test_the_command_offers_every_target():
    assert tuple(convert.TARGETS) == TARGETS


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_detector_there_and_back(suffix, effdet_weights, tmp_path, capsys):
    torch.save(effdet_weights, tmp_path / "effdet.pth")
    there, back = str(tmp_path / f"ours{suffix}"), str(tmp_path / "back.pth")
    assert main(["convert", str(tmp_path / "effdet.pth"), there, "--to", "effdet_fast"]) == 0
    assert (
        "effdet and effdet_fast EfficientDet -> effdet_fast: efficientdet_lite0, 90 classes" in capsys.readouterr().out
    )
    assert main(["convert", there, back, "--to", "effdet"]) == 0
    assert_identical(load(back), effdet_weights)
    model = create_model(NAME, image_size=64, checkpoint=there)
    assert_identical(model.state_dict(), effdet_weights)
    copy.deepcopy(model_pair(NAME, SIZE).peer).load_state_dict(load(back))


def test_a_converted_detector_predicts(effdet_weights, tmp_path):
    torch.save(effdet_weights, tmp_path / "effdet.pth")
    done = effdet_fast.convert_checkpoint(tmp_path / "effdet.pth", tmp_path / "ours.pt", "effdet_fast")
    assert (done.names, done.num_classes, done.tensors, done.left_out) == ([NAME], 90, len(effdet_weights), [])
    detector = effdet_fast.Detector.from_checkpoint(tmp_path / "ours.pt", device="cpu")
    assert detector.category_ids == list(range(1, 91)) and detector.image_size == (320, 320)
    assert_identical(detector.model.state_dict(), effdet_weights)


def test_level_first_heads_come_out_as_effdets_usual_file(effdet_weights):
    peer = copy.deepcopy(model_pair(NAME, SIZE).peer)
    peer.toggle_head_bn_level_first()
    assert list(peer.state_dict()) != list(effdet_weights)
    converted = convert_state_dict(peer.state_dict(), "effdet")
    assert converted.naming == "effdet, head BatchNorms level first"
    assert_identical(converted.state_dict, effdet_weights)


def test_a_runs_checkpoint_keeps_its_classes(tmp_path):
    config = create_model(NAME, 2, image_size=64, fpn_cells=1, aspect_ratios=[(1, 1)]).config
    model = effdet_fast.models.DetectionModel(config)
    best = {"format": 1, "model": NAME, "config": config.to_dict(), "class_names": ["ash", "oak"], "epoch": 3,
            "category_ids": [4, 9], "metrics": {"AP": 0.5}, "state_dict": model.state_dict(),
            "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3, "image_size": [64, 64]}}  # fmt: skip
    torch.save(best, tmp_path / "best.pt")
    effdet_fast.convert_checkpoint(tmp_path / "best.pt", tmp_path / "weights.pth", "effdet")
    assert_identical(load(tmp_path / "weights.pth"), model.state_dict())
    effdet_fast.convert_checkpoint(tmp_path / "best.pt", tmp_path / "ours.pt", "effdet_fast")
    detector = effdet_fast.Detector.from_checkpoint(tmp_path / "ours.pt", device="cpu")
    assert (detector.class_names, detector.category_ids) == (["ash", "oak"], [4, 9])
    with pytest.raises(ValueError, match="fit no model .* of the nearest, efficientdet_"):
        effdet_fast.convert_checkpoint(tmp_path / "weights.pth", tmp_path / "again.pth", "effdet_fast")
    done = effdet_fast.convert_checkpoint(tmp_path / "weights.pth", tmp_path / "again.pth", "effdet_fast", model=config)
    assert done.num_classes == 2


def test_zylo117s_tensors_and_ours_correspond_one_to_one(zylo117_weights):
    converted = convert_state_dict(zylo117_weights, "effdet")
    assert (converted.names, converted.config.num_classes, converted.left_out) == (["efficientdet_d0"], 3, [])
    own = create_model("efficientdet_d0", 3).state_dict()
    assert {key: value.shape for key, value in converted.state_dict.items()} == {
        key: value.shape for key, value in own.items()
    }
    assert list(converted.state_dict) == list(own) and len(zylo117_weights) == len(own) == 784
    assert {id(value) for value in converted.state_dict.values()} == {id(value) for value in zylo117_weights.values()}


def test_zylo117s_weights_give_its_outputs(zylo117_weights):
    model = create_model("efficientdet_d0", 3, image_size=128).eval()
    assert not load_checkpoint(model, {f"module.{key}": value for key, value in zylo117_weights.items()})
    peer = Zylo117(zylo117_weights)
    x = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        classes, boxes = model(x)
        features = classifier("efficientnet_b0").forward_intermediates(x, indices=[2, 3, 4], intermediates_only=True)
        levels = peer.neck(*features)
        expected = [*peer.head("classifier", levels), *peer.head("regressor", levels)]
    for ours, theirs in zip([*classes, *boxes], expected, strict=True):
        assert theirs.std() > 0.05
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_zylo117s_unread_fusion_weights_are_left_out_of_large_models():
    """D6 adds without weights, but its files hold them. Eight cells and no other tensors are enough to see that."""
    weights = {"bifpn.7.p6_w1": torch.ones(2), "bifpn.7.conv7_down.bn.bias": torch.ones(2)}
    weights |= {f"bifpn.{cell}.p3_w1": torch.ones(2) for cell in range(7)} | {"backbone_net.model.x": torch.ones(1)}
    renamed = recognize(weights).our_names(weights)
    assert "fpn.cell.7.fnode.7.after_combine.conv.bn.bias" in renamed
    assert not any("edge_weights" in key for key in renamed)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_classifier_there_and_back(suffix, tmp_path):
    weights = classifier("efficientnet_lite0").state_dict()
    torch.save({"state_dict": weights}, tmp_path / "timm.pth")
    effdet_fast.convert_checkpoint(tmp_path / "timm.pth", tmp_path / f"ours{suffix}", "effdet_fast")
    done = effdet_fast.convert_checkpoint(tmp_path / f"ours{suffix}", tmp_path / "back.pth", "timm")
    assert (done.naming, done.names, done.num_classes) == ("timm EfficientNet", ["efficientnet_lite0"], None)
    assert_identical(load(tmp_path / "back.pth"), weights)
    assert not load_backbone_checkpoint(create_model(NAME, 1, image_size=64), tmp_path / f"ours{suffix}")


@pytest.mark.parametrize("name", ["efficientnet_b1", "efficientnet_lite0"])
def test_the_underscored_naming_becomes_timms(name):
    weights = classifier(name).state_dict()
    converted = convert_state_dict(underscored(weights), "timm")
    assert name in converted.names
    assert_identical(converted.state_dict, weights)


def test_a_resnet_is_timms_torchvisions_and_ours():
    torchvision = pytest.importorskip("torchvision")
    weights = torchvision.models.resnet18(num_classes=3).state_dict()
    for target in ("timm", "torchvision", "effdet_fast"):
        shuffled = dict(sorted(weights.items()))
        converted = convert_state_dict(shuffled, target)
        assert converted.names == ["resnet18"]
        assert_identical(converted.state_dict, weights)
    timm = pytest.importorskip("timm")
    timm.create_model("resnet18", num_classes=3).load_state_dict(weights)


def old_torchvision_names(state_dict):
    """As torchvision's files were before 0.15: no blocks in the pyramid, the heads' convolutions at 0, 2, 4 and 6."""
    renamed = {}
    for key, value in state_dict.items():
        key = re.sub(r"(inner_blocks|layer_blocks)\.(\d)\.0\.", r"\1.\2.", key)
        key = re.sub(r"_head\.conv\.(\d)\.0\.", lambda match: f"_head.conv.{2 * int(match[1])}.", key)
        renamed[key] = value
    assert renamed.keys() != state_dict.keys()
    return renamed


@pytest.mark.parametrize("name", RETINANETS)
def test_a_retinanet_there_and_back(name, tmp_path):
    peer = torchvision_pair(name, (128, 160)).peer
    torch.save(peer.state_dict(), tmp_path / "torchvision.pth")
    effdet_fast.convert_checkpoint(tmp_path / "torchvision.pth", tmp_path / "ours.safetensors", "effdet_fast")
    done = effdet_fast.convert_checkpoint(tmp_path / "ours.safetensors", tmp_path / "back.pth", "torchvision")
    assert (done.names, done.num_classes, done.left_out) == ([name], 91, [])
    assert_identical(load(tmp_path / "back.pth"), peer.state_dict())
    effdet_fast.convert_checkpoint(tmp_path / "torchvision.pth", tmp_path / "ours.pt", "effdet_fast")
    detector = effdet_fast.Detector.from_checkpoint(tmp_path / "ours.pt", device="cpu")
    assert detector.category_ids == list(range(91))
    backbone = convert_state_dict(peer.state_dict(), "timm").state_dict
    assert_identical(backbone, peer.backbone.body.state_dict())


@pytest.mark.parametrize("name", RETINANETS)
def test_torchvisions_weights_give_its_outputs(name):
    peer = torchvision_pair(name, (128, 160)).peer
    weights = peer.state_dict() if name.endswith("v2") else old_torchvision_names(peer.state_dict())
    model = create_model(name, image_size=(128, 160)).eval()
    assert not load_checkpoint(model, {f"module.{key}": value for key, value in weights.items()})
    x = torch.randn(2, 3, 128, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(x)
        expected = peer.head(list(peer.backbone(x).values()))
    for ours, key in zip(found, ("cls_logits", "bbox_regression"), strict=True):
        values = expected[key].shape[2]
        concat = torch.cat([level.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, values)) for level in ours], 1)
        torch.testing.assert_close(concat, expected[key], rtol=1e-4, atol=1e-4)


def test_old_and_new_names_of_torchvision_become_the_same():
    weights = torchvision_pair(RETINANETS[0], (128, 160)).peer.state_dict()
    assert_identical(convert_state_dict(old_torchvision_names(weights), "torchvision").state_dict, weights)
    # Its detectors for training from scratch count batches, where the released weights are frozen.
    counting = {}
    for key, value in weights.items():
        counting[key] = value
        if key.endswith("running_var"):
            counting[key.replace("running_var", "num_batches_tracked")] = torch.tensor(3)
    there = convert_state_dict(counting, "effdet_fast").state_dict
    assert_identical(convert_state_dict(there, "torchvision").state_dict, counting)
    assert not load_checkpoint(create_model(RETINANETS[0], image_size=64), counting)


def test_timm_gets_the_backbone_out_of_a_detector(effdet_weights):
    timm = pytest.importorskip("timm")
    converted = convert_state_dict(effdet_weights, "timm")
    backbone = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2, 3, 4))
    assert list(converted.state_dict) == list(backbone.state_dict())
    backbone.load_state_dict(converted.state_dict)
    assert converted.left_out == [key for key in effdet_weights if not key.startswith("backbone.")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("box_net.predict.conv_pw.bias"), "1 missing: box_net.predict.conv_pw.bias"),
        (lambda w: w.update({"fpn.extra": torch.zeros(1)}), "1 unexpected: fpn.extra"),
        (
            lambda w: w.update({"backbone.conv_stem.weight": torch.zeros(8, 3, 3, 3)}),
            r"1 of another shape: backbone.conv_stem.weight is \[8, 3, 3, 3\], the model has \[32, 3, 3, 3\]",
        ),
    ],
)
def test_a_mismatch_lists_the_keys(change, message, effdet_weights):
    weights = dict(effdet_weights)
    change(weights)
    with pytest.raises(ValueError, match=f"of the nearest, efficientdet_lite0: {message}$"):
        convert_state_dict(weights, "effdet_fast")


def test_a_backbones_mismatch_lists_the_keys():
    weights = classifier("efficientnet_lite0").state_dict()
    del weights["conv_stem.weight"]
    with pytest.raises(ValueError, match="of the nearest, efficientnet_lite0: 1 missing: conv_stem.weight$"):
        convert_state_dict(weights, "timm")
    weights = {f"layer1.0.{tensor}": torch.zeros(1) for tensor in ("conv1.weight", "extra")}
    with pytest.raises(ValueError, match=r"of the nearest, resnet18: \d+ missing: .* 1 unexpected: layer1.0.extra"):
        convert_state_dict(weights, "timm")


def test_unknown_names_are_listed_beside_what_is_understood():
    with pytest.raises(
        ValueError, match="zylo117's EfficientDet, .*timm EfficientNet.* The keys are conv.0.weight, x$"
    ):
        convert_state_dict({"conv.0.weight": torch.zeros(1), "x": torch.zeros(1)}, "effdet")


def test_targets_refuse_what_they_do_not_have(effdet_weights):
    with pytest.raises(ValueError, match="torchvision has no efficientdet_lite0"):
        convert_state_dict(effdet_weights, "torchvision")
    with pytest.raises(ValueError, match="effdet has EfficientDets only, .* efficientnet_lite0"):
        convert_state_dict(classifier("efficientnet_lite0").state_dict(), "effdet")
    with pytest.raises(ValueError, match="to must be one of .*'timm'.*, got 'onnx'"):
        convert_state_dict(effdet_weights, "onnx")
    with pytest.raises(ValueError, match="unknown model 'efficientdet_d9'"):
        convert_state_dict(effdet_weights, "effdet", model="efficientdet_d9")


def test_nothing_is_overwritten_unasked(effdet_weights, tmp_path, capsys):
    torch.save(effdet_weights, tmp_path / "in.pth")
    (tmp_path / "out.pth").write_text("precious")
    command = ["convert", str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), "--to", "effdet"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "out.pth: exists" in error and len(error.strip().splitlines()) == 1
    assert (tmp_path / "out.pth").read_text() == "precious"
    assert main([*command, "--overwrite"]) == 0
    assert_identical(load(tmp_path / "out.pth"), effdet_weights)


def test_files_are_data_not_code(tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Payload()}))
    torch.save({"state_dict": Payload()}, tmp_path / "evil_zip.pth")
    for name in ("evil.pth", "evil_zip.pth", "absent.pth"):
        assert main(["convert", str(tmp_path / name), str(tmp_path / "out.pth"), "--to", "timm"]) == 2
        assert name in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pth", "evil_zip.pth"]


def test_safetensors_without_the_package(effdet_weights, tmp_path, monkeypatch, capsys):
    torch.save(effdet_weights, tmp_path / "in.pth")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    command = ["convert", str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors"), "--to", "effdet"]
    assert main(command) == 2
    assert "pip install safetensors" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_every_model_is_recognized_by_its_weights(name):
    with torch.device("meta"):
        model = create_model(name, 7)
    converted = convert_state_dict(model.state_dict(), "effdet_fast")
    assert name in converted.names and converted.config.num_classes == 7
    assert set(converted.names) <= {name, "efficientdet_d6", "efficientdet_d7"}
    assert list(converted.state_dict) == list(model.state_dict())
