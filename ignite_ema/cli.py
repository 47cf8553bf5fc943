"""The command ``ignite-ema``, also ``python -m ignite_ema``: inspects checkpoints, exports and rebuilds averages.

Modules that need torch are imported when a command runs, so that ``--help`` answers at once.
"""

import argparse
import io
import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from .checkpoints import Averaged
    from .posthoc.snapshots import StoredSnapshot

__all__ = ["main"]

_ACCEPTED = 0.1  # up to this residual, nothing is refused
_BAR = 40  # the width of the longest bar
_WIDTHS = (0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.28)
_HALF_LIVES = (0.01, 0.02, 0.05, 0.1, 0.2)
_LENGTHS: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "sigma_rel": ("PowerProfile", "power-function averages of this relative width, below 0.2887", _WIDTHS),
    "half_life": ("ExponentialProfile", "ordinary EMAs: weights count half that far back", _HALF_LIVES),
    "last": ("UniformProfile", "means of the last part of the run, as in SWA", (0.1, 0.2, 0.5)),
}  # profile, help, and what --list tries: for "last" the nearest lengths that begin at a snapshot
_CODES = """\
Exit codes:
  0  done
  1  a file cannot be read, has no such average, or must not be written; the reason is on stderr
  2  wrong usage
  130, 141  stopped by Ctrl-C, or by a closed pipe
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Args:
        argv: the arguments; None: those of the process.

    Raises:
        SystemExit: with code 2 for wrong usage, and with 0 after ``--help`` and ``--version``.
    """
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for letters that the terminal cannot show
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # such as head; Python would complain again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except (ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        print(f"ignite-ema: {reason}", file=sys.stderr)
        return 1
    return 0


# --- arguments ---


def _parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="ignite-ema",
        description="Averaged weights in checkpoints of Ignite, ignite_ema, torch, timm, Lightning, mmengine, mmcv,\n"
        "mmagic, diffusers, ema-pytorch and torch_ema. Nothing that a file holds is run.",
        epilog="Examples:\n"
        "  ignite-ema inspect checkpoint.pt\n"
        "  ignite-ema export checkpoint.pt averaged.safetensors\n"
        "  ignite-ema reconstruct snapshots --sigma-rel 0.15 --out averaged.pt\n\n" + _CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"ignite-ema {__version__}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    source = argparse.ArgumentParser(add_help=False)
    text = "the checkpoint: a torch file, .safetensors, or a directory of save_pretrained or torch.distributed"
    source.add_argument("file", metavar="FILE", type=Path, help=text)
    text = "names for diffusers and torch_ema: torch.save(dict(model.named_parameters()), FILE)"
    source.add_argument("--names", metavar="FILE", type=Path, help=text)
    source.add_argument("--base", metavar="FILE", type=Path, help="a file with tensors that the average lacks")
    source.add_argument("--strip-prefix", metavar="PREFIX", help="removed from all names, such as module.")
    key = "which average, if there are several, such as generator_ema"
    out = "the file to write: .pt, .pth or .safetensors; {} stands for the"

    command = _add_command(commands, _inspect, source)
    command.add_argument("--key", help=key)
    command.add_argument("--json", action="store_true", help="the same as one JSON object")

    command = _add_command(commands, _export, source)
    command.add_argument("--key", action="append", help=f"{key}; can be given several times")
    command.add_argument("out", metavar="OUT", type=Path, help=f"{out} key")
    command.add_argument("--force", action="store_true", help="overwrite OUT if it exists")

    command = _add_command(commands, _reconstruct)
    command.add_argument("file", metavar="DIR", type=Path, help="the directory of the snapshots")
    command.add_argument("--json", action="store_true", help="the list as one JSON object")
    task = command.add_mutually_exclusive_group(required=True)
    task.add_argument("--list", action="store_true", help="which snapshots there are, and what lengths they support")
    task.add_argument("--out", type=Path, help=f"{out} length")
    lengths = command.add_argument_group("lengths, one or several, as fractions of the run")
    for name, (_, text, _) in _LENGTHS.items():
        flag = f"--{name.replace('_', '-')}"
        lengths.add_argument(flag, type=float, action="extend", default=[], nargs="+", metavar="X", help=text)
    command.add_argument("--step", metavar="N", type=int, help="the time of a snapshot (default: the last)")
    command.add_argument("--force", action="store_true", help="overwrite files that exist")
    command.add_argument("--base", metavar="FILE", type=Path, help="a file with the frozen weights, if DIR lacks them")
    text = "how far from the requested length (default: %(default)s)"
    command.add_argument("--max-residual", metavar="X", type=float, default=_ACCEPTED, help=text)
    return whole


