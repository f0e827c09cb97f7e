"""Tensors as the kernels read them: dense, in one of two memory formats, without autograd."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_channels_last(x: Tensor) -> bool:
    """By the strides, so that it is also known of a slice, and of a tensor with one channel or one pixel."""
    strides = x.stride()
    return strides[1] == 1 and strides[3] >= x.shape[1] and strides != (1, 1, 1, 1)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def in_layout(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=memory_format(channels_last))


def dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, of that dtype; costs nothing where the tensor is that already."""
    return (x if x.dtype == dtype else x.to(dtype)).contiguous()


def detached(x: Tensor) -> Tensor:
    """`x.detach()`, which costs nothing where there is nothing to detach from."""
    return x.detach() if x.requires_grad or forward_ad._current_level >= 0 else x


def empty_in_layout(x: Tensor, sizes: tuple[int, ...], channels_last: bool) -> Tensor:
    """Uninitialized, of the dtype and on the device of x."""
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=memory_format(channels_last))


def dense_like(x: Tensor, channels_last: bool) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(channels_last))


def with_strides_of(like: Tensor, x: Tensor) -> Tensor:
    """A contiguous gradient with the strides of its contiguous parameter, also where a size is 1: DDP compares them all."""
    # In place, as autograd adds up the gradients of a shared parameter into a tensor only if that has its memory for itself.
    return x if x.stride() == like.stride() else x.as_strided_(like.shape, like.stride())
