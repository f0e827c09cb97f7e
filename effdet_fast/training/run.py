"""A training run from its options to its result: what `effdet_fast.train` does around the training loop."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effdet_fast.files import write_json
from effdet_fast.models import DetectionModel, create_model, load_checkpoint, model_config
from effdet_fast.nn import synchronize_batch_norm
from effdet_fast.training.checkpoint import RunCheckpoint, read_run_checkpoint
from effdet_fast.training.config import TrainConfig, config_for_resume, config_from_options
from effdet_fast.training.distributed import Processes, join_processes
from effdet_fast.training.interrupt import Interrupt
from effdet_fast.training.run_data import RunData, compare_data, open_data
from effdet_fast.training.run_folder import RunFolder
from effdet_fast.training.seeding import algorithm_choice
from effdet_fast.training.trainer import Trainer, batch_norms, enter_training


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of a training run.

    Attributes:
        output: The run's folder.
        best: Its `best.pt`, the weights with the highest AP; without validation data, those of the last epoch.
        last: Its `last.pt`, from which the run can be resumed.
        epochs: Number of finished epochs.
        steps: Number of finished steps.
        metrics: COCO metrics of the last evaluation; empty without validation data.
        best_ap: Highest AP of the run; None without validation data.
        signal: Number of the signal that ended the run early, or None.
        is_main: Whether this is the process that wrote the files.
    """

    output: Path
    best: Path
    last: Path
    epochs: int
    steps: int
    metrics: dict[str, float]
    best_ap: float | None
    signal: int | None
    is_main: bool = True


def train(config: TrainConfig | None = None, **options: Any) -> TrainResult:
    """Train a detector on data in COCO format; under torchrun, together with the other processes.

    Each process normalizes its loss by the positives of its own images, as effdet does; gradients are averaged. Ctrl-C and other
    signals end a run early, after it has written a `last.pt` to resume from.

    Args:
        config: All options.
        **options: The fields of `TrainConfig` one by one, instead of `config`. To continue a run, `resume` is enough; options
            given beside it replace the run's own where a run may change them (epochs, workers, device, paths, ...).

    Returns:
        The `TrainResult`: the run's folder, its checkpoints and its metrics.

    Raises:
        TypeError: An option is unknown, or `config` and options are both given.
        ValueError: An option is out of range, the data cannot be used, the output folder holds another run, or a checkpoint does
            not fit.
        FileNotFoundError: A file or folder is missing.
        NonFiniteLoss: The loss is no longer finite; the message names the step and its image ids.

    Example:
        ```python
        result = effdet_fast.train(
            train_images="train/images",
            train_annotations="train/annotations.json",
            val_images="val/images",
            val_annotations="val/annotations.json",
            output="runs/exp1",
            model="efficientdet_d0",
            epochs=50,
        )
        print(result.best_ap, result.best)
        ```
    """
    given = _given_options(config, options)
    resume = given.get("resume")
    resumed = read_run_checkpoint(resume) if resume else None
    config = config_from_options(given) if resumed is None else _resumed_config(resumed, given)
    config.require_paths()
    resumed_from = Path(resume) if resume else None
    processes, device = join_processes(config.device)
    with algorithm_choice(config.deterministic):
        folder = RunFolder(config.output)
        processes.on_main(lambda: folder.check_free(overwrite=config.overwrite, resumed_from=resumed_from))
        model_config(config.model, **config.model_options)
        data = open_data(config, processes, None if resumed is None else resumed.published["category_ids"])
        model = _build_model(config, len(data.category_ids), processes, device)
        if config.batch_size == 1 and not (processes.world_size > 1 and config.sync_bn):
            _check_batch_of_one(model, config)
        same_images = resumed is None or _check_fit(resumed, data, config, processes)
        with Interrupt(launched=processes.world_size > 1) as interrupt:  # from here on a signal leaves a last.pt
            try:
                processes.on_main(lambda: _claim(folder, config, resumed_from))
                trainer = Trainer(config, model, data, folder, processes, device, interrupt)
                if resumed is not None:
                    trainer.restore(resumed, same_images=same_images)
                trainer.fit()
                processes.gather(None)  # the files are there when any process returns
            finally:
                folder.release()
        return TrainResult(
            output=folder.path,
            best=folder.best,
            last=folder.last,
            epochs=trainer.epoch,
            steps=trainer.step,
            metrics=trainer.metrics,
            best_ap=trainer.best if trainer.metrics else None,
            signal=interrupt.signal,
            is_main=processes.is_main,
        )


def _given_options(config: TrainConfig | None, options: dict[str, Any]) -> dict[str, Any]:
    if config is None:
        return options
    if options:
        raise TypeError(f"train: give either a TrainConfig or options, got both (options: {', '.join(options)})")
    defaults = TrainConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if value != defaults[name]}


