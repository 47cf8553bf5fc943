"""The momentum of a handler: one that a schedule gives, or one that others drive. Two classes, one interface."""

from typing import Any, TypeAlias

from ignite.handlers.param_scheduler import BaseParamScheduler

from ..averaging.schedule_argument import constant_of, scheduled
from ..averaging.user_warnings import warn_user
from ..averaging.validation import checked_momentum
from ..schedules import Constant, LinearWarmup, Schedule

__all__ = ["DrivenMomentum", "Momentum", "ScheduledMomentum", "goes_on_from_existing", "momentum_of"]


class ScheduledMomentum:
    """Follows a schedule of the number of updates, and writes to the engine what it uses.

    Attributes:
        schedule: the schedule.
        counts: whether it depends on the number of updates.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.counts = not isinstance(schedule, Constant)

    def at(self, n: int) -> float:
        """λ of the update after ``n`` updates."""
        return scheduled(self.schedule, n)

    def take(self, state: Any, name: str, n: int) -> float:
        """λ of the update after ``n`` updates; shown as ``state.<name>`` from here on."""
        momentum = scheduled(self.schedule, n)
        setattr(state, name, momentum)
        return momentum


class DrivenMomentum:
    """A plain float that the engine's attribute holds, where a user or a ``StateParamScheduler`` may drive it.

    Attributes:
        value: the momentum, as it was seen last.
        is_restored: whether ``value`` was loaded, and counts more than what an engine has already.
    """

    schedule = None
    counts = False

    def __init__(self, value: float) -> None:
        self.value = value
        self.is_restored = False

    def at(self, n: int) -> float:
        """The momentum, at any count."""
        return self.value

    def take(self, state: Any, name: str, n: int) -> float:
        """λ as ``state.<name>`` shows it; raises TypeError or ValueError, naming the attribute, unless in [0, 1]."""
        value = getattr(state, name, None)
        if type(value) is not float or not 0 <= value <= 1:
            value = checked_momentum(value, f"engine.state.{name}")
        self.value = value
        return value


Momentum: TypeAlias = ScheduledMomentum | DrivenMomentum


def goes_on_from_existing(momentum: Momentum, state: Any, name: str, warns: bool) -> bool:
    """Whether ``momentum`` is driven by what ``state.<name>`` holds already; warns of what becomes of the two.

    Raises:
        TypeError, ValueError: where it would be driven by what is no momentum.
    """
    if not hasattr(state, name):
        return False
    value = getattr(state, name)  # None where a StateParamScheduler has made it and has not run yet
    goes_on = value is not None and isinstance(momentum, DrivenMomentum) and not momentum.is_restored
    if goes_on:
        checked_momentum(value, f"engine.state.{name}")
    if warns:
        ignored = f"it goes on from its value {value!r}, and the momentum of {momentum.at(0)} passed here is ignored"
        warn_user(
            f"Attribute '{name}' already exists in Engine.state, made by something else or loaded with the engine: "
            f"{ignored if goes_on else f'its value {value!r} is overwritten'}; choose another name, or set "
            "warn_if_exists to False if that is meant."
        )
    return goes_on


def momentum_of(momentum: float | Schedule, momentum_warmup: float | None, warmup_iters: int | None) -> Momentum:
    """What the arguments of a handler say; raises TypeError or ValueError, naming the argument."""
    if isinstance(momentum, BaseParamScheduler):
        raise TypeError(
            f"momentum should be a float or a schedule of the number of updates, got {type(momentum).__name__} of "
            "Ignite; pass a float and attach the scheduler to the engine, where it drives engine.state.<name>."
        )
    if callable(momentum):
        if momentum_warmup is not None or warmup_iters is not None:
            raise ValueError(
                "momentum_warmup and warmup_iters should be None where momentum is a schedule, got "
                f"{momentum_warmup!r} and {warmup_iters!r}; a schedule brings its own warm-up."
            )
        return ScheduledMomentum(momentum)
    if (momentum_warmup is None) != (warmup_iters is None):
        raise ValueError(
            "momentum_warmup and warmup_iters should be given together or not at all, got "
            f"{momentum_warmup!r} and {warmup_iters!r}."
        )
    value = constant_of(momentum).momentum
    if momentum_warmup is None or warmup_iters is None:
        return DrivenMomentum(value)
    return ScheduledMomentum(LinearWarmup(value, momentum_warmup, warmup_iters))
