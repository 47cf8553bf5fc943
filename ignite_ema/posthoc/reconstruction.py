"""Rebuilds averages of any profile from the snapshots of a :class:`~ignite_ema.PostHocEMA`."""

import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import Tensor

from ..averaging.checks import warn_user
from ..checkpoints.files import load_file, verify
from ..schedules import PowerFunction
from .fitting import GOOD, as_profile, fitted
from .profiles import Profile
from .snapshots import StoredSnapshot, frozen_path, path_of, read_frozen, stored

Base: TypeAlias = "Mapping[str, Tensor] | str | os.PathLike[str] | None"
_Target = TypeVar("_Target", bound=Profile | float)
_Score = TypeVar("_Score")

_CHUNK = 2**23  # how many numbers, of all snapshots together, are in memory in float64 at a time


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """γ, the exponent of a power function with the relative width ``sigma_rel``.

    Raises:
        ValueError: unless it is in (0, 1/√12 = 0.2887): no power function is wider than the mean of the whole run.
    """
    return PowerFunction(sigma_rel).gamma


def sigma_rel_from_gamma(gamma: float) -> float:
    """The width of a power function with exponent γ > 0, relative to the run: sqrt((γ + 1) / ((γ + 2)² (γ + 3))).

    Raises:
        ValueError: for an exponent of 0 (the mean of the whole run) or below.
    """
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma should be a number above 0, for a width below 1/√12 = 0.2887, got {gamma!r}.")
    return float(((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5)


@overload
def reconstruct(
    dirname: str | os.PathLike[str],
    target: Profile | float,
    step: int | None = None,
    *,
    max_residual: float = 0.10,
    progress: bool = False,
    base: Base = None,
) -> dict[str, Tensor]: ...


@overload
def reconstruct(
    dirname: str | os.PathLike[str],
    target: Sequence[Profile | float],
    step: int | None = None,
    *,
    max_residual: float = 0.10,
    progress: bool = False,
    base: Base = None,
) -> list[dict[str, Tensor]]: ...


def reconstruct(
    dirname: str | os.PathLike[str],
    target: Profile | float | Sequence[Profile | float],
    step: int | None = None,
    *,
    max_residual: float = 0.10,
    progress: bool = False,
    base: Base = None,
) -> dict[str, Tensor] | list[dict[str, Tensor]]:
    """Reconstructs the average with the profile ``target`` from the snapshots of a ``PostHocEMA``.

    Adds the snapshots up one part of a tensor at a time, so memory holds the results and little more, however many
    snapshots there are. Computes in float64. Buffers that are not averaged come from the snapshot at ``step``.

    Args:
        dirname: the directory of the snapshots.
        target: a profile, or the ``sigma_rel`` of a power function; or a sequence of several, to read the files once
            for all of them.
        step: the time at which the average is taken, in updates (or samples): the time of a snapshot; None: the last.
            Later snapshots are not used.
        max_residual: the largest :func:`residual` to accept.
        progress: whether to show a progress bar; needs the package tqdm.
        base: the frozen parameters that the averages share with the model (``share_frozen``), as a plain state dict or
            a file of one; needed only if the file ``snapshot_frozen.pt`` is missing.

    Returns:
        A complete, plain state dict on the CPU, in float32, or in the type of the snapshots if that is wider; for
        several targets, a list of them. Frozen parameters keep their type, and all state dicts in the list share them.

    Raises:
        FileNotFoundError, ValueError: if there are no snapshots, none at ``step``, or some from another run; if the
            residual, or the error from rounding to 16 bits (:func:`rounding`), is above ``max_residual``; if a file
            has changed since it was written; if frozen parameters are missing.

    Note:
        Warns if the residual or the rounding error is above 1 %. A weight that is infinite or NaN in any snapshot is
        taken from the last one.
    """
    is_several = isinstance(target, Sequence) and not isinstance(target, (str, bytes))
    targets = target if is_several else [target]
    used, weights, frozen = _sources(dirname, targets, step, max_residual, base)  # type: ignore[arg-type]
    total = sum(tensor.numel() for tensor in used[-1].averaged[0].values())
    with _bar(total, unit=" weights", unit_scale=True) if progress else nullcontext() as bar:
        states = _rebuilt(used, weights, frozen, bar)
    return states if is_several else states[0]


def sweep(
    dirname: str | os.PathLike[str],
    profiles: Iterable[_Target],
    score: Callable[[dict[str, Tensor]], _Score],
    step: int | None = None,
    *,
    max_residual: float = 0.10,
    base: Base = None,
) -> list[tuple[_Target, _Score]]:
    """Reconstructs the average of each profile in turn, and scores it. Shows a progress bar if tqdm is installed.

    Args:
        dirname: the directory of the snapshots.
        profiles: profiles, or ``sigma_rel`` of power functions.
        score: called with the state dict of an average; what it returns is its score, such as an accuracy.
        step: see :func:`reconstruct`, as for the others.
        max_residual: the largest :func:`residual` to accept.
        base: the frozen parameters, if ``snapshot_frozen.pt`` is missing.

    Returns:
        Pairs of a profile, as it was passed, and its score, in order.

    Raises:
        ValueError, OSError: as :func:`reconstruct` does, before anything is scored.
    """
    targets = list(profiles)
    used, weights, frozen = _sources(dirname, targets, step, max_residual, base)
    scores = []
    with _bar(len(targets), unit=" averages") if find_spec("tqdm") else nullcontext() as bar:
        for target, row in zip(targets, weights, strict=True):
            [state] = _rebuilt(used, row[None], frozen)
            scores.append((target, score(state)))
            if bar is not None:
                bar.update()
    return scores


def rounding(snapshot: StoredSnapshot, coefficients: Tensor) -> float:
    """The mean relative error of a reconstructed weight that comes from rounding the snapshots to their type.

    The mean error of one rounded weight is 0.43 units of rounding. A linear combination amplifies it by the norm of its
    coefficients if that is above 1.
    """
    coarsest = max(torch.finfo(tensor.dtype).eps for tensor in snapshot.averaged[0].values())
    return float(0.43 * coarsest / 2 * coefficients.norm().clamp(min=1))


def _sources(
    dirname: str | os.PathLike[str], targets: Sequence[Profile | float], step: int | None, limit: float, base: Base
) -> tuple[list[StoredSnapshot], Tensor, dict[str, Tensor]]:
    """The snapshots, the coefficients of shape (targets, n), and the frozen parameters, verified.

    Raises ValueError if the residual of a target, or its rounding error, is above the limit.
    """
    if not isinstance(limit, numbers.Real) or not limit >= 0:
        raise ValueError(f"max_residual should be a number of at least 0, got {limit!r}; 0.1 is 10%.")
    used = stored(dirname, step)
    weights, residuals = fitted([known for snapshot in used for known in snapshot.snapshots], targets)
    for target, row, residual in zip(map(as_profile, targets), weights, residuals, strict=True):
        differs = f"The closest sum of snapshots differs from {target} by"
        _check(differs, residual, limit, "choose another length or end time (step=), store more snapshots")
        amplifies = f"The sum that gives {target} amplifies the rounding of each weight to"
        _check(amplifies, rounding(used[-1], row), limit, "choose a longer average, store float32 snapshots")
    frozen = _frozen(used[-1], Path(dirname), base)
    for snapshot in used:
        verify(path_of(Path(dirname), snapshot.time))
    return used, weights, frozen


def _check(finding: str, error: float, limit: float, remedy: str) -> None:
    """Raises ValueError if an error is above the limit; warns if it is above 1 %."""
    if error > limit:
        accepted = math.ceil(100 * error) / 100
        raise ValueError(
            f"{finding} {error:.1%}, more than max_residual={limit:g}; {remedy}, or accept it with "
            f"max_residual={accepted:g} (--max-residual)."
        )
    if error > GOOD:
        warn_user(f"{finding} {error:.1%}, above the {GOOD:.0%} that counts as good; {remedy}.")


def _frozen(snapshot: StoredSnapshot, dirname: Path, base: Base) -> dict[str, Tensor]:
    """The frozen parameters by name, in memory of their own."""
    shapes, path = snapshot.frozen_shapes, frozen_path(dirname)
    if not shapes:
        if base is not None:
            raise ValueError(f"base should be left out: the snapshots in '{dirname}' are complete.")
        return {}
    tensors: Any = load_file(base) if isinstance(base, (str, os.PathLike)) else base
    if base is None:
        tensors = read_frozen(dirname, snapshot.run_id)
        if tensors is None:
            raise FileNotFoundError(
                f"'{path}' should have the {len(shapes)} frozen parameters that the averages share with the model, but "
                "it is missing or of another run; restore it, or pass the weights of the model as base= (--base FILE)."
            )
        verify(path)
    for name, shape in shapes.items():
        tensor = tensors.get(name) if isinstance(tensors, Mapping) else tensors
        got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        if got != list(shape):
            raise ValueError(
                f"base should have the frozen '{name}' of shape {list(shape)}, got {got}; pass the plain state dict "
                "of the model that was trained."
            )
    return {name: tensors[name].detach().clone() for name in shapes}


def _rebuilt(
    used: Sequence[StoredSnapshot], weights: Tensor, frozen: dict[str, Tensor], bar: Any = None
) -> list[dict[str, Tensor]]:
    """The state dict for each row of weights, of shape (targets, n)."""
    last = used[-1]
    results = [{name: tensor.clone() for name, tensor in last.copied.items()} | frozen for _ in weights]
    for name in last.averaged[0]:
        parts = [stream[name] for snapshot in used for stream in snapshot.averaged]
        for result, tensor in zip(results, _combined(parts, weights, bar), strict=True):
            result[name] = tensor
    return [{name: result[stored] for name, stored in last.state_dict_names.items()} for result in results]


def _combined(parts: Sequence[Tensor], weights: Tensor, bar: Any) -> list[Tensor]:
    """The weighted sums of n tensors of one shape, for each row of weights of shape (targets, n)."""
    first = parts[0]
    kind = torch.promote_types(first.dtype, torch.float32)
    wide = torch.complex128 if kind.is_complex else torch.float64
    results = [torch.empty(first.shape, dtype=kind) for _ in weights]
    flat = [part.reshape(-1) for part in parts]
    size = max(1, _CHUNK // len(flat))
    for start in range(0, first.numel(), size):
        chunk = slice(start, min(start + size, first.numel()))
        stack = torch.stack([part[chunk].to(wide) for part in flat])
        sums = weights.to(wide) @ stack
        steady = (stack == stack[0]).all(dim=0)  # frozen, or a mask: keeps its bits, and infinities, which no sum keeps
        sums = torch.where(steady | ~stack.isfinite().all(dim=0), stack[-1], sums)
        for result, values in zip(results, sums, strict=True):
            result.view(-1)[chunk] = values
        if bar is not None:
            bar.update(chunk.stop - start)
    return results


def _bar(total: int, **options: Any) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs the package tqdm; pip install tqdm.") from error
    return tqdm(total=total, **options)
