"""What it costs to evaluate the averaged weights in the model's place: time there and back, and memory meanwhile."""

from itertools import accumulate
from statistics import quantiles
from time import perf_counter
from typing import Any

import torch
from torch import nn

from ignite_ema import ModelAverage

__all__ = ["swap_costs"]


def swap_costs(model: nn.Module, rounds: int) -> dict[str, Any]:
    """Figures of ``ModelAverage(model).swapped()`` with nothing in the block.

    Returns:
        ``ms``: the milliseconds there and back, as median and quartiles. ``peak`` and ``left``: the most memory that
        was allocated at any time, and what stays allocated after it, in copies of the model.
    """
    average = ModelAverage(model)
    times = []
    for _ in range(rounds):
        start = perf_counter()
        with average.swapped():
            pass
        times.append(1000 * (perf_counter() - start))
    first, median, third = quantiles(times, n=4, method="inclusive")
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    allocated = _allocations(average)
    return {
        "ms": {"q1": first, "median": median, "q3": third},
        "peak": max(allocated) / size,
        "left": allocated[-1] / size,
    }


def _allocations(average: ModelAverage) -> list[int]:
    """The bytes that are allocated after each allocation and release of a swap, from 0 at its start."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler, average.swapped():
        pass
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
