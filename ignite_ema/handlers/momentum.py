"""The momentum of a handler: a schedule that it writes to the engine, or a plain float that it reads from there."""

from typing import Any

from ignite.handlers.param_scheduler import BaseParamScheduler

from ..averaging.checks import checked_momentum, constant_of, scheduled, warn_user
from ..schedules import Constant, LinearWarmup, Schedule

__all__ = ["Momentum", "schedule_from"]


class Momentum:
    """Reads or writes ``engine.state.<name>``.

    A schedule is written at each update. A plain float is shown once, and read at each update: a user or a
    ``StateParamScheduler`` may drive it there.

    Args:
        passed: what the user passed.
        schedule: the schedule in force, None for a plain float.

    Attributes:
        passed: as above.
        schedule: as above.
        value: the plain float, as it was last seen or set; of a schedule, the first λ.
    """

    def __init__(self, passed: float | Schedule, schedule: Schedule | None) -> None:
        self.passed, self.schedule = passed, schedule
        self.value = constant_of(passed).momentum if schedule is None else scheduled(schedule, 0)
        self._is_restored = False  # whether a loaded value counts more than what an engine has already

    @property
    def counts(self) -> bool:
        """Whether it depends on the number of updates."""
        return self.schedule is not None and not isinstance(self.schedule, Constant)

    def at(self, n: int) -> float:
        """λ of the update after ``n`` updates; a plain float at any count."""
        return self.value if self.schedule is None else scheduled(self.schedule, n)

    def take(self, state: Any, name: str, n: int) -> float:
        """λ of the update after ``n`` updates, which ``state.<name>`` shows from here on.

        Raises:
            TypeError, ValueError: naming the attribute, if it is no momentum.
        """
        if self.schedule is None:
            self.value = checked_momentum(getattr(state, name, None), f"engine.state.{name}")
            return self.value
        momentum = scheduled(self.schedule, n)
        setattr(state, name, momentum)
        return momentum

    def set(self, value: float) -> None:
        """Takes another plain float; raises TypeError or ValueError unless it is in (0, 1]."""
        self.value = constant_of(value).momentum
        self.passed, self._is_restored = value, False

    def restore(self, value: float) -> None:
        """Goes on from a saved plain float."""
        self.value, self._is_restored = value, True

    def check(self, state: Any, name: str, n: int) -> None:
        """Raises TypeError or ValueError if :meth:`show_first` would go on from what is no momentum."""
        if self._goes_on_from(state, name):
            checked_momentum(getattr(state, name), f"engine.state.{name}")
        self.at(n)

    def show_first(self, state: Any, name: str, n: int, warns: bool) -> bool:
        """Shows the first λ as ``state.<name>``, or goes on from what is there; returns whether it is new there."""
        is_new = not hasattr(state, name)
        goes_on = self._goes_on_from(state, name)
        momentum = self.at(n)
        if warns and not is_new:
            value = getattr(state, name)
            effect = (
                f"This handler shares it and goes on from its value {value!r}; the momentum {momentum} passed here is "
                "ignored."
                if goes_on
                else f"This handler writes its own momentum there at each update, over the value {value!r}."
                if self.schedule is not None
                else f"This handler sets it to {momentum} now, and reads it from there at each update."
            )
            warn_user(
                f"Attribute '{name}' already exists in Engine.state, made by another handler or loaded with the "
                f"engine. {effect} Choose another name, or set warn_if_exists to False if you mean that."
            )
        if not goes_on:
            setattr(state, name, momentum)
        return is_new

    def _goes_on_from(self, state: Any, name: str) -> bool:
        # None: a StateParamScheduler has made the attribute and has not run yet
        return self.schedule is None and not self._is_restored and getattr(state, name, None) is not None


def schedule_from(
    momentum: float | Schedule, momentum_warmup: float | None, warmup_iters: int | None
) -> Schedule | None:
    """The schedule that the arguments of a handler mean, None for a plain float.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if isinstance(momentum, BaseParamScheduler):
        raise TypeError(
            f"momentum should be a float or a schedule of the number of updates, got {type(momentum).__name__} of "
            "Ignite. Pass a float, and let a StateParamScheduler drive engine.state.<name>."
        )
    if callable(momentum):
        if momentum_warmup is not None or warmup_iters is not None:
            raise ValueError(
                "momentum_warmup and warmup_iters should be None if momentum is a schedule, got "
                f"{momentum_warmup!r} and {warmup_iters!r}; a schedule brings its own warm-up."
            )
        return momentum
    if (momentum_warmup is None) != (warmup_iters is None):
        raise ValueError(
            "momentum_warmup and warmup_iters should be given together or not at all, got "
            f"{momentum_warmup!r} and {warmup_iters!r}."
        )
    if momentum_warmup is None or warmup_iters is None:
        return None
    return LinearWarmup(constant_of(momentum).momentum, momentum_warmup, warmup_iters)
