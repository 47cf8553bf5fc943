"""The ``momentum`` argument, a float or a schedule: checked, evaluated and described as a schedule."""

import numbers
from dataclasses import fields, is_dataclass

from ..schedules import Constant, CopyUntil, Schedule
from .user_warnings import warn_user
from .validation import as_float, checked_momentum, shown_integer

__all__ = ["constant_of", "described", "schedule_of", "scheduled"]


def scheduled(schedule: Schedule, n: int) -> float:
    """The momentum of the update after ``n`` updates, checked to be in [0, 1]."""
    momentum = schedule(n)
    if type(momentum) is float and 0 <= momentum <= 1:
        return momentum
    return checked_momentum(momentum, "the schedule", "return", f" after {n} update{'' if n == 1 else 's'}")


def schedule_of(momentum: float | Schedule) -> Schedule:
    """``momentum`` as a schedule: itself, or a constant.

    Raises:
        TypeError, ValueError: unless it is a float in (0, 1), or a callable whose first momentum is in [0, 1].
    """
    if isinstance(momentum, type):
        raise TypeError(f"momentum should be a schedule, got the class {momentum.__name__}; make one: call it.")
    if callable(momentum):
        scheduled(momentum, 0)
        _warn_of_decay(_final(momentum), "the last momentum of the schedule")
        return momentum
    constant = constant_of(momentum)
    _warn_of_decay(constant.momentum, "momentum")
    return constant


def constant_of(momentum: object) -> Constant:
    """A plain momentum as a schedule; raises TypeError or ValueError unless it is a number in (0, 1)."""
    if isinstance(momentum, bool) or not isinstance(momentum, numbers.Real):
        raise TypeError(f"momentum should be a float in (0, 1) or a schedule, got {momentum!r}; 0.001 is usual.")
    value = as_float(momentum)
    if not 0 < value < 1:
        got = shown_integer(momentum) if isinstance(momentum, int) else momentum
        raise ValueError(
            f"Invalid momentum: {got}; it should be in (0, 1), as the weight of the new weights (1 - decay)."
        )
    return Constant(value)


def described(value: object) -> str:
    """A schedule, or a field of one, in words that are the same in every process; functions by their names alone."""
    if is_dataclass(value) and not isinstance(value, type):
        inner = ", ".join(f"{field.name}={described(getattr(value, field.name))}" for field in fields(value))
        return f"{type(value).__qualname__}({inner})"
    if isinstance(value, numbers.Real):
        return repr(float(value))
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else repr(value)


def _final(schedule: Schedule) -> float:
    """The momentum that a schedule is told to end with, by the name of its field; 0 where it has no such field."""
    while isinstance(schedule, CopyUntil):
        schedule = schedule.schedule
    values = [getattr(schedule, name, None) for name in ("momentum", "end", "min_momentum")]
    return next((float(value) for value in values if isinstance(value, numbers.Real)), 0.0)


def _warn_of_decay(momentum: float, what: str) -> None:
    if momentum > 0.5:
        warn_user(
            f"{what} is the weight of the new weights, and {momentum:g} nearly copies them at each update; if it was "
            f"meant as a decay, pass 1 - {momentum:g} = {1 - momentum:g}."
        )
