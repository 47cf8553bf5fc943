"""Measures what an update of the average costs and prints a table; see ``python -m tests.benchmarks --help``."""

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from .measure import measure
from .models import MODELS
from .peers import LIMIT, OURS, PEERS, Unavailable, Update
from .swap import swap_costs


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if problem := _problem(options):
        parser.error(problem)
    console = Console()
    models: dict[str, Any] = {}
    for name in options.models:
        with console.status(f"Measuring {name} …"):
            models[name] = _measured(MODELS[name](), options.rounds)
    machine = _machine()
    console.print(_table(models), _swap_table(models), sep="\n")
    console.print(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}")
    if options.json is not None:
        _write(options.json, {**machine, "rounds": options.rounds, "models": models})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=f"Times updates of an average, each through an event of an Ignite engine: '{OURS}', other "
        f"libraries, and '{LIMIT}', one lerp_ over as many contiguous floats. Batches of about 10 ms take turns.",
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help=f"of {', '.join(MODELS)}"
    )
    parser.add_argument("--rounds", type=int, default=100, help="batches of each, at least 2 (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE as well")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    return parser


def _problem(options: argparse.Namespace) -> str | None:
    if options.rounds < 2:
        return f"--rounds should be at least 2, got {options.rounds}: one round has no spread."
    if options.json is None:
        return "--force should come with --json FILE." if options.force else None
    if options.json.exists() and not options.force:
        return f"--json should name a new file, but {options.json} exists; pass --force to overwrite it."
    if not options.json.parent.is_dir():
        return f"--json should name a file in a directory that exists, got {options.json}; make the directory first."
    return None


def _measured(model: nn.Module, rounds: int) -> dict[str, Any]:
    peers, missing = _built(model)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameter_tensors": len(list(model.parameters())),
        "buffer_tensors": len(list(model.buffers())),
        "peers": measure(peers, rounds),
        "missing": missing,
        "swap": swap_costs(model, rounds),
    }


def _built(model: nn.Module) -> tuple[dict[str, Update], dict[str, str]]:
    """The updates of the peers, and of those that cannot take part the reasons."""
    peers, missing = {}, {}
    for name, build in PEERS.items():
        try:
            peers[name] = build(model)
        except Unavailable as reason:
            missing[name] = str(reason)
    return peers, missing


def _machine() -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ignite": version("pytorch-ignite"),
        "ignite_ema": version("ignite-ema"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # Linux alone has it
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _table(models: Mapping[str, Any]) -> Table:
    table = Table("model", "peer", title="ms per update, and as multiples of ours and of the limit")
    for heading in ("median", "IQR", f"to {OURS}", f"to {LIMIT}"):
        table.add_column(heading, justify="right")
    for name, figures in models.items():
        for peer, figure in figures["peers"].items():
            ms = figure["ms"]
            ratios = [f"{figure[to]['median']:.2f}" for to in ("to_ours", "to_limit")]
            table.add_row(name, peer, f"{ms['median']:.4f}", f"{ms['q3'] - ms['q1']:.4f}", *ratios)
        for peer, reason in figures["missing"].items():
            table.add_row(name, f"{peer}: {reason}")
        table.add_section()
    return table


def _swap_table(models: Mapping[str, Any]) -> Table:
    table = Table("model", title="the averaged weights swapped in and back; memory in copies of the model")
    for heading in ("median ms", "as updates", "most at a time", "left"):
        table.add_column(heading, justify="right")
    for name, figures in models.items():
        costs, update = figures["swap"], figures["peers"][OURS]["ms"]["median"]
        ms = costs["ms"]["median"]
        table.add_row(name, f"{ms:.3f}", f"{ms / update:.1f}", f"{costs['peak']:.2f}", f"{costs['left']:.2f}")
    return table


def _write(path: Path, figures: Mapping[str, Any]) -> None:
    """Writes beside ``path`` and renames, so that ``path`` is never half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
