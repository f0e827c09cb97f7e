"""Same weights, same numbers as torchvision's RetinaNet: outputs, losses, gradients, BatchNorm statistics, detections."""

from __future__ import annotations

import copy

import pytest
import torch

from effdet_fast.models import create_model, list_models
from tests.checks import distance
from tests.generated_data import random_objects
from tests.models.torchvision_models import model_pair, peer_key, peer_model

SIZE = (96, 128)
NAMES = [name for name in list_models() if name.startswith("retinanet")]
QUICK = ("retinanet_resnet18_fpn", "retinanet_resnet18_fpn_v2")
MOSTLY_SLOW = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]


def images(batch: int, size: tuple[int, int], seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def concat(outputs, values: int) -> torch.Tensor:
    """[B, N, values], as torchvision's heads join their levels."""
    return torch.cat([level.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, values)) for level in outputs], 1)


def assert_outputs_close(pair, x) -> None:
    with torch.no_grad():
        cls_outputs, box_outputs = pair.ours(x)
        expected = pair.peer.head(list(pair.peer.backbone(x).values()))
    for actual, wanted in (
        (concat(cls_outputs, pair.ours.config.num_classes), expected["cls_logits"]),
        (concat(box_outputs, 4), expected["bbox_regression"]),
    ):
        # A comparison of outputs that are all alike would say little.
        assert wanted.std() > 0.05
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_head_outputs(name):
    assert_outputs_close(model_pair(name, SIZE), images(2, SIZE))


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_head_outputs_in_channels_last(name):
    pair = model_pair(name, SIZE)
    ours = copy.deepcopy(pair.ours).to(memory_format=torch.channels_last)
    assert_outputs_close(pair._replace(ours=ours), images(2, SIZE).to(memory_format=torch.channels_last))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_head_outputs_at_full_size(name):
    size = create_model(name).config.image_size
    assert size == (800, 800)
    assert_outputs_close(model_pair(name, size), images(1, size))


def losses_and_gradients(model, losses_of, dtype, x, gt_boxes, gt_labels, fixed_statistics: bool = False):
    """(class loss, box loss), the gradients of their sum, and the model afterwards; in training mode."""
    model = copy.deepcopy(model).to(dtype).train()
    for module in model.modules():
        if fixed_statistics and isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    cls, box = losses_of(model, x.to(dtype), gt_boxes, gt_labels)
    (cls + box).backward()
    gradients = {key: parameter.grad.double() for key, parameter in model.named_parameters()}
    return (cls.detach(), box.detach()), gradients, model


def peer_losses(model, x, gt_boxes, gt_labels):
    targets = [{"boxes": b[k >= 0].to(x), "labels": k[k >= 0]} for b, k in zip(gt_boxes, gt_labels, strict=True)]
    losses = model(list(x), targets)
    return losses["classification"], losses["bbox_regression"]


def our_losses(model, x, gt_boxes, gt_labels):
    loss = model(x, (gt_boxes, gt_labels))
    torch.testing.assert_close(loss.total, loss.cls + loss.box, rtol=1e-6, atol=0)
    return loss.cls, loss.box


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_losses_gradients_and_statistics_in_training_mode(name):
    """Every gradient is the peer's in float64; with ignored anchors, and an image without objects."""
    peer, ours = model_pair(name, SIZE, 5)
    problem = images(2, SIZE), *random_objects(2, 12, SIZE, 5)
    assert (ours.assign(*problem[1:]).labels == -2).any()
    expected, exact, trained = losses_and_gradients(peer, peer_losses, torch.float64, *problem)
    actual, gradients, our_trained = losses_and_gradients(ours, our_losses, torch.float64, *problem)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    gradients = {peer_key(key): gradient for key, gradient in gradients.items()}
    assert gradients.keys() == exact.keys()
    for key, gradient in gradients.items():
        assert (gradient - exact[key]).norm() <= 1e-5 * exact[key].norm(), key
    statistics = {key: value for key, value in trained.state_dict().items() if "running" in key}
    assert statistics
    for key, value in our_trained.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(value, statistics.pop(peer_key(key)), rtol=1e-6, atol=1e-9)
    assert not statistics


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_losses_and_gradients_in_float32(name):
    """With fixed statistics: those of a few values turn rounding into gradients that are off by a percent, torchvision's too.

    Gradients are taken together: rounding decides on which side of a ReLU's kink a value falls, and one that changes sides
    changes the gradient of its own layer most.
    """
    peer, ours = model_pair(name, SIZE, 5)
    problem = images(2, SIZE), *random_objects(2, 12, SIZE, 5)
    expected, wanted, _ = losses_and_gradients(peer, peer_losses, torch.float32, *problem, fixed_statistics=True)
    actual, gradients, _ = losses_and_gradients(ours, our_losses, torch.float32, *problem, fixed_statistics=True)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)
    assert distance(gradients.values(), [wanted[peer_key(key)] for key in gradients]) <= 1e-3


