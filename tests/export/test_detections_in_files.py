"""Candidates and non-maximum suppression alone, as ONNX and as a program, on head outputs full of equal scores."""

import dataclasses

import numpy as np
import onnxruntime
import pytest
import torch

from effdet_fast.export.graph import FinalDetections
from effdet_fast.export.onnx_file import translated
from effdet_fast.export.onnx_operators import OnnxOperators
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
    """Logits in steps of 1/4, up to 1.75; those of the last image but one up to -0.75, of the last far below."""
    config = model.config
    shift = torch.zeros(batch, 1, 1, 1)
    shift[-2:] = torch.tensor([-2.5, -30.0]).view(2, 1, 1, 1)
    levels = [(config.anchors_per_cell, *size) for size in model.cache.sizes]
    classes = [torch.randint(-20, 8, (batch, a * config.num_classes, h, w)) / 4 + shift for a, h, w in levels]
    return classes, [torch.randn(batch, a * 4, h, w) * 0.4 for a, h, w in levels]


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
        )
        expected = {name: getattr(expected, name).numpy() for name in NAMES}
        if case == "threshold" and count == 4:
            assert expected["counts"][3] == 0 < expected["counts"][2] < expected["counts"][0]
        if case == "more_rows_than_candidates":
            assert (expected["counts"] == 30).all()
        assert len(np.unique(expected["scores"][0])) < 30  # or there would be no ties to speak of
        if format == "onnx":
            feeds = dict(zip(inputs, (x.numpy() for x in (*classes, *boxes)), strict=True))
            got = dict(zip(NAMES, session.run(None, feeds), strict=True))
        else:
            got = {name: value.numpy() for name, value in program.module()((classes, boxes)).items()}
        assert_same(got, expected)
