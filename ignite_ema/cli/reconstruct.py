"""The command ``ignite-ema reconstruct``: averages of any length from the snapshots of a ``PostHocEMA``."""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from .. import posthoc
from ..checkpoints.memory import mebibytes
from ..checkpoints.saving import check_target, save_file
from ..posthoc.fitting import windows_at_snapshots
from ..posthoc.reconstruction import reconstruct_all
from ..posthoc.snapshot_files import StoredSnapshot, is_snapshot_name
from .arguments import ACCEPTED

__all__ = ["reconstruct"]

_TARGETS: dict[str, tuple[Callable[[float], posthoc.Profile], tuple[float, ...]]] = {
    "sigma_rel": (
        posthoc.PowerProfile,
        (0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.28),
    ),
    "half_life": (posthoc.ExponentialProfile, (0.01, 0.02, 0.05, 0.1, 0.2)),
    "last": (posthoc.UniformProfile, (0.1, 0.2, 0.5)),
}  # what can be asked for, and the lengths that --list tries: of --last the nearest that begin at a snapshot


def reconstruct(arguments: argparse.Namespace) -> None:
    """Writes the averages of the lengths that are asked for, or lists what lengths there can be."""
    given = [(name, x) for name in _TARGETS for x in getattr(arguments, name)]
    if problem := _problem(arguments, given):
        arguments.usage_error(problem)
    if arguments.list:
        print("\n".join(_list(arguments.file, arguments.step)))
        return
    targets = {f"{name}_{x}": _target(arguments, name, x) for name, x in given}
    outs = [arguments.out.with_name(arguments.out.name.replace("{}", label)) for label in targets]
    for out in outs:
        check_target(out, force=arguments.force)  # before minutes of work
        if out.resolve().parent == arguments.file.resolve() and is_snapshot_name(out):
            raise ValueError(f"OUT should not be the name of a snapshot in DIR, got '{out}'; choose another.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        progress = sys.stderr.isatty() and find_spec("tqdm") is not None
        snapshots, states, residuals = reconstruct_all(
            arguments.file, list(targets.values()), arguments.step, arguments.max_residual, progress, arguments.base
        )
    for warning in caught:
        print(f"ignite-ema: warning: {warning.message}", file=sys.stderr)
    last = snapshots[-1]
    for out, state, target, residual in zip(outs, states, targets.values(), residuals, strict=True):
        save_file(state, out, force=arguments.force)
        print(
            f"{out}: {target} at {last.time} {last.time_unit} (iteration {last.iteration}, epoch {last.epoch}), "
            f"residual {residual:.2%}, {len(state)} tensors, {mebibytes(state)} MiB"
        )


def _target(arguments: argparse.Namespace, name: str, length: float) -> posthoc.Profile:
    """The profile that a flag asks for; what it says of a length out of its range is wrong usage."""
    try:
        return _TARGETS[name][0](length)
    except ValueError as error:
        arguments.usage_error(f"{_flag(name)}: {error}")
        raise


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _problem(arguments: argparse.Namespace, given: Sequence[tuple[str, float]]) -> str | None:
    """What is wrong with the usage, if anything is."""
    if arguments.list:
        extra = given or arguments.out or arguments.force
        return "--list should stand alone, or with --step; leave it out to write." if extra else None
    if not given or not arguments.out:
        return "reconstruct should have a length, such as --sigma-rel 0.15, and --out; --list says which are good."
    if not arguments.out.name:
        return f"--out should name a file, got '{arguments.out}'."
    if len(given) > 1 and "{}" not in arguments.out.name:
        return f"--out should have {{}} in its name for {len(given)} lengths, got '{arguments.out}'."
    return None


def _list(directory: Path, step: int | None) -> Iterator[str]:
    snapshots = posthoc.stored(directory, step)
    first, last = snapshots[0], snapshots[-1]
    tensors = {f"{index}.{path}": one for index, stream in enumerate(last.averaged) for path, one in stream.items()}
    types = ", ".join(sorted({str(one.dtype).removeprefix("torch.") for one in tensors.values()}))
    widths = " and ".join(f"{sigma:g}" for sigma in last.sigma_rels)
    yield f"{len(snapshots)} snapshots of averages of sigma_rel {widths}"
    yield f"{len(last.averaged[0])} averaged tensors in {types}, {mebibytes(tensors)} MiB in each snapshot"
    yield ""
    width = max(len(str(last.time)), 7)
    yield f"{first.time_unit:>{width}}  {'iteration':>9}  {'epoch':>5}"
    for one in snapshots:
        yield f"{one.time:>{width}}  {one.iteration:>9}  {one.epoch:>5}"
    yield ""
    yield f"what can be rebuilt at {last.time} {last.time_unit}:"
    yield from _supported(snapshots)


def _supported(snapshots: Sequence[StoredSnapshot]) -> Iterator[str]:
    """A line for each length that --list tries: how far what can be had is from it."""
    known = [known for one in snapshots for known in one.snapshots]
    noise = partial(posthoc.rounding, snapshots[-1])
    tried = [(name, x) for name in ("sigma_rel", "half_life") for x in _TARGETS[name][1]]
    windows = {x for near in _TARGETS["last"][1] for x in windows_at_snapshots(known, near, noise, ACCEPTED, count=1)}
    tried += [("last", x) for x in sorted(windows)]
    flags = [f"{_flag(name)} {x:.9g}" for name, x in tried]
    coefficients, residuals = posthoc.fitted(known, [_TARGETS[name][0](x) for name, x in tried])
    width = max(map(len, flags))
    for flag, row, residual in zip(flags, coefficients, residuals, strict=True):
        rounding = noise(row)
        worst = max(residual, rounding)
        verdict = "" if worst <= posthoc.GOOD else "rough" if worst <= ACCEPTED else "refused"
        rounded = f"  rounding {rounding:>8.3%}" if rounding > 1e-5 else ""
        yield f"  {flag:<{width}}  residual {residual:>8.3%}{rounded}  {verdict}".rstrip()
