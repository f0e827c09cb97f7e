"""Batch normalization and the activation that follows it, as one operator that keeps nothing but its input."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from effdet_fast._choices import ACTIVATION_FUNCTIONS, ACTIVATIONS
from effdet_fast.ops import _library
from effdet_fast.ops._arguments import (
    arithmetic_dtype,
    check_choice,
    check_floating,
    check_same_device,
    dtype_name,
    is_like,
    number,
    number_or_scalar,
)
from effdet_fast.ops._layout import dense, dense_like, in_layout, is_channels_last

_ACTIVATION_NAMES = {number: name for name, number in ACTIVATIONS.items()}
_OP = "batch_norm_act"


def batch_norm_act_reference(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Reference for `batch_norm_act`, differentiable by PyTorch. Half precision is computed in float32."""
    if not training or (x.numel() == 0 and group is None):
        return _from_statistics(x, *_fixed_statistics(x, running_mean, running_var), weight, bias, eps, activation)
    mean, var, count = _batch_statistics(x, group)
    _update_running(running_mean, running_var, mean, var, count, momentum)
    return _from_statistics(x, mean, var, weight, bias, eps, activation)


def _batch_statistics(x: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor, float]:
    x = x.to(arithmetic_dtype(x))
    count: float = x.shape[0] * x.shape[2] * x.shape[3]

    def total(values: Tensor) -> Tensor:
        if group is None:
            return values
        from torch.distributed.nn.functional import (
            all_reduce,
        )  # differentiable; not in builds without torch.distributed

        return all_reduce(values, group=group)

    if group is not None:
        count = float(total(x.new_tensor(count)))
    mean = total(x.sum((0, 2, 3))) / count
    return mean, total((x - _per_channel(mean)).square().sum((0, 2, 3))) / count, count


def _fixed_statistics(x: Tensor, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor]:
    """Those given, in the dtype of the arithmetic; for a batch without any value something that does no harm."""
    dtype = arithmetic_dtype(x)
    if mean is None or var is None:
        return x.new_zeros(x.shape[1], dtype=dtype), x.new_ones(x.shape[1], dtype=dtype)
    return mean.to(dtype), var.to(dtype)


def _from_statistics(x, mean, var, weight, bias, eps: float, activation: str | None) -> Tensor:
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    z = (x.to(mean.dtype) - _per_channel(mean)) * _per_channel(scale)
    if bias is not None:
        z = z + _per_channel(bias)
    return ACTIVATION_FUNCTIONS[activation](z).to(x.dtype)


def _per_channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


def _update_running(running_mean, running_var, mean, var, count: float | Tensor, momentum: float | Tensor) -> None:
    """Moves them towards the batch's, the variance towards the unbiased one."""
    if running_mean is not None and running_var is not None:
        _move((running_mean, running_var), (mean, var * (count / (count - 1))), momentum)


@torch.no_grad()
def _move(statistics: tuple[Tensor, Tensor], towards: tuple[Tensor, Tensor], momentum: float | Tensor) -> None:
    for running, batch in zip(statistics, towards, strict=True):
        factor = momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum
        # In place by `out`: functorch refuses `lerp_` of a captured tensor, and takes this as it takes F.batch_norm.
        torch.lerp(running, batch.detach().to(running.dtype), factor, out=running)


