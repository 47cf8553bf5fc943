"""Checks of arguments, warnings, and the parts of a ``repr``: shared by all parts of the library."""

import contextlib
import numbers
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..schedules import Constant, CopyUntil, Debiased, Rescaled, Schedule
from .names import parameters_of, unwrapped
from .sharding import is_first_rank


class EMAWarning(UserWarning):
    """The category of every warning of ``ignite_ema``."""


_SITE = Path(torch.__file__).parents[1]
_LIBRARIES = (str(Path(__file__).parents[1]), str(_SITE / "torch"), str(_SITE / "ignite"), contextlib.__file__)
_PLACE: Any = {"skip_file_prefixes": _LIBRARIES} if sys.version_info >= (3, 12) else {"stacklevel": 3}


def warn_user(message: str) -> None:
    """Warns at the innermost line outside of the libraries; before Python 3.12 at the line that called the caller."""
    warnings.warn(message, EMAWarning, **_PLACE)


def warn_first_rank(message: str) -> None:
    """Warns of what concerns the run as a whole: only on the first rank."""
    if is_first_rank():
        warn_user(message)


def checked_momentum(value: object, what: str, verb: str = "be", when: str = "") -> float:
    """``value`` as a momentum; raises TypeError or ValueError unless it is a number in [0, 1].

    For the message, ``what`` says where it was read from, ``verb`` whether that should "be" or "return" a momentum, and
    ``when`` goes after the value, such as " after 3 updates".
    """
    if type(value) is float and 0 <= value <= 1:
        return value
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what} should {verb} a momentum, a number in [0, 1], got {value!r}{when}; 0.001 is usual.")
    momentum = float(value)
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"{what} should {verb} a momentum in [0, 1], got {value!r}{when}. It is the weight of the new weights, 1 - "
            "decay."
        )
    return momentum


def scheduled(schedule: Schedule, n: int) -> float:
    """The momentum of the update after ``n`` updates, checked to be in [0, 1]."""
    momentum = schedule(n)
    if type(momentum) is float and 0 <= momentum <= 1:
        return momentum
    return checked_momentum(momentum, "the schedule", "return", f" after {counted(n, 'update')}")


def schedule_of(momentum: float | Schedule) -> Schedule:
    """``momentum`` as a schedule: itself, or a constant.

    Raises TypeError or ValueError unless it is a float in (0, 1], or a callable whose first momentum is in [0, 1].
    """
    if isinstance(momentum, type):
        raise TypeError(f"momentum should be a schedule, got the class {momentum.__name__}; make one by calling it.")
    schedule, what = momentum, "the last momentum of the schedule"
    if callable(schedule):
        scheduled(schedule, 0)
    else:
        schedule, what = constant_of(momentum), "momentum"
    last = final_momentum(schedule)
    if last >= 0.9 and schedule not in (Constant(1.0), Debiased(1.0)):  # hard copies are intended
        way_out = f"pass 1 - {last:g} = {1 - last:g}" if last < 1 else "pass 1 minus each of its values"
        warn_user(
            f"{what} is the weight of the new weights, and {last:g} nearly copies them at each update. If it is meant "
            f"as a decay, {way_out}."
        )
    return schedule


def constant_of(momentum: object) -> Constant:
    """A plain momentum as a schedule; raises TypeError or ValueError unless it is a number in (0, 1]."""
    if isinstance(momentum, bool) or not isinstance(momentum, numbers.Real):
        raise TypeError(f"momentum should be a float in (0, 1] or a schedule, got {momentum!r}; 0.001 is usual.")
    value = float(momentum)
    if not 0 < value <= 1:
        raise ValueError(
            f"Invalid momentum: {momentum}. It should be in (0, 1], as the weight of the new weights (1 - decay)."
        )
    return Constant(value)


def described(value: object) -> str:
    """A text for a schedule, or a field of one, that is the same in every process; functions appear by name only."""
    if is_dataclass(value) and not isinstance(value, type):
        inner = ", ".join(f"{field.name}={described(getattr(value, field.name))}" for field in fields(value))
        return f"{type(value).__qualname__}({inner})"
    if isinstance(value, numbers.Real):
        return repr(float(value))
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else repr(value)


def check_flags(**flags: object) -> None:
    """Raises TypeError, naming the argument, unless each flag is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} should be True or False, got {value!r}.")


def check_count(value: object, name: str = "num_updates") -> None:
    """Raises TypeError or ValueError unless ``value`` can be a number of updates."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} should be an integer, got {value!r}: it counts updates.")
    if value < 0:
        raise ValueError(f"{name} should be 0 or more, got {value}: it counts updates.")


def check_saved_mapping(state: object, kinds: Mapping[str, type | tuple[type, ...]], what: str) -> None:
    """Raises TypeError or ValueError unless ``state`` has exactly these entries, each of its kind.

    A ``bool`` counts as an ``int`` only if it is listed. ``what`` says whose state it is, such as "an EMAHandler".
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"The state of {what} should be a mapping from its state_dict(), got {type(state).__name__}.")
    for key in [*kinds, *state]:
        if key not in state or key not in kinds:
            fault = "misses" if key in kinds else "should not have"
            raise ValueError(
                f"The state of {what} should be what its state_dict() gave, but it {fault} {key!r}; load it unchanged."
            )
    for key, kind in kinds.items():
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(state[key], allowed) or (isinstance(state[key], bool) and bool not in allowed):
            names = " or ".join(one.__name__ for one in allowed)
            raise TypeError(
                f"{key!r} of the state should be of type {names}, got {type(state[key]).__name__}; load what "
                "state_dict() gave, unchanged."
            )


def listed(names: Iterable[object], most: int = 8) -> str:
    """The names, quoted: ``'a', 'b', … (12 in all)``; empty for no names."""
    quoted = [repr(str(name)) for name in names]
    return ", ".join(quoted[:most]) + (f", … ({len(quoted)} in all)" if len(quoted) > most else "")


def one_line(kind: str, *parts: Callable[[], str]) -> str:
    """``kind(part; part)`` for a ``repr``, without empty parts; never raises."""
    words = []
    for part in parts:
        try:
            words.append(part())
        except Exception as error:  # a broken object still has to be shown in a debugger
            words.append(f"<{type(error).__name__}>")
    return f"{kind}({'; '.join(filter(None, words))})"


def module_summary(module: nn.Module) -> str:
    """The class of an averaged twin, its number of parameters, and their types and devices."""
    parameters = list(parameters_of(unwrapped(module)))
    size = f"{type(unwrapped(module)).__name__}: {counted(sum(one.numel() for one in parameters), 'parameter')}"
    types = {str(one.dtype).removeprefix("torch."): None for one in parameters}
    devices = {str(one.device): None for one in parameters}
    return f"{size} in {' and '.join(types)} on {' and '.join(devices)}" if parameters else size


def percentage(share: float) -> str:
    """``25%``; a share below 1 is not rounded up to 100%."""
    return "over 99%" if 0.995 <= share < 1 else f"{share:.0%}"


def counted(number: int, noun: str) -> str:
    """``1,234 updates``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def final_momentum(schedule: Schedule) -> float:
    """The momentum that a schedule ends with, read from its field of a known name; 0 if it has no such field."""
    if isinstance(schedule, CopyUntil):
        return final_momentum(schedule.schedule)
    if isinstance(schedule, Rescaled):
        return float(1 - (1 - final_momentum(schedule.schedule)) ** schedule.factor)
    values = [getattr(schedule, name, None) for name in ("momentum", "end", "min_momentum")]
    return next((float(value) for value in values if isinstance(value, numbers.Real)), 0.0)
