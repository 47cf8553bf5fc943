"""Momentum schedules: how much the new weights count at each update.

A schedule is called as ``schedule(n)``, where ``n`` is the number of updates already made (0 at the first update), and
returns the momentum λ in [0, 1] of the next update: ``average = (1 - λ) * average + λ * weights``. λ weighs the *new*
weights, so λ = 1 - decay. ``n`` counts updates, not iterations. A schedule has no state: a checkpoint needs only the
count. Any such callable can be used as a schedule.

>>> ramp = LinearWarmup(momentum=0.5, momentum_warmup=0.0, warmup_iters=6)
>>> [ramp(n) for n in range(8)]
[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5]
>>> CopyUntil(2, ramp)
CopyUntil(n=2, schedule=LinearWarmup(momentum=0.5, momentum_warmup=0.0, warmup_iters=6))
"""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

__all__ = [
    "MAX_SIGMA_REL",
    "Annealing",
    "Constant",
    "CopyUntil",
    "Cosine",
    "Debiased",
    "EqualWeight",
    "ExponentialWarmup",
    "HalfLife",
    "InverseGamma",
    "LinearWarmup",
    "PowerFunction",
    "RatioWarmup",
    "Rescaled",
    "Schedule",
]

Schedule: TypeAlias = Callable[[int], float]

MAX_SIGMA_REL = 12**-0.5


def _number(value: object) -> float:
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan


def _kind(wanted: str, accepts: Callable[[Any], bool]) -> dict[str, Any]:
    """The metadata of a field: what it should be, in words, and a function that tells whether a value is valid."""
    return {"wanted": wanted, "accepts": accepts}


_WEIGHT = "as the weight of the new weights (1 - decay)"
_MOMENTUM = _kind(f"a number in [0, 1], {_WEIGHT}", lambda value: 0 <= _number(value) <= 1)
_POSITIVE_MOMENTUM = _kind(f"a number in (0, 1], {_WEIGHT}", lambda value: 0 < _number(value) <= 1)
_COUNT = _kind("an integer of at least 1", lambda value: isinstance(value, numbers.Integral) and _number(value) >= 1)
_POSITIVE = _kind("a number above 0", lambda value: 0 < _number(value) < math.inf)
_POSITIVE_OR_NONE = _kind("a number above 0", lambda value: value is None or 0 < _number(value) < math.inf)
_SIGMA_REL = _kind(f"a number in (0, 1/√12 = {MAX_SIGMA_REL:.4f})", lambda value: 0 < _number(value) < MAX_SIGMA_REL)
_SCHEDULE = _kind("a callable from the number of updates to a momentum", callable)


class _Checked:
    """Checks every field against its metadata when the object is made."""

    def __post_init__(self) -> None:
        for parameter in fields(self):  # type: ignore[arg-type]  # each subclass is a dataclass
            value = getattr(self, parameter.name)
            if not parameter.metadata["accepts"](value):
                wanted = parameter.metadata["wanted"]
                raise ValueError(f"{parameter.name} of {type(self).__name__} should be {wanted}, got {value!r}.")


@dataclass(frozen=True)
class Constant(_Checked):
    """λ(n) = momentum, in [0, 1]."""

    momentum: float = field(metadata=_MOMENTUM)

    def __call__(self, n: int) -> float:
        return self.momentum


@dataclass(frozen=True)
class LinearWarmup(_Checked):
    """λ(n) = w + (λ∞ - w) · n / max(1, iters - 1), and λ∞ from n = max(1, iters - 1) on.

    Args:
        momentum: λ∞, the momentum after the warm-up, in [0, 1].
        momentum_warmup: w, the momentum of the first update, in [0, 1]; above or below ``momentum``.
        warmup_iters: the length of the warm-up, in updates; the last of them uses ``momentum``.

    As in ``ignite.handlers.EMAHandler(momentum=..., momentum_warmup=..., warmup_iters=...)``.
    """

    momentum: float = field(metadata=_MOMENTUM)
    momentum_warmup: float = field(metadata=_MOMENTUM)
    warmup_iters: int = field(metadata=_COUNT)

    def __call__(self, n: int) -> float:
        last = max(1, self.warmup_iters - 1)
        if n >= last:
            return self.momentum
        return self.momentum_warmup + (self.momentum - self.momentum_warmup) * n / last


