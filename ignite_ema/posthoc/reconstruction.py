"""Any averaging profile, rebuilt from the snapshots of a ``PostHocEMA``."""

import math
import numbers
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor

from ..checkpoints.memory import copied
from ..checkpoints.naming import listed, quoted
from ..checkpoints.safe_load import load_file
from ..checkpoints.unpickling import kind_of
from ..schedules import PowerFunction
from .fitting import GOOD, as_profile, fitted, reach
from .profiles import Profile
from .snapshot_files import StoredSnapshot, frozen_path, read_all, read_frozen

__all__ = ["gamma_from_sigma_rel", "reconstruct", "reconstruct_all", "rounding", "sigma_rel_from_gamma", "stored"]

Base: TypeAlias = "Mapping[str, Tensor] | str | os.PathLike[str] | None"

_CHUNK = 2**23  # numbers, of all snapshots together, that are in memory in float64 at a time


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


def stored(dirname: str | os.PathLike[str], step: int | None = None) -> list[StoredSnapshot]:
    """The snapshots in the directory of a ``PostHocEMA``, in the order of their times.

    Args:
        dirname: the directory.
        step: the time of the last snapshot to return; None: all are returned.

    Raises:
        FileNotFoundError, ValueError: if there is no snapshot, or none at ``step``; if a file is damaged; if the
            snapshots are not all of one run.
        TypeError: if ``step`` is not an integer.
    """
    snapshots = read_all(Path(dirname))
    if step is not None and type(step) is not int:
        raise TypeError(f"step should be the time of a snapshot, an integer, got {step!r}.")
    end = snapshots[-1].time if step is None else step
    if all(one.time != end for one in snapshots):
        nearest = sorted(sorted(one.time for one in snapshots), key=lambda time: abs(time - end))[:2]
        raise ValueError(
            f"step should be the time of a snapshot, in {snapshots[0].time_unit}, got {step!r}; nearest in "
            f"'{dirname}': {' and '.join(map(str, sorted(nearest)))}."
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

    Reads the files once, a part of a tensor at a time, so that memory holds the results and little more, however many
    snapshots there are. Computes in float64. Buffers that are not averaged come from the snapshot at ``step``.

    Args:
        dirname: where the snapshots are.
        target: a profile, or the ``sigma_rel`` of a power function; or a sequence of several, to read the files once
            for all of them.
        step: the time at which the average is taken, in updates (or samples): the time of a snapshot; None: the last.
            Later snapshots are not used.
        max_residual: the largest :func:`residual` to accept.
        progress: whether to show a progress bar; needs the package tqdm.
        base: a plain state dict, or a file of one, with the frozen parameters that the averages share with the model
            (``share_frozen``); needed only if the file ``snapshot_frozen.pt`` is missing.

    Returns:
        A complete, plain state dict on the CPU, in float32, or in the type of the snapshots if that is wider; for
        several targets a list of them. Frozen parameters keep their type, and all in the list share them.

    Raises:
        FileNotFoundError, ValueError: if there are no snapshots, none at ``step``, or some of another run; if the
            residual, or the error from rounding to 16 bits (:func:`rounding`), is above ``max_residual``; if a tensor
            has changed since it was written; if frozen parameters are missing.
        TypeError: if a target is neither a profile nor a number.

    Note:
        Warns if the residual or the rounding error is above 1 %. A weight that is infinite or NaN in any snapshot is
        taken from the last one.
    """
    is_several = isinstance(target, Sequence) and not isinstance(target, (str, bytes))
    wanted: Sequence[Any] = target if is_several else [target]  # type: ignore[assignment]
    for one in wanted:
        if not isinstance(one, (Profile, numbers.Real)) or isinstance(one, bool):
            raise TypeError(
                f"target should be a profile or a number, got {one!r}; pass a sigma_rel such as 0.15, or a profile "
                "such as ExponentialProfile(0.05)."
            )
    _, states, _ = reconstruct_all(dirname, wanted, step, max_residual, progress, base)
    return states if is_several else states[0]


def reconstruct_all(
    dirname: str | os.PathLike[str],
    wanted: Sequence[Profile | float],
    step: int | None,
    max_residual: float,
    progress: bool,
    base: Base = None,
) -> tuple[list[StoredSnapshot], list[dict[str, Tensor]], list[float]]:
    """The snapshots that are used, and for each target the state dict and the residual."""
    if not isinstance(max_residual, numbers.Real) or isinstance(max_residual, bool) or not max_residual >= 0:
        raise ValueError(f"max_residual should be a number of at least 0, got {max_residual!r}; 0.1 is 10%.")
    used = stored(dirname, step)
    targets = list(map(as_profile, wanted))
    if not targets:
        raise ValueError("target should be a profile or several, got none.")
    known = [snapshot for one in used for snapshot in one.snapshots]
    weights, distances = fitted(known, targets)
    for one, distance in zip(targets, distances, strict=True):
        _check(used, one, distance, max_residual)
    last = used[-1]
    for one, row in zip(targets, weights, strict=True):
        _check_rounding(last, one, row, max_residual)
    frozen = _frozen(last, Path(dirname), base)
    results = _rebuilt(used, weights, progress)
    plain = [{name: {**result, **frozen}[path] for name, path in last.state_dict_names.items()} for result in results]
    return used, plain, distances


def _rebuilt(used: Sequence[StoredSnapshot], weights: Tensor, progress: bool) -> list[dict[str, Tensor]]:
    """For each row of weights, of shape (targets, n), the tensors by path; verified before they are added."""
    last = used[-1]
    results: list[dict[str, Tensor]] = [{} for _ in weights]
    total = sum(tensor.numel() for tensor in last.averaged[0].values())
    with _bar(total) if progress else nullcontext() as bar:
        for path in last.averaged[0]:
            for one in used:
                one.verify(path)
            parts = [stream[path] for one in used for stream in one.averaged]
            for result, tensor in zip(results, _combined(parts, weights, bar), strict=True):
                result[path] = tensor
    for path in last.copied:
        last.verify(path)
    for result in results:
        result.update({path: tensor.clone() for path, tensor in last.copied.items()})
    return results


def _frozen(snapshot: StoredSnapshot, dirname: Path, base: Base) -> dict[str, Tensor]:
    """The frozen parameters by name, checked, in memory of their own."""
    shapes = snapshot.frozen_shapes
    if not shapes:
        if base is not None:
            raise ValueError(f"base should be left out, for the snapshots in '{dirname}' are complete; leave it out.")
        return {}
    if base is None:
        if not frozen_path(dirname).exists():
            raise FileNotFoundError(
                f"'{dirname}' should have '{frozen_path(dirname).name}' with the {len(shapes)} frozen parameters, such "
                f"as '{next(iter(shapes))}', that the averages share with the model, but lacks it; restore it, or pass "
                "base= (--base FILE), the weights of the model."
            )
        tensors: Mapping[str, Tensor] = read_frozen(dirname, snapshot.run_id)
        source = f"'{frozen_path(dirname)}'"
    else:
        tensors = load_file(base) if isinstance(base, (str, os.PathLike)) else base
        source = "base" if tensors is base else f"base '{base}'"
    if not isinstance(tensors, Mapping):
        raise TypeError(f"{source} should be a state dict, got {type(tensors).__name__}; pass one of the model.")
    for name, shape in shapes.items():
        found = tensors.get(name)
        if not isinstance(found, Tensor) or list(found.shape) != list(shape) or found.is_meta:
            has = f"it has {listed(tensors)}" if name not in tensors else f"it is {_described(found)} there"
            raise ValueError(
                f"{source} should have the frozen {quoted(name)} of shape {tuple(shape)}, but {has}; pass the plain "
                "state dict of the model that was trained."
            )
    return copied({name: tensors[name] for name in shapes})


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return kind_of(value)
    return "on the meta device" if value.is_meta else f"of shape {tuple(value.shape)}"


def _check(used: Sequence[StoredSnapshot], target: Profile, distance: float, max_residual: float) -> None:
    if distance <= min(max_residual, GOOD):
        return
    known = [snapshot for one in used for snapshot in one.snapshots]
    is_refused = distance > max_residual
    advice = reach(known, target, partial(rounding, used[-1]), max_residual if is_refused else GOOD)
    if is_refused:
        accepting = f", or accept it with max_residual={math.ceil(100 * distance) / 100} (--max-residual)"
        raise ValueError(
            f"target should be within the reach of the snapshots, but what they give differs from {target} by "
            f"{distance:.1%}; {advice}{accepting if distance < 0.2 else ''}."
        )
    warnings.warn(
        f"The snapshots give {target} roughly: what they give differs by {distance:.1%}, where {GOOD:.0%} is good; "
        f"{advice}.",
        stacklevel=4,
    )


def rounding(snapshot: StoredSnapshot, coefficients: Tensor) -> float:
    """The mean relative error of a reconstructed weight that comes from rounding the snapshots to their type.

    The mean error of one rounded weight is 0.43 units of rounding. A linear combination amplifies it by the norm of its
    ``coefficients`` if that is above 1.
    """
    types = {tensor.dtype for tensor in snapshot.averaged[0].values()}
    coarsest = max(torch.finfo(dtype).eps for dtype in types)
    return float(0.43 * coarsest / 2 * coefficients.norm().clamp(min=1))


def _check_rounding(last: StoredSnapshot, target: Profile, coefficients: Tensor, limit: float) -> None:
    noise = rounding(last, coefficients)
    text = (
        f"The sum that gives {target} amplifies the rounding of the snapshots to {noise:.1%} of a weight; choose a "
        "longer average, or store float32 next time"
    )
    if noise > limit:
        raise ValueError(f"{text}, or accept it with max_residual={math.ceil(100 * noise) / 100} (--max-residual).")
    if noise > GOOD:
        warnings.warn(f"{text}.", stacklevel=4)


def _combined(parts: Sequence[Tensor], weights: Tensor, bar: Any) -> list[Tensor]:
    """Sums of n tensors of one shape with the weights in each row of (targets, n)."""
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
        steady = (stack == stack[0]).all(dim=0)  # frozen, or a mask: bit for bit, and infinities, which no sum keeps
        sums = torch.where(steady | ~stack.isfinite().all(dim=0), stack[-1], sums)
        for result, values in zip(results, sums, strict=True):
            result.view(-1)[chunk] = values
        if bar is not None:
            bar.update(chunk.stop - start)
    return results


def _bar(total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs the package tqdm; pip install tqdm.") from error
    return tqdm(total=total, unit=" weights", unit_scale=True)
