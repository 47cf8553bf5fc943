"""Averaging profiles: how much the weights at each moment of a run contribute to an average.

A profile is a density p(x) over the run so far, for x in (0, 1], with integral 1: x = 0 is the start, and x = 1 is the
moment at which the average is taken. In an average taken at time t, the weights at time τ have density p(τ / t) / t.
Lengths are fractions of the run: divide a length in updates by the number of updates. All computations use float64.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..schedules import _POSITIVE, _SIGMA_REL, PowerFunction, _Checked, _kind, _number

_PANELS = 40  # of the quadrature, toward each end; each is half as wide as the last, down to 1e-12 of the range
_NODES = 16  # per panel


class Profile(ABC):
    """Base class of all profiles: a density on (0, 1], and its integral from 0."""

    @abstractmethod
    def density(self, x: Tensor) -> Tensor:
        """p(x) for x in (0, 1]; a float64 tensor of the shape of ``x``."""

    @abstractmethod
    def cumulative(self, x: Tensor) -> Tensor:
        """The integral of p from 0 to x, for x in [0, 1]; a float64 tensor of the shape of ``x``."""


@dataclass(frozen=True)
class PowerProfile(_Checked, Profile):
    """p(x) = (γ + 1) · x^γ: the profile of a power-function average, whose length grows with the run.

    Args:
        sigma_rel: the standard deviation of the profile, as a fraction of the run, in (0, 1/√12); it determines γ.

    Karras et al. 2024 (arXiv 2312.02696), section 3; :class:`ignite_ema.schedules.PowerFunction` is the schedule
    whose averages have this profile.
    """

    sigma_rel: float = field(metadata=_SIGMA_REL)

    @property
    def gamma(self) -> float:
        """γ, the exponent."""
        return PowerFunction(self.sigma_rel).gamma

    def density(self, x: Tensor) -> Tensor:
        return (self.gamma + 1) * x**self.gamma

    def cumulative(self, x: Tensor) -> Tensor:
        return x ** (self.gamma + 1)


@dataclass(frozen=True)
class ExponentialProfile(_Checked, Profile):
    """p(x) ∝ ½^((1 - x) / half_life): the profile of an EMA with a constant momentum.

    An EMA also keeps a share ½^(1 / half_life) of its initial weights at the end of the run; this profile does not. For
    a half-life of a twentieth of the run that share is one millionth.

    Args:
        half_life: the time in which the contribution of weights halves, as a fraction of the run; above 0.
    """

    half_life: float = field(metadata=_POSITIVE)

    @classmethod
    def from_momentum(cls, momentum: float, num_updates: int) -> "ExponentialProfile":
        """The profile of an EMA after ``num_updates`` with ``momentum``, the weight of the new weights, in (0, 1)."""
        if not 0 < _number(momentum) < 1:
            raise ValueError(f"momentum should be in (0, 1), as the weight of the new weights, got {momentum!r}.")
        if not _number(num_updates) >= 1:
            raise ValueError(f"num_updates should be a number of at least 1, got {num_updates!r}.")
        return cls(math.log(2) / -math.log1p(-momentum) / num_updates)

    @property
    def _rate(self) -> float:
        return math.log(2) / self.half_life

    def density(self, x: Tensor) -> Tensor:
        return self._rate * torch.exp(-self._rate * (1 - x)) / -math.expm1(-self._rate)

    def cumulative(self, x: Tensor) -> Tensor:
        return torch.exp(-self._rate * (1 - x)) * torch.expm1(-self._rate * x) / math.expm1(-self._rate)


class _Steps(Profile):
    """A piecewise constant profile."""

    @abstractmethod
    def _steps(self) -> tuple[Tensor, Tensor]:
        """The n + 1 edges of the steps, and their n heights."""

    def density(self, x: Tensor) -> Tensor:
        edges, heights = self._steps()
        index = torch.bucketize(x, edges) - 1  # of the step that ends at or after x
        inside = (index >= 0) & (index < len(heights))
        return torch.where(inside, heights[index.clamp(0, len(heights) - 1)], 0.0)

    def cumulative(self, x: Tensor) -> Tensor:
        edges, heights = self._steps()
        inside = x.clamp(edges[0], edges[-1])
        index = (torch.bucketize(inside, edges) - 1).clamp(0, len(heights) - 1)  # of the step that ends at or after x
        before = torch.cat([heights.new_zeros(1), (heights * edges.diff()).cumsum(dim=0)])
        return before[index] + (inside - edges[index]) * heights[index]


@dataclass(frozen=True)
class UniformProfile(_Checked, _Steps):
    """p(x) = 1 / window for x in (1 - window, 1]: the mean over the last part of a run, as in SWA.

    Args:
        window: the length of that part, as a fraction of the run, in (0, 1].
    """

    window: float = field(
        metadata=_kind("a number in (0, 1], as a fraction of the run", lambda value: 0 < _number(value) <= 1)
    )

    def _steps(self) -> tuple[Tensor, Tensor]:
        edges = torch.tensor([1 - self.window, 1.0], dtype=torch.float64)
        return edges, torch.tensor([1 / self.window], dtype=torch.float64)


@dataclass(frozen=True, repr=False)
class SampledProfile(_Steps):
    """Your own profile: the run is divided into equal parts, and the k-th part has the weight ``weights[k]``.

    Args:
        weights: numbers of at least 0, from the start of the run to its end; they are scaled to sum to 1.
    """

    weights: Sequence[float]

    def __post_init__(self) -> None:
        weights = tuple(float(weight) for weight in self.weights)
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ValueError(f"weights should be numbers of at least 0 and not all 0, got {self.weights!r}.")
        object.__setattr__(self, "weights", weights)

    def __repr__(self) -> str:
        return f"SampledProfile of {len(self.weights)} weights"

    def _steps(self) -> tuple[Tensor, Tensor]:
        weights = torch.tensor(self.weights, dtype=torch.float64)
        edges = torch.linspace(0, 1, len(weights) + 1, dtype=torch.float64)
        return edges, weights * (len(weights) / weights.sum())


@dataclass(frozen=True)
class Snapshot(_Checked):
    """The profile of a stored average, and its time: since the start of the run, in the same unit for all snapshots."""

    profile: Profile = field(
        metadata=_kind("a Profile, such as PowerProfile(0.05)", lambda value: isinstance(value, Profile))
    )
    time: float = field(metadata=_POSITIVE)


def inner_products(p: Profile, ends: Tensor, q: Profile, other_ends: Tensor) -> Tensor:
    """∫ p(τ) q(τ) dτ for a profile p at each of n times, and a profile q at each of m times; of shape (n, m).

    In closed form for two power functions, or if either is piecewise constant; otherwise by quadrature. The times are
    above 0; all tensors are float64.
    """
    s, t = ends[:, None], other_ends[None, :]
    if isinstance(p, PowerProfile) and isinstance(q, PowerProfile):
        a, b = p.gamma, q.gamma
        exponent = torch.where(s < t, s.new_tensor(b), s.new_tensor(-a))  # plain numbers would give float32
        return (a + 1) * (b + 1) / (a + b + 1) * (s / t) ** exponent / torch.maximum(s, t)
    if isinstance(q, _Steps):
        return _with_steps(p, s, q, t)
    if isinstance(p, _Steps):
        return _with_steps(q, t, p, s)
    return _by_quadrature(p, s, q, t)


def _with_steps(p: Profile, s: Tensor, steps: _Steps, t: Tensor) -> Tensor:
    edges, heights = steps._steps()
    scaled = (edges * (t / s)[..., None]).clamp(max=1.0)
    return (p.cumulative(scaled).diff(dim=-1) * heights).sum(dim=-1) / t


def _by_quadrature(p: Profile, s: Tensor, q: Profile, t: Tensor) -> Tensor:
    """Gauss-Legendre quadrature on panels that narrow toward both ends of the range."""
    # Golub and Welsch 1969: the nodes and weights on [-1, 1] from the eigenvectors of a tridiagonal matrix.
    k = torch.arange(1, _NODES, dtype=torch.float64)
    off = torch.diag(k / (4 * k**2 - 1).sqrt(), 1)
    points, vectors = torch.linalg.eigh(off + off.T)
    halves = 0.5 ** torch.arange(1, _PANELS + 1, dtype=torch.float64)
    edges = torch.cat([halves.new_zeros(1), halves.flip(0), 1 - halves[1:], halves.new_ones(1)])
    widths = edges.diff()[:, None]
    x = (edges[:-1, None] + widths * (points + 1) / 2).flatten()
    weights: Tensor = (widths * vectors[0] ** 2).flatten()
    last = torch.minimum(s, t)
    tau = last[..., None] * x
    values = p.density(tau / s[..., None]) * q.density(tau / t[..., None])
    return values @ weights * last / (s * t)
