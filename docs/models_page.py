"""Prints docs/models.md: `python docs/models_page.py > docs/models.md`."""

from __future__ import annotations

import torch

from effdet_fast.models import create_model, list_models, summary
from effdet_fast.models.model_summary import ModelSummary

# Billions of FLOPs in the EfficientDet paper (arXiv:1911.09070), and of operations that torchvision states.
PUBLISHED = {
    "efficientdet_d0": 2.54,
    "efficientdet_d1": 6.1,
    "efficientdet_d2": 11,
    "efficientdet_d3": 24.9,
    "efficientdet_d4": 55.2,
    "efficientdet_d5": 135,
    "efficientdet_d6": 226,
    "efficientdet_d7": 325,
    "efficientdet_d7x": 410,
    "retinanet_resnet50_fpn": 151.54,
    "retinanet_resnet50_fpn_v2": 152.24,
}
# The project that the models of a prefix are compared with, the tests that do it, and the models with every comparison.
PEERS = {
    "efficientdet_": (
        "effdet 0.4",
        "tests/models/test_effdet_parity.py",
        ("efficientdet_d0", "efficientdet_lite0"),
    ),
    "retinanet_": (
        "torchvision",
        "tests/models/test_torchvision_parity.py",
        ("retinanet_resnet18_fpn", "retinanet_resnet18_fpn_v2"),
    ),
}
HEADER = ["model", "parameters", "multiply-adds", "published", "activations", "classes", "image", "anchors", "parity"]

BEFORE = """# Models

Written by `python docs/models_page.py > docs/models.md`, which counts on shapes alone. `effdet-fast summary MODEL` shows one
model part by part; `effdet-fast convert` takes its weights to the projects it is compared with, and back.
"""

AFTER = """
- **Parameters**: what training may change. Frozen BatchNorms (RetinaNet's first form) and statistics are not counted.
- **Multiply-adds** of all convolutions and matrix products for one image, depthwise ones and squeeze-and-excite included; a
  multiplication with its addition is one. BatchNorms, activations, fusions and poolings are not counted.
- **Published**: for EfficientDets the paper's FLOPs, which are multiply-adds and one operation more for each value that a
  convolution puts out: our two columns add up to them within a quarter of a percent. (For D5 the paper's repository says 130
  billion where the paper says 135.) For RetinaNets what torchvision states, which counts as we do.
- **Activations**: values that those convolutions and products put out.
- **Anchors** at the given image size, over all levels.

## Parity

Both models get the same random weights under the same names, so that a checkpoint of one loads in the other.

| | compared with | tests |
| --- | --- | --- |
"""


def summaries() -> list[ModelSummary]:
    """Of all models, in the order of `list_models()`."""
    with torch.device("meta"):
        return [summary(create_model(name)) for name in list_models()]


def row(found: ModelSummary) -> str:
    """One line of the table."""
    total = found.total
    height, width = found.image_size
    cells = [
        f"`{found.name}`",
        f"{total.parameters:,}",
        f"{total.multiply_adds / 1e9:.2f} B",
        f"{PUBLISHED[found.name]} B" if found.name in PUBLISHED else "",
        f"{total.activations / 1e6:.1f} M",
        str(found.num_classes),
        f"{height} x {width}",
        f"{found.anchors:,}",
        parity(found.name),
    ]
    return f"| {' | '.join(cells)} |"


def parity(name: str) -> str:
    """What is compared for a model, and with whom."""
    peer, _, whole = next(entry for prefix, entry in PEERS.items() if name.startswith(prefix))
    compared = "outputs, losses, gradients, detections" if name in whole else "keys, outputs"
    return f"{peer.partition(' ')[0]}: {compared}"


def page() -> str:
    """All of docs/models.md."""
    table = [f"| {' | '.join(HEADER)} |", "|" + " --- |" * len(HEADER), *map(row, summaries())]
    peers = [f"| `{prefix}*` | {peer} | [{tests}](../{tests}) |" for prefix, (peer, tests, _) in PEERS.items()]
    return "\n".join([BEFORE, *table, AFTER.rstrip("\n"), *peers]) + "\n"


if __name__ == "__main__":
    print(page(), end="")
