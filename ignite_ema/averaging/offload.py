"""Copies from a GPU to an average on the CPU: through page-locked memory, on a separate stream."""

from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]
Kernel: TypeAlias = Callable[[Tensors, Tensors, float], None]

_CHUNK = 2**28  # bytes


def stage(kernel: Kernel, averaged: Tensors, online: Tensors, weight: float) -> None:
    """Copies the values from a GPU to the CPU chunk by chunk: the kernel works on one while the next is under way.

    They go through page-locked memory, which torch keeps for the next time: two chunks of 256 MiB, or of one tensor
    each if it is larger. The host waits once for each chunk. The copies wait for the work queued so far on the current
    stream; work queued later does not wait for them.
    """
    side = _side_stream(online[0].device)
    under_way: deque[tuple[Tensors, Tensors, torch.cuda.Event]] = deque()
    for chunk in _chunks(online):
        under_way.append((averaged[chunk], *_send(online[chunk], side)))
        if len(under_way) == 2:
            _finish(kernel, weight, *under_way.popleft())
    _finish(kernel, weight, *under_way.popleft())


def _finish(kernel: Kernel, weight: float, averaged: Tensors, values: Tensors, arrived: torch.cuda.Event) -> None:
    arrived.synchronize()
    kernel(averaged, values, weight)


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
    sizes = [value.numel() for value in online]
    flat = torch.empty(sum(sizes), dtype=online[0].dtype, pin_memory=True)
    pieces = zip(torch.split(flat, sizes), online, strict=True)
    values = [part if value.ndim == 1 else part.view(value.shape) for part, value in pieces]
    with torch.cuda.stream(side):
        rows = [value if value.ndim == 1 else value.reshape(-1) for value in online]
        flat.copy_(rows[0] if len(rows) == 1 else torch.cat(rows), non_blocking=True)
        return values, side.record_event()
