"""Prints docs/models.md: `python docs/models_page.py > docs/models.md`."""

from __future__ import annotations

import torch

from effdet_fast.models import (
    compound_scaling,
    create_model,
    list_models,
    model_config,
    scaled_efficientnet,
    summary,
)
from effdet_fast.models.backbones.efficientnet import VARIANTS, variant_of
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
# The project that the models of a prefix are compared with, and the tests that do it.
PEERS = {
    "efficientdet_": ("effdet 0.4", "tests/models/test_effdet_parity.py"),
    "retinanet_": ("torchvision", "tests/models/test_torchvision_parity.py"),
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

- **Outputs** of the heads are within 1e-4 in float32: on small images in `make test`, at the released size in `make test-full`.
- **Losses** are within 1e-6 in float64, in training mode too. In float32 they are within 1e-4.
- **Gradients** are within 1e-5 in float64 for every parameter, in training mode too. In float32, with fixed BatchNorm
  statistics, they are within 1e-3: each one of D0 (or, where effdet's own is further off than that from the one in float64, no
  further), those of other models taken together. Rounding moves values across the kinks of ReLU6, so that the Lite models'
  are not compared in float32.
- **Detections** from images are the same boxes and classes in the same order in float64, where no two scores are equal. Those
  from equal outputs in float32 are too, for the models whose weights in the tests give no equal scores.

Losses, gradients and detections are compared on small images: of D0, D0 symmetric, Lite0 and both ResNet-18 forms in
`make test`, of all others in `make test-full`. Backbones are compared with timm's EfficientNets, of either padding, in
`tests/models/test_efficientnet.py`, and with torchvision's ResNets in `tests/models/test_resnet.py`.

| | compared with | tests |
| --- | --- | --- |
"""

SCALING = """## Compound scaling

`compound_scaling(phi)` and `scaled_efficientnet(phi)` give the papers' rules, for any real phi >= 0. The released models follow
them only in part: widths were rounded by hand, cells and resolution stop growing at the top. Where two values stand, the first is
the rule's and the second the released one, of EfficientDet-D0 to D7 and EfficientNet-B0 to B7.
"""
# Image sides that EfficientNet-B0 to B7 were released with (arXiv:1905.11946); no detector uses them.
EFFICIENTNET_SIDES = (224, 240, 260, 300, 380, 456, 528, 600)


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
    peer, _ = next(entry for prefix, entry in PEERS.items() if name.startswith(prefix))
    return f"{peer.partition(' ')[0]}: outputs, losses, gradients, detections"


def scaling_tables() -> list[str]:
    """What the rules of compound scaling give beside the released models, for EfficientDet and EfficientNet."""
    detectors = ["| phi | channels | cells | head layers | image |", "|" + " --- |" * 5]
    backbones = ["| phi | width | depth | image |", "|" + " --- |" * 4]
    for phi, side in enumerate(EFFICIENTNET_SIDES):
        released = model_config(f"efficientdet_d{phi}")
        rule = compound_scaling(phi)
        pairs = [
            (rule["fpn_channels"], released.fpn_channels),
            (rule["fpn_cells"], released.fpn_cells),
            (rule["head_repeats"], released.head_repeats),
            (rule["image_size"], released.image_size[0]),
        ]
        detectors.append(f"| {phi} | {' | '.join(either(*pair) for pair in pairs)} |")
        scaled = scaled_efficientnet(phi)
        ruled, variant = variant_of(scaled["backbone"]), VARIANTS[f"efficientnet_b{phi}"]
        pairs = [
            (round(ruled.width, 2), variant.width),
            (round(ruled.depth, 2), variant.depth),
            (scaled["image_size"], side),
        ]
        backbones.append(f"| {phi} | {' | '.join(either(*pair) for pair in pairs)} |")
    return [*detectors, "", *backbones]


def either(rule: float, released: float) -> str:
    return f"{rule}" if rule == released else f"{rule}, {released}"


def page() -> str:
    """All of docs/models.md."""
    table = [f"| {' | '.join(HEADER)} |", "|" + " --- |" * len(HEADER), *map(row, summaries())]
    peers = [f"| `{prefix}*` | {peer} | `{tests}` |" for prefix, (peer, tests) in PEERS.items()]
    return "\n".join([BEFORE, *table, AFTER.rstrip("\n"), *peers, "", SCALING, *scaling_tables()]) + "\n"


if __name__ == "__main__":
    print(page(), end="")
