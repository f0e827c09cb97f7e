"""The options of a training run: one dataclass for the Python API, the command line and the checkpoint."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

from effdet_fast.device import AMP_MODES
from effdet_fast.training.options import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    GROUPS,
    SHARE,
    Rule,
    docstring,
    one_of,
    option,
    options_of,
)

OPTIMIZERS = ("sgd", "adamw")
DATA, MODEL, RECIPE, SPEED, RUN = GROUPS


def default_workers() -> int:
    """Return 4, or the number of processors if that is smaller."""
    return min(4, os.cpu_count() or 1)


@dataclasses.dataclass
class TrainConfig:
    """The options of a training run; each is a flag of `effdet-fast train` too, and docs/training_options.md lists them."""

    train_images: str = option(DATA, "", "folder of the training images", metavar="DIR")
    train_annotations: str = option(DATA, "", "COCO-format JSON of the training images", metavar="FILE")
    output: str = option(RUN, "", "config.json, results.csv, best.pt and last.pt go here", metavar="DIR")
    model: str = option(
        MODEL, "efficientdet_d0", "efficientdet_d0, retinanet_resnet50_fpn, ...", metavar="NAME", fixed=True
    )
    model_options: dict[str, Any] = option(
        MODEL,
        dict,
        "other values for fields of the model's configuration: neck=panet, fusion=softmax, ...",
        default="",
        fixed=True,
    )
    val_images: str | None = option(
        DATA,
        None,
        "folder of the validation images; without it nothing is evaluated, and best.pt is the last epoch",
        metavar="DIR",
    )
    val_annotations: str | None = option(DATA, None, "COCO-format JSON of the validation images", metavar="FILE")
    epochs: int = option(RECIPE, 50, "passes over the training images", metavar="N", rule=AT_LEAST_1)
    batch_size: int = option(
        RECIPE,
        16,
        "images per process and step; a resumed run keeps their product with the number of processes",
        metavar="N",
        rule=AT_LEAST_1,
    )
    image_size: tuple[int, int] | None = option(
        MODEL,
        None,
        "one side, or height and width, of the model's input in pixels",
        default="the model's",
        metavar="PX",
        rule=Rule("one size or (height, width) in pixels, at least 1", lambda size: len(size) == 2 and min(size) >= 1),
        fixed=True,
    )
    optimizer: Literal["sgd", "adamw"] = option(
        RECIPE, "sgd", "sgd has Nesterov momentum", rule=one_of(*OPTIMIZERS), fixed=True
    )
    lr: float | None = option(
        RECIPE,
        None,
        "learning rate after warm-up",
        default="sgd 0.08 per 64 images of a step, adamw 0.001",
        metavar="LR",
        rule=ABOVE_0,
        fixed=True,
    )
    weight_decay: float | None = option(
        RECIPE,
        None,
        "on convolution weights only",
        default="sgd 4e-5, adamw 0.01",
        metavar="W",
        rule=AT_LEAST_0,
        fixed=True,
    )
    momentum: float = option(
        RECIPE, 0.9, "momentum of sgd", metavar="M", rule=Rule("in (0, 1)", lambda x: 0 < x < 1), fixed=True
    )
    warmup_epochs: float | None = option(
        RECIPE,
        None,
        "linear warm-up in epochs, fractions allowed",
        default="a tenth of the run, at most 1",
        metavar="E",
        fixed=True,
    )
    ema_decay: float = option(
        RECIPE,
        0.9998,
        "moving average of the weights; 0: off",
        metavar="D",
        rule=Rule("in [0, 1)", lambda x: 0 <= x < 1),
        fixed=True,
    )
    clip_grad_norm: float = option(
        RECIPE, 10.0, "largest norm of the gradient; 0: off", metavar="G", rule=AT_LEAST_0, fixed=True
    )
    amp: Literal["none", "bf16", "fp16"] = option(
        SPEED, "none", "mixed precision; fp16 scales the loss", rule=one_of(*AMP_MODES), fixed=True
    )
    cuda_graph: bool = option(
        SPEED,
        False,
        "replay each step from one CUDA graph: same steps, less work for the host; on one GPU, elsewhere a warning says "
        "why not; not yet run on a GPU",
        negatable=True,
    )
    channels_last: bool = option(SPEED, True, "images and weights in channels_last", negatable=True)
    deterministic: bool = option(SPEED, True, "deterministic algorithms where there is a choice", negatable=True)
    workers: int = option(
        DATA,
        default_workers,
        "data-loading processes per training process; 0 loads in the training process; by default at most one a processor",
        metavar="N",
        rule=AT_LEAST_0,
    )
    seed: int = option(
        RECIPE,
        0,
        "initial weights, order and augmentation",
        metavar="S",
        rule=Rule("in [0, 2**32)", lambda x: 0 <= x < 2**32),
        fixed=True,
    )
    device: str | None = option(SPEED, None, "cpu, cuda or cuda:1", default="the GPU if there is one", metavar="DEV")
    checkpoint: str | None = option(
        MODEL, None, "detector weights to start from; with other classes, the class layer starts anew", metavar="FILE"
    )
    backbone_checkpoint: str | None = option(MODEL, None, "ImageNet weights for the backbone", metavar="FILE")
    resume: str | None = option(
        RUN, None, "last.pt of a run to continue; its options are kept, so no other flag is needed", metavar="FILE"
    )
    overwrite: bool = option(RUN, False, "replace the run that the output folder holds")
    eval_every: int = option(RUN, 1, "evaluate every N epochs and after the last", metavar="N", rule=AT_LEAST_1)
    hflip: float = option(DATA, 0.5, "probability of a horizontal flip", metavar="P", rule=SHARE, fixed=True)
    vflip: float = option(
        DATA,
        0.0,
        "probability of a vertical flip, for pictures without an up and down",
        metavar="P",
        rule=SHARE,
        fixed=True,
    )
    scale_jitter: tuple[float, float] = option(
        DATA,
        (0.1, 2.0),
        "factors of the random resize before cropping; 1 1 switches it off",
        metavar=("MIN", "MAX"),
        rule=Rule("two factors, 0 < smallest <= largest", lambda x: len(x) == 2 and 0 < x[0] <= x[1]),
        fixed=True,
    )
    depth: int | Literal["auto"] | None = option(
        DATA,
        "auto",
        "8, 10, 12, 14 or 16: bits of the values of gray pictures of more than 8 bits, of which the upper 8 are used",
        default="auto, from the largest value of all of them",
        metavar="BITS",
        rule=Rule("auto or a number of bits", lambda x: x == "auto" or isinstance(x, int)),
        fixed=True,
    )
    bn_momentum: float | None = option(
        MODEL,
        None,
        "share of each batch in BatchNorm's running statistics; try 0.1 in runs of a few hundred steps",
        default="the model's, 0.01 in neck and heads",
        metavar="M",
        rule=Rule("in (0, 1]", lambda x: 0 < x <= 1),
        fixed=True,
    )
    freeze_backbone: bool = option(MODEL, False, "train neck and heads only", fixed=True)
    freeze_bn: bool = option(MODEL, False, "keep BatchNorm statistics and weights as loaded", fixed=True)
    sync_bn: bool = option(
        MODEL, True, "with several processes, share BatchNorm statistics", negatable=True, fixed=True
    )
    tensorboard: bool = option(RUN, False, "write TensorBoard files too (extra `tensorboard`)")
    progress: bool = option(RUN, True, "progress bar", negatable=True)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Path):
                setattr(self, field.name, str(value))
        if isinstance(self.image_size, int):
            self.image_size = (self.image_size, self.image_size)
        self.image_size = tuple(self.image_size) if self.image_size is not None else None  # type: ignore[assignment]
        self.scale_jitter = tuple(self.scale_jitter)  # type: ignore[assignment]
        for name, declared in options_of(self).items():
            declared.check(name, getattr(self, name))
        self._check_together()

    def _check_together(self) -> None:
        if self.warmup_epochs is not None and not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"train: warmup_epochs must be at least 0 and below epochs ({self.epochs}), got {self.warmup_epochs!r}"
            )
        told_elsewhere = sorted({"name", "num_classes", "image_size"} & set(self.model_options))
        if told_elsewhere:
            raise ValueError(
                f"train: model_options must be without {', '.join(told_elsewhere)}, got {self.model_options!r}"
            )
        if (self.val_images is None) != (self.val_annotations is None):
            raise ValueError("train: val_images and val_annotations must be given together")
        if self.checkpoint and self.backbone_checkpoint:
            raise ValueError("train: checkpoint already holds a backbone, so backbone_checkpoint cannot be given too")

    def require_paths(self) -> None:
        """Raise ValueError unless `train_images`, `train_annotations` and `output` are given."""
        for name in ("train_images", "train_annotations", "output"):
            if not getattr(self, name):
                raise ValueError(f"train: {name} is missing")

    def learning_rate(self, global_batch: int) -> float:
        """Return the learning rate after warm-up: `lr`, or else the optimizer's default.

        Args:
            global_batch: Images per step of all processes together.
        """
        if self.lr is not None:
            return self.lr
        return 0.08 * global_batch / 64 if self.optimizer == "sgd" else 1e-3

    def decay(self) -> float:
        """Return the weight decay: `weight_decay`, or else the optimizer's default."""
        if self.weight_decay is not None:
            return self.weight_decay
        return 4e-5 if self.optimizer == "sgd" else 1e-2

    def warmup(self) -> float:
        """Return the number of warm-up epochs: `warmup_epochs`, or else a tenth of the run, at most 1."""
        return self.warmup_epochs if self.warmup_epochs is not None else min(1.0, self.epochs / 10)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dict of plain values, which a checkpoint can hold and ``weights_only=True`` loads."""
        return dataclasses.asdict(self)


TrainConfig.__doc__ = docstring(TrainConfig)


def config_from_options(options: dict[str, Any]) -> TrainConfig:
    """Make a TrainConfig from keyword arguments; a TypeError names those it does not know."""
    known = options_of(TrainConfig)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"train: unknown options: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return TrainConfig(**options)


def config_for_resume(saved: dict[str, Any], given: dict[str, Any]) -> TrainConfig:
    """Merge a saved configuration with the options given anew, where a resumed run may change them.

    Raises:
        ValueError: A given option has another value, and a resumed run cannot change it.
    """
    config_from_options(given)
    saved = {**TrainConfig().to_dict(), **saved}
    options = options_of(TrainConfig)
    changed = []
    for name, declared in options.items():
        if not declared.fixed or name not in given:
            continue
        before, after = _plain(saved[name]), _plain(given[name])
        if name == "image_size" and isinstance(after, int):
            after = [after, after]
        if before != after:
            changed.append(f"{name} ({before!r} -> {after!r})")
    if changed:
        raise ValueError(
            f"train: a resumed run cannot change {', '.join(changed)}; "
            "to start a new run from those weights, pass them as checkpoint instead of resume"
        )
    known = {name: value for name, value in saved.items() if name in options}
    return TrainConfig(**{**known, "overwrite": False, **given})


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return list(value)
    return str(value) if isinstance(value, Path) else value
