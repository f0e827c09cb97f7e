"""What models make of boxes without area, and of boxes that are none: objects of a loss, and detections beside the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from effdet_fast import Detector
from effdet_fast.data import CocoDetection, create_loader
from effdet_fast.evaluation import detect_all
from effdet_fast.evaluation.trained_model import TrainedModel
from effdet_fast.models import create_model
from tests.checks import all_equal
from tests.generated_data import make_dataset

NAMES = ["efficientdet_lite0", "retinanet_resnet18_fpn", "retinanet_resnet18_fpn_v2"]
each_name = pytest.mark.parametrize("name", NAMES)


def small(name):
    torch.manual_seed(0)
    return create_model(name, 3, image_size=128, fpn_channels=32, fpn_cells=1, head_repeats=1)


@each_name
@pytest.mark.parametrize("box", [(10.0, 10, 10, 40), (10.0, 40, 60, 40), (7.0, 7, 7, 7)])
def test_an_object_without_area_takes_no_part(name, box):
    model, images = small(name).train(), torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        outputs = model(images)
    leaves = [[x.requires_grad_() for x in levels] for levels in outputs]
    sound, labels = [5.0, 5, 60, 60], torch.ones(2, 2, dtype=torch.int64)
    boxes = torch.tensor([[list(box), sound], [list(box), list(box)]])
    loss = model.loss(leaves, boxes, labels)
    there = torch.tensor([[-1, 1], [-1, -1]])
    assert all_equal(loss, model.loss(leaves, boxes, there))
    loss.total.backward()
    assert loss.total.isfinite() and all(x.grad.isfinite().all() for levels in leaves for x in levels)
    assert model.assign(boxes, labels).num_positives[1] == 0


@each_name
@pytest.mark.parametrize("box", [(90.0, 90, 10, 10), (float("nan"), 1, 2, 3), (0.0, 0, float("inf"), 3)])
def test_an_object_that_is_no_box_is_named(name, box):
    model, images = small(name).train(), torch.randn(2, 3, 128, 128)
    sound = torch.tensor([[5.0, 5, 60, 60]])
    targets = [
        {"boxes": sound, "labels": torch.tensor([0])},
        {"boxes": torch.cat([sound, torch.tensor([box])]), "labels": torch.tensor([0, 1])},
    ]
    with pytest.raises(ValueError, match=r"gt_boxes\[1, 1\] \(image 1, box 1\) must be finite .* got \[") as raised:
        model(images, targets)
    assert str(raised.value).endswith(str(torch.tensor(box).tolist()))


def best_at_the_bottom(name="efficientdet_lite0"):
    """A model that finds something at each anchor, surest at the lowest ones, and shifts nothing."""
    model = small(name).eval()
    cells = model.config.anchors_per_cell

    def forward(images):
        classes, boxes = [], []
        for height, width in model._anchors.sizes:
            rows = torch.linspace(-3, 3, height).view(1, 1, height, 1)
            rows = rows + torch.arange(3 * cells).view(1, -1, 1, 1) * 1e-3
            classes.append(rows.expand(len(images), 3 * cells, height, width).contiguous())
            boxes.append(torch.zeros(len(images), 4 * cells, height, width))
        return classes, boxes

    model.forward = forward
    return model


def has_area(boxes):
    return (boxes[..., 2:] > boxes[..., :2]).all(-1)


@each_name
def test_detections_in_the_padding_use_up_no_place(name):
    model = best_at_the_bottom(name)
    outputs, sizes = model(torch.zeros(2, 3, 128, 128)), torch.tensor([[128.0, 128.0], [30.0, 128.0]])
    found = model.detect(outputs, clip_sizes=sizes, max_detections=50)
    assert found.counts.tolist() == [50, 50] and has_area(found.boxes).all()
    nothing = model.detect(outputs, clip_sizes=torch.zeros(2, 2), max_detections=50)
    assert not nothing.counts.any() and (nothing.labels == -1).all() and not nothing.boxes.any()


def wide_pictures(folder, count=2):
    """Of which a square input shows a quarter of its height."""
    return make_dataset(folder, images=count, size=(32, 128))


def test_a_detector_fills_its_places_with_boxes_on_the_picture():
    model = best_at_the_bottom()
    half, device = (0.5, 0.5, 0.5), torch.device("cpu")
    detector = Detector(TrainedModel(model, ["a", "b", "c"], [1, 2, 3], half, half, (128, 128), device))
    found = detector.predict(Image.new("RGB", (256, 64)), score_threshold=None, max_detections=40)
    assert len(found) == 40
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all() and np.diff(found.scores).max() <= 0


def test_an_evaluation_counts_boxes_on_the_picture(tmp_path):
    dataset, half = CocoDetection(*wide_pictures(tmp_path)), (0.5, 0.5, 0.5)
    loader = create_loader(dataset, image_size=(128, 128), batch_size=2, mean=half, std=half, workers=0, training=False)
    rows = detect_all(best_at_the_bottom(), loader, dataset, device="cpu", max_detections=40)
    assert len(rows) == 40 * len(dataset)
    assert min(min(row["bbox"][2:]) for row in rows) > 0