@dataclass(frozen=True)
class ExponentialWarmup(_Checked):
    """λ(n) = (1 - λ∞) · exp(-(1 + n) / γ) + λ∞.

    Args:
        momentum: λ∞, in [0, 1].
        gamma: γ, the length of the warm-up, in updates.

    As in mmdetection's ``ExpMomentumEMA`` (YOLOX).
    """

    momentum: float = field(metadata=_MOMENTUM)
    gamma: float = field(default=2000, metadata=_POSITIVE)

    def __call__(self, n: int) -> float:
        return (1 - self.momentum) * math.exp(-(1 + n) / self.gamma) + self.momentum


@dataclass(frozen=True)
class RatioWarmup(_Checked):
    """λ(n) = min(λ∞, (1 + n) / (warm_up + n)): from 1 / warm_up upward; with λ∞ ≤ 1 / warm_up there is no warm-up.

    Args:
        momentum: λ∞, in [0, 1].
        warm_up: the length of the warm-up, in updates.

    As in mmcv's ``EMAHook`` and mmdetection's ``LinearMomentumEMAHook``.
    """

    momentum: float = field(metadata=_MOMENTUM)
    warm_up: int = field(default=100, metadata=_COUNT)

    def __call__(self, n: int) -> float:
        return min(self.momentum, (1 + n) / (self.warm_up + n))


@dataclass(frozen=True)
class Annealing(_Checked):
    """λ(n) = max(λ∞, γ / (γ + n)): from 1 downward.

    Args:
        momentum: λ∞, in [0, 1].
        gamma: γ, the number of updates after which λ has fallen to 1/2.

    As in mmengine's ``MomentumAnnealingEMA``.
    """

    momentum: float = field(metadata=_MOMENTUM)
    gamma: float = field(default=100, metadata=_POSITIVE)

    def __call__(self, n: int) -> float:
        return max(self.momentum, self.gamma / (self.gamma + n))


@dataclass(frozen=True)
class EqualWeight:
    """λ(n) = 1 / (n + 1): the mean of all weights so far; the first update copies.

    Stochastic weight averaging, Izmailov et al. 2018 (arXiv 1803.05407).
    """

    def __call__(self, n: int) -> float:
        return 1 / (n + 1)


@dataclass(frozen=True)
class InverseGamma(_Checked):
    """λ(n) = (1 + n / γ) ^ -power, kept within [min_momentum, max_momentum]; the first update copies.

    Args:
        gamma: γ, in updates.
        power: how fast λ falls; 2/3 for long runs, 3/4 for short ones.
        min_momentum: the smallest λ, in [0, 1].
        max_momentum: the largest λ, in [0, 1].

    As in k-diffusion, diffusers (``use_ema_warmup``) and timm.
    """

    gamma: float = field(default=1.0, metadata=_POSITIVE)
    power: float = field(default=2 / 3, metadata=_POSITIVE)
    min_momentum: float = field(default=0.0, metadata=_MOMENTUM)
    max_momentum: float = field(default=1.0, metadata=_MOMENTUM)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_momentum > self.max_momentum:
            raise ValueError(
                f"min_momentum of InverseGamma should be at most max_momentum, got {self.min_momentum!r} and "
                f"{self.max_momentum!r}."
            )

    def __call__(self, n: int) -> float:
        return min(self.max_momentum, max(self.min_momentum, float((1 + n / self.gamma) ** -self.power)))


@dataclass(frozen=True)
class Cosine(_Checked):
    """λ(n) = end - (end - start) · (cos(π · min(n, total) / total) + 1) / 2.

    Args:
        start: λ(0), in [0, 1].
        end: λ from n = total on, in [0, 1].
        total: the number of updates from ``start`` to ``end``.

    As in BYOL, DINO and mmpretrain's ``CosineEMA``.
    """

    start: float = field(metadata=_MOMENTUM)
    end: float = field(metadata=_MOMENTUM)
    total: int = field(metadata=_COUNT)

    def __call__(self, n: int) -> float:
        return self.end - (self.end - self.start) * (math.cos(math.pi * min(n, self.total) / self.total) + 1) / 2