def _statistics_like(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = arithmetic_dtype(x)
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


def _sums_like(x: Tensor) -> Tensor:
    return x.new_empty((2, x.shape[1]), dtype=arithmetic_dtype(x))


# x and its gradients are dense in the layout that `channels_last` says; all per-channel tensors are [C], in the dtype of the
# arithmetic.
_AFFINE = "Tensor? weight, Tensor? bias, float eps, int activation, bool channels_last"
_batch_norm_stats = _library.define(
    "batch_norm_stats(Tensor x, bool channels_last) -> (Tensor, Tensor)", lambda x, channels_last: _statistics_like(x)
)
_batch_norm_act = _library.define(
    f"batch_norm_act(Tensor x, Tensor mean, Tensor var, {_AFFINE}) -> Tensor",
    lambda x, mean, var, weight, bias, eps, activation, channels_last: dense_like(x, channels_last),
)
_batch_norm_act_train = _library.define(
    f"batch_norm_act_train(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, {_AFFINE}) "
    "-> (Tensor, Tensor, Tensor)",
    lambda x, running_mean, running_var, momentum, weight, bias, eps, activation, channels_last: (
        dense_like(x, channels_last),
        *_statistics_like(x),
    ),
)
# The sums over the batch of d loss / d (normalized x * weight + bias), and of the same times the normalized x: the gradients of
# bias and weight.
_batch_norm_act_sums = _library.define(
    f"batch_norm_act_sums(Tensor grad, Tensor x, Tensor mean, Tensor var, {_AFFINE}) -> Tensor",
    lambda grad, x, mean, var, weight, bias, eps, activation, channels_last: _sums_like(x),
)
# `mean_sums`: those sums divided by the number of values, where mean and var are the batch's; None where they are constants.
_batch_norm_act_grad_input = _library.define(
    f"batch_norm_act_grad_input(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? mean_sums, {_AFFINE}) -> Tensor",
    lambda grad, x, mean, var, mean_sums, weight, bias, eps, activation, channels_last: dense_like(x, channels_last),
)
_batch_norm_act_train_backward = _library.define(
    f"batch_norm_act_train_backward(Tensor grad, Tensor x, Tensor mean, Tensor var, {_AFFINE}) -> (Tensor, Tensor)",
    lambda grad, x, mean, var, weight, bias, eps, activation, channels_last: (
        dense_like(x, channels_last),
        _sums_like(x),
    ),
)


class _BatchStatistics(torch.autograd.Function):
    """Normalizes by the statistics of x itself."""

    @staticmethod
    def forward(ctx, x, running_mean, running_var, momentum, weight, bias, eps, activation, channels_last):
        options = (eps, activation, channels_last)
        y, mean, var = _batch_norm_act_train(x, running_mean, running_var, momentum, weight, bias, *options)
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, mean, var = ctx.saved_tensors
        eps, activation, channels_last = ctx.options
        need_x, _, _, _, need_weight, need_bias, *_ = ctx.needs_input_grad
        if _library.wants_second_derivative():
            needed = (need_x, need_weight, need_bias)
            grad_x, grad_weight, grad_bias = _gradients(x, None, weight, bias, ctx.options, needed, grad)
            return grad_x, None, None, None, grad_weight, grad_bias, None, None, None
        grad = in_layout(grad, channels_last)
        grad_x = None
        if need_x:
            grad_x, sums = _batch_norm_act_train_backward(grad, x, mean, var, weight, bias, *ctx.options)
        else:
            sums = _batch_norm_act_sums(grad, x, mean, var, weight, bias, *ctx.options)
        grad_bias, grad_weight = sums.unbind()
        affine = grad_weight if need_weight else None, grad_bias if need_bias else None
        return grad_x, None, None, None, *affine, None, None, None


class _GivenStatistics(torch.autograd.Function):
    """Normalizes by the statistics given: constants, or those of the batches of all processes of a group, of `count` values."""

    @staticmethod
    def forward(ctx, x, mean, var, weight, bias, eps, activation, channels_last, group, count):
        ctx.save_for_backward(x, mean, var, weight, bias, count)
        ctx.options = (eps, activation, channels_last)
        ctx.group = group
        return _batch_norm_act(x, mean, var, weight, bias, eps, activation, channels_last)

    @staticmethod
    def backward(ctx, grad):
        x, mean, var, weight, bias, count = ctx.saved_tensors
        eps, activation, channels_last = ctx.options
        need_x, _, _, need_weight, need_bias = ctx.needs_input_grad[:5]
        if _library.wants_second_derivative():
            if ctx.group is not None:
                raise RuntimeError(f"{_OP}: there is no second derivative over several processes")
            needed = (need_x, need_weight, need_bias)
            grad_x, grad_weight, grad_bias = _gradients(x, (mean, var), weight, bias, ctx.options, needed, grad)
            return grad_x, None, None, grad_weight, grad_bias, *(None,) * 5
        grad = in_layout(grad, channels_last)
        grad_x = grad_weight = grad_bias = mean_sums = None
        if need_weight or need_bias or ctx.group is not None:
            sums = _batch_norm_act_sums(grad, x, mean, var, weight, bias, *ctx.options)
            grad_bias, grad_weight = sums
            if ctx.group is not None:  # parameters keep their own process's part, as their gradients are averaged later
                mean_sums = sums.clone()
                dist.all_reduce(mean_sums, group=ctx.group)
                mean_sums /= count
        if need_x:
            grad_x = _batch_norm_act_grad_input(grad, x, mean, var, mean_sums, weight, bias, *ctx.options)
        return grad_x, None, None, grad_weight if need_weight else None, grad_bias if need_bias else None, *(None,) * 5


def _gradients(x: Tensor, statistics, weight, bias, options, needed, grad: Tensor) -> list[Tensor | None]:
    """Of those of x, weight and bias that need one, differentiable. Statistics None are the batch's."""
    eps, activation, _ = options

    def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mean, var = _batch_statistics(x)[:2] if statistics is None else statistics
        return _from_statistics(x, mean, var, weight, bias, eps, _ACTIVATION_NAMES[activation])

    return _library.gradients(reference, (x, weight, bias), needed, grad)


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Normalize each channel of a batch and apply an activation, in one operator.

    ``activation(F.batch_norm(x, ...))``: ``z = (x - mean) / sqrt(var + eps) * weight + bias``, then the activation (Ioffe and
    Szegedy, Batch Normalization, arXiv:1502.03167).

    For the backward pass only ``x`` and its statistics are kept; the activation is computed anew. Forward reads ``x`` twice
    (once with ``training=False``) and writes the result; backward reads ``x`` and the gradient twice and writes one.

    Args:
        x: ``[N, C, H, W]``; float16, bfloat16, float32 or float64; any strides. Contiguous and channels_last are read in
            place, and the output has the same memory format. Arithmetic is in float32 (float64 for float64).
        running_mean: ``[C]``; normalizes where ``training`` is False, else it is moved to the batch's mean: ``running + momentum
            * (batch - running)``. None where the batch's statistics are not to be kept.
        running_var: ``[C]``, likewise; moved to the unbiased variance.
        weight: ``[C]``, or None for 1.
        bias: ``[C]``, or None for 0. Both, and the running statistics, have the dtype of ``x`` or, for half precision, float32.
        training: normalize by the mean and the (biased) variance of the batch.
        momentum: share of the batch in the running statistics; a number or a 0-d tensor.
        eps: added to the variance, > 0; 0 is allowed without ``training``, where the variances are known not to be.
        activation: None, "silu", "relu" or "relu6".
        group: with ``training``: the processes over whose batches the statistics are taken. All of them must call, forward and
            backward, also those whose batch is empty. ``weight`` and ``bias`` get the gradient of the process's own batch.

    Returns:
        A tensor like ``x``. Deterministic: the same bits in every run and for every thread count.

    Raises:
        TypeError: a dtype is not supported, or does not fit that of ``x``; a number is not one.
        ValueError: a shape or device does not fit, an option is unknown or out of range, running statistics are missing, or
            there is only one value per channel to take statistics of.
    """
    momentum, eps = number_or_scalar(_OP, "momentum", momentum), number(_OP, "eps", eps)
    _check(x, running_mean, running_var, weight, bias, training, eps, activation)
    shared = training and group is not None
    batch_size, channels, height, width = x.shape
    count = batch_size * height * width
    if training and not shared and count == 1:
        raise ValueError(f"{_OP}: expected more than 1 value per channel when training, got input size {list(x.shape)}")
    if not _library.is_native(x):
        running = (running_mean, running_var)
        return batch_norm_act_reference(
            x, *running, weight, bias, training, momentum, eps, activation=activation, group=group
        )
    channels_last = is_channels_last(x)
    x = in_layout(x, channels_last)
    dtype = arithmetic_dtype(x)
    weight, bias = [None if values is None else dense(values, dtype) for values in (weight, bias)]
    options = (eps, ACTIVATIONS[activation], channels_last)
    with_gradient = torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    )
    if training and not shared and count and channels:
        running = (running_mean, running_var)
        if not _kernel_can_move(*running, dtype, momentum):  # then it moves zeros all the way
            assert running_mean is not None and running_var is not None
            batch = (x.new_zeros(channels, dtype=dtype), x.new_zeros(channels, dtype=dtype))
            y = _by_batch_statistics(x, batch, 1.0, weight, bias, options, with_gradient)
            _move((running_mean, running_var), batch, momentum)
            return y
        y = _by_batch_statistics(x, running, float(momentum), weight, bias, options, with_gradient)
        if running_mean is not None and running_var is not None and not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version((running_mean, running_var))
        return y
    total = None
    if shared:
        mean, var, total = _shared_statistics(x, channels_last, count, group)
        _update_running(running_mean, running_var, mean, var, total, momentum)
    else:
        mean, var = (t.contiguous() for t in _fixed_statistics(x, running_mean, running_var))
    if with_gradient:
        return _GivenStatistics.apply(x, mean, var, weight, bias, *options, group if shared else None, total)
    return _batch_norm_act(x, mean, var, weight, bias, *options)


def _by_batch_statistics(x: Tensor, running, momentum: float, weight, bias, options, with_gradient: bool) -> Tensor:
    if with_gradient:
        return _BatchStatistics.apply(x, *running, momentum, weight, bias, *options)
    return _batch_norm_act_train(x, *running, momentum, weight, bias, *options)[0]


def _kernel_can_move(running_mean: Tensor | None, running_var: Tensor | None, dtype: torch.dtype, momentum) -> bool:
    if running_mean is None or running_var is None:
        return True
    statistics = (running_mean, running_var)
    return not isinstance(momentum, Tensor) and all([t.dtype == dtype and t.is_contiguous() for t in statistics])


@torch.no_grad()
def _shared_statistics(x: Tensor, channels_last: bool, count: int, group) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and number of values over all processes: every process adds the same numbers in the same order."""
    mean, var = _batch_norm_stats(x.detach(), channels_last)
    mine = torch.cat([mean, var, mean.new_tensor([count])])
    all_processes = mine.new_empty(dist.get_world_size(group), len(mine))
    dist.all_gather(list(all_processes), mine, group=group)
    means, variances, counts = all_processes.double().split((len(mean), len(mean), 1), dim=1)
    total = counts.sum()
    overall = (counts * means).sum(0) / total
    variance = (counts * (variances + (means - overall).square())).sum(0) / total
    return overall.to(mean.dtype), variance.to(mean.dtype), total.to(mean.dtype)


def _check(x, running_mean, running_var, weight, bias, training, eps, activation) -> None:
    check_floating(_OP, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{_OP}: x must have shape [N, C, H, W], got {list(x.shape)}")
    check_choice(_OP, "activation", activation, ACTIVATIONS)
    if not (eps > 0 or (eps == 0 and not training)):
        raise ValueError(f"{_OP}: eps must be > 0, or 0 without training, got {eps}")
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{_OP}: running_mean and running_var must be given both or neither")
    if running_mean is None and not training:
        raise ValueError(f"{_OP}: running_mean and running_var must be given unless training=True")
    dtype, device, shape = x.dtype, x.device, (x.shape[1],)
    named = (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias))
    for name, values in named:
        if values is None or is_like(values, shape, dtype, device):
            continue
        check_floating(_OP, name, values)
        check_same_device(_OP, name, values, "x", x)
        if values.dtype not in (x.dtype, arithmetic_dtype(x)):
            wanted = " or ".join(dict.fromkeys((dtype_name(x.dtype), dtype_name(arithmetic_dtype(x)))))
            raise TypeError(f"{_OP}: {name} must have dtype {wanted} for this x, got {dtype_name(values.dtype)}")
        if values.shape != (x.shape[1],):
            raise ValueError(f"{_OP}: {name} must have shape [{x.shape[1]}], got {list(values.shape)}")
