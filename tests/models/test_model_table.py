"""Names, configurations and sizes of the models, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import effdet_fast.models as models
from effdet_fast.models.anchors import feature_sizes
from tests.models.effdet_models import model_pair, peer_model

# Parameters with the released number of classes (90, RetinaNet 91), and anchors at the released size.
SIZES = {
    "efficientdet_d0": (3_880_067, 49_104),
    "efficientdet_d1": (6_625_898, 76_725),
    "efficientdet_d2": (8_097_039, 110_484),
    "efficientdet_d3": (12_032_296, 150_381),
    "efficientdet_d4": (20_723_675, 196_416),
    "efficientdet_d5": (33_653_315, 306_900),
    "efficientdet_d6": (51_871_782, 306_900),
    "efficientdet_d7": (51_871_782, 441_936),
    "efficientdet_d7x": (77_147_166, 442_260),
    "efficientdet_d0_symmetric": (3_877_763, 49_104),
    "efficientdet_d1_symmetric": (6_622_026, 76_725),
    "efficientdet_d2_symmetric": (8_091_215, 110_484),
    "efficientdet_d3_symmetric": (12_022_376, 150_381),
    "efficientdet_lite0": (3_243_470, 19_206),
    "efficientdet_lite1": (4_248_318, 27_621),
    "efficientdet_lite2": (5_252_334, 37_629),
    "efficientdet_lite3": (8_350_862, 49_104),
    "efficientdet_lite3x": (9_280_862, 76_725),
    "efficientdet_lite4": (15_130_894, 76_725),
    "retinanet_resnet18_fpn": (21_038_871, 120_087),
    "retinanet_resnet18_fpn_v2": (21_640_343, 120_087),
    "retinanet_resnet34_fpn": (31_139_607, 120_087),
    "retinanet_resnet34_fpn_v2": (31_748_503, 120_087),
    "retinanet_resnet50_fpn": (34_014_999, 120_087),
    "retinanet_resnet50_fpn_v2": (38_198_935, 120_087),
    "retinanet_resnet101_fpn": (52_954_903, 120_087),
    "retinanet_resnet101_fpn_v2": (57_191_063, 120_087),
}


def test_every_listed_model_has_a_size_here():
    assert models.list_models() == list(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_anchors(name):
    with torch.device("meta"):
        model = models.create_model(name)
    parameters, anchors = SIZES[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.anchors("cpu").shape == (anchors, 4)


@pytest.mark.parametrize(
    "name",
    [
        "efficientdet_d2",
        "efficientdet_d7x",
        "efficientdet_lite3x",
        "efficientdet_d0_symmetric",
        "efficientdet_d3_symmetric",
    ],
)
def test_keys_shapes_and_settings_are_effdets(name):
    with torch.device("meta"):
        model = models.create_model(name)
        peer = peer_model(name)
    expected = {key: value.shape for key, value in peer.state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == expected
    assert model.config.image_size == tuple(peer.config.image_size)
    assert model.config.anchor_scale == peer.config.anchor_scale
    assert model.config.drop_path_rate == peer.config.backbone_args.drop_path_rate


@pytest.mark.parametrize("name", ["efficientdet_d0", "efficientdet_lite0", "efficientdet_d0_symmetric"])
def test_batch_norms_and_loss_constants_are_effdets(name):
    pair = model_pair(name, (128, 128) if name == "efficientdet_d0" else (136, 200))
    peer_norms = {key: module for key, module in pair.peer.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    norms = {key: module for key, module in pair.ours.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert norms.keys() == peer_norms.keys()
    for key, norm in norms.items():
        assert (norm.eps, norm.momentum) == (peer_norms[key].eps, peer_norms[key].momentum), key
    config, peer = pair.ours.config, pair.peer.config
    assert (config.focal_alpha, config.focal_gamma, config.box_loss_delta) == (peer.alpha, peer.gamma, peer.delta)
    assert (config.box_loss_weight, config.max_candidates) == (peer.box_loss_weight, peer.max_detection_points)


@pytest.mark.parametrize("name", ["efficientdet_d0", "efficientdet_lite0"])
def test_initial_weights_have_effdets_scale(name):
    torch.manual_seed(0)
    ours = models.create_model(name)
    peer = peer_model(name).state_dict()
    pooled: dict[str, list[torch.Tensor]] = {}
    for key, value in ours.state_dict().items():
        expected = peer[key]
        if expected.dim() != 4:
            # BatchNorm, biases and edge weights start at constants.
            torch.testing.assert_close(value, expected, msg=lambda text, key=key: f"{key}: {text}")
            continue
        ratio = (value.std() / expected.std()).item()
        # Small filters scatter; their pooled ratio must not.
        assert 0.5 < ratio < 2.0, key
        pooled.setdefault(key.split(".")[0], []).append(value.flatten() / expected.std())
    for part, values in pooled.items():
        assert torch.cat(values).std().item() == pytest.approx(1.0, abs=0.05), part


def test_prior_makes_objects_rare():
    model = models.create_model("efficientdet_lite0", 7, image_size=64)
    assert torch.sigmoid(model.class_net.predict.conv_pw.bias).detach() == pytest.approx(0.01)
    assert (model.box_net.predict.conv_pw.bias == 0).all()


def test_config_survives_json():
    config = models.create_model("efficientdet_lite0", 3, image_size=(96, 160)).config
    assert models.DetectorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert dataclasses.asdict(config)["image_size"] == (96, 160)


def test_a_first_version_config_is_understood():
    values = models.model_config("efficientdet_lite0", pos_iou=0.6, neg_iou=0.6).to_dict()
    old = {key: values[key] for key in ("name", "backbone", "image_size", "fpn_channels", "fpn_cells", "head_repeats")}
    old |= {key: values[key] for key in ("fusion", "activation", "mean", "std", "anchor_scale", "drop_path_rate")}
    old |= {"match_iou": 0.6, "huber_delta": 0.1}
    assert models.DetectorConfig.from_dict(old).to_dict() == values


def test_any_combination_is_one_call():
    model = models.create_model(
        "retinanet_resnet18_fpn", 3, image_size=64, neck="bifpn", fusion="softmax", head="separable", fpn_channels=32
    )
    assert model.config.num_classes == 3
    assert [level.shape[1] for level in model.eval()(torch.zeros(1, 3, 64, 64))[0]] == [27] * 5
    assert models.create_model("retinanet_resnet18_fpn", image_size=64).config.num_classes == 91


def test_tf_prefix_and_overrides():
    model = models.create_model(
        "tf_efficientdet_lite0", 2, image_size=64, fpn_cells=1, fusion="softmax", aspect_ratios=[(1, 1)]
    )
    assert model.config.name == "efficientdet_lite0"
    assert len(model.fpn.cell) == 1
    assert model.config.anchors_per_cell == 3
    outputs = model(torch.zeros(2, 3, 64, 64))
    assert [tuple(level.shape) for level in outputs[0]] == [(2, 6, side, side) for side in (8, 4, 2, 1, 1)]


def test_feature_sizes_round_up():
    assert feature_sizes((320, 200), 3, 7) == [(40, 25), (20, 13), (10, 7), (5, 4), (3, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="efficientdet_d9"), "unknown model 'efficientdet_d9'; known are .*efficientdet_lite0"),
        (dict(name=None), "unknown model None"),
        (dict(num_classes=0), r"num_classes must be an integer in \[1, 100000\], got 0"),
        (dict(num_classes=2.0), r"num_classes must be an integer in \[1, 100000\], got 2.0"),
        (dict(image_size=0), "image_size must be a positive integer or a pair .*, got 0"),
        (dict(image_size=(64, -1)), r"image_size .* got \(64, -1\)"),
        (dict(image_size=(64, 64, 3)), r"image_size .* got \(64, 64, 3\)"),
        (dict(image_size="512"), "image_size .* got '512'"),
        (dict(fusion="mean"), "fusion must be one of .* got 'mean'"),
        (dict(activation="gelu"), "activation must be one of .* got 'gelu'"),
        (dict(min_level=2), r"min_level must be 3 and max_level in \[5, 10\], got 2 and 7"),
        (dict(aspect_ratios=[(1, 0)]), "aspect_ratios must be pairs of positive"),
        (dict(mean=(0.5,)), "mean must have 3 values"),
        (dict(neck="pan"), r"neck must be one of \['fpn', 'panet', 'nas_fpn', 'bifpn'\], got 'pan'"),
        (dict(backbone="vgg16"), "backbone must be one of .*'efficientnet_b0'.*'resnet50'.*, got 'vgg16'"),
        (dict(head="mlp"), r"head must be one of \['separable', 'conv'\], got 'mlp'"),
        (dict(head_norm="layer"), r"head_norm must be one of \['batch', 'group', None\], got 'layer'"),
        (dict(head_norm="group", fpn_channels=88), "'group' needs fpn_channels divisible by 32, got 88"),
        (dict(extra_levels="c4"), "extra_levels must be one of .*'p5'.*, got 'c4'"),
        (dict(anchor_style="yolo"), r"anchor_style must be one of \['efficientdet', 'retinanet'\], got 'yolo'"),
        (dict(box_coder="xywh"), r"box_coder must be one of \['effdet', 'torchvision'\], got 'xywh'"),
        (dict(box_loss="l2"), "box_loss must be one of .*'giou'.*, got 'l2'"),
        (dict(loss_normalizer="none"), r"loss_normalizer must be one of \['batch', 'per_image'\], got 'none'"),
        (dict(allow_low_quality_matches=True), "force_match and allow_low_quality_matches exclude each other"),
        (dict(name="retinanet_resnet51_fpn"), "unknown model .*retinanet_resnet50_fpn"),
        (dict(neck=["fpn"]), r"neck must be one of \['fpn', 'panet', 'nas_fpn', 'bifpn'\], got \['fpn'\]"),
        (dict(backbone=["resnet18"]), r"backbone must be one of .*'resnet50'.*, got \['resnet18'\]"),
        (dict(max_level="7"), r"min_level must be 3 and max_level in \[5, 10\], got 3 and '7'"),
        (dict(aspect_ratios=3), "aspect_ratios must be pairs of positive .*, got 3"),
        (dict(mean=0.5), "mean must have 3 values, got 0.5"),
        (dict(std=(0.2, 0.2, 0)), r"std must be positive, got \(0.2, 0.2, 0\)"),
        (dict(neg_iou=0.0), r"neg_iou must be in \(0, 1\], got 0.0"),
        (dict(neg_iou=0.6), "neg_iou must be <= pos_iou, got 0.6 and 0.5"),
        (dict(drop_path_rate="0.1"), r"drop_path_rate must be in \[0, 1\), got '0.1'"),
        (dict(anchor_scale=0), "anchor_scale must be > 0, got 0"),
        (dict(focal_gamma=-1), "focal_gamma must be >= 0, got -1"),
        (dict(box_loss_weight=float("nan")), "box_loss_weight must be >= 0, got nan"),
        (dict(nms_iou=7), r"nms_iou must be in \[0, 1\], got 7"),
        (dict(score_threshold="0.3"), r"score_threshold must be in \[0, 1\] or None, got '0.3'"),
        (dict(drop_path_rate=1.0), r"drop_path_rate must be in \[0, 1\), got 1.0"),
        (dict(num_classes=10**9), r"num_classes must be an integer in \[1, 100000\], got 1000000000"),
        (dict(fpn_channels=10**9), r"fpn_channels must be an integer in \[1, 8192\]"),
        (dict(fpn_cells=10**9), r"fpn_cells must be an integer in \[1, 64\]"),
        (dict(head_repeats=10**5), r"head_repeats must be an integer in \[1, 64\]"),
        (dict(num_scales=10**9), r"num_scales must be an integer in \[1, 64\]"),
        (dict(max_candidates=10**10), r"max_candidates must be an integer in \[1, 1073741824\]"),
        (dict(max_detections=10**10), r"max_detections must be an integer in \[1, 1073741824\]"),
        (dict(max_level=10**6), r"max_level in \[5, 10\], got 3 and 1000000"),
        (dict(image_size=10**9), "image_size .* at most 32768, got 1000000000"),
        (dict(aspect_ratios=[(1, 1)] * 1000), "aspect_ratios must be pairs .* at most 64"),
        (dict(frozen_batch_norm=1), "frozen_batch_norm must be a bool, got 1"),
        (dict(channels=64), r"unknown configuration field\(s\) \['channels'\]; known are .*fpn_channels"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.create_model(**{"name": "efficientdet_lite0", **arguments})


@pytest.fixture(scope="module")
def small_model():
    return models.create_model("efficientdet_lite0", 3, image_size=64).eval()


@pytest.mark.parametrize("shape", [(1, 3, 64, 96), (3, 64, 64), (1, 1, 64, 64)])
def test_images_of_another_shape(small_model, shape):
    with pytest.raises(ValueError, match=r"images must have shape \[B, 3, 64, 64\]"):
        small_model(torch.zeros(shape))


def test_bad_ground_truth(small_model):
    outputs = small_model(torch.zeros(2, 3, 64, 64))
    boxes, labels = torch.zeros(2, 4, 4), torch.full((2, 4), -1)
    with pytest.raises(ValueError, match=r"gt_boxes must have shape \[2, 4, 4\], got \[2, 4, 5\]"):
        small_model.loss(outputs, torch.zeros(2, 4, 5), labels)
    with pytest.raises(ValueError, match=r"gt_labels must have shape \[2, M\], got \[1, 4\]"):
        small_model.loss(outputs, boxes, labels[:1])
    with pytest.raises(TypeError, match="gt_labels must be int64, got torch.float32"):
        small_model.loss(outputs, boxes, labels.float())
    with pytest.raises(TypeError, match="gt_boxes must be floating point, got torch.int64"):
        small_model.loss(outputs, boxes.long(), labels)
    with pytest.raises(ValueError, match="gt_labels must be below num_classes = 3, got 3"):
        small_model.loss(outputs, boxes, torch.full((2, 4), 3))


def test_bad_outputs(small_model):
    cls_outputs, box_outputs = small_model(torch.zeros(2, 3, 64, 64))
    with pytest.raises(ValueError, match="detect: class outputs must have shapes .*27, 8, 8.*got"):
        small_model.detect((cls_outputs[1:], box_outputs))
    with pytest.raises(ValueError, match="loss: box outputs must have shapes .*36, 8, 8.*got"):
        small_model.loss((cls_outputs, cls_outputs), torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"clip_sizes must have shape \[2, 2\], got \[2\]"):
        small_model.detect((cls_outputs, box_outputs), clip_sizes=torch.zeros(2))
