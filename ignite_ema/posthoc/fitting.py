"""Which sum of known averages comes closest to one that is wanted, and how close: least squares over their profiles."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor

from .profiles import ExponentialProfile, PowerProfile, Profile, Snapshot, UniformProfile, inner_products

__all__ = [
    "GOOD",
    "as_profile",
    "coefficients",
    "fitted",
    "planned",
    "reach",
    "residual",
    "residuals",
    "windows_at_snapshots",
]

_LENGTHS = [k / 100 for k in range(1, 29)]  # among which the reach of snapshots is looked for
_HALF_LIVES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # among which one is looked for
GOOD = 0.01  # a residual up to which an average is the one that was asked for
_NEAR = 32  # windows of which each is tried

Noise: TypeAlias = Callable[[Tensor], float]


def coefficients(snapshots: Sequence[Snapshot], target: Profile | float, end: float | None = None) -> Tensor:
    """The coefficients of the linear combination of snapshots whose profile is closest to ``target``.

    Computed by least squares over the run, in float64. The coefficients sum to 1, and some may be negative.

    Args:
        snapshots: n snapshots, as :func:`planned` makes them.
        target: a profile, or the ``sigma_rel`` of a power function.
        end: the time at which the average is taken; None: the time of the last snapshot.

    Returns:
        A float64 tensor of shape (n,).

    Raises:
        TypeError, ValueError: if there are no snapshots, or an argument is not a profile or not a time.
    """
    return fitted(snapshots, [as_profile(target)], end)[0][0]


def residual(snapshots: Sequence[Snapshot], target: Profile | float, end: float | None = None) -> float:
    """The relative L2 distance between ``target`` and the closest combination of snapshots: ‖p - Σᵢ cᵢ pᵢ‖ / ‖p‖.

    The cᵢ are the :func:`coefficients`. 0 means exact; above a few percent the result is a different average from the
    one asked for. Arguments and errors are those of :func:`coefficients`.

    Examples:
        >>> f"{residual(planned(times=range(1, 65)), 0.15):.3%}"
        '0.058%'
    """
    return residuals(snapshots, [target], end)[0]


def residuals(
    snapshots: Sequence[Snapshot], targets: Iterable[Profile | float], end: float | None = None
) -> list[float]:
    """The :func:`residual` of each target; faster than calling it for each."""
    return fitted(snapshots, [as_profile(target) for target in targets], end)[1]


def planned(times: Iterable[float], sigma_rels: Sequence[float] = (0.05, 0.10)) -> list[Snapshot]:
    """The snapshots that a ``PostHocEMA`` with these widths would store at these times; for planning a run."""
    ordered = list(times)
    return [Snapshot(PowerProfile(sigma_rel), time) for time in ordered for sigma_rel in sigma_rels]


def fitted(
    snapshots: Sequence[Snapshot], targets: Sequence[Profile], end: float | None = None
) -> tuple[Tensor, list[float]]:
    """The :func:`coefficients` for each target, of shape (targets, n), and the residuals."""
    if not snapshots:
        raise ValueError("snapshots should be one or more, got none; without them nothing can be rebuilt.")
    for one in snapshots:
        if not isinstance(one, Snapshot):
            raise TypeError(
                f"snapshots should be of type Snapshot, got {one!r}; posthoc.planned(times=...) makes them of times."
            )
    wanted = [Snapshot(target, max(one.time for one in snapshots) if end is None else end) for target in targets]
    own = torch.cat([_gram([one], [one])[0] for one in wanted])
    for one, norm in zip(wanted, own.tolist(), strict=True):
        if not 0 < norm < math.inf:
            raise ValueError(
                f"target should have a density that float64 can hold, got {one.profile}; choose a longer one."
            )
    gram, mixed = _gram(snapshots, snapshots), _gram(snapshots, wanted)
    solved = _solved(gram, torch.cat([mixed, torch.ones(len(snapshots), 1, dtype=torch.float64)], dim=1))
    free, ones = solved[:, :-1], solved[:, -1:]
    found = free + ones * ((1 - free.sum(dim=0)) / ones.sum())  # a Lagrange multiplier: the least squares with sum 1
    distances = own - 2 * (found * mixed).sum(dim=0) + (found * (gram @ found)).sum(dim=0)
    return found.T, (distances.clamp(min=0) / own).sqrt().tolist()


def _solved(gram: Tensor, right: Tensor) -> Tensor:
    """``gram`` to the power of -1, times ``right``; where there is no inverse, as of equal snapshots, the shortest."""
    scale = gram.diagonal().rsqrt()[:, None]  # to a diagonal of 1, for the profiles of neighbours are nearly the same
    factor, failed = torch.linalg.cholesky_ex(gram * scale * scale.T)
    if not failed:
        return scale * torch.cholesky_solve(scale * right, factor)
    values, vectors = torch.linalg.eigh(gram * scale * scale.T)
    kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    vectors = scale * vectors[:, kept]
    result: Tensor = vectors @ (vectors.T @ right / values[kept][:, None])
    return result


def reach(
    snapshots: Sequence[Snapshot], target: Profile, noise: Noise = lambda row: 0.0, max_residual: float = GOOD
) -> str:
    """What to ask for in place of a target that is not to be had, none of it refused in its turn: a clause.

    Args:
        snapshots: the snapshots.
        target: the profile that was asked for.
        noise: says of coefficients, of shape (n,), how much they amplify the rounding of the snapshots.
        max_residual: how far the target may be; above 1 % windows and half-lives that are rough are named, too.
    """
    if isinstance(target, UniformProfile):
        windows = windows_at_snapshots(snapshots, target.window, noise, max_residual)
        if windows:
            named = (f"{x:.9g}{'' if off <= GOOD else f' ({off:.1%} off)'}" for x, off in windows.items())
            return f"let its window begin at a snapshot, such as {' or '.join(named)}"
    lengths = []
    if isinstance(target, ExponentialProfile):
        found = _nearest_half_life(snapshots, target.half_life, noise, max_residual)
        lengths += [f"half_life is {'good' if off <= GOOD else f'{off:.1%} off'} at {x:g}" for x, off in found]
    distances = _distances(snapshots, PowerProfile, _LENGTHS, noise)
    if good := [x for x, distance in zip(_LENGTHS, distances, strict=True) if distance <= min(GOOD, max_residual)]:
        lengths.append(f"sigma_rel is good {_ranges(good)}")
    return f"choose another length ({', '.join(lengths)})" if lengths else "take more snapshots next time"


def windows_at_snapshots(
    snapshots: Sequence[Snapshot], window: float, noise: Noise, max_residual: float, count: int = 2
) -> dict[float, float]:
    """The windows of a ``UniformProfile`` within ``max_residual`` that are nearest to ``window``, the nearest first.

    Each begins at a snapshot, and comes with how far what can be had is from it.
    """
    times = sorted({one.time for one in snapshots})
    windows = sorted((1 - time / times[-1] for time in [0, *times[:-1]]), key=lambda one: abs(one - window))
    near = dict.fromkeys(
        [*range(_NEAR), *(round(_NEAR * 1.2**step) for step in range(50))]
    )  # and a few of the far ones
    tried = [windows[index] for index in near if index < len(windows)]
    spelled = [[float(f"{one:.{digits}g}") for digits in (4, 6, 9)] for one in tried]
    values = [*dict.fromkeys(chain.from_iterable(spelled))]
    distances = dict(zip(values, _distances(snapshots, UniformProfile, values, noise), strict=True))
    accepted: dict[float, float] = {}
    for one in spelled:
        best = min(distances[x] for x in one)
        limits = [1.05 * best, *(limit for limit in (GOOD, max_residual) if best <= limit)]
        shortest = next(x for x in one if distances[x] <= min(limits))
        if best <= max_residual and len(accepted) < count:
            accepted[shortest] = distances[shortest]
    return accepted


def _nearest_half_life(
    snapshots: Sequence[Snapshot], half_life: float, noise: Noise, max_residual: float
) -> list[tuple[float, float]]:
    """A half-life within ``max_residual`` that is near to ``half_life``, and how far what can be had is from it.

    One by one, from the nearest on, for each takes a quadrature; at most one, and none where none is found.
    """

    def first(lengths: Iterable[float]) -> list[tuple[float, float]]:
        for x in lengths:
            [distance] = _distances(snapshots, ExponentialProfile, [x], noise)
            if distance <= max_residual:
                return [(x, distance)]
        return []

    found = first(sorted(_HALF_LIVES, key=lambda x: abs(math.log(x / half_life))))
    if not found:
        return []
    start = found[0][0]
    gap = min(max(half_life / start, 0.4), 2.5)  # to the next of the list
    return first(float(f"{start * gap ** (k / 8):.2g}") for k in range(7, 0, -1)) or found


def _distances(
    snapshots: Sequence[Snapshot], kind: Callable[[float], Profile], lengths: Sequence[float], noise: Noise
) -> list[float]:
    """For each length how far what can be had is from it: the residual, or what rounding comes to."""
    rows, distances = fitted(snapshots, list(map(kind, lengths)))
    return [max(distance, noise(row)) for row, distance in zip(rows, distances, strict=True)]


def _ranges(good: Sequence[float]) -> str:
    """Hundredths in words: ``from 0.03 to 0.06 and at 0.1``."""
    runs: list[list[int]] = []
    for k in (round(100 * x) for x in good):
        if runs and runs[-1][-1] == k - 1:
            runs[-1].append(k)
        else:
            runs.append([k])
    words = [f"from {run[0] / 100:g} to {run[-1] / 100:g}" if len(run) > 1 else f"at {run[0] / 100:g}" for run in runs]
    return " and ".join(words)


def as_profile(target: Profile | float) -> Profile:
    """``target``, or the power function of this ``sigma_rel``."""
    return target if isinstance(target, Profile) else PowerProfile(target)


def _times(snapshots: Sequence[Snapshot]) -> Tensor:
    return torch.tensor([one.time for one in snapshots], dtype=torch.float64)


def _gram(rows: Sequence[Snapshot], columns: Sequence[Snapshot]) -> Tensor:
    """The inner products of all with all, a block for each two profiles."""
    result = torch.empty(len(rows), len(columns), dtype=torch.float64)
    for one, here in _by_profile(rows):
        for other, there in _by_profile(columns):
            block = inner_products(one, _times([rows[i] for i in here]), other, _times([columns[j] for j in there]))
            result[torch.tensor(here)[:, None], torch.tensor(there)] = block
    return result


def _by_profile(snapshots: Sequence[Snapshot]) -> Iterator[tuple[Profile, list[int]]]:
    profiles: list[Profile] = []  # and not a set: a profile of one's own may have no hash
    for one in snapshots:
        if one.profile not in profiles:
            profiles.append(one.profile)
    for profile in profiles:
        yield profile, [index for index, one in enumerate(snapshots) if one.profile == profile]
