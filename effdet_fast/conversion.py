"""Checkpoint files from one project's names to another's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effdet_fast.evaluation.result_files import check_writable, refuse_existing, write_atomically
from effdet_fast.evaluation.trained_model import FORMAT
from effdet_fast.models import DetectorConfig
from effdet_fast.models.checkpoint_files import SAFETENSORS, read_content, read_tensors, write_content
from effdet_fast.models.conversion import Converted, convert_state_dict

# What a `best.pt` says about its model beside the weights.
_DESCRIPTION = ("format", "model", "config", "class_names", "category_ids", "preprocessing")


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` did.

    Attributes:
        naming: Whose names the tensors had.
        names: Every model (or backbone) that the weights fit; the first was taken.
        num_classes: Of the detector; None for a backbone.
        tensors: How many were written.
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
    """Writes a checkpoint's weights under another project's names; values, types and shapes stay as they are.

    Understood are effdet (either order of the heads' BatchNorms), zylo117's Yet-Another-EfficientDet-Pytorch,
    torchvision's RetinaNets (new and old names), this package's own files, and backbones of timm, torchvision and the
    EfficientNet naming with `_blocks`; in files of `torch.save`, wrapped or not, or `.safetensors`. Averaged weights are
    taken where a file has both. Nothing in a file is executed (`weights_only=True`).

    A detector converted to "effdet_fast" in a `.pt` or `.pth` file can be evaluated and used for prediction at once, like
    a run's `best.pt`. Class names are the category ids unless the source is such a file: label + 1 as effdet counts, or
    the label as torchvision does.

    Args:
        source: The file to read.
        output: The file to write: `.safetensors`, or anything else for `torch.save`. Tensors only, in the target's order,
            except for detectors as "effdet_fast".
        to: "effdet", "torchvision", "timm" (the backbone alone) or "effdet_fast".
        model: What the weights belong to, a name of `list_models()` or a configuration. By default what the file says, or
            the released model that they fit.
        overwrite: Replace an existing `output`.

    Raises:
        FileNotFoundError, FileExistsError: `source` or `output`.
        ValueError: Names or weights that are not understood, do not fit (keys are listed) or that the target has not; or a
            `.safetensors` file without the package safetensors.
    """
    source, output = os.fspath(source), os.fspath(output)
    refuse_existing([output], overwrite)
    check_writable(output)
    content = read_content(source)
    own = content if all(key in content for key in _DESCRIPTION) else None
    if model is None and own is not None:
        model = DetectorConfig.from_dict(own["config"])
    try:
        converted = convert_state_dict(read_tensors(content), to, model=model)
    except ValueError as error:
        raise ValueError(f"{error} (in {source})") from error
    weights = {key: value.detach().contiguous().clone() for key, value in converted.state_dict.items()}
    config = converted.config
    described = to == "effdet_fast" and config is not None and not output.endswith(SAFETENSORS)
    written = {**_description(converted, own), "state_dict": weights} if described else weights
    write_atomically(output, lambda path: write_content(written, path))
    return Conversion(
        converted.naming,
        converted.names,
        None if config is None else config.num_classes,
        len(weights),
        converted.left_out,
    )


def _description(converted: Converted, own: Mapping[str, Any] | None) -> dict[str, Any]:
    """All of a `best.pt` but its weights."""
    config = converted.config
    assert config is not None
    if own is not None:
        return {key: own[key] for key in _DESCRIPTION}
    # torchvision's labels are the ids themselves, effdet's count from 0.
    first = 0 if config.box_coder == "torchvision" else 1
    ids = list(range(first, first + config.num_classes))
    return {
        "format": FORMAT,
        "model": config.name,
        "config": config.to_dict(),
        "class_names": [str(category) for category in ids],
        "category_ids": ids,
        "preprocessing": {"mean": list(config.mean), "std": list(config.std), "image_size": list(config.image_size)},
    }