def _resumed_config(resumed: RunCheckpoint, given: dict[str, Any]) -> TrainConfig:
    (published, state), path = resumed, Path(given["resume"])
    # What "auto" found is what the weights know.
    saved = {**state.config, "depth": published["preprocessing"].get("depth")}
    config = config_for_resume(saved, {"output": str(path.parent), **given})
    if state.epoch >= config.epochs:
        raise ValueError(
            f"train: {path} has finished {state.epoch} epochs of {config.epochs}, so nothing is left to do; "
            "give a larger number of epochs to train on"
        )
    if config.epochs != state.config["epochs"]:
        warnings.warn(
            f"train: {state.config['epochs']} -> {config.epochs} epochs: from here on the learning rate follows "
            "the schedule of a run of the new length",
            stacklevel=4,
        )
    return config


def _build_model(config: TrainConfig, classes: int, processes: Processes, device: torch.device) -> DetectionModel:
    torch.manual_seed(config.seed)
    options = dict(config.model_options)
    if model_config(config.model).frozen_batch_norm and not (config.backbone_checkpoint or config.checkpoint):
        options.setdefault(
            "frozen_batch_norm", False
        )  # statistics of trained weights are worth keeping, others are none
    model = create_model(
        config.model,
        classes,
        image_size=config.image_size,
        backbone_checkpoint=config.backbone_checkpoint,
        **options,
    )
    if config.checkpoint and not config.resume:
        _start_from(model, config.checkpoint, processes)
    if config.bn_momentum is not None:
        _set_bn_momentum(model, config.bn_momentum)
    _freeze(model, backbone=config.freeze_backbone, bn=config.freeze_bn)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    if processes.world_size > 1 and config.sync_bn:
        model = synchronize_batch_norm(model)  # type: ignore[assignment]
    return model


def _set_bn_momentum(model: nn.Module, momentum: float) -> None:
    """Give all BatchNorm layers the same momentum (the share of the new batch in the running statistics)."""
    for module in batch_norms(model):
        module.momentum = momentum


def _freeze(model: nn.Module, *, backbone: bool, bn: bool) -> None:
    """Exclude the backbone's parameters, or all BatchNorm weights and biases, from training."""
    if backbone:
        model.backbone.requires_grad_(False)  # type: ignore[operator, union-attr]
    if bn:
        for module in batch_norms(model):
            module.requires_grad_(False)


def _check_batch_of_one(model: DetectionModel, config: TrainConfig) -> None:
    """ValueError if a BatchNorm that learns would see one value per channel, of which there is no variance."""
    probe = copy.deepcopy(model).to("meta")
    enter_training(probe, frozen_backbone=config.freeze_backbone, frozen_bn=config.freeze_bn)
    height, width = model.config.image_size
    try:
        with torch.no_grad():
            probe(torch.empty(1, 3, height, width, device="meta"))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"train: batch_size 1 at image_size {model.config.image_size} leaves a BatchNorm a single value per channel; "
            "use 2 or more, larger images, or freeze_bn"
        ) from None


def _start_from(model: DetectionModel, checkpoint: str, processes: Processes) -> None:
    """Load a detector's weights; its class layer only where it has as many classes as ours."""
    load_checkpoint(model, checkpoint, reset_head=True)
    if load_checkpoint(model, checkpoint, strict=False).shapes and processes.is_main:
        print(f"{checkpoint} has another number of classes; the class layer starts anew", flush=True)


def _check_fit(resumed: RunCheckpoint, data: RunData, config: TrainConfig, processes: Processes) -> bool:
    """Whether the images are those of the resumed run, of which some may have gone or come; says what has changed.

    Raises:
        ValueError: Other classes, fewer than half of the images left, or another number of images in a step.
    """
    published, state = resumed
    before = dict(zip(published["category_ids"], published["class_names"], strict=True))
    now = dict(zip(data.category_ids, data.class_names, strict=True))
    if before != now:
        raise ValueError(
            f"train: {config.resume} was trained on other classes ({before}) than {config.train_annotations} has ({now})"
        )
    same_images = True
    if isinstance(state.data, torch.Tensor):  # checkpoints of old know their images' number and ids alone
        change = compare_data(state.data, data.record)
        if 2 * change.kept <= len(state.data):
            raise ValueError(
                f"train: {config.resume} was trained on other data: of its {len(state.data)} images "
                f"{config.train_annotations} has {change.kept}"
            )
        same_images = change.same_images
        if change and processes.is_main:
            how = "" if same_images else "; the epoch under way starts again"
            warnings.warn(f"train: images have changed since {config.resume}: {change.describe()}{how}", stacklevel=3)
    elif state.data != data.old_record():
        raise ValueError(
            f"train: {config.resume} was trained on other data ({state.data}); {config.train_annotations} has "
            f"{data.old_record()}"
        )
    images = config.batch_size * processes.world_size
    if state.images_per_step != images:
        raise ValueError(
            f"train: {config.resume} was trained on {state.images_per_step} images per step; now it would be "
            f"batch_size {config.batch_size} x {processes.world_size} processes = {images}"
        )
    return same_images


def _claim(folder: RunFolder, config: TrainConfig, resumed_from: Path | None) -> None:
    folder.claim(overwrite=config.overwrite, resumed_from=resumed_from)
    write_json(os.fspath(folder.config), config.to_dict(), indent=2)