@dataclass(frozen=True)
class HalfLife(_Checked):
    """λ(n) = 1 - ½ ^ (s / h), with s samples per update and h = min(half_life, rampup_ratio · (n + 1) · s).

    Args:
        half_life: the number of samples after which old weights count half.
        rampup_ratio: keeps h below this fraction of the samples seen so far; None: no ramp-up.
        samples_per_update: s; with 1, ``half_life`` is in updates.

    As in StyleGAN (in thousands of images) and mmagic's ``RampUpEMA``.
    """

    half_life: float = field(metadata=_POSITIVE)
    rampup_ratio: float | None = field(default=None, metadata=_POSITIVE_OR_NONE)
    samples_per_update: float = field(default=1, metadata=_POSITIVE)

    def __call__(self, n: int) -> float:
        half_life = self.half_life
        if self.rampup_ratio is not None:
            half_life = min(half_life, self.rampup_ratio * (n + 1) * self.samples_per_update)
        return -math.expm1(-math.log(2) * self.samples_per_update / half_life)


@dataclass(frozen=True)
class PowerFunction(_Checked):
    """λ(n) = 1 - (1 - 1 / (n + 1)) ^ (γ + 1): an average whose length grows with the run; the first update copies.

    Args:
        sigma_rel: the width of the averaging profile relative to the run so far, in (0, 1/√12); it determines γ by
            σ² = (γ + 1) / ((γ + 2)² (γ + 3)).

    EDM2, Karras et al. 2024 (arXiv 2312.02696), section 3.
    """

    sigma_rel: float = field(metadata=_SIGMA_REL)

    def __call__(self, n: int) -> float:
        return 1.0 if n == 0 else -math.expm1((self.gamma + 1) * math.log1p(-1 / (n + 1)))

    @property
    def gamma(self) -> float:
        """γ, the exponent of the averaging profile."""
        # The largest root of γ³ + 7γ² + (16 - σ⁻²)γ + (12 - σ⁻²), from above, where Newton's method is monotone.
        squared = self.sigma_rel**-2
        gamma = 1 / self.sigma_rel
        while True:
            value = ((gamma + 7) * gamma + 16 - squared) * gamma + 12 - squared
            lower = gamma - value / ((3 * gamma + 14) * gamma + 16 - squared)
            if not lower < gamma:
                return gamma
            gamma = lower


@dataclass(frozen=True)
class Debiased(_Checked):
    """λ(n) = min(1, λ∞ / (1 - (1 - λ∞) ^ (n + 1))): the exponentially weighted mean of the weights so far, normalized.

    The first update copies, early updates weigh all weights alike (about 1 / (n + 1)), late updates use λ∞. The
    starting weights do not count, so no run is too short for it.

    Args:
        momentum: λ∞, in (0, 1].

    The correction of Adam's moments (Kingma and Ba 2015, arXiv 1412.6980), as in optax ``ema(debias=True)``.
    """

    momentum: float = field(metadata=_POSITIVE_MOMENTUM)

    def __call__(self, n: int) -> float:
        if self.momentum == 1:
            return 1.0
        return min(1.0, self.momentum / -math.expm1((n + 1) * math.log1p(-self.momentum)))


@dataclass(frozen=True)
class CopyUntil(_Checked):
    """λ = 1 for the first n updates, then the schedule from its update 1 on: the last copy is its update 0.

    As mmengine's averaged models do at the first update, and until ``begin_iter`` with ``EMAHook``.
    """

    n: int = field(metadata=_COUNT)
    schedule: Schedule = field(metadata=_SCHEDULE)

    def __call__(self, n: int) -> float:
        return 1.0 if n < self.n else self.schedule(n - self.n + 1)


@dataclass(frozen=True)
class Rescaled(_Checked):
    """λ(n) = 1 - (1 - schedule(n)) ^ factor: one update that stands for ``factor`` updates of the schedule.

    Use it for an update every ``factor`` iterations, or a batch ``factor`` times larger. For ``Debiased(m)`` it is
    ``Debiased(1 - (1 - m) ** factor)``, which stays normalized.
    """

    schedule: Schedule = field(metadata=_SCHEDULE)
    factor: float = field(metadata=_POSITIVE)

    def __call__(self, n: int) -> float:
        if isinstance(self.schedule, Debiased) and self.schedule.momentum < 1:
            return Debiased(-math.expm1(self.factor * math.log1p(-self.schedule.momentum)))(n)
        momentum = self.schedule(n)
        return 1.0 if momentum == 1 else -math.expm1(self.factor * math.log1p(-momentum))
