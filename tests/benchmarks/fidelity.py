"""How exact the averages are: ``python -m tests.benchmarks.fidelity`` compares each with one that float64 computes."""

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .arguments import check_target
from .errors import measure, small
from .figures import write
from .machine import machine
from .peers import OURS, PEERS, ignite_ema
from .tables import console

__all__ = ["HELD", "MOMENTA", "STEPS", "STOCHASTIC", "main", "percent"]

# What holds the average: the types of the weights and of the average. Those that need the same memory stand together.
HELD: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "float32": (torch.float32, torch.float32),
    "float32 of bfloat16 weights": (torch.bfloat16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
}
MOMENTA = (1e-2, 2e-4, 1e-5)
# Of each update, relative to the size of the weights of its tensor. 1e-3 is a rule of thumb for what optimisers do; as
# these steps do not depend on each other, 10,000 of them change a weight by a tenth of its size.
STEPS = {"constant": 0.0, "walk": 1e-3}
STOCHASTIC = f"{OURS}, stochastic_rounding=True"
_TIE = 1.02  # errors that differ by less are called equal
_STALLED = 0.01  # of the way
_CAPTION = """\
drift: how far averages of constant weights have moved, relative to the weights; should be 0.
error: of averages of weights that walk at random, in percent of the way that they should have gone.
    Both are root mean squares; * marks the best of a column, ties within 2 % included.
gone: what the average has gone of that way, 100 % where it is right but for noise. One that has gone
    less than 1 % has stalled. Columns are momenta."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table for each type that holds the average."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if problem := _problem(options):
        parser.error(problem)
    output, held = console(), {}
    output.print(_CAPTION, highlight=False)
    for name, types in HELD.items():
        with output.status(f"Averaging in {name} …"):
            held[name] = _measured(options.peers, types, options.updates)
        output.print(_table(name, held[name]))
    if options.json is not None:
        figures = {**machine(torch.device("cpu")), "updates": options.updates, "steps": STEPS, "held": held}
        write(options.json, figures, force=options.force)


def _measured(names: Sequence[str], types: tuple[torch.dtype, torch.dtype], updates: int) -> dict[str, Any]:
    """The figures of all momenta and walks."""
    weights, average = types
    builds = {name: PEERS[name] for name in names}
    if OURS in builds and average.itemsize == 2:
        builds = {OURS: builds.pop(OURS), STOCHASTIC: partial(ignite_ema, stochastic_rounding=True), **builds}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A momentum of .* is too small")  # which is what the table shows
        run = partial(measure, builds=builds, dtype=average, updates=updates)
        return {
            f"{momentum:g}": {walk: run(small(weights), momentum=momentum, step=step) for walk, step in STEPS.items()}
            for momentum in MOMENTA
        }


def _table(name: str, figures: Mapping[str, Any]) -> Table:
    cases = list(figures.values())
    drifts = [_best(case["constant"], "error", _short) for case in cases]
    errors = [_best(case["walk"], "error_of_way", percent) for case in cases]
    columns = drifts + errors + [_gone(case["walk"]) for case in cases]
    title = f"Average in {name}: {HELD[name][1].itemsize} bytes per weight"
    table = Table("peer", title=title, box=SIMPLE_HEAD, padding=0, pad_edge=False, caption_justify="left")
    for what in ("drift", "error", "gone"):
        for momentum in figures:
            table.add_column(f"{what}\n{momentum}", justify="right")
    for peer in cases[0]["walk"]["peers"]:
        table.add_row(peer.replace(", ", ",\n"), *(column[peer] for column in columns))
    missing = cases[0]["walk"]["missing"]
    for peer in missing:
        table.add_row(peer, *("–" for _ in columns))
    table.caption = "\n".join(f"– {peer}: {reason}" for peer, reason in missing.items()) or None
    return table


def _best(case: Mapping[str, Any], name: str, shown: Callable[[float], str]) -> dict[str, str]:
    errors = {peer: figures[name] for peer, figures in case["peers"].items()}
    best = _TIE * min(errors.values(), default=0)
    return {
        peer: f"[bold green]{shown(error)}*[/]" if error <= best else f"{shown(error)} "
        for peer, error in errors.items()
    }


def _gone(case: Mapping[str, Any]) -> dict[str, str]:
    parts = {peer: figures["gone"] for peer, figures in case["peers"].items()}
    return {peer: "[red]stalled[/]" if part < _STALLED else f"{100 * part:.0f} %" for peer, part in parts.items()}


def _short(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def percent(part: float) -> str:
    """Two digits, but three from 100 % on."""
    return f"{100 * part:.2g} %" if part < 0.995 else f"{100 * part:.0f} %"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fidelity", description=__doc__)
    parser.add_argument("--updates", type=int, default=10_000, help="of each average (default: %(default)s)")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=f"of {', '.join(PEERS)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE as well")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    return parser


def _problem(options: argparse.Namespace) -> str | None:
    if options.updates < 1:
        return f"--updates should be at least 1, got {options.updates}."
    if options.json is None:
        return "--force should come with --json FILE." if options.force else None
    try:
        check_target("--json", options.json, options.force)
    except ValueError as problem:
        return str(problem)
    return None


if __name__ == "__main__":
    main()
