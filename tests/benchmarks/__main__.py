"""Measures what averages cost and prints tables; see ``python -m tests.benchmarks --help``."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from .arguments import Options, parsed
from .figures import write
from .machine import machine
from .model_costs import model_costs
from .picture import draw
from .tables import console, origin, tables
from .training_steps import training_costs


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    figures = options.figures or _measured(options)
    if options.json is not None:
        write(options.json, figures, force=options.force)
    output = console()
    output.print(*tables(figures), sep="\n")
    output.print(origin(figures), highlight=False, markup=False)
    if options.picture is not None:
        draw(figures, options.picture, force=options.force)


def _measured(options: Options) -> dict[str, Any]:
    device, rounds = torch.device(options.device), _rounds(options.rounds)
    # Without its thread, which would take turns with what is measured.
    with Progress(console=Console(stderr=True), auto_refresh=False, transient=True) as progress:

        def track(title: str, number: int) -> Any:
            return progress.track(range(number), description=title)

        measured = partial(model_costs, device=device, rounds=rounds, track=track)
        trained = partial(training_costs, device=device, rounds=rounds["training"], track=track)
        models = {name: measured(name) for name in options.models}
        training = {name: trained(name) for name in options.training}
    return {**machine(device), "rounds": rounds, "models": models, "training": training}


def _rounds(updates: int) -> dict[str, int]:
    """What moves a whole model and takes long gets fewer."""
    few = max(2, updates // 5)
    return {"update": updates, "state_dict": updates, "swapped": few, "construction": few, "training": updates}


if __name__ == "__main__":
    main()
