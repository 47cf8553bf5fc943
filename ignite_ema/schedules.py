"""Momentum schedules: how much the new weights count at each update.

A schedule is called as ``schedule(n)``, where ``n`` is the number of updates that were already made (0 at the first
update), and returns the momentum λ in [0, 1] of the update to come: ``ema = (1 - λ) * ema + λ * weights``. λ weighs the
*new* weights, so λ = 1 - decay. ``n`` counts updates, not iterations. A schedule has no state: the count is all that a
checkpoint needs.

>>> ramp = LinearWarmup(momentum=0.5, momentum_warmup=0.0, warmup_iters=6)
>>> [ramp(n) for n in range(8)]
[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5]
"""

import numbers
from collections.abc import Callable
from dataclasses import dataclass, fields

__all__ = ["Constant", "LinearWarmup", "Schedule"]

Schedule = Callable[[int], float]


def _check_fraction(owner: str, name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} of {owner} should be a number in [0, 1], got {value!r}.")
    if not 0 <= value <= 1:
        raise ValueError(
            f"{name} of {owner} should be in [0, 1], got {value!r}: it is the weight of the new weights, 1 - decay."
        )


def _check_count(owner: str, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} of {owner} should be an integer, got {value!r}: it counts updates.")
    if value < 1:
        raise ValueError(f"{name} of {owner} should be at least 1, got {value!r}: it counts updates.")


_CHECKS = {"momentum": _check_fraction, "momentum_warmup": _check_fraction, "warmup_iters": _check_count}


class _Checked:
    """Checks every field of a schedule, by the field's name, when the schedule is made."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]  # each subclass is a dataclass
            _CHECKS[field.name](type(self).__name__, field.name, getattr(self, field.name))


@dataclass(frozen=True)
class Constant(_Checked):
    """λ(n) = momentum.

    Args:
        momentum: weight of the new weights, in [0, 1].

    >>> Constant(0.0002)(1_000_000)
    0.0002
    """

    momentum: float

    def __call__(self, n: int) -> float:
        return self.momentum


@dataclass(frozen=True)
class LinearWarmup(_Checked):
    """λ(n) = w + (λ∞ - w) · n / max(1, iters - 1), and λ∞ from n = max(1, iters - 1) on.

    Args:
        momentum: λ∞, the momentum after the warm-up, in [0, 1].
        momentum_warmup: w, the momentum of the first update, in [0, 1]; it may lie above ``momentum`` as well as below.
        warmup_iters: the length of the warm-up, in updates, at least 1; ``momentum`` is reached at the last of them.

    The rule of ``ignite.handlers.EMAHandler(momentum, momentum_warmup, warmup_iters)``.

    >>> LinearWarmup(momentum=0.002, momentum_warmup=0.2, warmup_iters=100)(0)
    0.2
    """

    momentum: float
    momentum_warmup: float
    warmup_iters: int

    def __call__(self, n: int) -> float:
        last = max(1, self.warmup_iters - 1)
        if n >= last:
            return self.momentum
        return self.momentum_warmup + (self.momentum - self.momentum_warmup) * n / last
