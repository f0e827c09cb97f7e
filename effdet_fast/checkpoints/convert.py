"""Conversion of a checkpoint to another project's names."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from effdet_fast.checkpoints.files import SAFETENSORS, read_content, read_tensors, shorten, write_content
from effdet_fast.checkpoints.format import describe, description_of
from effdet_fast.checkpoints.identify import Identity, identify_backbone, identify_detector
from effdet_fast.checkpoints.names import NAMINGS, StateDict, backbone_of, recognize, strip_prefixes
from effdet_fast.checkpoints.names.torchvision import torchvision_names
from effdet_fast.files import check_writable, refuse_existing
from effdet_fast.models import DetectorConfig, model_config
from effdet_fast.models.backbones.resnet import VARIANTS


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` did.

    Attributes:
        naming: The project whose names the tensors had.
        names: Every model (or backbone) that the weights fit; the first was taken.
        num_classes: Number of classes of the detector; None for a backbone.
        tensors: Number of tensors written.
        left_out: Keys of the tensors that the target has no place for.
    """

    naming: str
    names: list[str]
    num_classes: int | None
    tensors: int
    left_out: list[str]


def convert_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    to: str,
    *,
    model: str | DetectorConfig | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert a checkpoint to another project's names; values, dtypes and shapes stay as they are.

    It reads detectors of effdet (either order of the heads' BatchNorms), of zylo117's Yet-Another-EfficientDet-Pytorch, of
    torchvision (RetinaNets with new or old names) and of this package, and backbones of timm, of torchvision and with the
    EfficientNet naming `_blocks`. Files are those of `torch.save`, wrapped or not, or `.safetensors`. Averaged weights are
    taken where a file has both. Nothing in a file is executed (`weights_only=True`).

    A detector converted to "effdet_fast" in a file other than `.safetensors` can be evaluated and used for prediction at once,
    like a run's `best.pt`. Unless the source is such a file, its class names are the category ids: label + 1, as effdet counts,
    or the label, as torchvision does.

    Args:
        source: The file to read.
        output: The file to write: `.safetensors`, or anything else for `torch.save`. It holds tensors only, in the target's
            order, unless it is a detector as "effdet_fast".
        to: "effdet", "torchvision", "timm" (the backbone alone) or "effdet_fast".
        model: The model that the weights belong to, a name of `list_models()` or a configuration. By default the one that the
            file names, or else the released model that they fit.
        overwrite: Replace an existing `output`.

    Returns:
        A `Conversion`: what was found, and what was left out.

    Raises:
        FileExistsError: `output` exists.
        FileNotFoundError: There is no `source`.
        ValueError: The names are unknown, the weights fit no model (keys are listed), the target has no such model, or a
            `.safetensors` file needs the package safetensors.

    Example:
        ```python
        effdet_fast.convert_checkpoint("runs/exp1/best.pt", "effdet.pth", "effdet")
        ```
    """
    source, output = os.fspath(source), os.fspath(output)
    refuse_existing([output], overwrite)
    check_writable(output)
    content = read_content(source)
    own = description_of(content)
    if model is None and own is not None:
        model = DetectorConfig.from_dict(own["config"])
    try:
        converted = convert_state_dict(read_tensors(content), to, model=model)
    except ValueError as error:
        raise ValueError(f"{error} (in {source})") from error
    weights = {key: value.detach().contiguous().clone() for key, value in converted.state_dict.items()}
    config = converted.config
    if to == "effdet_fast" and config is not None and not output.endswith(SAFETENSORS):
        written = {**(own or _description(config)), "state_dict": weights}
    else:
        written = weights
    write_content(written, output)
    return Conversion(
        converted.naming,
        converted.names,
        None if config is None else config.num_classes,
        len(weights),
        converted.left_out,
    )


def _description(config: DetectorConfig) -> dict[str, Any]:
    """Describe converted weights: torchvision's labels are the category ids themselves, effdet's are the ids less 1."""
    first = 0 if config.box_coder == "torchvision" else 1
    ids = range(first, first + config.num_classes)
    return describe(config, [str(category) for category in ids], ids)


class Converted(NamedTuple):
    """The result of `convert_state_dict`.

    Attributes:
        state_dict: The tensors, unchanged, under the target's names and in the order of its own files.
        naming: The project whose names they had.
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
    """Rename the tensors of a detector or a backbone; each must have its place in one of our models.

    Args:
        state_dict: Under any of the names that `NAMINGS` lists, perhaps with "module." or "model." before every key.
        to: One of `TARGETS`. "effdet" takes EfficientDets, "torchvision" RetinaNets and ResNets, "timm" every backbone,
            alone or out of a detector.
        model: The model that the weights belong to, a name of `list_models()` or a configuration. By default the released
            model that they fit, with any number of classes.

    Raises:
        ValueError: The target or the names are unknown, the weights fit no model (keys are listed), or the target has no such
            model.
    """
    if to not in TARGETS:
        raise ValueError(f"convert: to must be one of {list(TARGETS)}, got {to!r}")
    state_dict = strip_prefixes(state_dict)
    naming = recognize(state_dict)
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
