"""The training loop: steps, epochs, evaluation, checkpoints."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from effdet_fast.checkpoints.files import write_content
from effdet_fast.checkpoints.format import describe
from effdet_fast.data import BatchLoader, CocoDetection, normalize
from effdet_fast.evaluation import evaluate_model
from effdet_fast.models import DetectionModel
from effdet_fast.training.checkpoint import RunCheckpoint, RunState
from effdet_fast.training.config import TrainConfig
from effdet_fast.training.distributed import Agreement, Processes, wrap_model
from effdet_fast.training.graphed_step import GraphedStep
from effdet_fast.training.interrupt import Interrupt, ignoring_children
from effdet_fast.training.monitor import LossMonitor, LossSums, NonFiniteLoss
from effdet_fast.training.optimizer import ModelEma, WarmupCosine, create_optimizer, set_learning_rate
from effdet_fast.training.reporter import Reporter
from effdet_fast.training.run_data import RunData
from effdet_fast.training.run_folder import RunFolder
from effdet_fast.training.seeding import seed_step
from effdet_fast.training.step import TrainingStep


class Trainer:
    """One run on one process; all processes of a run go through the same steps.

    Args:
        config: The run's options.
        model: On its device, with its initial weights.
        data: Loaders and label meaning.
        folder: Where the main process writes.
        processes: The processes of the run.
        device: Device of `model`.
        interrupt: Tells of signals; entered by the caller.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: DetectionModel,
        data: RunData,
        folder: RunFolder,
        processes: Processes,
        device: torch.device,
        interrupt: Interrupt,
    ) -> None:
        self.config, self.model, self.data = config, model, data
        self.folder, self.processes, self.device, self.interrupt = folder, processes, device, interrupt
        self.epoch = self.batch = self.step = 0  # finished epochs, finished batches of this epoch, finished steps
        self.rows: list[dict[str, Any]] = []
        self.best = -math.inf
        self.metrics: dict[str, float] = {}
        self._agreement = Agreement(processes)
        self._images_per_step = config.batch_size * processes.world_size
        self._steps_per_epoch = len(data.train_loader)
        self._schedule = WarmupCosine(
            config.learning_rate(self._images_per_step),
            round(config.warmup() * self._steps_per_epoch),
            config.epochs * self._steps_per_epoch,
        )
        self._optimizer = create_optimizer(
            model, name=config.optimizer, lr=self._schedule(0), weight_decay=config.decay(), momentum=config.momentum
        )
        self._ema = ModelEma(model, config.ema_decay) if config.ema_decay > 0 else None
        self._take_step = (GraphedStep if config.cuda_graph else TrainingStep)(
            wrap_model(model, processes, device),
            self._optimizer,
            clip_grad_norm=config.clip_grad_norm,
            ema=self._ema,
            amp=config.amp,
        )
        self._monitor = LossMonitor(
            device, processes, scaled=config.amp == "fp16", own_id=data.train_loader.coco.annotations.own_id
        )
        self._reporter = Reporter(config, folder, enabled=processes.is_main)

    def fit(self) -> None:
        """Train to the last epoch, or to the first signal; either way `last.pt` is whole."""
        self._reporter.start_run(self.model.config, self.data, self.device, self._images_per_step, self.step)
        try:
            while self.epoch < self.config.epochs:
                if not self._train_epoch() or not self._finish_epoch():
                    return
        except NonFiniteLoss as error:
            error.tell_of_weights(self.model)
            if self.processes.is_main:
                self.folder.write_failure(error.step, error.image_ids, str(error))
            raise
        except Exception as error:
            lost = self.data.train_loader.lost_process()
            if lost is None and self.data.val_loader is not None:
                lost = self.data.val_loader.lost_process()
            with ignoring_children():
                if lost is not None and self.interrupt.signal and self.processes.world_size == 1:
                    self.save_last()  # the signal went to all processes of the run
                    return
                self._save_after_error()
            if lost is not None:
                raise lost from error
            raise
        finally:
            self._reporter.close()

    def _save_after_error(self) -> None:
        """Keep what was trained, whatever has ended the run."""
        if not self.processes.is_main:
            return
        try:
            if self.processes.world_size == 1:  # several would wait for each other
                self._monitor.flush()
            self.save_last()
        except Exception as another:
            print(f"what was trained since the last checkpoint is lost: {another}", file=sys.stderr, flush=True)
            return
        print(
            f"stopped by an error after {self.step} steps; to continue: effdet-fast train --resume {self.folder.last}",
            file=sys.stderr,
            flush=True,
        )

    def _train_epoch(self) -> bool:
        """Train the rest of the present epoch; False if a signal ended it early."""
        enter_training(self.model, frozen_backbone=self.config.freeze_backbone, frozen_bn=self.config.freeze_bn)
        loader = self.data.train_loader
        loader.set_epoch(self.epoch, start_batch=self.batch)
        self._reporter.start_epoch(self.epoch, self._steps_per_epoch, self.batch)
        if self.batch == 0:
            self._monitor.start_epoch()
        images_seen = stop = 0
        waited, started = 0.0, time.perf_counter()
        ready = started
        for batch in loader:
            waited += time.perf_counter() - ready
            self._train_step(batch)
            images_seen += self._images_per_step
            self._reporter.step(self._monitor.latest, self._learning_rate(self.step - 1), images_seen)
            stop = self._agreement.exchange(self.interrupt.signal or 0)
            if stop:
                break
            ready = time.perf_counter()
        stop = max(stop, self._agreement.drain())
        self._monitor.flush()
        seconds = time.perf_counter() - started
        self.processes.broadcast_buffers(self.model)
        self._reporter.end_epoch(seconds, images_seen, waited)
        if stop:
            self.interrupt.signal = stop
            self.save_last()
        return not stop

    def _learning_rate(self, step: int) -> float:
        """By the steps that moved the weights: one that the scaler skips does not count."""
        return self._schedule(self._monitor.steps_taken(step))

    def _train_step(self, batch: Any) -> None:
        config = self.config
        seed_step(config.seed, self.step, self.processes.rank)
        set_learning_rate(self._optimizer, self._learning_rate(self.step))
        image_ids = batch.image_ids
        batch = batch.to(self.device, non_blocking=True)
        images = normalize(
            batch.images, self.model.config.mean, self.model.config.std, channels_last=config.channels_last
        )
        losses = self._take_step(images, batch.gt_boxes, batch.gt_labels)
        self._monitor.record(self.step, losses[:3], losses.grad_norm, image_ids)
        self.step += 1
        self.batch += 1

    def _finish_epoch(self) -> bool:
        """Evaluate where due, write the row and the checkpoints; False if a signal cut the evaluation short."""
        config, epoch = self.config, self.epoch
        last = epoch + 1 == config.epochs
        loader, dataset = self.data.val_loader, self.data.val_dataset
        metrics: dict[str, float] = {}
        if loader is not None and dataset is not None and ((epoch + 1) % config.eval_every == 0 or last):
            self.save_last()  # an evaluation can take minutes; a signal need not wait for it
            try:
                with self.interrupt.raising():
                    metrics = self._evaluate(loader, dataset)
            except KeyboardInterrupt:
                return False
        total, cls, box = self._monitor.sums.means()
        row = {
            "epoch": epoch + 1,
            "step": self.step,
            "lr": self._learning_rate(self.step - 1),
            "loss": total,
            "cls_loss": cls,
            "box_loss": box,
            **metrics,
            **self._reporter.speed(),
        }
        self.rows.append(row)
        self.epoch, self.batch = epoch + 1, 0
        self._monitor.start_epoch()
        self.metrics = metrics or self.metrics
        better = metrics.get("AP", -math.inf) >= self.best if metrics else loader is None
        if metrics and better:
            self.best = metrics["AP"]
        if self.processes.is_main:
            self.folder.write_results(self.rows)
            self._reporter.epoch_line(row, best=better and bool(metrics))
            if better:
                write_content(self._published(metrics), self.folder.best)
        self.save_last()
        return True

    def _evaluate(self, loader: BatchLoader, dataset: CocoDetection) -> dict[str, float]:
        model: nn.Module = self.model
        if self._ema is not None:
            self._ema.copy_buffers()
            model = self._ema.module
        model.eval()
        return evaluate_model(
            model,
            loader,
            dataset,
            device=self.device,
            amp=self.config.amp,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        )

    def _published(self, metrics: dict[str, float]) -> dict[str, Any]:
        """What a user of the weights needs; all of `best.pt`, and the head of `last.pt`."""
        data = self.data
        return {
            **describe(self.model.config, data.class_names, data.category_ids, data.train_loader.coco.depth),
            "epoch": self.epoch,
            "metrics": dict(metrics),
            "state_dict": self.model.state_dict() if self._ema is None else self._ema.state_dict(),
        }

    def save_last(self) -> None:
        """Write `last.pt` (main process only): the published weights and everything a resumed run continues from."""
        if not self.processes.is_main:
            return
        state = RunState(
            config=self.config.to_dict(),
            epoch=self.epoch,
            batch=self.batch,
            step=self.step,
            steps_per_epoch=self._steps_per_epoch,
            images_per_step=self._images_per_step,
            data=self.data.record,
            model=self.model.state_dict(),
            optimizer=self._optimizer.state_dict(),
            scaler=self._take_step.scaler.state_dict(),
            ema_updates=self._ema.updates if self._ema is not None else 0,
            sums=dataclasses.asdict(self._monitor.sums),
            skipped=list(self._monitor.skipped),
            rows=self.rows,
            best=self.best,
            metrics=self.metrics,
        )
        write_content({**self._published(self.metrics), "training": state.to_dict()}, self.folder.last)

    def restore(self, checkpoint: RunCheckpoint, *, same_images: bool = True) -> None:
        """Continue from a `last.pt` whose fit to this run has been checked; with other images, from the start of its epoch."""
        state = checkpoint.state
        self.epoch, self.batch, self.step = state.epoch, state.batch, state.step
        self.rows, self.best, self.metrics = state.rows, state.best, state.metrics
        self.model.load_state_dict(state.model)
        self._optimizer.load_state_dict(state.optimizer)
        if self._take_step.scaler.is_enabled():
            self._take_step.scaler.load_state_dict(state.scaler)
        if self._ema is not None:
            self._ema.load(checkpoint.published["state_dict"], state.ema_updates)
        self._monitor.start_epoch(LossSums(**state.sums))  # type: ignore[arg-type]
        self._monitor.skipped = list(state.skipped)
        if not same_images:
            self.batch, self.step = 0, self.epoch * self._steps_per_epoch
            self._monitor.skipped = [step for step in self._monitor.skipped if step < self.step]
            self._monitor.start_epoch()


def enter_training(model: nn.Module, *, frozen_backbone: bool, frozen_bn: bool) -> None:
    """Training mode, except that frozen parts keep their BatchNorm statistics."""
    model.train()
    if frozen_backbone:
        model.backbone.eval()  # type: ignore[operator, union-attr]
    if frozen_bn:
        for module in batch_norms(model):
            module.eval()


def batch_norms(model: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield module
