"""How much memory of a device a call allocates: the most at any time, and what stays."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch

from .measure import Call

__all__ = ["Memory", "memory_of", "quick_collections"]


class Memory(NamedTuple):
    """Bytes above those that were allocated before the call.

    Attributes:
        peak: the most at any time during the call.
        left: what is still allocated after it, while its result is alive and its garbage is collected.
    """

    peak: int
    left: int


@contextmanager
def quick_collections() -> Iterator[None]:
    """Inside, garbage is looked for among new objects only: among all those of the libraries it takes 0.3 s."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def memory_of(call: Call, device: torch.device) -> Memory:
    gc.collect()  # or garbage of before would be released meanwhile, and count as memory that the call gave back
    return _on_cuda(call, device) if device.type == "cuda" else _on_cpu(call)


def _on_cuda(call: Call, device: torch.device) -> Memory:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    gc.collect()
    memory = Memory(torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before)
    del result
    return memory


def _on_cpu(call: Call) -> Memory:
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        result = call()
        gc.collect()
    del result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    allocated = list(accumulate(changes, initial=0))
    return Memory(max(allocated), allocated[-1])
