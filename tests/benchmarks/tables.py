"""The figures as tables, for 100 columns."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from .measure import Summary
from .models import TITLES
from .peers import EVENT, LIMIT, OURS

__all__ = ["console", "multiple", "origin", "tables"]

# What it is called, its unit, and how many of the unit are a millisecond.
_OTHERS = {
    "construction": ("construction of an average", "ms", 1),
    "state_dict": ("state_dict (of diffusers and torch_ema a list that is there already)", "µs", 1000),
    "swapped": ("averaged weights swapped in and back", "ms", 1),
}


def console() -> Console:
    """Where tables are printed: on 100 columns where it is no terminal."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=100)


def tables(figures: Mapping[str, Any]) -> Iterator[Table]:
    models, rounds = figures["models"], figures["rounds"]
    yield _updates(models, rounds["update"])
    for cost, (title, unit, scale) in _OTHERS.items():
        yield _others(models, cost, f"{title}, {rounds[cost]} rounds", unit, scale)
    for name, training in figures["training"].items():
        yield _training(name, training, rounds["training"])


def origin(figures: Mapping[str, Any]) -> str:
    """Where the figures come from, in one line."""
    packages = figures["packages"]
    threads = f", {_threads(figures)}" if figures["device"] == "cpu" else ""
    versions = f"torch {packages['torch']}, pytorch-ignite {packages['pytorch-ignite']}"
    return f"{figures['device_name']}{threads}, {versions}, {figures['date'][:10]}"


def _updates(models: Mapping[str, Any], rounds: int) -> Table:
    table = _table(f"one update through an event, {rounds} rounds", "ms", "quartiles", "× ours", "quartiles", "× limit")
    table.caption = f"{EVENT}: an event whose handler does nothing. {LIMIT}: the limit, one lerp_ of as many bytes."
    for name, model in models.items():
        table.add_row(_heading(name))
        for peer, figure in model["update"].items():
            limit = _short(figure["to_limit"]["median"])
            table.add_row(
                Text(f"  {peer}"), *_spread(figure["ms"]), *_spread(figure["to_ours"]), limit, style=_style(peer)
            )
        _add_missing(table, model["missing"])
    return table


def _others(models: Mapping[str, Any], cost: str, title: str, unit: str, scale: float) -> Table:
    table = _table(title, unit, "quartiles", "× ours", "quartiles", "peak", "left")
    table.caption = "peak, left: the most memory while it is done, and what stays, in copies of the model."
    for name, model in models.items():
        table.add_row(_heading(name))
        for peer, figure in model[cost].items():
            spreads = (*_spread(figure["ms"], scale), *_spread(figure["to_ours"]))
            memory = (f"{figure[key]:.2f}" for key in ("peak", "left"))
            table.add_row(Text(f"  {peer}"), *spreads, *memory, style=_style(peer))
        for peer in [one for one in model["update"] if one not in (*model[cost], EVENT, LIMIT)]:
            table.add_row(Text(f"  {peer}"), "none")
        _add_missing(table, model["missing"])
    return table


def _training(name: str, training: Mapping[str, Any], rounds: int) -> Table:
    title = f"training step: {name}, {training['parameters']:,} parameters, {_threads(training)}, {rounds} rounds"
    table = _table(title, "ms", "quartiles", "% added", "quartiles")
    table.add_row("  none", *_spread(training["bare"]))
    for peer, figure in training["peers"].items():
        percent = figure["percent"]
        added = (f"{percent['median']:+.2f}", f"{percent['q1']:+.2f} to {percent['q3']:+.2f}")
        table.add_row(Text(f"  {peer}"), *_spread(figure["ms"]), *added, style=_style(peer))
    _add_missing(table, training["missing"])
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(
        Column("", no_wrap=True),
        title=title,
        box=SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        min_width=72,
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _heading(model: str) -> Text:
    return Text(TITLES.get(model, model), style="bold")


def _add_missing(table: Table, missing: Mapping[str, str]) -> None:
    for peer, reason in missing.items():
        table.add_row(Text(f"  {peer}"), "–")
        line = escape(f"{peer}: {reason}")
        if line not in str(table.caption or "").splitlines():
            table.caption = f"{table.caption}\n{line}" if table.caption else line


def _spread(summary: Summary, scale: float = 1) -> tuple[str, str]:
    """Median and quartiles."""
    first, median, third = (_short(scale * summary[key]) for key in ("q1", "median", "q3"))
    return median, f"{first}–{third}"


def _short(value: float) -> str:
    """Three digits."""
    if value < 0.001:
        return f"{value:.4f}"
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def multiple(ratio: float) -> str:
    """Two digits, but three about 1."""
    digits = 3 if 0.9 < ratio < 1.1 else 2
    return f"{ratio:.{digits}g}" if ratio < 99.5 else f"{ratio:.0f}"


def _threads(figures: Mapping[str, Any]) -> str:
    return f"{figures['threads']} thread{'' if figures['threads'] == 1 else 's'}"


def _style(peer: str) -> str:
    return "green" if peer == OURS else ""
