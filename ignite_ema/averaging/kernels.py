"""The arithmetic of the average: in-place operations over lists of tensors.

Every kernel takes two lists of equal length, whose i-th tensors have the same shape, and a ``weight`` in [0, 1]::

    averaged[i] = (1 - weight) * averaged[i] + weight * online[i]

A weight of 1 copies exactly, whatever ``averaged`` held (so it heals a NaN); a weight of 0 does nothing. The step is
written ``averaged + weight * (online - averaged)``: weights that do not change are left bit for bit as they are, where
the form above would lose a rounding error at each update.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from .offload import stage

__all__ = [
    "NARROW",
    "Kernel",
    "Tensors",
    "batches",
    "copy",
    "copying_kernel_for",
    "has_begun",
    "is_finite",
    "leaves_gpu",
    "lerping_kernel_for",
    "norms",
    "parts",
    "spoils",
]

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]
Kernel: TypeAlias = Callable[[Tensors, Tensors, float], None]

# Numbers of elements: what stays in a CPU's cache, and what is worth the launch of a GPU's kernel.
_CACHED, _LAUNCHED = 2**20, 2**24

# What torch can interpolate; narrower types are widened for the step.
NARROW = {torch.bfloat16, torch.float16}
_NATIVE = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}


def copying_kernel_for(online: Tensor, averaged: Tensor) -> Kernel:
    """The kernel that copies whatever the weight."""
    if averaged.layout is not torch.strided:
        return _copy_sparse
    return _copy_staged if leaves_gpu(averaged, online) else _copy_strided


def lerping_kernel_for(
    online: Tensor, averaged: Tensor, *, is_buffer: bool, is_trained: bool, narrow: Kernel | None = None
) -> Kernel:
    """The fastest kernel that is right for this pair, and for each pair of the same dtypes and devices.

    Args:
        online: the tensor of the model.
        averaged: the tensor of the twin.
        is_buffer: whether they are buffers.
        is_trained: whether the model's requires gradients. Others may be masks of 0 and -inf. Of finite values each
            kernel makes the same bits.
        narrow: the kernel for parameters whose average is in 16 bits, if they have their own.
    """
    if averaged.dtype not in _NATIVE:
        return _lerp_widened
    if is_buffer:
        return _lerp_buffers
    if narrow is not None and averaged.dtype in NARROW:
        return narrow
    if not is_trained:
        return _lerp_frozen
    if averaged.dtype == online.dtype and averaged.device == online.device:
        return _lerp
    return _lerp_staged if leaves_gpu(averaged, online) else _lerp_converted


def copy(averaged: Tensors, online: Tensors) -> None:
    """``averaged[i] = online[i]`` for tensors of any type and layout."""
    pairs = list(zip(averaged, online, strict=True))
    for strided in (True, False):
        chosen = [pair for pair in pairs if (pair[0].layout is torch.strided) == strided]
        if chosen:
            ours, theirs = zip(*chosen, strict=True)
            (_copy_strided if strided else _copy_sparse)(ours, theirs, 1)


def is_finite(tensors: Tensors, dtype: torch.dtype) -> bool:
    """False where a tensor holds what is a NaN or an infinity in ``dtype``; also, rarely, for huge finite values.

    One pass and one synchronisation for all of them, which have one type and live on one device.
    """
    if tensors[0].dtype not in _NATIVE:
        tensors = [tensor.to(_wide(tensor.dtype)) for tensor in tensors]
    largest: float = torch.stack(torch._foreach_norm(tensors)).max().item()
    return largest <= torch.finfo(dtype).max  # which a NaN is not


def spoils(averaged: Tensor, online: Tensor) -> bool:
    """Whether ``online`` would bring a NaN or an infinity into ``averaged`` that is not there already."""
    before = averaged.to(_wide(averaged.dtype))
    after = online.to(before.device, averaged.dtype).to(before.dtype)
    return bool((~after.isfinite() & (after != before)).any())


def has_begun(tensor: Tensor) -> bool:
    """False if no element is finite, or one is a NaN; an attention mask of 0 and -inf has begun."""
    wide = tensor.to(_wide(tensor.dtype))
    return tensor.numel() == 0 or bool(wide.isfinite().any() and not wide.isnan().any())


def norms(tensors: Tensors) -> list[float]:
    """The Euclidean norms of those tensors that have one: a cheap mark by which to see that they have changed."""
    native = [one for one in tensors if type(one) is Tensor and one.dtype in _NATIVE and one.layout is torch.strided]
    return torch.stack([norm.abs().double().cpu() for norm in torch._foreach_norm(native)]).tolist() if native else []


def leaves_gpu(averaged: Tensor, online: Tensor) -> bool:
    """Whether the values have to come from a GPU to an average on the CPU."""
    return online.is_cuda and averaged.device.type == "cpu"


def parts(averaged: Tensors, online: Tensors, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs, those of more than ``most`` elements in parts."""
    for average, value in zip(averaged, online, strict=True):
        if average.numel() <= most:
            yield average, value
        elif average.is_contiguous() and value.is_contiguous():
            yield from zip(torch.split(average.view(-1), most), torch.split(value.view(-1), most), strict=True)
        else:
            dim = max(range(average.ndim), key=average.shape.__getitem__)
            rows = max(1, average.shape[dim] * most // average.numel())
            yield from parts(torch.split(average, rows, dim), torch.split(value, rows, dim), most)


def batches(averaged: Tensors, online: Tensors, most: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Small pairs together and large ones in parts, up to ``most`` elements."""
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    size = 0
    for average, value in parts(averaged, online, most):
        if ours and size + average.numel() > most:
            yield ours, theirs
            ours, theirs, size = [], [], 0
        ours.append(average)
        theirs.append(value)
        size += average.numel()
    if ours:
        yield ours, theirs


def _copy_strided(averaged: Tensors, online: Tensors, weight: float) -> None:
    torch._foreach_copy_(averaged, online)


def _copy_sparse(averaged: Tensors, online: Tensors, weight: float) -> None:
    for average, value in zip(averaged, online, strict=True):
        average.resize_as_sparse_(value)  # the number of specified elements may have changed
        average.copy_(value)


def _lerp(averaged: Tensors, online: Tensors, weight: float) -> None:
    if weight == 1:
        torch._foreach_copy_(averaged, online)
    elif weight != 0:
        torch._foreach_lerp_(averaged, online, weight)


def _lerp_converted(averaged: Tensors, online: Tensors, weight: float) -> None:
    if weight == 1:
        torch._foreach_copy_(averaged, online)
    elif weight != 0:
        # Parts that are converted and used while they are in the cache: as few bytes move as in one pass.
        for average, value in parts(averaged, online, _CACHED if averaged[0].device.type == "cpu" else _LAUNCHED):
            average.lerp_(value.to(average.device, average.dtype), weight)


def _copy_staged(averaged: Tensors, online: Tensors, weight: float) -> None:
    stage(_copy_strided, averaged, online, weight)


def _lerp_staged(averaged: Tensors, online: Tensors, weight: float) -> None:
    if weight != 0:
        stage(_lerp_converted, averaged, online, weight)


def _lerp_frozen(averaged: Tensors, online: Tensors, weight: float) -> None:
    """For frozen parameters, which may be masks of 0 and -inf."""
    _lerp_flat(averaged, online, weight, _mixed)


def _lerp_buffers(averaged: Tensors, online: Tensors, weight: float) -> None:
    """For buffers, which may also begin as infinities, such as the range of an observer: copied until finite."""
    _lerp_flat(averaged, online, weight, _healed)


def _lerp_widened(averaged: Tensors, online: Tensors, weight: float) -> None:
    """For types without arithmetic of their own (8-bit floats)."""
    if weight == 1:
        torch._foreach_copy_(averaged, online)
    elif weight != 0:
        for average, value in zip(averaged, online, strict=True):
            average.copy_(_mixed(*_widened(average, value), weight))


def _lerp_flat(averaged: Tensors, online: Tensors, weight: float, step: Callable[..., Tensor]) -> None:
    """Applies ``step`` to small tensors together, as one flat tensor."""
    if weight == 1:
        torch._foreach_copy_(averaged, online)
    elif weight != 0:
        most = _CACHED if averaged[0].device.type == "cpu" else _LAUNCHED
        for ours, theirs in batches(averaged, online, most):
            before = torch.cat([average.reshape(-1) for average in ours])
            moved = step(*_widened(before, torch.cat([value.reshape(-1) for value in theirs])), weight)
            split = torch.split(moved, [average.numel() for average in ours])
            torch._foreach_copy_(ours, [part.view(a.shape) for part, a in zip(split, ours, strict=True)])


def _widened(average: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    before = average.to(_wide(average.dtype))
    return before, value.to(before.device, before.dtype)


def _mixed(before: Tensor, after: Tensor, weight: float) -> Tensor:
    finite = torch.isfinite(before) & torch.isfinite(after)
    mixed = (1 - weight) * before + weight * after  # inf - inf is NaN, so infinities take this form
    return torch.where(finite, torch.lerp(before, after, weight), mixed)


def _healed(before: Tensor, after: Tensor, weight: float) -> Tensor:
    return torch.where(torch.isfinite(before), _mixed(before, after, weight), after)


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype in _NATIVE:
        return dtype
    return torch.complex64 if dtype.is_complex else torch.float32