def _add_command(commands: Any, run: Callable[[argparse.Namespace], None], *parents: Any) -> argparse.ArgumentParser:
    """Adds a command with the name of a function, and its docstring as the help."""
    summary, _, examples = cleandoc(run.__doc__ or "").partition("\n\n")
    command: argparse.ArgumentParser = commands.add_parser(
        run.__name__.strip("_"),
        help=summary,
        description=summary,
        epilog=f"{examples}\n\n{_CODES}",
        parents=parents,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run, usage_error=command.error)
    return command


def _names(path: Path | None) -> Any:
    """The content of the --names file, a mapping in the order of the parameters."""
    from .checkpoints import load_file

    if path is not None and path.suffix == ".safetensors":
        raise ValueError(
            f"{str(path)!r} should keep the order of the parameters, but .safetensors sorts them; save "
            "dict(model.named_parameters()) with torch.save."
        )
    return None if path is None else load_file(path)


def _outs(arguments: argparse.Namespace, labels: Sequence[str]) -> list[Path]:
    """The file to write for each label; exits if two are the same, and raises if one cannot be written."""
    from .checkpoints.files import check_target
    from .posthoc.snapshots import is_snapshot_name

    source, outs = arguments.file, [Path(str(arguments.out).replace("{}", label)) for label in labels]
    if len(set(outs)) < len(outs):
        arguments.usage_error(
            f"OUT should have {{}} in it, for the key or length, got {str(arguments.out)!r} for {', '.join(labels)}."
        )
    for out in outs:
        place = out.resolve()
        is_source = out.exists() and source.exists() and out.samefile(source)
        if is_source or (place.parent == source.resolve() and is_snapshot_name(place)):
            raise ValueError(
                f"OUT should not be FILE, nor be named like a snapshot in DIR, got {str(out)!r}; choose another name."
            )
        check_target(out, force=arguments.force)
    return outs


def _print_table(rows: Sequence[Sequence[object]]) -> None:
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell!s:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


# --- inspect ---


def _inspect(arguments: argparse.Namespace) -> None:
    """Shows what is in a checkpoint, and how far the average is from the model.

    Examples:
      ignite-ema inspect checkpoint.pt
      ignite-ema inspect gan.pth --key generator_ema
      ignite-ema inspect checkpoint.pt --json
      ignite-ema inspect checkpoint.pt | grep ^distance

    A distance is |average - model| / |model|, of all floating-point tensors, or of one layer.
    If a file has several averages, they are listed unless --key chooses one.
    """
    from .checkpoints.reading import SeveralAverages, read_part

    file, names = arguments.file, _names(arguments.names)
    try:
        found, lacks = read_part(file, arguments.key, names, arguments.base, arguments.strip_prefix)
    except SeveralAverages as several:
        if arguments.json:
            averages = [
                {"key": one.label, "format": one.system, "tensors": len(one.tensors), "note": one.note or None}
                for one in several.choices
            ]
            print(json.dumps({"file": str(file), "averages": averages}, indent=2))
            return
        print(f"{str(file)!r} has several averages; choose one by its key: --key, or its last part")
        _print_table(
            [(repr(one.label), one.system, f"{len(one.tensors)} tensors", one.note) for one in several.choices]
        )
    else:
        _show(str(file), found, lacks, arguments.json)


