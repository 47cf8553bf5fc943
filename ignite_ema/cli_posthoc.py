"""The command ``ignite-ema reconstruct``: averages of any length from the snapshots of a ``PostHocEMA``."""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from . import checkpoints, posthoc
from .cli_checkpoints import AddCommand
from .files import mebibytes

__all__ = ["add_reconstruct"]

_TARGETS: dict[str, tuple[Callable[[float], posthoc.Profile], tuple[float, ...]]] = {
    "sigma_rel": (
        posthoc.PowerProfile,
        (0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.28),
    ),
    "half_life": (posthoc.ExponentialProfile, (0.01, 0.02, 0.05, 0.1, 0.2)),
    "last": (posthoc.UniformProfile, (0.1, 0.2, 0.5)),
}  # what can be asked for, and the lengths that --list tries


def add_reconstruct(add_command: AddCommand) -> None:
    """The command ``reconstruct``."""
    command = add_command(
        "reconstruct",
        _reconstruct,
        "Rebuilds averages of any length from the snapshots of a PostHocEMA.",
        "  ignite-ema reconstruct snapshots --list\n"
        "  ignite-ema reconstruct snapshots --sigma-rel 0.15 --out averaged.safetensors\n"
        "  ignite-ema reconstruct snapshots --sigma-rel 0.1 0.15 --half-life 0.05 --out 'averaged_{}.pt'\n",
    )
    command.add_argument("file", metavar="DIR", type=Path, help="the directory of the snapshots")
    command.add_argument("--list", action="store_true", help="which snapshots there are, and what lengths they support")
    lengths = command.add_argument_group("lengths, one or several, as fractions of the run")
    for name, text in (
        ("sigma_rel", "power-function averages of this relative width, below 0.2887"),
        ("half_life", "ordinary EMAs: weights count half that far back"),
        ("last", "means of the last part of the run, as in SWA"),
    ):
        flag = f"--{name.replace('_', '-')}"
        lengths.add_argument(flag, metavar="X", type=float, nargs="+", default=[], help=text)
    command.add_argument("--step", metavar="N", type=int, help="the time of a snapshot; without it the last")
    command.add_argument("--out", type=Path, help="what to write: .pt, .pth or .safetensors; {} stands for the length")
    command.add_argument("--force", action="store_true", help="overwrite what is there already")
    command.add_argument(
        "--max-residual", metavar="X", type=float, default=0.1, help="how far from the length asked for (default 0.1)"
    )


def _reconstruct(arguments: argparse.Namespace) -> None:
    targets = {f"{name}_{x}": kind(x) for name, (kind, _) in _TARGETS.items() for x in getattr(arguments, name)}
    if arguments.list:
        if targets or arguments.out:
            raise ValueError(
                "--list should stand alone (or with --step), got lengths or --out, too; leave it out to write."
            )
        print("\n".join(_list(arguments.file, arguments.step)))
        return
    if not targets or not arguments.out:
        raise ValueError(
            "reconstruct should have a length, such as --sigma-rel 0.15, and --out; see --list for lengths."
        )
    if len(targets) > 1 and "{}" not in arguments.out.name:
        raise ValueError(f"OUT should have {{}} in its name for {len(targets)} lengths, got '{arguments.out}'.")
    outs = [arguments.out.with_name(arguments.out.name.replace("{}", label)) for label in targets]
    for out in outs:
        checkpoints.check_target(out, force=arguments.force)  # before minutes of work
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        states = posthoc.reconstruct(
            arguments.file,
            list(targets.values()),
            arguments.step,
            max_residual=arguments.max_residual,
            progress=sys.stderr.isatty() and _has_tqdm(),
        )
    for warning in caught:
        print(f"ignite-ema: {warning.message}", file=sys.stderr)
    for out, state in zip(outs, states, strict=True):
        checkpoints.save_file(state, out, force=arguments.force)
        print(f"{out}: {len(state)} tensors, {mebibytes(state)} MiB")


def _has_tqdm() -> bool:
    return find_spec("tqdm") is not None


def _list(directory: Path, step: int | None) -> Iterator[str]:
    snapshots = posthoc.stored(directory, step)
    first, last = snapshots[0], snapshots[-1]
    tensors = {f"{index}.{path}": one for index, stream in enumerate(last.averaged) for path, one in stream.items()}
    types = ", ".join(sorted({str(one.dtype).removeprefix("torch.") for one in tensors.values()}))
    yield f"{len(snapshots)} snapshots of {', '.join(f'sigma_rel {sigma:g}' for sigma in last.sigma_rels)}"
    yield f"each {len(last.averaged[0])} averaged tensors, {mebibytes(tensors)} MiB in all, in {types}"
    yield ""
    width = len(str(last.time))
    yield f"{first.time_unit:>{max(width, 7)}}  {'iteration':>9}  {'epoch':>5}"
    for one in snapshots:
        yield f"{one.time:>{max(width, 7)}}  {one.iteration:>9}  {one.epoch:>5}"
    yield ""
    yield f"what can be rebuilt at {last.time} {last.time_unit}:"
    known = [posthoc.Snapshot(profile, one.time) for one in snapshots for profile in one.profiles]
    for name, (kind, lengths) in _TARGETS.items():
        for x in lengths:
            residual = posthoc.residual(known, kind(x))
            verdict = "" if residual <= 0.01 else "rough" if residual <= 0.1 else "refused"
            yield f"  --{name.replace('_', '-')} {x:<6g} residual {residual:>8.3%}  {verdict}".rstrip()
