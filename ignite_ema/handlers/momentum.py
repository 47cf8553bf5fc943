"""The momentum of a handler: the schedule that its arguments describe, and its value at each update, checked."""

import numbers
import warnings

from ..averaging.validation import checked_momentum
from ..schedules import Constant, CopyUntil, LinearWarmup, Rescaled, Schedule

__all__ = ["schedule_of", "scheduled"]


def scheduled(schedule: Schedule, n: int) -> float:
    """The momentum that ``schedule`` gives after ``n`` updates, checked."""
    return checked_momentum(schedule(n), "the momentum that the schedule returns")


def schedule_of(momentum: float | Schedule, momentum_warmup: float | None, warmup_iters: int | None) -> Schedule:
    """The schedule that the arguments of a handler say; raises TypeError or ValueError, naming the argument."""
    if callable(momentum):
        if momentum_warmup is not None or warmup_iters is not None:
            raise ValueError(
                "momentum_warmup and warmup_iters should be None where momentum is a schedule, got "
                f"{momentum_warmup!r} and {warmup_iters!r}; a schedule brings its own warm-up."
            )
        _warn_of_decay(_last(momentum), "the last momentum of the schedule")
        return momentum
    if isinstance(momentum, bool) or not isinstance(momentum, numbers.Real):
        raise TypeError(f"momentum should be a float in (0, 1) or a schedule, got {momentum!r}.")
    if not 0 < momentum < 1:
        raise ValueError(
            f"Invalid momentum: {momentum}; it should be in (0, 1), as the weight of the new weights (1 - decay)."
        )
    if (momentum_warmup is None) != (warmup_iters is None):
        raise ValueError(
            "momentum_warmup and warmup_iters should be given together or not at all, got "
            f"{momentum_warmup!r} and {warmup_iters!r}."
        )
    _warn_of_decay(float(momentum), "momentum")
    if momentum_warmup is None or warmup_iters is None:
        return Constant(float(momentum))
    return LinearWarmup(momentum, momentum_warmup, warmup_iters)


def _last(schedule: object) -> float:
    """Where a schedule of ours ends up, 0 for any other."""
    if isinstance(schedule, CopyUntil):
        return _last(schedule.schedule)
    is_ours = type(schedule).__module__ == CopyUntil.__module__ and not isinstance(schedule, Rescaled)
    return schedule(10**12) if is_ours and callable(schedule) else 0.0


def _warn_of_decay(momentum: float, what: str) -> None:
    if momentum > 0.5:
        warnings.warn(
            f"{what} is the weight of the new weights, and {momentum:g} nearly copies them at each update; if it was "
            f"meant as a decay, pass 1 - {momentum:g} = {1 - momentum:g}.",
            stacklevel=5,
        )
