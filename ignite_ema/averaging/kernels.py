"""The arithmetic of the average: in-place operations over lists of tensors.

Every kernel takes two lists of equal length, whose i-th tensors have the same shape, and a ``weight`` in [0, 1]::

    averaged[i] = (1 - weight) * averaged[i] + weight * online[i]

A weight of 1 copies exactly, whatever ``averaged`` held (so it heals a NaN); a weight of 0 does nothing. The step is
computed as ``averaged + weight * (online - averaged)``: weights that do not change keep every bit, while the form above
would add a rounding error at each update. On an accelerator the number of operations does not grow with the number of
tensors if these are flat, as a pairing makes them for the kernels that join tensors.

Weights on a GPU reach an average on the CPU through page-locked memory, on a separate stream (:func:`stage`).
"""

from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]
Kernel: TypeAlias = Callable[[Tensors, Tensors, float], None]

# Numbers of elements: what stays in a CPU's cache, and what is worth a kernel launch on a GPU.
_CACHED, _LAUNCHED = 2**20, 2**24
_CHUNK = 2**28  # bytes that are copied from a GPU at once

# What torch can interpolate; narrower types are widened for the step.
NARROW = {torch.bfloat16, torch.float16}
_NATIVE = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}


def copying_kernel_for(online: Tensor, averaged: Tensor) -> Kernel:
    """The kernel that copies whatever the weight is; the average must have the layout of ``online``."""
    if online.layout is not torch.strided:
        return _copy_sparse
    return _copy_staged if leaves_gpu(averaged, online) else _copy_strided


def lerping_kernel_for(
    online: Tensor, averaged: Tensor, is_buffer: bool, is_trained: bool, narrow: Kernel | None = None
) -> Kernel:
    """The fastest kernel that is right for this pair, and for each pair of the same dtypes and devices.

    For finite values all kernels give the same bits. What is not trained may be a mask of 0 and -inf. ``narrow`` is a
    special kernel for parameters whose average is in 16 bits.
    """
    if averaged.dtype not in _NATIVE:
        return _lerp_frozen
    if is_buffer:
        return _lerp_buffers
    if narrow is not None and averaged.dtype in NARROW:
        return narrow
    if not is_trained:
        return _lerp_frozen
    if averaged.dtype == online.dtype and averaged.device == online.device:
        return _lerp
    if leaves_gpu(averaged, online):
        return _lerp_staged
    return _lerp_converted if averaged.device.type == "cpu" else _lerp_through_scratch


def needs_flat(kernel: Kernel) -> bool:
    """Whether a kernel joins tensors, which takes flat ones; for the others a view would only add to their cost."""
    return kernel not in (_lerp, _copy_strided)


def copy(averaged: Tensors, online: Tensors) -> None:
    """``averaged[i] = online[i]`` for tensors of any type and layout."""
    pairs = list(zip(averaged, online, strict=True))
    for strided in (True, False):
        chosen = [pair for pair in pairs if (pair[0].layout is torch.strided) == strided]
        if chosen:
            ours, theirs = zip(*chosen, strict=True)
            (_copy_strided if strided else _copy_sparse)(ours, theirs, 1)


def is_finite(tensors: Tensors, dtype: torch.dtype) -> bool:
    """False if a tensor holds what is a NaN or an infinity in ``dtype``; also, rarely, for huge finite values.

    One pass and one synchronization for all tensors, which have one type and live on one device.
    """
    if tensors[0].dtype not in _NATIVE:
        tensors = [tensor.to(_wide(tensor.dtype)) for tensor in tensors]
    largest: float = torch.stack(torch._foreach_norm(tensors)).max().item()
    return largest <= torch.finfo(dtype).max  # False for a NaN


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
    """The Euclidean norms of the tensors that have one: a cheap way to see that they have changed."""
    native = [one for one in tensors if type(one) is Tensor and one.dtype in _NATIVE and one.layout is torch.strided]
    return torch.stack([norm.abs().cpu().double() for norm in torch._foreach_norm(native)]).tolist() if native else []


def leaves_gpu(averaged: Tensor, online: Tensor) -> bool:
    """Whether the values have to move from a GPU to an average on the CPU."""
    return online.is_cuda and averaged.device.type == "cpu"


