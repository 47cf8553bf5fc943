"""One line that says what an object is and where it stands, for ``repr``; never raises."""

import numbers
from collections.abc import Callable

from torch import nn

from .schedule_argument import described
from .traversal import unwrapped

__all__ = ["counted", "module_summary", "momentum_summary", "one_line"]


def one_line(kind: str, *parts: Callable[[], str]) -> str:
    """``kind(part; part)``, without empty parts; of a part that raises, the type of what it raised."""
    words = []
    for part in parts:
        try:
            words.append(part())
        except Exception as error:  # a broken object still has to be shown in a debugger
            words.append(f"<{type(error).__name__}>")
    return f"{kind}({'; '.join(filter(None, words))})"


def module_summary(module: nn.Module) -> str:
    """The class of an averaged twin, its number of parameters, and the types and devices that hold them."""
    parameters = list(unwrapped(module).parameters())
    size = f"{type(unwrapped(module)).__name__}: {counted(sum(one.numel() for one in parameters), 'parameter')}"
    types = {str(one.dtype).removeprefix("torch."): None for one in parameters}
    devices = {str(one.device): None for one in parameters}
    return f"{size} in {' and '.join(types)} on {' and '.join(devices)}" if parameters else size


def momentum_summary(momentum: object) -> str:
    """A momentum or a schedule; empty for None."""
    if momentum is None:
        return ""
    return f"momentum {momentum:g}" if isinstance(momentum, numbers.Real) else f"momentum {described(momentum)}"


def counted(number: int, noun: str) -> str:
    """``1,234 updates``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
