"""COCO metrics: known answers, ids that survive, crowd, gathering over processes."""

import json
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from effdet_fast.data import CocoDetection, Placement, create_loader
from effdet_fast.data.annotations import read_annotations
from effdet_fast.evaluation import METRICS, coco_metrics, coco_results, detect_all, evaluate_model, image_results
from tests.generated_data import make_dataset

SIZE = (64, 80)


class Padded(NamedTuple):
    boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    counts: torch.Tensor


class Oracle(nn.Module):
    """Says what the annotations say, for the images in the order in which an evaluation loader gives them."""

    def __init__(self, dataset, image_size=SIZE, order=None, label_shift=0, found=True):
        super().__init__()
        self.dataset, self.image_size, self.label_shift, self.found = dataset, image_size, label_shift, found
        self.order = list(range(len(dataset))) if order is None else list(order)
        self.next = 0
        self.saw_training = []

    def forward(self, images):
        self.saw_training.append(self.training or torch.is_grad_enabled())
        assert images.dtype == torch.float32 and tuple(images.shape[2:]) == self.image_size
        self.next += len(images)
        return [torch.tensor(self.order[self.next - len(images) : self.next])], []

    def detect(self, outputs, *, score_threshold=None, iou_threshold=0.5, max_detections=100, clip_sizes=None):
        indices = outputs[0][0].tolist()
        expected = [Placement.letterbox(self.dataset.size(i), self.image_size).visible for i in indices]
        assert clip_sizes.tolist() == [list(size) for size in expected]
        n = len(indices)
        boxes, scores = torch.zeros(n, max_detections, 4), torch.zeros(n, max_detections)
        labels, counts = torch.full((n, max_detections), -1), torch.zeros(n, dtype=torch.int64)
        for row, i in enumerate(indices):
            true_boxes, true_labels = self.dataset.boxes(i)
            if not self.found:
                continue
            k = counts[row] = len(true_boxes)
            placement = Placement.letterbox(self.dataset.size(i), self.image_size)
            boxes[row, :k] = torch.from_numpy(placement.apply_boxes(true_boxes))
            scores[row, :k] = torch.linspace(0.9, 0.5, int(k))
            labels[row, :k] = (torch.from_numpy(true_labels) + self.label_shift) % len(self.dataset.category_ids)
        return Padded(boxes, scores, labels, labels, counts)


@pytest.fixture
def dataset(tmp_path):
    return CocoDetection(*make_dataset(tmp_path, images=7, size=(70, 111), seed=1))


def loader_of(dataset, batch_size=3, **options):
    options = {"image_size": SIZE, "mean": (0.5,) * 3, "std": (0.5,) * 3, "workers": 0, "training": False, **options}
    return create_loader(dataset, batch_size=batch_size, **options)


def test_perfect_detections_have_ap_one(dataset, capsys):
    model = Oracle(dataset).train()
    metrics = evaluate_model(model, loader_of(dataset), dataset, device="cpu")
    assert list(metrics) == list(METRICS)
    assert metrics["AP"] == pytest.approx(1.0) and metrics["AR100"] == pytest.approx(1.0)
    assert model.training and not any(model.saw_training)
    assert capsys.readouterr().out == ""


def test_unknown_precision_is_refused(dataset):
    with pytest.raises(ValueError, match="amp must be None, 'bf16' or 'fp16', got 'fp8'"):
        evaluate_model(Oracle(dataset), loader_of(dataset), dataset, device="cpu", amp="fp8")


def test_mode_comes_back_after_an_error(dataset):
    model = Oracle(dataset, order=[99] * 99).train()
    with pytest.raises(IndexError):
        evaluate_model(model, loader_of(dataset), dataset, device="cpu")
    assert model.training


def test_shifted_classes_have_ap_zero(dataset):
    assert evaluate_model(Oracle(dataset, label_shift=1), loader_of(dataset), dataset, device="cpu")["AP"] < 0.05


