"""What an update is made of: ``python -m tests.benchmarks.parts`` times its parts, one by one and in turns."""

import argparse
from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
from rich.table import Table
from torch import Tensor, nn

from ignite_ema import EMAHandler

from .measure import Call, batch_of, in_turns, seconds
from .model_costs import MOMENTUM
from .models import AVERAGED_IN, MODELS
from .peers import Peer, event, update_of
from .tables import console

__all__ = ["main", "parts_of"]

_CPU = torch.device("cpu")
WHOLE = "an update through an event"


def parts_of(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Call]:
    """The whole, and what it does, as calls."""
    handler = EMAHandler(model, momentum=MOMENTUM, dtype=dtype)
    pairing = handler._average._pairing
    tensors = pairing.read()
    online = tensors[: len(tensors) // 2]
    calls: dict[str, Call] = {
        WHOLE: update_of(Peer(handler.attach, list, dict)),
        "Ignite fires the event": event(),
        "check that modules and names are unchanged": pairing.structure.intact,
        "fetch the tensors": pairing._tensors,
        "check where their memory is": lambda: list(map(Tensor.data_ptr, tensors)),
        "check the shapes of the model's": lambda: [tensor.shape for tensor in online],
        "check their types": lambda: [tensor.dtype for tensor in online],
    }
    for kernel, ours, theirs, averages in pairing.groups:
        what = "average" if averages else "copy"
        calls[f"{what} ({len(tensors[ours])} of {tensors[theirs][0].dtype})"] = partial(
            torch.no_grad()(kernel), tensors[ours], tensors[theirs], MOMENTUM
        )
    return calls


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.parts", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=40, help="median of so many (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds should be at least 1, got {options.rounds}; leave it out for 40.")
    table = Table("", "µs", "of the whole", title="What an update is made of")
    for name in options.models:
        calls = parts_of(MODELS[name](), AVERAGED_IN.get(name))
        measures = {part: partial(seconds, call, batch_of(call, _CPU), _CPU) for part, call in calls.items()}
        times = {part: median(values) for part, values in in_turns(measures, range(options.rounds)).items()}
        table.add_row(f"[bold]{name}[/]")
        for part, time in times.items():
            table.add_row(f"  {part}", f"{1e6 * time:,.2f}", f"{time / times[WHOLE]:.0%}")
        rest = 2 * times[WHOLE] - sum(times.values())
        table.add_row("  the rest: calls, comparisons, lists", f"{1e6 * rest:,.2f}", f"{rest / times[WHOLE]:.0%}")
        table.add_section()
    console().print(table)


if __name__ == "__main__":
    main()
