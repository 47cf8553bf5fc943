"""What a long run does to an average: ``python -m tests.benchmarks.long_run`` makes a million updates of a small model.

After each block it counts what is alive in the process, and compares the average with the exact one. Updates are timed
in turns with those of an average that has just been made, so that what else runs on the machine matters less.
"""

import argparse
import gc
import os
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import truediv
from pathlib import Path
from statistics import linear_regression, mean, median
from typing import TypeAlias

import torch
from rich.table import Column, Table
from torch import Tensor

from .alternating import RUNS, Alternating, Run
from .tables import console

__all__ = ["main", "measure", "verdicts"]

_PIECES = 50  # of a block
_UNIT = 2.0**-24  # rounding to the nearest float32 changes a number by at most so much of its size
# What may grow from the first block to the last: the times by noise, caches of Python and torch that fill late.
_LIMITS = {"to fresh": 0.1, "MiB": 1.0, "objects": 20.0, "allocations": 500.0, "tensors": 0.0, "tensor bytes": 0.0}

Figures: TypeAlias = "Mapping[str, array[float]]"


class _Exact:
    """The average a + c (b - a) in float64, where c is one number, and a bound of the error of one in float32.

    An update in float32 rounds λ, the distance, their product, and the sum. The last counts in full, the others by the
    product, which is at most 2 λ of the largest weight; what was lost before, by 1 - λ.

    Attributes:
        part: c.
        bound: relative to the largest weight.
    """

    def __init__(self) -> None:
        self.updates, self.part, self.bound = 0, 0.0, 0.0

    def advance(self, updates: int, rule: Callable[[int], float]) -> None:
        for n in range(self.updates, self.updates + updates):
            momentum = rule(n)
            self.part += momentum * ((n + 1) % 2 - self.part)
            self.bound = (1 - momentum) * self.bound + 1.01 * _UNIT * (1 + 6 * momentum)  # 1.01: the second order
        self.updates += updates

    def error_of(self, averaged: Iterable[Tensor], values: Sequence[Sequence[Tensor]]) -> float:
        """Of the worst weight, relative to the largest."""
        a, b, ours = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (*values, averaged))
        error = (ours - a.lerp(b, self.part)).abs().max() / torch.stack([a, b]).abs().max()
        return error.item()


def measure(make: Callable[[Alternating], Run], updates: int, blocks: int) -> Figures:
    """Figures at the end of each block.

    Returns:
        ``µs``: microseconds per update. ``to fresh``: the same as a multiple of that of a new average. ``MiB``: of
        resident memory; NaN where that is not known. ``objects``: that the garbage collector knows. ``allocations``: of
        Python, for numbers, too. ``tensors``, ``tensor bytes``: that are alive. ``error``, ``bound`` of it: relative to
        the largest weight. ``missed``: updates that were not counted.
    """
    alternating, exact = Alternating(), _Exact()
    run, piece = make(alternating), updates // blocks // _PIECES
    names = ["µs", *_LIMITS, "error", "bound", "missed"]
    figures = {name: array("d", bytes(8 * blocks)) for name in names}  # allocates nothing later
    list(_alive())  # to look takes memory, too
    for block in range(blocks):
        figures["µs"][block], figures["to fresh"][block] = _times(run, make(Alternating()), piece)
        exact.advance(_PIECES * piece, run.momentum)
        figures["error"][block] = exact.error_of(run.averaged(), alternating.values)
        figures["bound"][block] = exact.bound
        figures["missed"][block] = exact.updates - run.num_updates()
        for name, value in zip(("MiB", "objects", "allocations", "tensors", "tensor bytes"), _alive(), strict=True):
            figures[name][block] = value
    return figures


def _times(run: Run, fresh: Run, piece: int) -> tuple[float, float]:
    """Microseconds of an update, and what they are to those of ``fresh``, which makes as many; medians."""
    pairs = [(run.advance(piece), fresh.advance(piece)) for _ in range(_PIECES)]
    return 1e6 * median(old for old, _ in pairs) / piece, median(old / new for old, new in pairs)


def _alive() -> Iterator[float]:
    gc.collect()
    yield _resident()
    objects = gc.get_objects()
    yield len(objects)
    # Sparse ones, which others may have left in the process, have no size in bytes.
    tensors = [item for item in objects if issubclass(type(item), Tensor) and item.layout is torch.strided]
    count, size = len(tensors), sum(tensor.nbytes for tensor in tensors)
    del objects, tensors
    yield sys.getallocatedblocks()
    yield from (count, size)


def _resident() -> float:
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:  # Linux alone has it
        return float("nan")
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def verdicts(figures: Figures) -> dict[str, bool]:
    """Whether each figure is as it should be: those that are alive do not grow, the error is below its bound."""
    grown = {name: figures[name][-1] - figures[name][0] for name in _LIMITS}
    grown["to fresh"] = _slope(figures["to fresh"])
    right = {name: not grown[name] > limit for name, limit in _LIMITS.items()}
    errors = all(error <= bound for error, bound in zip(figures["error"], figures["bound"], strict=True))
    return {**right, "error": errors, "missed": not any(figures["missed"])}


def _slope(times: Sequence[float]) -> float:
    """Growth over the run, relative to the mean, of the straight line through the times."""
    return linear_regression(range(len(times)), times).slope * (len(times) - 1) / mean(times)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each figure of each run."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.long_run", description=__doc__)
    parser.add_argument("--updates", type=int, default=1_000_000, help="of each average (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=20, help="at least 2 (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.blocks < 2 or options.updates < 500 * options.blocks:
        parser.error(
            "--blocks should be at least 2 and --updates 500 times as many, got "
            f"{options.blocks} and {options.updates}; take fewer blocks, or more updates."
        )
    output = console()
    table = Table(
        Column("figure", no_wrap=True),
        "first block",
        "last block",
        "growth",
        Column("verdict", no_wrap=True),
        title="Averages over a long run",
        caption="to fresh: the time of an update to that of a new average; MiB: resident; allocations: of Python.\n"
        "error: of the worst weight, relative to the largest; missed: updates that were not counted.",
    )
    for name, (make, part) in RUNS.items():
        updates = int(options.updates * part)
        with output.status(f"{name}: {updates:,} updates …"):
            figures = measure(make, updates, options.blocks)
        table.add_row(f"[bold]{name}[/]", f"{updates:,} updates")
        for row in _rows(figures):
            table.add_row(*row)
        table.add_section()
    output.print(table)


def _rows(figures: Figures) -> Iterator[tuple[str, ...]]:
    right = verdicts(figures)
    for name in ("µs", *right):
        first, last = figures[name][0], figures[name][-1]
        growth = f"{last - first:+.4g}"
        if name == "to fresh":
            growth = f"{_slope(figures[name]):+.1%} (straight line)"
        elif name == "error":
            growth = f"{max(map(truediv, figures[name], figures['bound'])):.1%} of its bound"
        verdict = {True: "[green]right[/]", False: "[bold red]WRONG[/]", None: ""}[right.get(name)]
        yield name, _short(first), _short(last), growth, verdict


def _short(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    main()
