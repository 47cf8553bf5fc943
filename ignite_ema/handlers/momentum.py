"""The momentum of a handler: a schedule written to the engine, or a plain float read from the engine."""

from typing import Any

from ignite.handlers.param_scheduler import BaseParamScheduler

from ..averaging.checks import checked_momentum, constant_of, scheduled, warn_user
from ..schedules import Constant, LinearWarmup, Schedule


class Momentum:
    """Reads or writes ``engine.state.<name>``.

    A schedule is written at each update. A plain float is shown once, and read at each update: a user or a
    ``StateParamScheduler`` may drive it there.
    """

    def __init__(self, momentum: float | Schedule, momentum_warmup: float | None, warmup_iters: int | None) -> None:
        if isinstance(momentum, BaseParamScheduler):
            raise TypeError(
                f"momentum should be a float or a schedule of the number of updates, got {type(momentum).__name__} of "
                "Ignite. Pass a float, and let a StateParamScheduler drive engine.state.<name>."
            )
        got = f"got {momentum_warmup!r} and {warmup_iters!r}"
        if callable(momentum) and (momentum_warmup is not None or warmup_iters is not None):
            raise ValueError(f"momentum_warmup and warmup_iters should be None if momentum is a schedule, {got}.")
        if (momentum_warmup is None) != (warmup_iters is None):
            raise ValueError(f"momentum_warmup and warmup_iters should be given together or not at all, {got}.")
        self.passed = momentum  # or set since
        self.schedule: Schedule | None = momentum if callable(momentum) else None  # in force; None for a plain float
        self.value = 1.0 if callable(momentum) else constant_of(momentum).momentum  # as last used or set
        if momentum_warmup is not None and warmup_iters is not None:
            self.schedule = LinearWarmup(self.value, momentum_warmup, warmup_iters)
        self._is_restored = False  # whether a loaded value takes precedence over what an engine already has

    @property
    def counts(self) -> bool:
        """Whether λ depends on the number of updates."""
        return self.schedule is not None and not isinstance(self.schedule, Constant)

    def at(self, n: int) -> float:
        """λ of the update after ``n`` updates; a plain float is the same at any count."""
        return self.value if self.schedule is None else scheduled(self.schedule, n)

    def take(self, state: Any, name: str, n: int) -> float:
        """λ of the update after ``n`` updates, which ``state.<name>`` shows from now on, or has to be a momentum."""
        if self.schedule is not None:
            setattr(state, name, self.at(n))
        self.value = checked_momentum(getattr(state, name, None), f"engine.state.{name}")
        return self.value

    def set(self, value: float) -> None:
        """Sets another plain float."""
        self.passed, self.value, self._is_restored = value, float(value), False

    def restore(self, value: float) -> None:
        """Resumes from a saved plain float."""
        self.value, self._is_restored = value, True

    def first(self, state: Any, name: str, n: int, warns: bool) -> float:
        """The value for ``state.<name>`` after ``n`` updates, before the next; warns if the attribute exists."""
        there = getattr(state, name, None)  # also None if a StateParamScheduler has made it and has not run yet
        goes_on = self.schedule is None and not self._is_restored and there is not None
        momentum = checked_momentum(there, f"engine.state.{name}") if goes_on else self.at(n)
        if warns and hasattr(state, name):
            effect = f"shares it and goes on from its value {there!r}; the momentum {self.value} passed here is ignored"
            if not goes_on:
                when = "" if self.schedule is None else " at each update"
                effect = f"writes its own momentum there{when}, over the value {there!r}"
            warn_user(
                f"Attribute '{name}' already exists in Engine.state, made by another handler or loaded with the "
                f"engine. This handler {effect}. Choose another name, or pass warn_if_exists=False if this is intended."
            )
        return momentum
