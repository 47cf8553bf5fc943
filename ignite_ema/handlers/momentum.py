"""The momentum of a handler: one that a schedule gives, or one that others drive. Two classes, one interface."""

from typing import Any, TypeAlias

from ignite.handlers.param_scheduler import BaseParamScheduler

from ..averaging.schedule_argument import constant_of, scheduled
from ..averaging.user_warnings import warn_user
from ..averaging.validation import checked_momentum
from ..schedules import Constant, LinearWarmup, Schedule
from .attachment import Attachments

__all__ = ["DrivenMomentum", "Momentum", "ScheduledMomentum", "momentum_of", "settable"]


class ScheduledMomentum:
    """Follows a schedule of the number of updates, and writes to the engines what it uses.

    Attributes:
        passed: what the user passed: the schedule, or the float at which a warm-up ends.
        schedule: the schedule.
        counts: whether it depends on the number of updates.
    """

    def __init__(self, passed: float | Schedule, schedule: Schedule, attachments: Attachments) -> None:
        self.passed, self.schedule = passed, schedule
        self.counts = not isinstance(schedule, Constant)
        self._attachments = attachments

    def at(self, n: int) -> float:
        """λ of the update after ``n`` updates."""
        return scheduled(self.schedule, n)

    def take(self, state: Any, name: str, n: int) -> float:
        """λ of the update after ``n`` updates; shown as ``state.<name>`` from here on."""
        momentum = scheduled(self.schedule, n)
        setattr(state, name, momentum)
        return momentum

    def begin(self, state: Any, name: str, n: int, warns: bool) -> bool:
        """Shows the first λ as ``state.<name>``, whatever that held; returns whether it is a new attribute."""
        return _show_first(state, name, self.at(n), warns)

    def go_on(self, n: int, saved: float | None = None) -> None:
        """Shows what it goes on with after a load, a reset or another count; has no use for a ``saved`` momentum."""
        self._attachments.publish(self.at(n))

    def in_force(self) -> Schedule:
        """The schedule."""
        return self.schedule


class DrivenMomentum:
    """A plain float that the engine's attribute holds, where a user or a ``StateParamScheduler`` may drive it.

    Attributes:
        passed: what the user passed.
        value: the momentum, as it was seen last.
        is_restored: whether ``value`` was loaded, and counts more than what an engine has already.
    """

    schedule = None
    counts = False

    def __init__(self, passed: float, attachments: Attachments) -> None:
        self._attachments = attachments
        self.set(passed)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy goes on with: the value to which this one was driven."""
        return {**vars(self), "value": self.in_force()}

    def at(self, n: int) -> float:
        """The momentum, at any count."""
        return self.value

    def take(self, state: Any, name: str, n: int) -> float:
        """λ as ``state.<name>`` shows it; raises TypeError or ValueError, naming the attribute, unless in [0, 1]."""
        self.value = checked_momentum(getattr(state, name, None), f"engine.state.{name}")
        return self.value

    def begin(self, state: Any, name: str, n: int, warns: bool) -> bool:
        """Goes on from what ``state.<name>`` holds, or shows there what was loaded, or passed if it holds nothing.

        Raises:
            TypeError, ValueError: where it would go on from what is no momentum.
        """
        value = getattr(state, name, None)  # None where a StateParamScheduler has made it and has not run yet
        goes_on = value is not None and not self.is_restored
        if goes_on:
            checked_momentum(value, f"engine.state.{name}")
        return _show_first(state, name, self.value, warns, goes_on)

    def go_on(self, n: int, saved: float | None = None) -> None:
        """Shows the ``saved`` momentum from here on; without one it stays what it is driven to."""
        if saved is not None:
            self.value, self.is_restored = saved, True
            self._attachments.publish(saved)

    def in_force(self) -> float:
        """The value to which it has been driven."""
        return self._attachments.driven(self.value)

    def set(self, passed: float) -> None:
        """Takes another float and shows it; raises TypeError or ValueError unless it is in (0, 1)."""
        self.value = constant_of(passed).momentum
        self.passed, self.is_restored = passed, False
        self._attachments.publish(self.value)


Momentum: TypeAlias = ScheduledMomentum | DrivenMomentum


def _show_first(state: Any, name: str, momentum: float, warns: bool, goes_on: bool = False) -> bool:
    """Shows ``momentum`` unless that ``goes_on`` from what is there; warns of what becomes of the two."""
    is_new = not hasattr(state, name)
    if warns and not is_new:
        value = getattr(state, name)
        ignored = f"it goes on from its value {value!r}, and the momentum of {momentum} passed here is ignored"
        warn_user(
            f"Attribute '{name}' already exists in Engine.state, made by something else or loaded with the engine: "
            f"{ignored if goes_on else f'its value {value!r} is overwritten'}; choose another name, or set "
            "warn_if_exists to False if that is meant."
        )
    if not goes_on:
        setattr(state, name, momentum)
    return is_new


def settable(momentum: Momentum, value: float) -> DrivenMomentum:
    """``momentum``, where it can be set to another float and ``value`` is no schedule; raises TypeError otherwise."""
    if isinstance(momentum, ScheduledMomentum) or callable(value):
        raise TypeError(
            f"momentum should be set from one float to another, got {value!r} in place of {momentum.passed!r}; make a "
            "new handler for another schedule."
        )
    return momentum


def momentum_of(
    momentum: float | Schedule, momentum_warmup: float | None, warmup_iters: int | None, attachments: Attachments
) -> Momentum:
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
        return ScheduledMomentum(momentum, momentum, attachments)
    if (momentum_warmup is None) != (warmup_iters is None):
        raise ValueError(
            "momentum_warmup and warmup_iters should be given together or not at all, got "
            f"{momentum_warmup!r} and {warmup_iters!r}."
        )
    if momentum_warmup is None or warmup_iters is None:
        return DrivenMomentum(momentum, attachments)
    schedule = LinearWarmup(constant_of(momentum).momentum, momentum_warmup, warmup_iters)
    return ScheduledMomentum(momentum, schedule, attachments)
