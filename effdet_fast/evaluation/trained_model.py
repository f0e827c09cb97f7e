"""A trained detector from its checkpoint, with the meaning of its labels and inputs."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import torch

from effdet_fast.checkpoints.format import PREPROCESSING, read_checkpoint
from effdet_fast.data.image_io import DEPTHS
from effdet_fast.models import DetectionModel, DetectorConfig, load_checkpoint


@dataclass(frozen=True)
class TrainedModel:
    """A trained model, and what its labels and inputs mean; `load_trained_model` reads it from a checkpoint.

    Attributes:
        model: the `DetectionModel`, in evaluation mode and channels_last.
        class_names: name of each label.
        category_ids: id of each label in the annotations file that the model was trained on.
        mean: RGB mean that inputs are normalized with, in 0..1.
        std: RGB standard deviation, likewise.
        image_size: (height, width) of the model's input in pixels.
        device: where the model is.
        depth: bits of the values of the gray training pictures of more than 8 bits, see `open_image`; None if there were none.
    """

    model: DetectionModel
    class_names: list[str]
    category_ids: list[int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    device: torch.device
    depth: int | None = None


def load_trained_model(
    checkpoint: str | os.PathLike[str],
    device: torch.device | str | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> TrainedModel:
    """Load a trained detector from the checkpoint of a run.

    Nothing in the file is executed (`weights_only=True`).

    Args:
        checkpoint: a `best.pt` or `last.pt`, or a detector that `convert_checkpoint` wrote as "effdet_fast".
        device: None takes the GPU if there is one.
        image_size: input side or (height, width) in pixels, if other than the one trained at.

    Returns:
        The `TrainedModel`, whose parameters require no gradient.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint of this package, or contradicts itself.
    """
    path = os.fspath(checkpoint)
    content = read_checkpoint(path)
    inputs = {key: content["preprocessing"][key] for key in PREPROCESSING}
    if image_size is not None:
        inputs["image_size"] = image_size
    try:
        config = dataclasses.replace(DetectorConfig.from_dict(content["config"]), **inputs)
        names, ids = [str(n) for n in content["class_names"]], [int(c) for c in content["category_ids"]]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: holds no usable model configuration: {error}") from error
    depth = content["preprocessing"].get("depth")
    if depth not in (None, *DEPTHS):
        raise ValueError(f"{path}: its preprocessing has depth {depth!r}, which must be one of {list(DEPTHS)}")
    if not len(names) == len(ids) == config.num_classes or len(set(ids)) != len(ids):
        raise ValueError(
            f"{path}: has {config.num_classes} classes, {len(names)} class names and {len(set(ids))} category ids"
        )
    model = DetectionModel(config)
    load_checkpoint(model, content["state_dict"])
    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    model.to(device=target, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.eval().requires_grad_(False)
    return TrainedModel(model, names, ids, config.mean, config.std, config.image_size, target, depth)
