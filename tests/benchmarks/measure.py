"""Timing in turns, so that whatever else slows the machine down slows all of them down."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import repeat
from statistics import quantiles
from time import perf_counter
from typing import TypeAlias

import torch

__all__ = ["Call", "Summary", "Track", "batch_of", "in_turns", "ratios", "seconds", "summary", "threads", "wait_for"]

_BATCH_SECONDS = 0.01

Call: TypeAlias = Callable[[], object]
Summary: TypeAlias = dict[str, float]

# From a title and a number of rounds to the rounds, which shows how many are done while they are gone through.
Track: TypeAlias = Callable[[str, int], Iterable[object]]


def in_turns(measures: Mapping[str, Callable[[], float]], rounds: Iterable[object]) -> dict[str, list[float]]:
    """What each measure gives in each of the rounds.

    Every round has an order of its own: torch's threads go on spinning for a moment after a parallel operation, and
    where cores are scarce, the one that always came next would pay for it.
    """
    values: dict[str, list[float]] = {name: [] for name in measures}
    shuffled = random.Random(0)
    for _ in rounds:
        for name in shuffled.sample(list(measures), len(measures)):
            values[name].append(measures[name]())
    return values


def seconds(call: Call, batch: int, device: torch.device) -> float:
    """Seconds per call; garbage is collected as it is in a training run, since updates make some."""
    wait_for(device)
    start = perf_counter()
    for _ in repeat(None, batch):
        call()
    wait_for(device)
    return (perf_counter() - start) / batch


def batch_of(call: Call, device: torch.device) -> int:
    """The number of calls that take about 10 ms, at least 1; also warms up, for the first call may take long."""
    batch = 1
    while (least := min(seconds(call, batch, device) for _ in range(3))) * batch < _BATCH_SECONDS / 2:
        batch *= 2
    return max(1, round(_BATCH_SECONDS / least))


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given; the CPU has done it already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Inside, torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ratios(numerators: Iterable[float], denominators: Iterable[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def summary(values: Iterable[float], scale: float = 1) -> Summary:
    """Median and quartiles of the values, each ``scale`` times as large."""
    first, median, third = quantiles([scale * value for value in values], n=4, method="inclusive")
    return {"q1": first, "median": median, "q3": third}
