"""What a training run can be told: one dataclass for the Python API, the command line and the checkpoint."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any, Literal

from effdet_fast.device import AMP_MODES

OPTIMIZERS = ("sgd", "adamw")

# What a resumed run cannot change: the weights, the optimiser state or the order of the samples would no longer fit.
FIXED_ON_RESUME = (
    "model",
    "model_options",
    "image_size",
    "seed",
    "optimizer",
    "lr",
    "weight_decay",
    "momentum",
    "warmup_epochs",
    "ema_decay",
    "clip_grad_norm",
    "amp",
    "hflip",
    "vflip",
    "scale_jitter",
    "depth",
    "bn_momentum",
    "freeze_backbone",
    "freeze_bn",
    "sync_bn",
)


def default_workers() -> int:
    """4, or the number of processors if that is smaller."""
    return min(4, os.cpu_count() or 1)


@dataclasses.dataclass
class TrainConfig:
    """A training run.

    Args:
        model: Model name, as in ``effdet_fast.models.list_models()``.
        model_options: Fields of ``effdet_fast.models.DetectorConfig`` that differ from the named model's, for instance
            ``{"neck": "panet", "fusion": "softmax"}``; image size and number of classes are told in other ways.
        train_images: Folder of the training images.
        train_annotations: COCO-format JSON file of the training images.
        val_images: Folder of the validation images; without it nothing is evaluated and `best.pt` is the last epoch.
        val_annotations: COCO-format JSON file of the validation images.
        output: Folder of the run: `config.json`, `results.csv`, `best.pt`, `last.pt`.
        epochs: Passes over the training images.
        batch_size: Images per process and step.
        image_size: (height, width) of the model's input in pixels; None: the model's own.
        optimizer: "sgd" (Nesterov momentum) or "adamw".
        lr: Learning rate at the end of warm-up; None: 0.08 per 64 images of the global batch for sgd, 1e-3 for adamw.
        weight_decay: Decay of convolution weights only; None: 4e-5 for sgd, 1e-2 for adamw.
        momentum: Momentum of sgd.
        warmup_epochs: Epochs (fractions allowed) of linear warm-up; None: a tenth of the run, at most 1.
        ema_decay: Decay of the exponential moving average of the weights; 0 switches it off.
        clip_grad_norm: Largest norm of the gradient over all parameters; 0 switches clipping off.
        amp: "none" (float32), "bf16" or "fp16" (with a gradient scaler).
        cuda_graph: Replay each step from one CUDA graph (`effdet_fast.training.GraphedStep`) on one GPU; elsewhere a warning
            says why not. The steps are the same ones, so a resumed run may change it. Not yet run on a GPU.
        channels_last: Keep images and weights in channels_last.
        deterministic: Choose deterministic algorithms where PyTorch has both kinds.
        workers: Data-loading processes per training process; 0 loads in the training process. The default is 4, or the
            number of processors if that is smaller.
        seed: Seed of initial weights, order of the samples and augmentation.
        device: "cuda", "cuda:1", "cpu"; None: the GPU if there is one.
        checkpoint: Local file to start from; a class head of another size is left at its initial values.
        backbone_checkpoint: Local file of ImageNet weights for the backbone.
        resume: A `last.pt` to continue from.
        overwrite: Allow an output folder that holds another run, and replace that run.
        eval_every: Evaluate every so many epochs, and after the last.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip, for pictures without an up and down.
        scale_jitter: Smallest and largest factor of the random resize before cropping.
        depth: Bits of the values of grey pictures of more than 8 bits, of which the upper 8 are used: 8, 10, 12, 14, 16, or
            "auto" for the least that fits the largest value of all training images.
        bn_momentum: Momentum of all BatchNorm layers in PyTorch's sense (the share of the new batch); None: the
            model's own (0.01 in EfficientDet's necks and heads, which lags in runs of a few hundred steps).
        freeze_backbone: Train neck and heads only.
        freeze_bn: Keep all BatchNorm layers at their loaded statistics and weights.
        sync_bn: With several processes, take BatchNorm statistics over the images of all of them.
        tensorboard: Write TensorBoard event files too (extra `tensorboard`).
        progress: Show a progress bar.
    """

    train_images: str = ""
    train_annotations: str = ""
    output: str = ""
    model: str = "efficientdet_d0"
    model_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    val_images: str | None = None
    val_annotations: str | None = None
    epochs: int = 50
    batch_size: int = 16
    image_size: tuple[int, int] | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float | None = None
    weight_decay: float | None = None
    momentum: float = 0.9
    warmup_epochs: float | None = None
    ema_decay: float = 0.9998
    clip_grad_norm: float = 10.0
    amp: Literal["none", "bf16", "fp16"] = "none"
    cuda_graph: bool = False
    channels_last: bool = True
    deterministic: bool = True
    workers: int = dataclasses.field(default_factory=default_workers)
    seed: int = 0
    device: str | None = None
    checkpoint: str | None = None
    backbone_checkpoint: str | None = None
    resume: str | None = None
    overwrite: bool = False
    eval_every: int = 1
    hflip: float = 0.5
    vflip: float = 0.0
    scale_jitter: tuple[float, float] = (0.1, 2.0)
    depth: int | Literal["auto"] | None = "auto"
    bn_momentum: float | None = None
    freeze_backbone: bool = False
    freeze_bn: bool = False
    sync_bn: bool = True
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Path):
                setattr(self, field.name, str(value))
        if isinstance(self.image_size, int):
            self.image_size = (self.image_size, self.image_size)
        self.image_size = tuple(self.image_size) if self.image_size is not None else None  # type: ignore[assignment]
        self.scale_jitter = tuple(self.scale_jitter)  # type: ignore[assignment]
        self._check_values()

    def _check_values(self) -> None:
        def require(name: str, ok: bool, rule: str) -> None:
            if not ok:
                raise ValueError(f"train: {name} must be {rule}, got {getattr(self, name)!r}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            require(field.name, not any(isinstance(n, float) and not math.isfinite(n) for n in numbers), "finite")
        require("epochs", self.epochs >= 1, "at least 1")
        require("batch_size", self.batch_size >= 1, "at least 1")
        require("workers", self.workers >= 0, "at least 0")
        require("eval_every", self.eval_every >= 1, "at least 1")
        require("seed", 0 <= self.seed < 2**32, "in [0, 2**32)")
        require("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        require("amp", self.amp in AMP_MODES, f"one of {', '.join(AMP_MODES)}")
        require("lr", self.lr is None or self.lr > 0, "above 0")
        require("weight_decay", self.weight_decay is None or self.weight_decay >= 0, "at least 0")
        require("momentum", 0 < self.momentum < 1, "in (0, 1)")
        require("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        require("clip_grad_norm", self.clip_grad_norm >= 0, "at least 0")
        require("hflip", 0 <= self.hflip <= 1, "in [0, 1]")
        require("vflip", 0 <= self.vflip <= 1, "in [0, 1]")
        require(
            "warmup_epochs",
            self.warmup_epochs is None or 0 <= self.warmup_epochs < self.epochs,
            f"at least 0 and below epochs ({self.epochs})",
        )
        require("bn_momentum", self.bn_momentum is None or 0 < self.bn_momentum <= 1, "in (0, 1]")
        require("depth", self.depth in (None, "auto") or isinstance(self.depth, int), "auto or a number of bits")
        low_high = len(self.scale_jitter) == 2 and 0 < self.scale_jitter[0] <= self.scale_jitter[1]
        require("scale_jitter", low_high, "two factors, 0 < smallest <= largest")
        sizes_fit = self.image_size is None or (len(self.image_size) == 2 and min(self.image_size) >= 1)
        require("image_size", sizes_fit, "one size or (height, width) in pixels, at least 1")
        told_elsewhere = sorted({"name", "num_classes", "image_size"} & set(self.model_options))
        require("model_options", not told_elsewhere, f"without {', '.join(told_elsewhere)}")
        if (self.val_images is None) != (self.val_annotations is None):
            raise ValueError("train: val_images and val_annotations must be given together")
        if self.checkpoint and self.backbone_checkpoint:
            raise ValueError("train: checkpoint already holds a backbone, so backbone_checkpoint cannot be given too")

    def require_paths(self) -> None:
        """Raise ValueError if a path no run can do without is missing."""
        for name in ("train_images", "train_annotations", "output"):
            if not getattr(self, name):
                raise ValueError(f"train: {name} is missing")

    def learning_rate(self, global_batch: int) -> float:
        """The given rate, or the optimiser's default for `global_batch` images per step."""
        if self.lr is not None:
            return self.lr
        return 0.08 * global_batch / 64 if self.optimizer == "sgd" else 1e-3

    def decay(self) -> float:
        """The given weight decay, or the optimiser's default."""
        if self.weight_decay is not None:
            return self.weight_decay
        return 4e-5 if self.optimizer == "sgd" else 1e-2

    def warmup(self) -> float:
        """The given number of warm-up epochs, or the default for the run's length."""
        return self.warmup_epochs if self.warmup_epochs is not None else min(1.0, self.epochs / 10)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, so that a checkpoint holding them loads with ``weights_only=True``."""
        return dataclasses.asdict(self)


def field_names() -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(TrainConfig))


def config_from_options(options: dict[str, Any]) -> TrainConfig:
    """A TrainConfig from keyword arguments; TypeError naming any it does not know."""
    unknown = sorted(set(options) - field_names())
    if unknown:
        raise TypeError(f"train: unknown options: {', '.join(unknown)}; known: {', '.join(sorted(field_names()))}")
    return TrainConfig(**options)


def config_for_resume(saved: dict[str, Any], given: dict[str, Any]) -> TrainConfig:
    """The saved configuration with the options given anew, where a run may change them.

    Raises:
        ValueError: An option that a run cannot change half-way was given with another value.
    """
    config_from_options(given)
    saved = {**TrainConfig().to_dict(), **saved}
    changed = []
    for name in FIXED_ON_RESUME:
        if name not in given:
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
    known = {name: value for name, value in saved.items() if name in field_names()}
    return TrainConfig(**{**known, "overwrite": False, **given})


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return list(value)
    return str(value) if isinstance(value, Path) else value
