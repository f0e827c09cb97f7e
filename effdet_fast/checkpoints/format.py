"""The dictionary in a `best.pt`, and in a `last.pt` with more: the weights, and what is needed to use them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from effdet_fast.checkpoints.files import read_torch_file
from effdet_fast.models import DetectorConfig

FORMAT = 1
_DESCRIPTION: dict[str, type] = {
    "format": int,
    "model": str,
    "config": dict,
    "class_names": list,
    "category_ids": list,
    "preprocessing": dict,
}
PREPROCESSING = ("mean", "std", "image_size")


def describe(
    config: DetectorConfig, class_names: Sequence[str], category_ids: Sequence[int], depth: int | None = None
) -> dict[str, Any]:
    """Make such a dictionary without its `state_dict`.

    Args:
        config: Configuration of the model.
        class_names: Name of each label.
        category_ids: Id of each label in the annotations file that the model was trained on.
        depth: Bits of the values of the gray training pictures of more than 8 bits; None if there were none.
    """
    return {
        "format": FORMAT,
        "model": config.name,
        "config": config.to_dict(),
        "class_names": list(class_names),
        "category_ids": list(category_ids),
        "preprocessing": {
            "mean": list(config.mean),
            "std": list(config.std),
            "image_size": list(config.image_size),
            "depth": depth,
        },
    }


def description_of(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what `describe` made from the content of a file; None for another project's file."""
    return {key: content[key] for key in _DESCRIPTION} if all(key in content for key in _DESCRIPTION) else None


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read such a dictionary from a file, tensors on the CPU; nothing in the file is executed (`weights_only=True`).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no such dictionary, or one of a later format.
    """
    content = read_torch_file(path)
    kinds = {**_DESCRIPTION, "state_dict": Mapping}
    missing = [key for key in kinds if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(
            f"{path}: is not a checkpoint of a trained detector, it has no {', '.join(missing)}; weights alone are "
            "loaded with create_model(..., checkpoint=...)"
        )
    if not isinstance(content["format"], int) or content["format"] > FORMAT:
        raise ValueError(f"{path}: has checkpoint format {content['format']}; this version reads up to {FORMAT}")
    for key, kind in kinds.items():
        if not isinstance(content[key], kind):
            raise ValueError(
                f"{path}: its {key} must be a {kind.__name__.lower()}, got a {type(content[key]).__name__}"
            )
    lacking = [key for key in PREPROCESSING if key not in content["preprocessing"]]
    if lacking:
        raise ValueError(f"{path}: its preprocessing has no {', '.join(lacking)}")
    return content
