"""The length of an average chosen after training: any averaging profile, rebuilt from the snapshots of a few.

:class:`~ignite_ema.snapshots.PostHocEMA` keeps power-function averages of two widths while a model trains, and stores
them from time to time. Each is a sum over the same weights of the model, with a known profile; which sum of them
comes closest to a profile that is wanted is found by least squares, without the weights. Karras et al. 2024 (arXiv
2312.02696), section 3 and appendix C.

>>> snapshots = [Snapshot(PowerProfile(sigma_rel), k) for sigma_rel in (0.05, 0.10) for k in range(1, 65)]
>>> f"{residual(snapshots, PowerProfile(0.15)):.3%}"
'0.058%'
"""

import math
import numbers
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from .profiles import ExponentialProfile, PowerProfile, Profile, SampledProfile, UniformProfile, inner_products
from .schedules import PowerFunction
from .snapshot_files import StoredSnapshot, read_all

__all__ = [
    "ExponentialProfile",
    "PowerProfile",
    "Profile",
    "SampledProfile",
    "Snapshot",
    "UniformProfile",
    "coefficients",
    "gamma_from_sigma_rel",
    "inner_products",
    "reconstruct",
    "residual",
    "sigma_rel_from_gamma",
    "stored",
]

_CHUNK = 2**23  # numbers, of all snapshots together, that are in memory in float64 at a time
_LARGE_RESIDUAL = 0.01


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """γ, the exponent of a power function with the relative width ``sigma_rel``, in (0, 1/√12 = 0.2887).

    The largest root of γ³ + 7γ² + (16 - σ⁻²)γ + (12 - σ⁻²).

    Raises:
        ValueError: for a width outside; a power function is never wider than the mean of the whole run.
    """
    return PowerFunction(sigma_rel).gamma