def test_no_detections_have_ap_zero(dataset):
    assert evaluate_model(Oracle(dataset, found=False), loader_of(dataset), dataset, device="cpu")["AP"] == 0.0


def test_no_annotations_give_minus_one(tmp_path):
    images, file = make_dataset(tmp_path, images=3)
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "annotations": []}))
    dataset = CocoDetection(images, file)
    metrics = evaluate_model(Oracle(dataset), loader_of(dataset), dataset, device="cpu")
    assert set(metrics.values()) == {-1.0}


def test_category_and_image_ids_are_the_files(dataset):
    rows = detect_all(Oracle(dataset), loader_of(dataset), dataset, device="cpu")
    content = json.loads(open(dataset.annotations_file).read())
    expected = {(a["image_id"], a["category_id"], *np.round(a["bbox"]).astype(int)) for a in content["annotations"]}
    assert {(r["image_id"], r["category_id"], *np.round(r["bbox"]).astype(int)) for r in rows} == expected
    assert {r["category_id"] for r in rows} <= {3, 7, 40}
    json.dumps(rows)


def by_pycocotools(file, rows):
    truth = COCO(str(file))
    evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


def noisy_rows(dataset, seed):
    rng = np.random.default_rng(seed)
    rows = []
    for i, image_id in enumerate(dataset.image_ids):
        boxes, labels = dataset.boxes(i)
        for box, label in zip(np.repeat(boxes, 3, axis=0), np.repeat(labels, 3), strict=True):
            box = box + rng.normal(0, 3, 4)
            category = dataset.category_ids[label if rng.random() < 0.8 else (label + 1) % 3]
            bbox = [float(v) for v in (*box[:2], *np.maximum(box[2:] - box[:2], 1))]
            score = float(rng.random())
            rows.append({"image_id": image_id, "category_id": category, "bbox": bbox, "score": score})
    return rows


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_pycocotools_on_the_file(tmp_path, seed):
    images, file = make_dataset(tmp_path, images=12, size=(150, 200), seed=seed)
    content = json.loads(file.read_text())
    for k, row in enumerate(content["annotations"]):
        row["iscrowd"] = int(k % 5 == 0)
    content["annotations"][1]["bbox"][0] -= 30
    file.write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = CocoDetection(images, file)
    rows = noisy_rows(dataset, seed)
    assert 0.05 < coco_metrics(dataset.annotations, rows)["AP"] < 0.95
    np.testing.assert_allclose(
        list(coco_metrics(dataset.annotations, rows).values()), by_pycocotools(file, rows), rtol=0, atol=1e-12
    )


def many_objects(tmp_path, count=200):
    """One image with so many objects in a grid, and perfect results for them."""
    boxes = [[20 * (i % 20), 20 * (i // 20), 10, 10] for i in range(count)]
    row = {"image_id": 1, "category_id": 1}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 400, "height": 400}],
        "categories": [{"id": 1, "name": "tree"}],
        "annotations": [{**row, "id": i + 1, "bbox": box} for i, box in enumerate(boxes)],
    }
    file = tmp_path / "many.json"
    file.write_text(json.dumps(content))
    return read_annotations(file), [{**row, "bbox": box, "score": 1 - i / 1000} for i, box in enumerate(boxes)]


