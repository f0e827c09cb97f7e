"""`torch.compile` takes each model whole: labels, loss and detections too, not one operator of ours breaks a graph."""

from __future__ import annotations

import pytest
import torch

from effdet_fast.models import create_model
from tests.generated_data import random_objects

NAMES = [
    pytest.param("efficientdet_d0", marks=pytest.mark.slow),
    "efficientdet_lite0",
    "retinanet_resnet18_fpn",
    pytest.param("retinanet_resnet18_fpn_v2", marks=pytest.mark.slow),
]
SIZE = (64, 96)


def small(name: str):
    torch.manual_seed(0)
    return create_model(name, 5, image_size=SIZE, fpn_channels=32, fpn_cells=1, head_repeats=1)


def breaks(function, *arguments) -> int:
    """How often the compiler had to leave a function and enter it again."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.compile(function, backend=count)(*arguments)
    found = sum(torch._dynamo.utils.counters["graph_break"].values())
    assert len(graphs) == 1 + found and sum(len(graph.graph.nodes) for graph in graphs) > 100
    return found


@pytest.mark.parametrize("name", NAMES)
def test_none_in_forward_and_loss(name):
    model = small(name).train()
    assert breaks(model, torch.randn(2, 3, *SIZE), random_objects(2, 5, SIZE, 5)) == 0


@pytest.mark.parametrize("name", [*NAMES[:1], pytest.param("efficientdet_lite0", marks=pytest.mark.slow), *NAMES[2:]])
def test_none_in_predict(name):
    assert breaks(small(name).eval().predict, torch.randn(2, 3, *SIZE)) == 0


def test_a_break_is_counted():
    def broken(x):
        for _ in range(101):
            x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    assert breaks(broken, torch.zeros(1)) == 1