def with_area(detections):
    """The first 300 of each image's, without boxes that were clipped to nothing, which we leave out."""
    for found in detections:
        rows = (found["boxes"][:, 2:] > found["boxes"][:, :2]).all(1).nonzero().flatten()[:300]
        yield {key: value[rows] for key, value in found.items()}


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_post_processing_of_equal_outputs(name):
    peer, ours = model_pair(name, SIZE)
    x = images(2, SIZE)
    with torch.no_grad():
        outputs = ours(x)
        found = ours.predict(x)
    counts = [9 * level.shape[2] * level.shape[3] for level in outputs[0]]
    logits, deltas = (concat(levels, values).split(counts, 1) for levels, values in zip(outputs, (91, 4), strict=True))
    anchors = [list(ours.anchors().split(counts))] * 2
    peer = copy.copy(peer)
    peer.detections_per_img = 10**6
    expected = peer.postprocess_detections({"cls_logits": logits, "bbox_regression": deltas}, anchors, [SIZE] * 2)
    # The limit of each level and the one of all detections have both been at work.
    assert (torch.sigmoid(logits[0]) > 0.05).flatten(1).sum(1).min() > 1000
    assert found.counts.tolist() == [300, 300] and found.boxes.shape == (2, 300, 4)
    for image, wanted in enumerate(with_area(expected)):
        assert torch.equal(found.labels[image], wanted["labels"])
        torch.testing.assert_close(found.scores[image], wanted["scores"], rtol=1e-6, atol=0)
        torch.testing.assert_close(found.boxes[image], wanted["boxes"], rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_detections_from_images(name):
    """In float64, where rounding swaps no detections of nearly equal score."""
    peer, ours = (copy.deepcopy(model).double() for model in model_pair(name, SIZE, 5))
    x = images(2, SIZE).double()
    peer.detections_per_img = 10**6
    with torch.no_grad():
        expected = peer(list(x))
    found = ours.predict(x)
    for image, wanted in enumerate(with_area(expected)):
        count = int(found.counts[image])
        assert 20 < count == len(wanted["labels"])
        assert torch.equal(found.labels[image, :count], wanted["labels"])
        torch.testing.assert_close(found.boxes[image, :count], wanted["boxes"], rtol=0, atol=1e-4)
        torch.testing.assert_close(found.scores[image, :count], wanted["scores"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["retinanet_resnet18_fpn", "retinanet_resnet50_fpn_v2"])
def test_initial_weights_have_torchvisions_scale(name):
    torch.manual_seed(0)
    ours, peer = create_model(name, 5), peer_model(name, SIZE, 5).state_dict()
    for key, value in ours.state_dict().items():
        wanted = peer[peer_key(key)]
        if value.dim() == 4:
            assert value.std().item() == pytest.approx(wanted.std().item(), rel=0.1), key
        else:
            torch.testing.assert_close(value, wanted, msg=lambda text, key=key: f"{key}: {text}")
