"""Candidates and non-maximum suppression alone, as ONNX and as a program, on head outputs full of equal scores."""

import dataclasses

import numpy as np
import onnxruntime
import pytest
import torch

from effdet_fast.export.graph import FinalDetections
from effdet_fast.export.onnx_file import onnx_bytes, translated
from effdet_fast.export.onnx_operators import OnnxOperators
from effdet_fast.export.torch_export_file import torch_export_bytes
from effdet_fast.export.torch_operators import TorchOperators
from effdet_fast.models.anchors import AnchorCache
from effdet_fast.models.registry import model_config
from effdet_fast.ops import decode_detections
from tests.export.exported import assert_same

NAMES = ["boxes", "scores", "labels", "counts"]


class Anchored:
    """What `FinalDetections` asks of a model."""

    def __init__(self, config):
        self.config, self.cache = config, AnchorCache(config)

    def anchors(self, device):
        return self.cache.boxes(torch.device(device))


def head_outputs(model, batch):
    """Logits in steps of 1/4, up to 1.75; those of the last image but one up to -0.75, of the last far below.

    Every third anchor of a cell lies beside the image.
    """
    config = model.config
    shift = torch.zeros(batch, 1, 1, 1)
    shift[-2:] = torch.tensor([-2.5, -30.0]).view(2, 1, 1, 1)
    levels = [(config.anchors_per_cell, *size) for size in model.cache.sizes]
    classes = [torch.randint(-20, 8, (batch, a * config.num_classes, h, w)) / 4 + shift for a, h, w in levels]
    boxes = [torch.randn(batch, a * 4, h, w) * 0.4 for a, h, w in levels]
    for x in boxes:
        x[:, ::12] += 100  # the position across the image, or down
    return classes, boxes


CASES = {
    "all_scores": ("efficientdet_d0", {}),
    "threshold": ("efficientdet_d0", {"score_threshold": 0.3, "nms_iou": 0.3, "max_candidates": 300}),
    "per_level": ("retinanet_resnet18_fpn", {"max_candidates": 100, "max_detections": 40}),
    "more_rows_than_candidates": ("efficientdet_d0", {"max_candidates": 30, "max_detections": 50, "nms_iou": 1.0}),
    "nothing_may_touch": ("retinanet_resnet18_fpn", {"nms_iou": 0.0, "score_threshold": 0.01}),
}


def quick_ones():
    for case in CASES:
        for format in ("onnx", "torch_export"):
            is_quick = case == "threshold" or (case, format) == ("per_level", "onnx")
            yield pytest.param(case, format, marks=[] if is_quick else pytest.mark.slow)


@pytest.mark.parametrize(("case", "format"), quick_ones())
def test_order_ties_padding_and_thresholds_are_those_of_the_op(case, format):
    name, options = CASES[case]
    config = dataclasses.replace(model_config(name), image_size=(96, 64), num_classes=3, **options)
    model = Anchored(config)
    operators = TorchOperators(config.nms_iou, config.max_detections)
    if format == "onnx":
        operators = OnnxOperators(config.nms_iou, config.max_detections, config.num_classes)
    graph = FinalDetections(model, operators, config.score_threshold, config.max_detections)
    example = head_outputs(model, 2)
    batch = torch.export.Dim("batch", min=1)
    shapes = (tuple([{0: batch}] * len(levels) for levels in example),)
    program = torch.export.export(graph, (example,), dynamic_shapes=shapes, strict=False)
    if format == "onnx":
        inputs = [f"level_{i}" for i in range(2 * len(example[0]))]
        content = translated(program, inputs, NAMES).model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    for count in (4, 1):
        classes, boxes = head_outputs(model, max(count, 2))
        classes, boxes = [x[:count] for x in classes], [x[:count] for x in boxes]
        expected = decode_detections(
            classes,
            boxes,
            model.anchors("cpu"),
            num_classes=config.num_classes,
            max_candidates=config.max_candidates,
            score_threshold=config.score_threshold,
            iou_threshold=config.nms_iou,
            max_detections=config.max_detections,
            clip_sizes=torch.tensor([[96.0, 64.0]] * count),
            box_coder=config.box_coder,
            candidates_per_level=config.candidates_per_level,
            drop_empty=True,
        )
        expected = {name: getattr(expected, name).numpy() for name in NAMES}
        if case == "threshold" and count == 4:
            assert expected["counts"][3] == 0 < expected["counts"][2] < expected["counts"][0]
        if case == "more_rows_than_candidates":
            assert 10 < expected["counts"].min() and expected["counts"].max() < 30
        assert len(np.unique(expected["scores"][0])) < 30  # or there would be no ties to speak of
        if format == "onnx":
            feeds = dict(zip(inputs, (x.numpy() for x in (*classes, *boxes)), strict=True))
            got = dict(zip(NAMES, session.run(None, feeds), strict=True))
        else:
            got = {name: value.numpy() for name, value in program.module()((classes, boxes)).items()}
        assert_same(got, expected)


def test_largest_orders_all_float32_as_a_stable_sort_does():
    infinite, tiny = float("inf"), 1e-42
    values = torch.tensor([[0.0, -0.0, 1, -1, infinite, -infinite, tiny, -tiny, 1, 3.4e38, -3.4e38, -1, 0.0]])
    values = torch.cat([values, -values, (torch.randn(1, 13) * 2).round() / 4])
    expected = values.sort(dim=1, descending=True, stable=True).indices
    for count in (13, 5):
        assert torch.equal(TorchOperators(0.5, 1).largest(values, count), expected[:, :count])


@pytest.mark.parametrize("write", [onnx_bytes, torch_export_bytes])
def test_operators_that_are_not_standard_are_refused(write):
    class Foreign(torch.nn.Module):
        def forward(self, images):
            x = images[:, :1].float()
            return {"y": torch.ops.effdet_fast.batch_norm_stats(x, False)[0]}

    program = torch.export.export(Foreign(), (torch.zeros(2, 3, 8, 8, dtype=torch.uint8),), strict=False)
    with pytest.raises(ValueError, match=r"own operators only.*batch_norm_stats|do not suffice.*batch_norm_stats"):
        write(program, {"input": "images", "outputs": {"y": "a"}})
