"""The command ``ignite-ema reconstruct``: averages of any length from the snapshots of a ``PostHocEMA``."""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import posthoc
from ..checkpoints.memory import mebibytes
from ..checkpoints.saving import check_target, save_file
from ..posthoc.snapshots import StoredSnapshot, is_snapshot_name
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
        facts = _facts(arguments.file, arguments.step)
        print(json.dumps(facts, indent=2, allow_nan=False) if arguments.json else "\n".join(_lines(facts)))
        return
    targets = {f"{name}_{x}": _target(arguments, name, x) for name, x in given}
    outs = [arguments.out.with_name(arguments.out.name.replace("{}", label)) for label in targets]
    for out in outs:
        check_target(out, force=arguments.force)  # before minutes of work
        if out.resolve().parent == arguments.file.resolve() and is_snapshot_name(out):
            raise ValueError(f"OUT should not be the name of a snapshot in DIR, got {str(out)!r}; choose another.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        progress = sys.stderr.isatty() and find_spec("tqdm") is not None
        states = posthoc.reconstruct(
            arguments.file,
            list(targets.values()),
            arguments.step,
            max_residual=arguments.max_residual,
            progress=progress,
            base=arguments.base,
        )
    for warning in caught:
        print(f"ignite-ema: warning: {warning.message}", file=sys.stderr)
    snapshots = posthoc.stored(arguments.file, arguments.step)
    last = snapshots[-1]
    residuals = posthoc.residuals([known for one in snapshots for known in one.snapshots], targets.values())
    for out, state, target, residual in zip(outs, states, targets.values(), residuals, strict=True):
        save_file(state, out, force=arguments.force)
        print(
            f"{str(out)!r}: {target} at {last.time} {last.time_unit} (iteration {last.iteration}, epoch {last.epoch}), "
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
        return "--list should stand alone, or with --step or --json; leave it out to write." if extra else None
    if arguments.json:
        return "--json should stand with --list; leave it out to write."
    if not given or not arguments.out:
        return "reconstruct should have a length, such as --sigma-rel 0.15, and --out; --list says which are good."
    if not arguments.out.name:
        return f"--out should name a file, got {str(arguments.out)!r}."
    if len(given) > 1 and "{}" not in arguments.out.name:
        return f"--out should have {{}} in its name for {len(given)} lengths, got {str(arguments.out)!r}."
    return None


def _facts(directory: Path, step: int | None) -> dict[str, Any]:
    """What --list says: the snapshots, and for each length that is tried how far what can be had is from it."""
    snapshots = posthoc.stored(directory, step)
    last = snapshots[-1]
    tensors = [tensor for stream in last.averaged for tensor in stream.values()]
    return {
        "dir": str(directory),
        "time_unit": last.time_unit,
        "sigma_rels": list(last.sigma_rels),
        "tensors": len(last.averaged[0]),
        "types": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "snapshots": [{"time": one.time, "iteration": one.iteration, "epoch": one.epoch} for one in snapshots],
        "lengths": list(_supported(snapshots)),
    }


def _supported(snapshots: Sequence[StoredSnapshot]) -> Iterator[dict[str, Any]]:
    known = [known for one in snapshots for known in one.snapshots]
    noise = partial(posthoc.rounding, snapshots[-1])
    tried = [(name, x) for name in ("sigma_rel", "half_life") for x in _TARGETS[name][1]]
    windows = [1 - time / snapshots[-1].time for time in (0, *(one.time for one in snapshots[:-1]))]
    nearest = {min(windows, key=lambda window: abs(window - x)) for x in _TARGETS["last"][1]}
    tried += [("last", float(f"{x:.9g}")) for x in sorted(nearest)]
    coefficients, residuals = posthoc.fitted(known, [_TARGETS[name][0](x) for name, x in tried])
    for (name, x), row, residual in zip(tried, coefficients, residuals, strict=True):
        worst = max(residual, noise(row))
        verdict = "good" if worst <= posthoc.GOOD else "rough" if worst <= ACCEPTED else "refused"
        yield {"length": name, "value": x, "residual": residual, "rounding": noise(row), "verdict": verdict}


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    widths = " and ".join(f"{sigma:g}" for sigma in facts["sigma_rels"])
    size = f"{facts['bytes'] / 2**20:.3f} MiB"
    yield f"{len(facts['snapshots'])} snapshots of averages of sigma_rel {widths}"
    yield f"{facts['tensors']} averaged tensors in {', '.join(facts['types'])}, {size} in each snapshot"
    yield ""
    last = facts["snapshots"][-1]
    width = max(len(str(last["time"])), 7)
    yield f"{facts['time_unit']:>{width}}  {'iteration':>9}  {'epoch':>5}"
    for one in facts["snapshots"]:
        yield f"{one['time']:>{width}}  {one['iteration']:>9}  {one['epoch']:>5}"
    yield ""
    yield f"what can be rebuilt at {last['time']} {facts['time_unit']}:"
    flags = [f"{_flag(one['length'])} {one['value']:.9g}" for one in facts["lengths"]]
    width = max(map(len, flags))
    for flag, one in zip(flags, facts["lengths"], strict=True):
        rounded = f"  rounding {one['rounding']:>8.3%}" if one["rounding"] > 1e-5 else ""
        verdict = "" if one["verdict"] == "good" else one["verdict"]
        yield f"  {flag:<{width}}  residual {one['residual']:>8.3%}{rounded}  {verdict}".rstrip()
