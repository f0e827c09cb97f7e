"""A training step that is replayed from a CUDA graph: one launch instead of thousands."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from effdet_fast.data.batch import object_rows
from effdet_fast.training.optimizer import (
    DeviceLearningRates,
    ModelEma,
    marked_capturable,
    skips_on_device,
    why_not_capturable,
)
from effdet_fast.training.step import StepLosses, TrainingStep

WARMUP_STEPS = 3
MAX_CHANGES = 10  # of what a graph takes as constant, without a replay between them


class GraphedStep(TrainingStep):
    """A `TrainingStep` that runs as one CUDA graph: same arguments and same weights after it, with one launch by the host.

    The first three steps run eagerly, on a stream of their own; they train like any other and allocate what is allocated once.
    The next step is captured, and it and all later ones are replayed. Losses are copies, which later steps leave alone.

    - Learning rates live on the GPU; ``group["lr"] = x`` and PyTorch's schedulers go on working.
    - Batches with fewer objects are padded. One with more than ever before leads to three eager steps and a new capture.
    - Random numbers are those of the eager step: each replay reads the state of PyTorch's generator, so ``torch.manual_seed``
      works as usual.
    - A new capture follows by itself when an optimizer's state is loaded, its options change, parameters are unfrozen or moved,
      or modules switch modes. After any other change that Python would see, call `reset`.
    - Hooks, prints and everything else that is no launch happen in eager steps only.

    Where capture is impossible, steps run eagerly. One warning names the reason, which the attribute `fallback_reason` keeps: no
    GPU, several processes, an optimizer that is neither fused nor capturable, a step that waits for the GPU, or a failed capture.
    A batch whose images have another shape or dtype than the captured ones runs eagerly too; the first one gives a warning.

    Not yet run on a GPU.

    Args:
        model: As for `TrainingStep`.
        optimizer: As for `TrainingStep`.
        clip_grad_norm: As for `TrainingStep`.
        ema: As for `TrainingStep`.
        amp: As for `TrainingStep`.

    Raises:
        TypeError: As `TrainingStep`.
        ValueError: As `TrainingStep`; also, when called, if the shapes of the objects do not fit.

    Example:
        ```python
        model = effdet_fast.create_model("efficientdet_d0").cuda().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        ema = ModelEma(model, 0.9998)
        step = GraphedStep(model, optimizer, clip_grad_norm=10.0, ema=ema, amp="bf16")
        for images, gt_boxes, gt_labels in batches:  # on the GPU
            losses = step(images, gt_boxes, gt_labels)
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_grad_norm: float = 0.0,
        ema: ModelEma | None = None,
        amp: str = "none",
    ) -> None:
        super().__init__(model, optimizer, clip_grad_norm=clip_grad_norm, ema=ema, amp=amp)
        self.fallback_reason: str | None = None
        self._captured: _Captured | None = None
        self._constants: Any = None
        self._modules = list(model.modules())
        self._rows = self._warm = self._changes = 0
        self._mismatch_told = False
        if reason := self._why_not():
            self._give_up(reason)
        else:
            self._rates = DeviceLearningRates(optimizer, self.device)

    def __call__(self, images: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> StepLosses:
        if self.fallback_reason is not None:
            return super().__call__(images, gt_boxes, gt_labels)
        check_shapes(type(self).__name__, images, gt_boxes, gt_labels)
        self._rates.take_over()
        self.prepare()
        self._drop_outdated(gt_labels.shape[1])
        if self._changes > MAX_CHANGES:
            self._give_up("an option of the optimizer, or a parameter, changes again and again")
            return self.compute(images, gt_boxes, gt_labels)
        if self._captured is None and self._warm < WARMUP_STEPS:
            return self._warm_up(images, gt_boxes, gt_labels)
        if self._captured is None:
            self._captured = self._try_capture(images, gt_boxes, gt_labels)
        if self._captured is None or self._differs(images, gt_boxes):
            return self.compute(images, gt_boxes, gt_labels)
        self._changes = 0
        return self._captured.replay(images, gt_boxes, gt_labels)

    def reset(self) -> None:
        """Forget the captured step; the next steps warm up and capture again."""
        self._captured = None
        self._warm = 0

    def _why_not(self) -> str | None:
        if not torch.cuda.is_available():
            return f"PyTorch {torch.__version__} sees no GPU"
        if self.device.type != "cuda":
            return f"the model is on {self.device}"
        if any(parameter.device != self.device for parameter in self.parameters):
            return "the model's parameters are on several devices"
        if self.model is not self.detector or (
            dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        ):
            return "a step that averages gradients over several processes is not captured"
        if self.scaler.is_enabled() and not skips_on_device(self.optimizer):
            return f"with fp16, {type(self.optimizer).__name__} skips steps on the host unless made with fused=True"
        return why_not_capturable(self.optimizer)

    def _give_up(self, reason: str) -> None:
        self.fallback_reason = reason
        self.reset()
        warnings.warn(f"{type(self).__name__}: steps run without a CUDA graph: {reason}", stacklevel=3)

    def _drop_outdated(self, objects: int) -> None:
        """Forget a captured step that has no room for so many objects, or that took for constant what has changed."""
        constants = self._take_constants()
        rows = max(self._rows, object_rows(objects))
        if rows != self._rows or constants != self._constants:
            self._changes += 1
            self._rows, self._constants = rows, constants
            self.reset()

    def _take_constants(self) -> tuple:
        optimizer = self.optimizer
        groups = [[(k, v) for k, v in group.items() if k not in ("params", "lr")] for group in optimizer.param_groups]
        return (
            _Same(optimizer.state),  # load_state_dict puts another one there
            [[(k, _Same(v) if isinstance(v, Tensor) else v) for k, v in group] for group in groups],
            [(parameter.requires_grad, parameter.data_ptr()) for parameter in self.parameters],
            [module.training for module in self._modules],
        )

    def _warm_up(self, images: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> StepLosses:
        """An eager step on the stream that will be captured; the last one is watched."""
        self._warm += 1
        with self._on_stream(), self._watch() as waits:
            losses = self.compute(images, gt_boxes, gt_labels)
        if waits:
            self._give_up(f"the step waits for the GPU ({waits[0]})")
        return losses

    def _watch(self) -> contextlib.AbstractContextManager[list[str]]:
        return _waits_noted() if self._warm == WARMUP_STEPS else contextlib.nullcontext([])

    @functools.cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Launch on the side stream, between what was launched before and what will be launched after."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def _try_capture(self, images: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> _Captured | None:
        if torch.is_autocast_enabled(self.device.type):
            self._give_up(
                "it is called inside torch.autocast, which keeps cast weights from step to step; give amp instead"
            )
            return None
        try:
            return self._capture(images, gt_boxes, gt_labels)
        except RuntimeError as error:  # torch.AcceleratorError and torch.OutOfMemoryError are such
            self.drop_gradients()
            self._renew_scaler()
            # Ending a broken capture raises too, and says less than what broke it.
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            message = str(cause).strip().partition("\n")[0]
            self._give_up(f"its capture failed ({type(cause).__name__}: {message})")
            return None

    def _capture(self, images: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> _Captured:
        """Record the launches of a step without any of them being done."""
        with self._on_stream():
            batch = StaticBatch(images, gt_boxes, gt_labels, self._rows)
            graph = torch.cuda.CUDAGraph()
            # "thread_local", as a data loader's thread pins memory meanwhile, which "global" takes for a mistake.
            recording = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
            with marked_capturable(self.optimizer), recording:
                losses = torch.stack(self.compute(batch.images, batch.gt_boxes, batch.gt_labels))
        return _Captured(graph, batch, losses)

    def _renew_scaler(self) -> None:
        """Another scaler in the same state: one that was interrupted half-way refuses the next step."""
        state = self.scaler.state_dict()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaler.is_enabled())
        self.scaler.load_state_dict(state)

    def _differs(self, images: Tensor, gt_boxes: Tensor) -> bool:
        assert self._captured is not None
        mismatch = self._captured.batch.mismatch(images, gt_boxes)
        if mismatch is not None and not self._mismatch_told:
            self._mismatch_told = True
            warnings.warn(
                f"{type(self).__name__}: batches like this run without a CUDA graph: {mismatch}", stacklevel=3
            )
        return mismatch is not None


@dataclasses.dataclass(frozen=True)
class _Captured:
    """A recorded step, the batch it reads and the losses it writes, float32 [4]."""

    graph: torch.cuda.CUDAGraph
    batch: StaticBatch
    losses: Tensor

    def replay(self, images: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> StepLosses:
        self.batch.fill(images, gt_boxes, gt_labels)
        self.graph.replay()
        return StepLosses(*self.losses.clone().unbind())


@dataclasses.dataclass(eq=False)
class _Same:
    """A value that equals another only if both are the same object; comparing tensors would read them."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


@contextlib.contextmanager
def _waits_noted() -> Iterator[list[str]]:
    """Collects where the host waits for the GPU meanwhile, which a capture would not survive."""
    waits: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for each in caught:
        if "synchronizing CUDA operation" in str(each.message):
            waits.append(f"{each.filename}:{each.lineno}")
        elif "Synchronization debug mode" not in str(each.message):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


class StaticBatch:
    """Room for batches of one image shape and at most so many objects per image.

    Args:
        images: [B, ...]; its shape, dtype, device and layout are taken over.
        gt_boxes: [B, M, 4]; its dtype is taken over.
        gt_labels: int64 [B, M].
        rows: Objects per image there must be room for; `object_rows` of M if that is more.
    """

    def __init__(self, images: Tensor, gt_boxes: Tensor, gt_labels: Tensor, rows: int = 0) -> None:
        rows = max(rows, object_rows(gt_labels.shape[1]))
        self.images = torch.empty_like(images)
        self.gt_boxes = gt_boxes.new_zeros(len(images), rows, 4)
        self.gt_labels = gt_labels.new_full((len(images), rows), -1)
        self.fill(images, gt_boxes, gt_labels)

    def mismatch(self, images: Tensor, gt_boxes: Tensor) -> str | None:
        """What keeps a batch from being read here, in words."""
        for what, given, held in (("images", images, self.images), ("gt_boxes", gt_boxes, self.gt_boxes)):
            if given.dtype != held.dtype:
                return f"{what} are {given.dtype}, where the graph has {held.dtype}"
        if images.shape != self.images.shape:
            return f"images have shape {list(images.shape)}, where the graph has {list(self.images.shape)}"
        return None

    def fill(self, images: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> None:
        """Copy a batch in; rows past its objects become padding. Launches on the device only."""
        objects = gt_labels.shape[1]
        self.images.copy_(images)
        self.gt_boxes[:, :objects].copy_(gt_boxes)
        self.gt_boxes[:, objects:].zero_()
        self.gt_labels[:, :objects].copy_(gt_labels)
        self.gt_labels[:, objects:].fill_(-1)


def check_shapes(caller: str, images: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> None:
    """Raise ValueError unless these are images with their padded objects: a copy would broadcast."""
    if gt_labels.dim() != 2 or len(gt_labels) != len(images):
        raise ValueError(f"{caller}: gt_labels must have shape [{len(images)}, M], got {list(gt_labels.shape)}")
    if list(gt_boxes.shape) != [*gt_labels.shape, 4]:
        raise ValueError(f"{caller}: gt_boxes must have shape {[*gt_labels.shape, 4]}, got {list(gt_boxes.shape)}")
