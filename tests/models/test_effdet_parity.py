"""Same weights, same numbers as effdet: outputs, losses, gradients, BatchNorm statistics, detections."""

from __future__ import annotations

import copy

import effdet
import pytest
import torch
from effdet.anchors import AnchorLabeler, Anchors
from effdet.bench import DetBenchPredict, _batch_detection, _post_process
from effdet.loss import DetectionLoss

from effdet_fast.models import list_models, model_config
from tests.checks import distance
from tests.generated_data import random_objects
from tests.models.effdet_models import Pair, model_pair, peer_name

NAMES = [name for name in list_models() if name.startswith("efficientdet")]
QUICK = ("efficientdet_d0", "efficientdet_lite0", "efficientdet_d0_symmetric")
# Odd feature maps on every level (17x25, 9x13, 5x7, 3x4, 2x2), and strides that are not whole.
ODD = (136, 200)
SIZES = {name: (128, 128) if name == "efficientdet_d0" else ODD for name in NAMES}


def slow_unless(quick) -> list:
    """All names, those not in `quick` left to make test-full."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in NAMES]


@pytest.fixture(scope="module", params=slow_unless(QUICK))
def pair(request) -> Pair:
    """effdet's model and ours for small images, equal weights; leave them as they are."""
    return model_pair(request.param, SIZES[request.param])


def images(batch: int, size: tuple[int, int], seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def assert_outputs_close(ours, peer, atol: float = 1e-4) -> None:
    for our_levels, peer_levels in zip(ours, peer, strict=True):
        assert len(our_levels) == len(peer_levels) >= 5
        for our_level, peer_level in zip(our_levels, peer_levels, strict=True):
            assert our_level.shape == peer_level.shape
            # A comparison of outputs that are all alike would say little.
            assert peer_level.std() > 0.05
            torch.testing.assert_close(our_level, peer_level, atol=atol, rtol=0)


def peer_loss(peer, outputs, gt_boxes, gt_labels):
    """effdet's labels and loss; its boxes are yxyx and its classes count from 1."""
    labeler = AnchorLabeler(Anchors.from_config(peer.config), peer.config.num_classes)
    valid = gt_labels >= 0
    boxes = [image_boxes[keep][:, [1, 0, 3, 2]] for image_boxes, keep in zip(gt_boxes, valid, strict=True)]
    labels = [image_labels[keep] + 1 for image_labels, keep in zip(gt_labels, valid, strict=True)]
    return DetectionLoss(peer.config)(*outputs, *labeler.batch_label_anchors(boxes, labels))


def test_state_dict_keys_and_their_order_are_effdets(pair):
    assert list(pair.ours.state_dict()) == list(pair.peer.state_dict())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_head_outputs(pair, layout):
    x = images(2, pair.ours.config.image_size)
    ours = copy.deepcopy(pair.ours).to(memory_format=layout)
    with torch.no_grad():
        assert_outputs_close(ours(x.to(memory_format=layout)), pair.peer(x))


def check_head_outputs(name, size) -> None:
    peer, ours = model_pair.__wrapped__(name, size)
    x = images(1, size)
    with torch.no_grad():
        assert_outputs_close(ours(x), peer(x))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*QUICK, "efficientdet_d7")])
def test_head_outputs_of_every_model(name):
    """Feature maps of 9x13, 5x7, 3x4, 2x2 and 1x1. The layers of D7 are those of D6."""
    check_head_outputs(name, (72, 104))


@pytest.mark.parametrize("name", slow_unless(QUICK[:2]))
def test_head_outputs_at_released_size(name):
    size = model_config(name).image_size
    assert size == tuple(effdet.get_efficientdet_config(peer_name(name)).image_size)
    check_head_outputs(name, size)


def test_losses_and_gradients_in_eval_mode(pair):
    peer, ours = copy.deepcopy(pair)
    size = ours.config.image_size
    check_losses_and_gradients(peer, ours, images(3, size), *random_objects(3, 12, size, 90), loss_rtol=1e-5)