def parts(averaged: Tensors, online: Tensors, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs; those of more than ``most`` elements are split into parts."""
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
    """Groups small pairs and splits large ones, into batches of up to ``most`` elements."""
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
        # Each part is converted and used while it is in the cache: no more bytes move than in one pass.
        for average, value in parts(averaged, online, _CACHED):
            average.lerp_(value.to(average.device, average.dtype), weight)


def _lerp_through_scratch(averaged: Tensors, online: Tensors, weight: float) -> None:
    """Like :func:`_lerp_converted`, in a number of operations that does not grow with the number of tensors."""
    if weight == 1:
        torch._foreach_copy_(averaged, online)
    elif weight != 0:
        for ours, theirs in batches(averaged, online, _LAUNCHED):
            torch._foreach_lerp_(ours, split(gathered(theirs, ours[0].dtype, ours[0].device), ours), weight)


def _lerp_staged(averaged: Tensors, online: Tensors, weight: float) -> None:
    if weight != 0:
        stage(_lerp_converted, averaged, online, weight)


def _lerp_flat(step: Callable[..., Tensor], averaged: Tensors, online: Tensors, weight: float) -> None:
    """Applies ``step`` to small tensors at once, as one flat tensor."""
    if weight == 1:
        torch._foreach_copy_(averaged, online)
    elif weight != 0:
        dtype, device = _wide(averaged[0].dtype), averaged[0].device
        for ours, theirs in batches(averaged, online, _CACHED if device.type == "cpu" else _LAUNCHED):
            moved = step(gathered(ours, dtype, device), gathered(theirs, dtype, device), weight)
            torch._foreach_copy_(ours, split(moved, ours))


def gathered(tensors: Tensors, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values of all tensors in one flat tensor."""
    flat = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=dtype, device=device)
    torch._foreach_copy_(split(flat, tensors), tensors)
    return flat


def split(flat: Tensor, like: Tensors) -> list[Tensor]:
    """The parts of a flat tensor, in the shapes of ``like``."""
    pieces = torch.split(flat, [one.numel() for one in like])
    return [part if one.ndim == 1 else part.view(one.shape) for part, one in zip(pieces, like, strict=True)]


def _mixed(before: Tensor, after: Tensor, weight: float) -> Tensor:
    finite = torch.isfinite(before) & torch.isfinite(after)
    mixed = (1 - weight) * before + weight * after  # for infinities, since inf - inf is NaN
    return torch.where(finite, torch.lerp(before, after, weight), mixed)


def _healed(before: Tensor, after: Tensor, weight: float) -> Tensor:
    return torch.where(torch.isfinite(before), _mixed(before, after, weight), after)


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype in _NATIVE:
        return dtype
    return torch.complex64 if dtype.is_complex else torch.float32


def stage(kernel: Kernel, averaged: Tensors, online: Tensors, weight: float) -> None:
    """Copies the values from a GPU to the CPU chunk by chunk: the kernel works on one while the next is under way.

    They go through page-locked memory, which torch keeps for the next time: two chunks of 256 MiB, or of one tensor
    each if it is larger. The host waits once for each chunk. The copies wait for the work queued so far on the current
    stream; work queued later does not wait for them.
    """
    side = _side_stream(online[0].device)
    under_way: deque[tuple[Tensors, Tensors, torch.cuda.Event]] = deque()

    def finish_first() -> None:
        ours, values, arrived = under_way.popleft()
        arrived.synchronize()
        kernel(ours, values, weight)

    for chunk in _chunks(online):
        under_way.append((averaged[chunk], *_send(online[chunk], side)))
        if len(under_way) == 2:
            finish_first()
    finish_first()


def _chunks(tensors: Tensors) -> list[slice]:
    """Runs of neighbors of up to ``_CHUNK`` bytes, or of a single larger tensor."""
    bounds, size = [0], 0
    for index, tensor in enumerate(tensors):
        if size and size + tensor.nbytes > _CHUNK:
            bounds.append(index)
            size = 0
        size += tensor.nbytes
    return [slice(start, stop) for start, stop in zip(bounds, [*bounds[1:], len(tensors)], strict=True)]


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that waits for the work queued so far on the current one."""
    side = _stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    return side


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The same stream at each call, since torch reuses a stream's memory only on that stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _send(online: Tensors, side: torch.cuda.Stream) -> tuple[Tensors, torch.cuda.Event]:
    """Starts copies into page-locked memory; returns them and the event after which they hold the values."""
    flat = torch.empty(sum(value.numel() for value in online), dtype=online[0].dtype, pin_memory=True)
    with torch.cuda.stream(side):
        rows = [value if value.ndim == 1 else value.reshape(-1) for value in online]
        flat.copy_(rows[0] if len(rows) == 1 else torch.cat(rows), non_blocking=True)
        return split(flat, online), side.record_event()


_copy_staged = partial(stage, _copy_strided)
# For frozen parameters, which may be masks of 0 and -inf, and types without arithmetic (8-bit floats).
_lerp_frozen = partial(_lerp_flat, _mixed)
# For buffers, which may also start as infinities, such as the range of an observer: copied until finite.
_lerp_buffers = partial(_lerp_flat, _healed)
