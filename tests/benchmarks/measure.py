"""Timing peers in turns, so that whatever else slows the machine down slows all of them down."""

import random
from collections.abc import Mapping
from itertools import repeat
from statistics import quantiles
from time import perf_counter
from typing import Any

from .peers import LIMIT, OURS, Update

__all__ = ["measure"]

_BATCH_SECONDS = 0.01


def measure(peers: Mapping[str, Update], rounds: int) -> dict[str, dict[str, Any]]:
    """What an update of each peer costs, from ``rounds`` rounds of one batch of each.

    Every round has an order of its own: torch's threads go on spinning for a moment after a parallel operation, and
    where cores are scarce, the peer that always came next would pay for it.

    Returns:
        For each peer the updates of a batch, and as median and quartiles: ``ms``, the milliseconds per update,
        and ``to_ours`` and ``to_limit``, how many times as long as ours and as the limit it took in the same round.
    """
    batches = {name: _batch_of(update) for name, update in peers.items()}
    times: dict[str, list[float]] = {name: [] for name in peers}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for name in shuffled.sample(list(peers), len(peers)):
            times[name].append(_seconds(peers[name], batches[name]))
    return {
        name: {
            "batch": batches[name],
            "ms": _summary([1000 * t for t in times[name]]),
            "to_ours": _summary(_ratios(times[name], times[OURS])),
            "to_limit": _summary(_ratios(times[name], times[LIMIT])),
        }
        for name in peers
    }


def _seconds(update: Update, batch: int) -> float:
    """Seconds per update; garbage is collected as it is in a training run, since updates make some."""
    start = perf_counter()
    for _ in repeat(None, batch):
        update()
    return (perf_counter() - start) / batch


def _batch_of(update: Update) -> int:
    """The number of updates that take about 10 ms, at least 1; also warms up, for the first update may take long."""
    batch = 1
    while (seconds := min(_seconds(update, batch) for _ in range(3))) * batch < _BATCH_SECONDS / 2:
        batch *= 2
    return max(1, round(_BATCH_SECONDS / seconds))


def _ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def _summary(values: list[float]) -> dict[str, float]:
    first, median, third = quantiles(values, n=4, method="inclusive")
    return {"q1": first, "median": median, "q3": third}