def test_more_objects_than_cocos_limit(tmp_path):
    annotations, perfect = many_objects(tmp_path)
    with pytest.warns(
        UserWarning, match=r"1 of 1 images have more objects than the 100 detections .*\(a.png has 200\)"
    ):
        metrics = coco_metrics(annotations, perfect)
    assert list(metrics) == list(METRICS) and metrics["AP"] == pytest.approx(0.505, abs=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        raised = coco_metrics(annotations, perfect, max_detections=300)
    assert {name: raised[name] for name in METRICS} == metrics
    assert {name: raised[name] for name in set(raised) - set(METRICS)} == dict.fromkeys(
        ("AP@300", "AP50@300", "AP75@300", "AR@300"), pytest.approx(1.0)
    )


@pytest.mark.parametrize("limit", [5, 1000])
def test_another_limit_gives_what_pycocotools_accumulates_for_it(tmp_path, limit):
    images, file = make_dataset(tmp_path, images=6, size=(150, 200), max_boxes=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = CocoDetection(images, file)
        rows = noisy_rows(dataset, 3)
        metrics = coco_metrics(dataset.annotations, rows, limit)
    truth = COCO(str(file))
    evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
    evaluation.params.maxDets = [limit]
    evaluation.evaluate()
    evaluation.accumulate()
    precision, recall = evaluation.eval["precision"][..., 0, 0], evaluation.eval["recall"][..., 0, 0]
    assert metrics[f"AP@{limit}"] == pytest.approx(precision[precision > -1].mean(), abs=1e-12)
    assert metrics[f"AP75@{limit}"] == pytest.approx(precision[5][precision[5] > -1].mean(), abs=1e-12)
    assert metrics[f"AR@{limit}"] == pytest.approx(recall[recall > -1].mean(), abs=1e-12)


def crowd_file(tmp_path, iscrowd):
    row = {"image_id": 1, "category_id": 9, "area": 400, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 100}],
        "categories": [{"id": 9, "name": "thing"}],
        "annotations": [
            {**row, "id": 0, "bbox": [0, 0, 20, 20]},
            {**row, "id": 1, "bbox": [40, 40, 50, 50], "area": 2500, "iscrowd": iscrowd},
        ],
    }
    file = tmp_path / f"crowd{iscrowd}.json"
    file.write_text(json.dumps(content))
    return read_annotations(file)


def test_crowd_is_ignored_and_annotation_id_zero_counts(tmp_path):
    row = {"image_id": 1, "category_id": 9}
    inside_crowd = [{**row, "bbox": [45.0 + i, 45, 10, 10], "score": 0.9} for i in range(3)]
    rows = [*inside_crowd, {**row, "bbox": [0.0, 0, 20, 20], "score": 0.5}]
    assert coco_metrics(crowd_file(tmp_path, 1), rows)["AP"] == pytest.approx(1.0)
    assert coco_metrics(crowd_file(tmp_path, 0), rows)["AP"] < 0.3


def test_result_for_an_unknown_image_is_refused(tmp_path):
    row = {"image_id": 5, "category_id": 9, "bbox": [0, 0, 1, 1], "score": 0.5}
    with pytest.raises(ValueError, match="no image with id 5"):
        coco_metrics(crowd_file(tmp_path, 0), [row])


def test_image_results_drop_padding_and_what_is_not_finite():
    boxes = torch.tensor([[[0.0, 0, 32, 40], [0, 0, float("nan"), 4], [1, 1, 500, 600], [-1, -1, -1, -1]]])
    detections = Padded(
        boxes, torch.tensor([[0.9, 0.8, 0.7, 0.0]]), torch.tensor([[1, 0, 0, -1]]), None, torch.tensor([3])
    )
    with pytest.warns(UserWarning, match="1 detections"):
        (result,) = image_results(detections, torch.tensor([[128, 100]]), (64, 64))
    np.testing.assert_allclose(result.boxes, [[0, 0, 64, 80], [2, 2, 100, 128]])
    assert result.labels.tolist() == [1, 0]
    rows = coco_results([result], [77], [30, 10])
    assert rows[0] == {"image_id": 77, "category_id": 10, "bbox": [0, 0, 64, 80], "score": pytest.approx(0.9)}
    with pytest.raises(ValueError, match="label 1 has no category id"):
        coco_results([result], [77], [30])


def test_training_loader_and_partial_loader_are_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="training=False"):
        evaluate_model(Oracle(dataset), loader_of(dataset, training=True), dataset, device="cpu")
    half = loader_of(dataset, rank=0, world_size=2)
    with pytest.raises(ValueError, match="each of the 7 images once"):
        evaluate_model(Oracle(dataset, order=range(0, 7, 2)), half, dataset, device="cpu")