def sigma_rel_from_gamma(gamma: float) -> float:
    """The width of a power function with exponent γ > 0, relative to the run: sqrt((γ + 1) / ((γ + 2)² (γ + 3))).

    Raises:
        ValueError: for an exponent of 0 (the mean of the whole run) or below.
    """
    if not 0 < gamma < float("inf"):
        raise ValueError(f"gamma should be a number above 0, where the width is below 1/√12 = 0.2887, got {gamma!r}.")
    return float(((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5)


@dataclass(frozen=True)
class Snapshot:
    """An average that is known: its profile, and when it was taken.

    Args:
        profile: how much the weights of each moment count.
        time: from the start of the run, above 0, in whatever unit all times are in.
    """

    profile: Profile
    time: float

    def __post_init__(self) -> None:
        if not isinstance(self.profile, Profile):
            raise TypeError(f"profile should be a Profile, such as PowerProfile(0.05), got {self.profile!r}.")
        if not 0 < self.time < float("inf"):
            raise ValueError(
                f"time of a Snapshot should be above 0, got {self.time!r}; before it there are no weights."
            )


def coefficients(snapshots: Sequence[Snapshot], target: Profile | float, end: float | None = None) -> Tensor:
    """How much each snapshot counts in the sum that comes closest to an average with the profile ``target``.

    Least squares over the run, in float64; the coefficients sum to 1, and some may be below 0.

    Args:
        snapshots: n of them.
        target: the profile, or the ``sigma_rel`` of a power function.
        end: when the wanted average is taken; None: at the time of the last snapshot.

    Returns:
        A float64 tensor of shape (n,).

    Raises:
        TypeError, ValueError: without snapshots, or for what is no profile or no time.
    """
    return _fit(snapshots, target, end)[0]


def residual(snapshots: Sequence[Snapshot], target: Profile | float, end: float | None = None) -> float:
    """How far the sum with these :func:`coefficients` is from what is wanted: the relative L2 distance of the profiles.

    ‖p - Σᵢ cᵢ pᵢ‖ / ‖p‖: 0 is exact, and above a few percent the average is another one than the one asked for.
    Arguments and errors as for :func:`coefficients`.
    """
    return _fit(snapshots, target, end)[1]


def _fit(snapshots: Sequence[Snapshot], target: Profile | float, end: float | None) -> tuple[Tensor, float]:
    if not snapshots:
        raise ValueError("snapshots should be one or more, got none; without them nothing can be rebuilt.")
    wanted = Snapshot(_as_profile(target), max(one.time for one in snapshots) if end is None else end)
    own = inner_products(wanted.profile, _times([wanted]), wanted.profile, _times([wanted])).item()
    if not 0 < own < math.inf:
        raise ValueError(f"target should have a density that float64 can hold, got {target}; choose a longer one.")
    gram, mixed = _gram(snapshots, snapshots), _gram(snapshots, [wanted])[:, 0]
    # Scaled to a diagonal of 1, and inverted where it can be: the profiles of neighbours in time are nearly the same.
    scale = gram.diagonal().rsqrt()
    values, vectors = torch.linalg.eigh(gram * scale[:, None] * scale)
    kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    vectors = scale[:, None] * vectors[:, kept]
    free, ones = ((vectors @ (vectors.T @ v / values[kept])) for v in (mixed, torch.ones_like(mixed)))
    found = free + ones * ((1 - free.sum()) / ones.sum())  # a Lagrange multiplier: the least squares with sum 1
    distance = own - 2 * found.dot(mixed) + found.dot(gram @ found)
    return found, float((distance.clamp(min=0) / own).sqrt())


def _as_profile(target: Profile | float) -> Profile:
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


def stored(dirname: str | os.PathLike[str], step: int | None = None) -> list[StoredSnapshot]:
    """The snapshots in the directory of a ``PostHocEMA``, in the order of their times.

    Args:
        dirname: the directory.
        step: the time of the last one to take; None: all.

    Raises:
        FileNotFoundError, ValueError: where there are none, or none at ``step``; where a file is damaged, or they are
            not of one run.
    """
    snapshots = read_all(Path(dirname))
    end = snapshots[-1].time if step is None else step
    if all(one.time != end for one in snapshots):
        nearest = sorted(sorted(one.time for one in snapshots), key=lambda time: abs(time - end))[:2]
        raise ValueError(
            f"step should be the time of a snapshot, in {snapshots[0].time_unit}, got {step!r}; the nearest in "
            f"'{dirname}' are {' and '.join(map(str, sorted(nearest)))}."
        )
    return [one for one in snapshots if one.time <= end]


@overload
def reconstruct(
    dirname: str | os.PathLike[str],
    target: Profile | float,
    step: int | None = None,
    *,
    max_residual: float = 0.10,
    progress: bool = False,
) -> dict[str, Tensor]: ...


@overload
def reconstruct(
    dirname: str | os.PathLike[str],
    target: Sequence[Profile | float],
    step: int | None = None,
    *,
    max_residual: float = 0.10,
    progress: bool = False,
) -> list[dict[str, Tensor]]: ...


def reconstruct(
    dirname: str | os.PathLike[str],
    target: Profile | float | Sequence[Profile | float],
    step: int | None = None,
    *,
    max_residual: float = 0.10,
    progress: bool = False,
) -> dict[str, Tensor] | list[dict[str, Tensor]]:
    """The average with the profile ``target``, from the snapshots of a ``PostHocEMA``: a plain state dict.

    Goes through the files once, a part of a tensor at a time: in memory are the results and little more, however many
    snapshots there are. Computed in float64. Buffers that are not averaged are those of the snapshot at ``step``.

    Args:
        dirname: where the snapshots are.
        target: a profile, or the ``sigma_rel`` of a power function; or several, for which the files are read once.
        step: the time at which the average is taken, that of a snapshot, in updates (or samples); None: the last.
            Later snapshots are not used.
        max_residual: how far the profile of what can be had may be from the one asked for; see :func:`residual`.
        progress: show a bar; needs the package tqdm.

    Returns:
        The state dict, in float32 on the CPU, or in the type of the snapshots where that is wider; for several targets
        a list.

    Raises:
        FileNotFoundError, ValueError: where there are no snapshots, or they are not of one run; where there is none at
            ``step``; where a residual is above ``max_residual``.

    Note:
        A residual above 1 % is warned about.
    """
    if not isinstance(max_residual, numbers.Real) or isinstance(max_residual, bool) or not max_residual >= 0:
        raise ValueError(f"max_residual should be a number of at least 0, got {max_residual!r}; 0.1 is 10%.")
    used = stored(dirname, step)
    targets = list(target) if isinstance(target, Sequence) else [target]
    if not targets:
        raise ValueError("target should be a profile or several, got none.")
    known = [Snapshot(profile, one.time) for one in used for profile in one.profiles]
    rows = []
    for one in targets:  # and no comprehension, which until Python 3.12 is a level of the stack: see stacklevel
        rows.append(_checked(known, _as_profile(one), max_residual))
    weights = torch.stack(rows)
    last = used[-1]
    results: list[dict[str, Tensor]] = [{} for _ in targets]
    total = sum(tensor.numel() for tensor in last.averaged[0].values())
    with _Bar(total, progress) as bar:
        for path in last.averaged[0]:
            parts = [stream[path] for one in used for stream in one.averaged]
            for result, tensor in zip(results, _combined(parts, weights, bar), strict=True):
                result[path] = tensor
    for result in results:
        result.update({path: tensor.clone() for path, tensor in last.copied.items()})
    plain = [{name: result[path] for name, path in last.state_dict_names.items()} for result in results]
    return plain if isinstance(target, Sequence) else plain[0]


def _checked(known: Sequence[Snapshot], target: Profile, max_residual: float) -> Tensor:
    found, distance = _fit(known, target, None)
    if distance > max_residual:
        raise ValueError(
            f"target should be within the reach of the snapshots, but what they give differs from {target} by "
            f"{distance:.1%}; choose another length, or accept it with max_residual={math.ceil(100 * distance) / 100} "
            "(--max-residual)."
        )
    if distance > _LARGE_RESIDUAL:
        warnings.warn(
            f"The snapshots give another average than {target}: their profiles differ by {distance:.1%}, where 1% is "
            "good; take more snapshots next time, or choose another length.",
            stacklevel=3,
        )
    return found


def _combined(parts: Sequence[Tensor], weights: Tensor, bar: "_Bar") -> list[Tensor]:
    """Sums of n tensors of one shape with the weights in each row of (targets, n)."""
    first = parts[0]
    kind = torch.promote_types(first.dtype, torch.float32)
    wide = torch.complex128 if kind.is_complex else torch.float64
    results = [torch.empty(first.shape, dtype=kind) for _ in weights]
    flat = [part.reshape(-1) for part in parts]
    size = max(1, _CHUNK // len(flat))
    for start in range(0, first.numel(), size):
        chunk = slice(start, min(start + size, first.numel()))
        sums = weights.to(wide) @ torch.stack([part[chunk].to(wide) for part in flat])
        for result, values in zip(results, sums, strict=True):
            result.view(-1)[chunk] = values
        bar.update(chunk.stop - start)
    return results


class _Bar:
    """A bar of tqdm, or none."""

    def __init__(self, total: int, wanted: bool) -> None:
        self._bar = None
        if wanted:
            try:
                from tqdm import tqdm
            except ImportError as error:
                raise ImportError("progress=True needs the package tqdm; pip install tqdm.") from error
            self._bar = tqdm(total=total, unit=" weights", unit_scale=True)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)