def test_training_mode(pair):
    """Batch statistics, drop path under one seed, and the running statistics and counters left behind."""
    peer, ours = copy.deepcopy(pair)
    size = ours.config.image_size
    peer.train()
    ours.train()
    # The coarsest levels take statistics of a few values: rounding moves effdet's own losses by 3e-5.
    check_losses_and_gradients(peer, ours, images(3, size), *random_objects(3, 12, size, 90), loss_rtol=1e-4)
    for (key, our_value), peer_value in zip(ours.state_dict().items(), peer.state_dict().values(), strict=True):
        torch.testing.assert_close(our_value, peer_value, atol=1e-4, rtol=1e-4, msg=lambda text, key=key: key + text)


def check_losses_and_gradients(peer, ours, x, gt_boxes, gt_labels, loss_rtol: float) -> None:
    """Equal in float64. In float32 ours are as near to those: within 1e-3 of each gradient, or no further off than effdet's own.

    Some gradients are small differences of large sums, which float32 does not give to 1e-3 in either model. In deeper models
    rounding also decides which pixel some max-pooling takes, so that theirs are judged together.
    """
    exact_peer, exact_ours = copy.deepcopy(peer).double(), copy.deepcopy(ours).double()
    expected, exact = losses_and_gradients(exact_peer, peer_losses_of, x.double(), gt_boxes, gt_labels)
    actual, gradients = losses_and_gradients(exact_ours, losses_of, x.double(), gt_boxes, gt_labels)
    assert expected[1] > 0.1 and expected[2] > 1e-3
    assert_losses_close(actual, expected, 1e-6)
    assert gradients.keys() == exact.keys()
    # Before a BatchNorm on batch statistics, a bias has no gradient but rounding noise of what flows past it.
    noise = 1e-7 * torch.stack([gradient.norm() for gradient in exact.values()]).norm()
    for key, gradient in gradients.items():
        error, bound = (gradient - exact[key]).norm(), 1e-6 * exact[key].norm() + noise
        assert error <= bound, f"{key}: gradients differ by {error}, allowed {bound}"

    expected, peer_gradients = losses_and_gradients(peer, peer_losses_of, x, gt_boxes, gt_labels)
    actual, gradients = losses_and_gradients(ours, losses_of, x, gt_boxes, gt_labels)
    assert_losses_close(actual, expected, loss_rtol)
    if ours.config.activation == "relu6":
        return  # rounding decides on which side of its kinks some values fall, and with them their whole gradients
    if ours.config.name not in QUICK:
        # On batch statistics of few values, effdet's own float32 gradients are off by up to half a percent.
        assert ours.training or distance(gradients.values(), [exact[key] for key in gradients]) <= 1e-3
        return
    for key, gradient in gradients.items():
        error, of_peer = (gradient - exact[key]).norm(), (peer_gradients[key] - exact[key]).norm()
        bound = max(1e-3 * exact[key].norm() + noise, of_peer)
        assert error <= bound, f"{key}: float32 gradients are off by {error}, allowed {bound}"


def peer_losses_of(model, x, gt_boxes, gt_labels):
    return peer_loss(model, model(x), gt_boxes, gt_labels)


def losses_of(model, x, gt_boxes, gt_labels):
    return model.loss(model(x), gt_boxes, gt_labels)


def losses_and_gradients(model, losses_of, x, gt_boxes, gt_labels):
    torch.manual_seed(3)
    losses = losses_of(model, x, gt_boxes, gt_labels)
    losses[0].backward()
    return losses, {key: value.grad for key, value in model.named_parameters()}


def assert_losses_close(actual, expected, rtol: float) -> None:
    for our_value, peer_value in zip(actual, expected, strict=True):
        torch.testing.assert_close(our_value, peer_value, rtol=rtol, atol=0, check_dtype=False)


