"""`effdet-fast train`."""

from __future__ import annotations

import argparse

from effdet_fast.cli.arguments import add_model_option, image_size, model_options
from effdet_fast.device import AMP_MODES
from effdet_fast.training.config import OPTIMIZERS, TrainConfig, field_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag is a field of `TrainConfig`; one that is not given is left out, so that --resume sees what is."""
    parser.argument_default = argparse.SUPPRESS
    defaults = TrainConfig()
    switch = argparse.BooleanOptionalAction

    data = parser.add_argument_group("data")
    data.add_argument("--train-images", metavar="DIR", help="folder of the training images")
    data.add_argument("--train-annotations", metavar="FILE", help="COCO-format JSON of the training images")
    data.add_argument("--val-images", metavar="DIR", help="folder of the validation images (default: no validation)")
    data.add_argument("--val-annotations", metavar="FILE", help="COCO-format JSON of the validation images")
    data.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help=f"data-loading processes per training process (default: {defaults.workers})",
    )
    data.add_argument(
        "--hflip", type=float, metavar="P", help=f"probability of a horizontal flip (default: {defaults.hflip})"
    )
    data.add_argument(
        "--vflip", type=float, metavar="P", help=f"probability of a vertical flip (default: {defaults.vflip})"
    )
    low, high = defaults.scale_jitter
    data.add_argument(
        "--scale-jitter",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help=f"factors of the random resize before cropping; 1 1 switches it off (default: {low} {high})",
    )

    data.add_argument(
        "--depth",
        metavar="BITS",
        help="8, 10, 12, 14 or 16: bits of the values of grey pictures of more than 8 bits, of which the upper 8 are used "
        "(default: auto, from the largest value of all of them)",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="NAME", help=f"efficientdet_d0, retinanet_resnet50_fpn, ... (default: {defaults.model})"
    )
    add_model_option(model)
    model.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PX",
        help="one side, or height and width, of the model's input in pixels (default: the model's)",
    )
    model.add_argument("--backbone-checkpoint", metavar="FILE", help="ImageNet weights for the backbone")
    model.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="detector weights to start from; with other classes, the class layer starts anew",
    )
    model.add_argument("--freeze-backbone", action="store_true", help="train neck and heads only")
    model.add_argument("--freeze-bn", action="store_true", help="keep BatchNorm statistics and weights as loaded")
    model.add_argument(
        "--bn-momentum",
        type=float,
        metavar="M",
        help="share of each batch in BatchNorm's running statistics, in (0, 1]; try 0.1 in runs of a few hundred steps "
        "(default: the model's, 0.01 in neck and heads)",
    )
    model.add_argument(
        "--sync-bn", action=switch, help="with several processes, share BatchNorm statistics (default: yes)"
    )

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--epochs", type=int, metavar="N", help=f"passes over the training images (default: {defaults.epochs})"
    )
    recipe.add_argument(
        "--batch-size", type=int, metavar="N", help=f"images per process and step (default: {defaults.batch_size})"
    )
    recipe.add_argument("--optimizer", choices=OPTIMIZERS, help=f"default: {defaults.optimizer}")
    recipe.add_argument(
        "--lr",
        type=float,
        metavar="LR",
        help="learning rate after warm-up (default: sgd 0.08 per 64 images of a step, adamw 0.001)",
    )
    recipe.add_argument("--momentum", type=float, metavar="M", help=f"momentum of sgd (default: {defaults.momentum})")
    recipe.add_argument(
        "--weight-decay", type=float, metavar="W", help="on convolution weights only (default: sgd 4e-5, adamw 0.01)"
    )
    recipe.add_argument(
        "--warmup-epochs",
        type=float,
        metavar="E",
        help="linear warm-up in epochs, fractions allowed (default: a tenth of the run, at most 1)",
    )
    recipe.add_argument(
        "--ema-decay",
        type=float,
        metavar="D",
        help=f"moving average of the weights; 0: off (default: {defaults.ema_decay})",
    )
    recipe.add_argument(
        "--clip-grad-norm",
        type=float,
        metavar="G",
        help=f"largest norm of the gradient; 0: off (default: {defaults.clip_grad_norm})",
    )
    recipe.add_argument(
        "--seed", type=int, metavar="S", help=f"initial weights, order and augmentation (default: {defaults.seed})"
    )

    speed = parser.add_argument_group("device and speed")
    speed.add_argument("--device", metavar="DEV", help="cpu, cuda or cuda:1 (default: the GPU if there is one)")
    speed.add_argument(
        "--amp", choices=AMP_MODES, help=f"mixed precision; fp16 scales the loss (default: {defaults.amp})"
    )
    speed.add_argument(
        "--cuda-graph",
        action=switch,
        help="replay each step from one CUDA graph; same steps, less work for the host; one GPU (default: no)",
    )
    speed.add_argument("--channels-last", action=switch, help="images and weights in channels_last (default: yes)")
    speed.add_argument(
        "--deterministic", action=switch, help="deterministic algorithms where there is a choice (default: yes)"
    )

    run_group = parser.add_argument_group("run")
    run_group.add_argument("--output", metavar="DIR", help="config.json, results.csv, best.pt and last.pt go here")
    run_group.add_argument(
        "--resume",
        metavar="FILE",
        help="last.pt of a run to continue; its options are kept, so no other flag is needed",
    )
    run_group.add_argument("--overwrite", action="store_true", help="replace the run that the output folder holds")
    run_group.add_argument(
        "--eval-every",
        type=int,
        metavar="N",
        help=f"evaluate every N epochs and after the last (default: {defaults.eval_every})",
    )
    run_group.add_argument("--tensorboard", action="store_true", help="write TensorBoard files too")
    run_group.add_argument("--progress", action=switch, help="progress bar (default: yes)")


def run(options: argparse.Namespace) -> int:
    from effdet_fast.training import train

    given = {name: value for name, value in vars(options).items() if name in field_names()}
    if "image_size" in given:
        given["image_size"] = image_size(given["image_size"])
    if given.get("depth", "auto").isdecimal():
        given["depth"] = int(given["depth"])
    if "model_options" in given:
        given["model_options"] = model_options(given["model_options"])
    result = train(**given)
    if result.signal is not None:
        if result.is_main:
            print(
                f"stopped after {result.steps} steps; to continue: effdet-fast train --resume {result.last}", flush=True
            )
        return 128 + result.signal
    if result.is_main:
        best = f", best AP {result.best_ap:.4f}" if result.best_ap is not None else ""
        print(f"finished {result.epochs} epochs{best}; weights: {result.best}", flush=True)
    return 0
