"""Finds the model that the tensors of a checkpoint belong to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch

from effdet_fast.checkpoints.names import CLASSIFIER, StateDict, backbone_of
from effdet_fast.models.backbones import efficientnet, resnet
from effdet_fast.models.backbones.efficientnet import EfficientNet
from effdet_fast.models.backbones.resnet import ResNet
from effdet_fast.models.config import DetectorConfig
from effdet_fast.models.detection_model import DetectionModel
from effdet_fast.models.registry import list_models, model_config
from effdet_fast.models.weights import Mismatch, compare, is_class_layer

_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "edge_weights")


class Identity(NamedTuple):
    """The model that a state dict was found to belong to.

    Attributes:
        state_dict: Its tensors, under our names and in the order of the model's own.
        config: The detector's configuration; None for a backbone.
        names: Every model or backbone that it fits; the first is `config`'s.
    """

    state_dict: StateDict
    config: DetectorConfig | None
    names: list[str]


def identify_detector(state_dict: StateDict, configs: Iterable[DetectorConfig] | None = None) -> Identity:
    """Find the configuration, with any number of classes, that a detector's tensors fit exactly.

    Args:
        state_dict: Tensors under our names.
        configs: Configurations to try; by default those of the released models.

    Raises:
        ValueError: The tensors fit none; the message lists what does not fit the nearest one.
    """
    if configs is None:
        configs = [config for config in map(model_config, list_models()) if _may_fit(state_dict, config)]
    fits: list[tuple[DetectorConfig, StateDict]] = []
    misfits: list[tuple[Mismatch, str]] = []
    for config in configs:
        config = _with_classes_of(state_dict, config)
        with torch.device("meta"):
            own = DetectionModel(config).state_dict()
        mismatch = compare(state_dict, own)
        if mismatch:
            misfits.append((mismatch, config.name))
        else:
            fits.append((config, own))
    if not fits:
        raise ValueError(f"the weights fit no model of {list_models()}{_nearest(misfits)}")
    config, own = fits[0]
    return Identity(in_order_of(own, state_dict), config, [config.name for config, _ in fits])


def identify_backbone(state_dict: StateDict) -> Identity:
    """Find the EfficientNet or ResNet that a backbone's tensors, with a classifier or without, fit exactly.

    Raises:
        ValueError: The tensors fit none; the message lists what does not fit the nearest one.
    """
    features = backbone_of(state_dict)
    names: list[str] = []
    misfits: list[tuple[Mismatch, str]] = []
    order: StateDict = {}
    for name in _backbones_like(features):
        with torch.device("meta"):
            own = (EfficientNet(name) if name in efficientnet.VARIANTS else ResNet(name)).state_dict()
        mismatch = compare(features, own)
        if mismatch:
            misfits.append((mismatch, name))
        else:
            names.append(name)
            order = own
    if not names:
        raise ValueError(f"the weights fit no EfficientNet or ResNet{_nearest(misfits)}")
    return Identity(in_order_of(order, state_dict), None, names)


def in_order_of(own: Iterable[str], state_dict: StateDict) -> StateDict:
    """Sort tensors to a model's own order: a classifier that it lacks comes last, counters after their BatchNorm's tensors."""
    ranks: dict[str, int] = {}
    for key in own:
        ranks.setdefault(key.rpartition(".")[0], len(ranks))
    for module in CLASSIFIER:
        ranks.setdefault(module.rstrip("."), len(ranks))

    def position(key: str) -> tuple[int, int]:
        module, _, tensor = key.rpartition(".")
        return ranks.get(module, len(ranks)), _TENSORS.index(tensor) if tensor in _TENSORS else len(_TENSORS)

    return {key: state_dict[key] for key in sorted(state_dict, key=position)}


def _may_fit(state_dict: StateDict, config: DetectorConfig) -> bool:
    """Looks at what can be seen without building the model."""
    widths = [value.shape[1] for key, value in state_dict.items() if is_class_layer(key) and value.dim() == 4]
    return config.fpn_channels in widths and config.backbone in _backbones_like(backbone_of(state_dict))


def _backbones_like(features: StateDict) -> list[str]:
    """The backbones with as many blocks and of the same kind; all of them if there are none."""
    if any(key.startswith("layer1.") for key in features):
        blocks = sum(re.fullmatch(r"layer\d\.\d+\.conv1\.weight", key) is not None for key in features)
        kind = blocks, any(".conv3." in key for key in features)
        kinds = {name: (sum(row.repeats), row.bottleneck) for name, row in resnet.VARIANTS.items()}
    else:
        blocks = sum(key.endswith(".conv_dw.weight") for key in features)
        kind = blocks, not any(".se." in key for key in features)
        kinds = {
            name: (sum(stage.repeats for stage in efficientnet.scaled_stages(row)), row.lite)
            for name, row in efficientnet.VARIANTS.items()
        }
    return [name for name in kinds if kinds[name] == kind] or list(kinds)


def _with_classes_of(state_dict: StateDict, config: DetectorConfig) -> DetectorConfig:
    outputs = next((len(value) for key, value in state_dict.items() if is_class_layer(key)), 0)
    classes = max(1, outputs // config.anchors_per_cell)
    return dataclasses.replace(config, num_classes=classes)


def _nearest(misfits: list[tuple[Mismatch, str]]) -> str:
    if not misfits:
        return "; none has this many channels in the pyramid"
    mismatch, name = min(misfits, key=lambda row: sum(len(part) for part in row[0]))
    return f"; of the nearest, {name}: {mismatch.describe()}"