@pytest.mark.parametrize("what", ["padding only", "no rows"])
def test_loss_of_a_batch_without_objects(what):
    pair = model_pair("efficientdet_lite0", ODD)
    rows = 4 if what == "padding only" else 0
    gt_boxes, gt_labels = torch.full((2, rows, 4), -1.0), torch.full((2, rows), -1)
    outputs = pair.ours(images(2, ODD))
    loss = pair.ours.loss(outputs, gt_boxes, gt_labels)
    expected = peer_loss(pair.peer, outputs, gt_boxes, gt_labels)
    assert loss.box == 0.0
    torch.testing.assert_close(loss.total, expected[0], rtol=1e-5, atol=0)
    loss.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in pair.ours.parameters())


def with_area(detections):
    """The first 100 of each image's, without boxes that were clipped to nothing, which we leave out."""
    return torch.stack([rows[(rows[:, 2:4] > rows[:, :2]).all(1)][:100] for rows in detections])


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("clip", [False, True])
def test_post_processing_of_equal_outputs(name, clip):
    """In float32, where other weights may give equal scores, whose order effdet leaves open."""
    pair = model_pair(name, SIZES[name])
    config = pair.ours.config
    with torch.no_grad():
        outputs = pair.ours(images(2, config.image_size))
    # effdet takes (width, height) of the original image and scales back; a scale of 1 leaves pixels of the input.
    sizes = torch.tensor([[100.0, 128.0], [70.0, 55.0]]) if clip else None
    selected = _post_process(*outputs, num_levels=config.num_levels, num_classes=90)
    expected = _batch_detection(
        2,
        *selected[:2],
        Anchors.from_config(pair.peer.config).boxes,
        *selected[2:],
        img_scale=torch.ones(2) if clip else None,
        img_size=sizes.flip(1) if clip else None,
        max_det_per_image=5000,
    )
    expected = with_area(expected)
    actual = pair.ours.detect(outputs, clip_sizes=sizes)
    assert actual.counts.tolist() == [100, 100]
    assert len(actual.labels.unique()) > 1
    torch.testing.assert_close(actual.boxes, expected[..., :4], rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(actual.scores, expected[..., 4], rtol=1e-6, atol=0)
    assert torch.equal(actual.labels + 1, expected[..., 5].long())


def test_detections_from_images(pair):
    """In float64, where rounding swaps no detections of nearly equal score."""
    peer, ours = (model.double() for model in copy.deepcopy(pair))
    x = images(2, ours.config.image_size).double()
    found = ours.predict(x)
    with torch.no_grad():
        height, width = ours.config.image_size
        info = {"img_scale": torch.ones(2), "img_size": torch.tensor([[width, height]] * 2)}
        bench = DetBenchPredict(peer)
        bench.max_det_per_image = 5000
        expected = with_area(bench(x, info))
    assert found.counts.tolist() == [100, 100]
    assert torch.equal(found.labels + 1, expected[..., 5].long())
    torch.testing.assert_close(found.boxes, expected[..., :4], rtol=0, atol=1e-4, check_dtype=False)
    torch.testing.assert_close(found.scores, expected[..., 4], rtol=0, atol=1e-6, check_dtype=False)


def test_detect_thresholds_and_padding():
    ours = model_pair("efficientdet_lite0", ODD).ours
    with torch.no_grad():
        outputs = ours(images(2, ODD))
    every = ours.detect(outputs, max_detections=20)
    threshold = float(every.scores[0, 7] + every.scores[0, 8]) / 2
    few = ours.detect(outputs, max_detections=20, score_threshold=threshold)
    assert few.counts[0] == 8
    assert torch.equal(few.boxes[0, :8], every.boxes[0, :8])
    assert (few.scores[0, :8] > threshold).all() and (few.labels[0, 8:] == -1).all() and (few.scores[0, 8:] == 0).all()
    looser = ours.detect(outputs, iou_threshold=1.0)
    assert not torch.equal(looser.boxes, ours.detect(outputs).boxes)
