"""Batch normalization with the activation that follows it, as modules."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from effdet_fast._choices import ACTIVATIONS
from effdet_fast.ops._arguments import check_choice
from effdet_fast.ops.batch_norm_act import batch_norm_act


class BatchNormAct2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` followed by an activation, in one operator: ``effdet_fast.ops.batch_norm_act``.

    A subclass of ``nn.BatchNorm2d`` with its arguments, parameters, buffers and state-dict keys; the activation has no state.
    Input in half precision works with float32 parameters, as under autocast (Ioffe and Szegedy, Batch Normalization,
    arXiv:1502.03167).

    Args:
        num_features: C of the input ``[N, C, H, W]``.
        eps: added to the variance.
        momentum: share of each batch in the running statistics; None takes the mean over all batches.
        affine: learn a scale and a shift.
        track_running_stats: keep running statistics, by which evaluation mode normalizes.
        device: of the parameters and buffers.
        dtype: of the parameters and buffers.
        bias: learn a shift, where ``affine`` is set; False learns a scale only.
        activation: None, "silu", "relu" or "relu6".

    Attributes:
        synchronized: whether training takes the statistics over the batches of several processes, as ``nn.SyncBatchNorm`` does,
            but on any device. `synchronize_batch_norm` sets it for a whole model.
        process_group: these processes; None for all of them.

    Raises:
        ValueError: the activation is unknown.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        check_choice(type(self).__name__, "activation", activation, ACTIVATIONS)
        self.activation = activation
        self.synchronized = False
        self.process_group: dist.ProcessGroup | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Normalize and activate ``[N, C, H, W]``; in training mode also move the running statistics."""
        group = self._group() if self.training and self.synchronized else None
        return normalize(self, input, self.activation, group)

    def _group(self) -> dist.ProcessGroup | None:
        """The process group to share statistics with; None if this process is alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    @property
    def qconfig(self) -> None:
        """An attribute that is missing, with an error that prevents a lost activation.

        ``convert_sync_batchnorm`` of PyTorch and timm reads it before it replaces a module by one without an activation, which
        would be another network.

        Raises:
            TypeError: ``convert_sync_batchnorm`` asks, and there is an activation to lose.
            AttributeError: anything else asks.
        """
        if self.activation is not None and sys._getframe(1).f_code.co_name == "convert_sync_batchnorm":
            raise TypeError(
                f"{type(self).__name__}: nn.SyncBatchNorm.convert_sync_batchnorm would drop the activation {self.activation!r}; "
                "use effdet_fast.nn.synchronize_batch_norm"
            )
        raise AttributeError(f"{type(self).__name__} has no attribute 'qconfig'")

    def extra_repr(self) -> str:
        """Return the options that ``repr`` shows."""
        shared = ", synchronized=True" if self.synchronized else ""
        return f"{super().extra_repr()}, activation={self.activation!r}{shared}"


def normalize(
    norm: nn.BatchNorm2d, input: Tensor, activation: str | None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Run a BatchNorm's forward and an activation as one operator, and update the BatchNorm's buffers as PyTorch does."""
    norm._check_input_dim(input)
    tracks = norm.training and norm.track_running_stats
    momentum: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    if tracks and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # the mean over all batches; a tensor, as reading it would wait for a GPU
            momentum = 1.0 / norm.num_batches_tracked
    reads = tracks or not norm.training
    return batch_norm_act(
        input,
        norm.running_mean if reads else None,
        norm.running_var if reads else None,
        norm.weight,
        norm.bias,
        norm.training or (norm.running_mean is None and norm.running_var is None),
        momentum,
        norm.eps,
        activation=activation,
        group=group,
    )


class FrozenBatchNormAct2d(nn.Module):
    """Batch normalization by constants, followed by an activation, in one operator: ``effdet_fast.ops.batch_norm_act``.

    Statistics, scale and shift are buffers: they are neither trained nor decayed, and training mode changes nothing. State-dict
    keys are those of torchvision's ``FrozenBatchNorm2d``: ``weight``, ``bias``, ``running_mean`` and ``running_var``. Loading
    drops the ``num_batches_tracked`` of a trained BatchNorm.

    Args:
        num_features: C of the input ``[N, C, H, W]``.
        eps: added to the variance, >= 0.
        activation: None, "silu", "relu" or "relu6".

    Raises:
        ValueError: the activation is unknown.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, *, activation: str | None = None):
        super().__init__()
        check_choice(type(self).__name__, "activation", activation, ACTIVATIONS)
        self.num_features = num_features
        self.eps = eps
        self.activation = activation
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize and activate ``[N, C, H, W]``."""
        return batch_norm_act(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            eps=self.eps,
            activation=self.activation,
        )

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d) -> FrozenBatchNormAct2d:
        """Freeze a BatchNorm and its activation: the result computes what its evaluation mode does, and shares its tensors.

        Args:
            norm: an ``nn.BatchNorm2d`` or a `BatchNormAct2d`.

        Raises:
            ValueError: the BatchNorm has no running statistics.
        """
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(f"{cls.__name__}.from_batch_norm: the BatchNorm has no running statistics")
        frozen = cls(norm.num_features, norm.eps, activation=getattr(norm, "activation", None)).to(norm.running_mean)
        for name in ("weight", "bias", "running_mean", "running_var"):
            values = getattr(norm, name)
            if values is not None:
                setattr(frozen, name, values.detach())
        return frozen

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return the options that ``repr`` shows."""
        return f"{self.num_features}, eps={self.eps}, activation={self.activation!r}"


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """Replace each ``nn.BatchNorm2d`` and `BatchNormAct2d` of a model by a `FrozenBatchNormAct2d` with its values.

    Args:
        module: the model, which is changed in place.

    Returns:
        The model; its replacement if the model is itself a BatchNorm.

    Raises:
        TypeError: the model has another subclass of ``nn.BatchNorm2d``, whose behavior is not known.
        ValueError: a BatchNorm has no running statistics.
    """
    if isinstance(module, nn.BatchNorm2d):
        if type(module) not in (nn.BatchNorm2d, BatchNormAct2d):
            raise TypeError(f"freeze_batch_norm: {type(module).__name__} cannot be frozen, only BatchNorm2d can")
        return FrozenBatchNormAct2d.from_batch_norm(module)
    for name, child in module.named_children():
        setattr(module, name, freeze_batch_norm(child))
    return module


def synchronize_batch_norm(module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Make all BatchNorms of a model take their training statistics over the batches of several processes.

    Like ``nn.SyncBatchNorm.convert_sync_batchnorm``, but on any device, and activations stay. A `BatchNormAct2d` is switched
    over. A plain ``nn.BatchNorm2d`` is replaced by a `BatchNormAct2d` with the same parameters, buffers and state-dict keys.
    BatchNorms of other dimensions become ``nn.SyncBatchNorm``.

    Args:
        module: the model, which is changed in place.
        process_group: the processes; None for all of them.

    Returns:
        The model; its replacement if the model is itself a BatchNorm.
    """
    if isinstance(module, BatchNormAct2d):
        module.synchronized = True
        module.process_group = process_group
        return module
    if type(module) is nn.BatchNorm2d:
        options = (module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
        shared = BatchNormAct2d(*options, device="meta").train(module.training)
        shared._parameters.update(module._parameters)
        shared._buffers.update(module._buffers)
        return synchronize_batch_norm(shared, process_group)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
    for name, child in module.named_children():
        setattr(module, name, synchronize_batch_norm(child, process_group))
    return module
