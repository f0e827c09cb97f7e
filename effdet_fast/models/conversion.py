"""The same weights under another project's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from effdet_fast.models.checkpoint_files import shorten
from effdet_fast.models.checkpoint_names import NAMINGS, StateDict, backbone_of, recognise, strip_prefixes
from effdet_fast.models.config import DetectorConfig
from effdet_fast.models.identify import Identity, identify_backbone, identify_detector
from effdet_fast.models.names_torchvision import torchvision_names
from effdet_fast.models.registry import model_config
from effdet_fast.models.resnet import VARIANTS


class Converted(NamedTuple):
    """What `convert_state_dict` made.

    Attributes:
        state_dict: The tensors, unchanged, under the target's names and in the order of its own files.
        naming: Whose names they had.
        config: The detector they belong to; None for a backbone.
        names: Every model (or backbone) they fit, the first of which is `config`'s: D6 and D7 have the same weights.
        left_out: Keys, as they were, of tensors that the target has no place for.
    """

    state_dict: StateDict
    naming: str
    config: DetectorConfig | None
    names: list[str]
    left_out: list[str]


def convert_state_dict(state_dict: StateDict, to: str, *, model: str | DetectorConfig | None = None) -> Converted:
    """Renames a detector's or a backbone's tensors; every one must have its place in one of our models.

    Args:
        state_dict: Under any of the names that `NAMINGS` lists, perhaps with "module." or "model." before every key.
        to: One of `TARGETS`. "effdet" takes EfficientDets, "torchvision" RetinaNets and ResNets, "timm" every backbone,
            alone or out of a detector.
        model: What the weights belong to, a name of `list_models()` or a configuration. By default the released model
            that they fit; other numbers of classes fit too.

    Raises:
        ValueError: Unknown target or names, weights that do not fit (the keys are listed), or of no use to the target.
    """
    if to not in TARGETS:
        raise ValueError(f"convert: to must be one of {list(TARGETS)}, got {to!r}")
    state_dict = strip_prefixes(state_dict)
    naming = recognise(state_dict)
    if naming is None:
        known = ", ".join(row.name for row in NAMINGS)
        raise ValueError(f"convert: unknown names; understood are {known}. The keys are {shorten(list(state_dict))}")
    ours = naming.our_names(state_dict)
    try:
        if naming.is_detector:
            config = model_config(model) if isinstance(model, str) else model
            found = identify_detector(ours, None if config is None else [config])
        else:
            found = identify_backbone(ours)
    except ValueError as error:
        raise ValueError(f"convert: {naming.name}: {error}") from error
    converted = TARGETS[to](found)
    kept = {id(value) for value in converted.values()}
    left_out = [key for key, value in state_dict.items() if id(value) not in kept]
    return Converted(converted, naming.name, found.config, found.names, left_out)


def _to_effdet_fast(found: Identity) -> StateDict:
    return found.state_dict


def _to_effdet(found: Identity) -> StateDict:
    config = found.config
    if config is None or (config.neck, config.head) != ("bifpn", "separable"):
        raise ValueError(f"convert: effdet has EfficientDets only, and the weights are those of {found.names[0]}")
    return found.state_dict


def _to_timm(found: Identity) -> StateDict:
    return found.state_dict if found.config is None else backbone_of(found.state_dict)


def _to_torchvision(found: Identity) -> StateDict:
    config = found.config
    if config is None and "layer1.0.conv1.weight" in found.state_dict:
        return found.state_dict
    if config is None or not _is_torchvisions(config):
        raise ValueError(f"convert: torchvision has no {found.names[0]} with weights like these")
    return torchvision_names(found.state_dict)


def _is_torchvisions(config: DetectorConfig) -> bool:
    """Whether torchvision's RetinaNet can be built with these layers."""
    layers = (config.neck, config.fusion, config.head) == ("fpn", "sum", "conv")
    options = config.head_norm in (None, "group") and config.extra_levels in ("c5", "p5")
    return layers and options and config.backbone in VARIANTS


TARGETS: dict[str, Callable[[Identity], StateDict]] = {
    "effdet": _to_effdet,
    "torchvision": _to_torchvision,
    "timm": _to_timm,
    "effdet_fast": _to_effdet_fast,
}