def _show(file: str, found: "Averaged", lacks: list[str], as_json: bool) -> None:
    from .averaging.checks import listed
    from .checkpoints.files import size_of

    tensors, updates = found.tensors, found.num_updates
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()).most_common()
    ratios = {} if found.online is None else _distances(tensors, found.online)
    if as_json:
        finite = {layer: ratio if math.isfinite(ratio) else None for layer, ratio in ratios.items()}
        facts = {
            "file": file,
            "format": found.system,
            "tensors": len(tensors),
            "types": dict(types),
            "bytes": size_of(tensors),
            "num_updates": updates,
            "lacks": lacks,
            "distance": finite.pop(None, None),
            "layers": finite if ratios else None,
        }
        print(json.dumps(facts, indent=2))
        return
    print(f"file      {file!r}")
    print(f"format    {found.system if found.system != 'plain' else 'plain (no average)'}")
    print(f"tensors   {len(tensors)} ({', '.join(f'{count} {name}' for name, count in types)})")
    print(f"size      {size_of(tensors) / 2**20:.3f} MiB")
    print(f"updates   {'not stated' if updates is None else updates}")
    if lacks:
        print(f"lacks     {listed(lacks)}: frozen, and shared with the model; --base has them")
    if not ratios:
        print("distance  not known: the file has no averaged and raw weights side by side")
        return
    rows = [("distance", f"{ratios.pop(None):.3e}", "all", "")]
    largest = max(filter(math.isfinite, ratios.values()), default=0.0)
    for layer, ratio in ratios.items():
        bar = "#" * math.ceil(_BAR * ratio / largest) if largest and math.isfinite(ratio) else ""
        rows.append(("distance", f"{ratio:.3e}", repr(layer) if layer else "(root)", bar))
    _print_table(rows)


def _distances(averaged: "Mapping[str, Tensor]", online: "Mapping[str, Tensor]") -> dict[str | None, float]:
    """‖averaged - online‖ / ‖online‖, of all tensors under None, then of each layer: a name without its last part."""
    import torch

    squares: dict[str | None, tuple[float, float]] = {None: (0.0, 0.0)}
    for name, tensor in averaged.items():
        if tensor.is_floating_point() or tensor.is_complex():
            raw = online[name].to(torch.complex128 if tensor.is_complex() else torch.float64)
            apart, norm = float((tensor.to(raw.dtype) - raw).norm()) ** 2, float(raw.norm()) ** 2
            for layer in (None, name.rpartition(".")[0]):
                before = squares.get(layer, (0.0, 0.0))
                squares[layer] = (before[0] + apart, before[1] + norm)
    return {
        layer: math.sqrt(apart / norm) if norm else math.inf if apart else 0.0
        for layer, (apart, norm) in squares.items()
    }


# --- export ---


def _export(arguments: argparse.Namespace) -> None:
    """Writes the averaged weights as a plain state dict.

    Examples:
      ignite-ema export checkpoint.pt averaged.pt
      ignite-ema export epoch_12.pth averaged.safetensors --force
      ignite-ema export unet_ema.pt unet.pt --names names.pt
      ignite-ema export lora.pt averaged.pt --base pretrained.safetensors
      ignite-ema export gan.pth 'gan_{}.pt' --key generator_ema --key encoder_ema
    """
    from .checkpoints import read, save_file
    from .checkpoints.files import size_of

    keys: list[str | None] = arguments.key or [None]
    outs = _outs(arguments, [key or "average" for key in keys])
    names, base, prefix = _names(arguments.names), arguments.base, arguments.strip_prefix
    # All are read before any is written.
    averages = [read(arguments.file, key=key, names=names, base=base, strip_prefix=prefix) for key in keys]
    for found, out in zip(averages, outs, strict=True):
        save_file(found.tensors, out, force=arguments.force)
        origin = "plain weights: the file has no average" if found.system == "plain" else f"averaged by {found.system}"
        print(f"{str(out)!r}: {len(found.tensors)} tensors, {size_of(found.tensors) / 2**20:.3f} MiB, {origin}")
        if all(name.startswith("module.") for name in found.tensors):
            print("all names begin with 'module.', as a wrapped model's do; --strip-prefix module. takes it off")


# --- reconstruct ---


