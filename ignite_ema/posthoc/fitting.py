"""Finds the weighted sum of known averages that is closest to a target: least squares over their profiles."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .profiles import PowerProfile, Profile, Snapshot, inner_products

GOOD = 0.01  # up to this residual, a result counts as the requested average


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
        TypeError, ValueError: if there are no snapshots, or an argument is not a valid profile or time.
    """
    return fitted(snapshots, [target], end)[0][0]


def residual(snapshots: Sequence[Snapshot], target: Profile | float, end: float | None = None) -> float:
    """The relative L2 distance between ``target`` and the closest combination of snapshots: ‖p - Σᵢ cᵢ pᵢ‖ / ‖p‖.

    The cᵢ are the :func:`coefficients`, which takes the same arguments. 0 means exact; above a few percent the result
    is not the requested average.

    Examples:
        >>> f"{residual(planned(times=range(1, 65)), 0.15):.3%}"
        '0.058%'
    """
    return residuals(snapshots, [target], end)[0]


def residuals(
    snapshots: Sequence[Snapshot], targets: Iterable[Profile | float], end: float | None = None
) -> list[float]:
    """The :func:`residual` of each target; faster than separate calls."""
    return fitted(snapshots, list(targets), end)[1]


def planned(times: Iterable[float], sigma_rels: Sequence[float] = (0.05, 0.10)) -> list[Snapshot]:
    """The snapshots that a ``PostHocEMA`` of these widths would store at these times, for planning a run."""
    return [Snapshot(PowerProfile(sigma_rel), time) for time in times for sigma_rel in tuple(sigma_rels)]


def fitted(
    snapshots: Sequence[Snapshot], targets: Sequence[Profile | float], end: float | None = None
) -> tuple[Tensor, list[float]]:
    """The :func:`coefficients` for each target, of shape (targets, n), and the residuals."""
    if not snapshots or not targets:
        missing = "targets" if snapshots else "snapshots"
        raise ValueError(f"{missing} should have at least one entry, got none; pass those to fit.")
    for snapshot in snapshots:
        if not isinstance(snapshot, Snapshot):
            raise TypeError(
                f"snapshots should be of type Snapshot, got {snapshot!r}; posthoc.planned(times=...) makes them from "
                "times."
            )
    last = max(snapshot.time for snapshot in snapshots) if end is None else end
    wanted = [Snapshot(as_profile(target), last) for target in targets]
    norms = torch.cat([_gram([target], [target])[0] for target in wanted])
    for target, norm in zip(targets, norms.tolist(), strict=True):
        if not 0 < norm < math.inf:
            raise ValueError(f"target should have a density that float64 can hold, got {target}; choose a longer one.")
    gram, mixed = _gram(snapshots, snapshots), _gram(snapshots, wanted)
    solved = _solved(gram, torch.cat([mixed, torch.ones(len(snapshots), 1, dtype=torch.float64)], dim=1))
    free, ones = solved[:, :-1], solved[:, -1:]
    found = free + ones * ((1 - free.sum(dim=0)) / ones.sum())  # a Lagrange multiplier makes the sum 1
    distances = norms - 2 * (found * mixed).sum(dim=0) + (found * (gram @ found)).sum(dim=0)
    return found.T, (distances.clamp(min=0) / norms).sqrt().tolist()


def as_profile(target: Profile | float) -> Profile:
    """``target`` itself, or the power function with this ``sigma_rel``."""
    return target if isinstance(target, Profile) else PowerProfile(target)


def _solved(gram: Tensor, right: Tensor) -> Tensor:
    """``gram⁻¹ @ right``; the shortest solution if ``gram`` is singular (equal snapshots)."""
    scale = gram.diagonal().rsqrt()[:, None]  # makes the diagonal 1: neighbors have nearly the same profile
    factor, failed = torch.linalg.cholesky_ex(gram * scale * scale.T)
    if not failed:
        return scale * torch.cholesky_solve(scale * right, factor)
    values, vectors = torch.linalg.eigh(gram * scale * scale.T)
    kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    vectors = scale * vectors[:, kept]
    result: Tensor = vectors @ (vectors.T @ right / values[kept][:, None])
    return result


def _gram(rows: Sequence[Snapshot], columns: Sequence[Snapshot]) -> Tensor:
    """The inner products of all pairs, computed in a block for each pair of profiles."""
    result = torch.empty(len(rows), len(columns), dtype=torch.float64)
    for profile, here, ends in _by_profile(rows):
        for other, there, other_ends in _by_profile(columns):
            result[here[:, None], there] = inner_products(profile, ends, other, other_ends)
    return result


def _by_profile(snapshots: Sequence[Snapshot]) -> Iterator[tuple[Profile, Tensor, Tensor]]:
    """Each profile, with the indices and the times of its snapshots."""
    profiles = [snapshot.profile for snapshot in snapshots]  # not in a dict: a user's own profile may not be hashable
    for index, profile in enumerate(profiles):
        if profiles.index(profile) == index:
            here = [k for k, other in enumerate(profiles) if other == profile]
            yield profile, torch.tensor(here), torch.tensor([snapshots[k].time for k in here], dtype=torch.float64)
