"""What the main process shows while it trains: a bar, a line per epoch, TensorBoard curves."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from tqdm import tqdm

from effdet_fast.evaluation import METRICS
from effdet_fast.training.config import TrainConfig
from effdet_fast.training.run_data import RunData
from effdet_fast.training.run_folder import RunFolder

_LOADER_BOUND = 0.25


class Reporter:
    """Progress on screen and in TensorBoard files; silent on all processes but the main one.

    Args:
        config: The run's options.
        folder: Where TensorBoard files go.
        enabled: Whether this is the main process.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder, *, enabled: bool) -> None:
        self._config = config
        self._enabled = enabled and config.progress
        self._bar: tqdm | None = None
        self._seconds = self._images = self._waited = 0.0
        self._writer: Any = None
        if config.tensorboard and enabled:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError("train: --tensorboard needs `pip install effdet_fast[tensorboard]`") from error
            self._writer = SummaryWriter(str(folder.path))

    def start_run(self, model_config: Any, data: RunData, device: torch.device, per_step: int, step: int) -> None:
        if not self._enabled:
            return
        height, width = model_config.image_size
        images, classes = len(data.train_loader.coco), len(data.class_names)
        print(
            f"{model_config.name} at {height} x {width} px on {device}: {images} images, {classes} classes, "
            f"{len(data.train_loader)} steps of {per_step} images per epoch"
            + (f"; continuing after step {step}" if step else ""),
            flush=True,
        )
        if (deepest := data.train_loader.coco.deepest) is not None:
            print(
                f"gray values go up to {deepest}: taken as {data.train_loader.coco.depth} bits (see --depth)",
                flush=True,
            )

    def start_epoch(self, epoch: int, steps: int, start: int) -> None:
        if not self._enabled:
            return
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=steps,
            initial=start,
            desc=f"epoch {epoch + 1}/{self._config.epochs}",
            unit="step",
            leave=False,
            dynamic_ncols=True,
            mininterval=0.2 if terminal else 30.0,  # a log file wants a line now and then
        )

    def step(self, loss: float, lr: float, images: int) -> None:
        if self._bar is None:
            return
        rate = images / max(1e-9, self._bar.format_dict["elapsed"])
        shown = "..." if math.isnan(loss) else f"{loss:.4g}"
        self._bar.set_postfix_str(f"loss {shown}, lr {lr:.3g}, {rate:.3g} img/s", refresh=False)
        self._bar.update()

    def end_epoch(self, seconds: float, images: int, waited: float) -> None:
        self._seconds, self._images, self._waited = seconds, images, waited
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def speed(self) -> dict[str, float]:
        rate = self._images / self._seconds if self._seconds > 0 else 0.0
        return {"images_per_second": round(rate, 2), "seconds": round(self._seconds, 2)}

    def epoch_line(self, row: dict[str, Any], *, best: bool) -> None:
        if self._writer is not None:
            for name in ("lr", "loss", "cls_loss", "box_loss", "images_per_second", *METRICS):
                if name in row:
                    self._writer.add_scalar(name, row[name], row["epoch"])
        if not self._enabled:
            return
        parts = [
            f"epoch {row['epoch']}/{self._config.epochs}",
            f"loss {row['loss']:.4f} (class {row['cls_loss']:.4f}, box {row['box_loss']:.4f})",
        ]
        if "AP" in row:
            parts.append(f"AP {row['AP']:.4f} AP50 {row['AP50']:.4f}" + (" (best)" if best else ""))
        parts.append(f"lr {row['lr']:.3g}")
        parts.append(f"{row['images_per_second']:.3g} img/s")
        share = self._waited / self._seconds if self._seconds else 0.0
        if share > _LOADER_BOUND:
            parts.append(f"({share:.0%} of the time waiting for data: more --workers may help)")
        print("  ".join(parts), flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()