def _reconstruct(arguments: argparse.Namespace) -> None:
    """Rebuilds averages of any length from the snapshots of a PostHocEMA.

    Examples:
      ignite-ema reconstruct snapshots --list
      ignite-ema reconstruct snapshots --sigma-rel 0.15 --out averaged.safetensors
      ignite-ema reconstruct snapshots --sigma-rel 0.1 0.15 --half-life 0.05 --out 'averaged_{}.pt'
    """
    from . import posthoc
    from .checkpoints.files import save_file, size_of

    directory, step = arguments.file, arguments.step
    lengths = [(name, length) for name in _LENGTHS for length in getattr(arguments, name)]
    if bool(lengths) == arguments.list or arguments.json > arguments.list:
        arguments.usage_error(
            "reconstruct should have --list, or --list --json, or --out and a length, such as --sigma-rel 0.15; --list "
            "says which are good."
        )
    if arguments.list:
        _list(directory, step, arguments.json)
        return
    try:
        targets = [getattr(posthoc, _LENGTHS[name][0])(length) for name, length in lengths]
    except ValueError as error:
        arguments.usage_error(str(error))
    outs = _outs(arguments, [f"{name}_{length}" for name, length in lengths])
    show = sys.stderr.isatty() and find_spec("tqdm") is not None
    options = {"max_residual": arguments.max_residual, "progress": show, "base": arguments.base}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        states = posthoc.reconstruct(directory, targets, step, **options)
    for warning in caught:
        print(f"ignite-ema: warning: {warning.message}", file=sys.stderr)
    snapshots = posthoc.stored(directory, step)
    last = snapshots[-1]
    residuals = posthoc.residuals([known for one in snapshots for known in one.snapshots], targets)
    for out, state, target, residual in zip(outs, states, targets, residuals, strict=True):
        save_file(state, out, force=arguments.force)
        print(
            f"{str(out)!r}: {target} at {last.time} {last.time_unit} (iteration {last.iteration}, epoch {last.epoch}), "
            f"residual {residual:.2%}, {len(state)} tensors, {size_of(state) / 2**20:.3f} MiB"
        )


def _list(directory: Path, step: int | None, as_json: bool) -> None:
    """Shows the snapshots, and how closely some lengths can be rebuilt."""
    from . import posthoc

    snapshots = posthoc.stored(directory, step)
    last = snapshots[-1]
    tensors = [tensor for stream in last.averaged for tensor in stream.values()]
    facts: dict[str, Any] = {
        "dir": str(directory),
        "time_unit": last.time_unit,
        "sigma_rels": list(last.sigma_rels),
        "tensors": len(last.averaged[0]),
        "types": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "snapshots": [{"time": one.time, "iteration": one.iteration, "epoch": one.epoch} for one in snapshots],
        "lengths": _tried(snapshots),
    }
    if as_json:
        print(json.dumps(facts, indent=2, allow_nan=False))
        return
    print(f"{len(snapshots)} snapshots of averages of sigma_rel {' and '.join(f'{one:g}' for one in last.sigma_rels)}")
    size = f"{facts['bytes'] / 2**20:.3f} MiB"
    print(f"{facts['tensors']} averaged tensors in {', '.join(facts['types'])}, {size} in each snapshot\n")
    _print_table([(last.time_unit, "iteration", "epoch"), *((one.time, one.iteration, one.epoch) for one in snapshots)])
    print(f"\nwhat can be rebuilt at {last.time} {last.time_unit}:")
    rows = []
    for one in facts["lengths"]:
        flag = f"--{one['length'].replace('_', '-')} {one['value']:.9g}"
        rounded = f"rounding {one['rounding']:.3%}" if one["rounding"] > 1e-5 else ""
        verdict = "" if one["verdict"] == "good" else one["verdict"]
        rows.append((flag, f"residual {one['residual']:>8.3%}", rounded, verdict))
    _print_table(rows)


def _tried(snapshots: "list[StoredSnapshot]") -> list[dict[str, Any]]:
    """How closely some lengths can be rebuilt at the last snapshot."""
    from . import posthoc

    last = snapshots[-1]
    windows = [1.0, *(1 - one.time / last.time for one in snapshots[:-1])]
    nearest = {min(windows, key=lambda window: abs(window - length)) for length in _LENGTHS["last"][2]}
    tried = [(name, length) for name in ("sigma_rel", "half_life") for length in _LENGTHS[name][2]]
    tried += [("last", float(f"{window:.9g}")) for window in sorted(nearest)]
    profiles = [getattr(posthoc, _LENGTHS[name][0])(length) for name, length in tried]
    fitted = posthoc.fitted([known for one in snapshots for known in one.snapshots], profiles)
    lengths = []
    for (name, length), row, residual in zip(tried, *fitted, strict=True):
        errors = {"residual": residual, "rounding": posthoc.rounding(last, row)}
        worst = max(errors.values())
        verdict = "good" if worst <= posthoc.GOOD else "rough" if worst <= _ACCEPTED else "refused"
        lengths.append({"length": name, "value": length, **errors, "verdict": verdict})
    return lengths
