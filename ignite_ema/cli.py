"""The command ``ignite-ema``, also ``python -m ignite_ema``: looks into checkpoints, takes or rebuilds averages.

What imports torch is imported when a command runs, so that ``--help`` answers at once.
"""

import argparse
import io
import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from .posthoc import Profile

__all__ = ["main"]

_ACCEPTED = 0.1  # a residual up to which nothing is refused
_BAR = 40  # the width of the longest bar
_WIDTHS = (0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.28)
_LENGTHS: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "sigma_rel": ("PowerProfile", "power-function averages of this relative width, below 0.2887", _WIDTHS),
    "half_life": (
        "ExponentialProfile",
        "ordinary EMAs: weights count half that far back",
        (0.01, 0.02, 0.05, 0.1, 0.2),
    ),
    "last": ("UniformProfile", "means of the last part of the run, as in SWA", (0.1, 0.2, 0.5)),
}  # profile, help, and what --list tries: of "last" the nearest lengths that begin at a snapshot
_CODES = """\
exit codes:
  0  done
  1  a file cannot be read, has no such average, or must not be written; the reason is on stderr
  2  wrong usage
  130, 141  stopped by Ctrl-C, or by a closed pipe
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; argparse exits by itself, with 2, on wrong usage."""
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # letters of names that the terminal cannot show
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
        epilog="examples:\n"
        "  ignite-ema inspect checkpoint.pt\n"
        "  ignite-ema export checkpoint.pt averaged.safetensors\n"
        "  ignite-ema reconstruct snapshots --sigma-rel 0.15 --out averaged.pt\n\n" + _CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"ignite-ema {__version__}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_inspect, _add_export, _add_reconstruct):
        add(commands)
    return whole


def _add_command(commands: Any, run: Any, summary: str, examples: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        run.__name__.strip("_"),
        help=summary,
        description=summary,
        epilog=f"examples:\n{examples}\n{_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run, usage_error=command.error)
    return command


def _add_source(command: argparse.ArgumentParser, **key: Any) -> None:
    source = "the checkpoint: a torch file, .safetensors, or a directory of save_pretrained or torch.distributed"
    command.add_argument("file", metavar="FILE", type=Path, help=source)
    command.add_argument("--key", help="which average, if there are several, such as generator_ema", **key)
    names = "names for diffusers and torch_ema: torch.save(dict(model.named_parameters()), FILE)"
    command.add_argument("--names", metavar="FILE", type=Path, help=names)
    base = "a file with the tensors that the average lacks, such as frozen ones"
    command.add_argument("--base", metavar="FILE", type=Path, help=base)
    command.add_argument("--strip-prefix", metavar="PREFIX", help="taken off all names, such as module.")


def _add_inspect(commands: Any) -> None:
    command = _add_command(
        commands,
        _inspect,
        "What is in a checkpoint, and how far the average is from the model.",
        "  ignite-ema inspect checkpoint.pt\n"
        "  ignite-ema inspect gan.pth --key generator_ema\n"
        "  ignite-ema inspect checkpoint.pt --json\n"
        "  ignite-ema inspect checkpoint.pt | grep ^distance\n\n"
        "A distance is |average - model| / |model|, of all floating-point tensors, or of one layer.\n"
        "Of a file with several averages, without --key, they are listed.\n",
    )
    _add_source(command)
    command.add_argument("--json", action="store_true", help="the same as one JSON object")


def _add_export(commands: Any) -> None:
    command = _add_command(
        commands,
        _export,
        "Writes the averaged weights as a plain state dict.",
        "  ignite-ema export checkpoint.pt averaged.pt\n"
        "  ignite-ema export epoch_12.pth averaged.safetensors --force\n"
        "  ignite-ema export unet_ema.pt unet.pt --names names.pt\n"
        "  ignite-ema export lora.pt averaged.pt --base pretrained.safetensors\n"
        "  ignite-ema export gan.pth 'gan_{}.pt' --key generator_ema --key encoder_ema\n",
    )
    _add_source(command, action="append")
    out = "what to write: .pt, .pth or .safetensors; {} stands for the key"
    command.add_argument("out", metavar="OUT", type=Path, help=out)
    command.add_argument("--force", action="store_true", help="overwrite OUT if it exists")


def _add_reconstruct(commands: Any) -> None:
    command = _add_command(
        commands,
        _reconstruct,
        "Rebuilds averages of any length from the snapshots of a PostHocEMA.",
        "  ignite-ema reconstruct snapshots --list\n"
        "  ignite-ema reconstruct snapshots --sigma-rel 0.15 --out averaged.safetensors\n"
        "  ignite-ema reconstruct snapshots --sigma-rel 0.1 0.15 --half-life 0.05 --out 'averaged_{}.pt'\n",
    )
    command.add_argument("file", metavar="DIR", type=Path, help="the directory of the snapshots")
    command.add_argument("--json", action="store_true", help="the list as one JSON object")
    task = command.add_mutually_exclusive_group(required=True)
    task.add_argument("--list", action="store_true", help="which snapshots there are, and what lengths they support")
    task.add_argument("--out", type=Path, help="what to write: .pt, .pth or .safetensors; {} stands for the length")
    lengths = command.add_argument_group("lengths, one or several, as fractions of the run")
    for name, (_, text, _) in _LENGTHS.items():
        options: dict[str, Any] = {"dest": "lengths", "action": "extend", "default": [], "nargs": "+", "metavar": "X"}
        lengths.add_argument(_flag(name), type=_length(name), help=text, **options)
    command.add_argument("--step", metavar="N", type=int, help="the time of a snapshot; without it the last")
    command.add_argument("--force", action="store_true", help="overwrite what is there already")
    base = "a file with the frozen weights, if snapshot_frozen.pt is missing"
    command.add_argument("--base", metavar="FILE", type=Path, help=base)
    limit = "how far from the length asked for (default: %(default)s)"
    command.add_argument("--max-residual", metavar="X", type=float, default=_ACCEPTED, help=limit)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _length(name: str) -> "Callable[[str], tuple[str, Profile]]":
    """A type for argparse: a length under its label."""

    def parse(text: str) -> "tuple[str, Profile]":
        try:
            return f"{name}_{float(text)}", _profile(name, float(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def _profile(name: str, length: float) -> "Profile":
    from . import posthoc

    profile: Profile = getattr(posthoc, _LENGTHS[name][0])(length)
    return profile


def _names(path: Path | None) -> Any:
    """What --names names: a mapping in the order of the parameters."""
    if path is None:
        return None
    if path.suffix == ".safetensors":
        raise ValueError(
            f"{str(path)!r} should keep the order of the parameters, but .safetensors sorts them; save "
            "dict(model.named_parameters()) with torch.save."
        )
    from .checkpoints import load_file

    return load_file(path)


def _outs(arguments: argparse.Namespace, labels: Sequence[str]) -> list[Path]:
    """What to write for each label; exits unless these are as many names, and raises if one cannot be written."""
    from .checkpoints.files import check_target

    names = [arguments.out.name.replace("{}", label) for label in labels]
    if len(set(names)) < len(names) or not all(name and Path(name).name == name for name in names):
        arguments.usage_error(
            f"OUT should name a file, with {{}} in it for several, got {str(arguments.out)!r} for {', '.join(labels)}; "
            "{} stands for the key or the length."
        )
    outs: list[Path] = [arguments.out.with_name(name) for name in names]
    for out in outs:
        if out.exists() and arguments.file.exists() and out.samefile(arguments.file):
            raise ValueError(f"OUT should be another file than FILE, got {str(out)!r} for both; name a new one.")
        check_target(out, force=arguments.force)
    return outs


def _print(facts: Mapping[str, Any], lines: Iterable[str], as_json: bool) -> None:
    print(json.dumps(facts, indent=2, allow_nan=False) if as_json else "\n".join(lines))


def _table(rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines with the columns below one another."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell!s:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


# --- inspect ---


def _inspect(arguments: argparse.Namespace) -> None:
    """Prints what a checkpoint holds: of several averages which, of one its tensors and its distance to the model."""
    from .checkpoints.files import quoted, size_of
    from .checkpoints.reading import SeveralAverages, read_part

    file, key = arguments.file, arguments.key
    try:
        found, lacks = read_part(file, key, _names(arguments.names), arguments.base, arguments.strip_prefix)
    except SeveralAverages as several:
        averages = [
            {"key": one.label, "format": one.system, "tensors": len(one.tensors), "note": one.note or None}
            for one in several.choices
        ]
        rows = [(quoted(one["key"]), one["format"], f"{one['tensors']} tensors", one["note"] or "") for one in averages]
        lines = [f"{quoted(file)} has several averages; choose one by its key: --key, or its last part", *_table(rows)]
        _print({"file": str(file), "averages": averages}, lines, arguments.json)
        return
    ratios = {} if found.online is None else _distances(found.tensors, found.online)
    finite = {layer: ratio if math.isfinite(ratio) else None for layer, ratio in ratios.items()}  # as JSON wants it
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in found.tensors.values())
    facts = {
        "file": str(file),
        "format": found.system,
        "tensors": len(found.tensors),
        "types": dict(types.most_common()),
        "bytes": size_of(found.tensors),
        "num_updates": found.num_updates,
        "lacks": lacks,
        "distance": finite.pop(None, None),
        "layers": finite if ratios else None,
    }
    _print(facts, _lines_of_file(facts, ratios), arguments.json)


def _lines_of_file(facts: Mapping[str, Any], ratios: Mapping[str | None, float]) -> Iterator[str]:
    from .averaging.checks import listed
    from .checkpoints.files import quoted

    yield f"file      {quoted(facts['file'])}"
    yield f"format    {facts['format'] if facts['format'] != 'plain' else 'plain (no average)'}"
    yield f"tensors   {facts['tensors']} ({', '.join(f'{count} {name}' for name, count in facts['types'].items())})"
    yield f"size      {facts['bytes'] / 2**20:.3f} MiB"
    yield f"updates   {'not stated' if facts['num_updates'] is None else facts['num_updates']}"
    if facts["lacks"]:
        yield f"lacks     {listed(facts['lacks'])}: frozen, and shared with the model; --base has them"
    if not ratios:
        yield "distance  not known: the file has no averaged and raw weights side by side"
        return
    largest = max((ratio for layer, ratio in ratios.items() if layer is not None and math.isfinite(ratio)), default=0.0)
    rows = [("distance", f"{ratios[None]:.3e}", "all", "")]
    for layer, ratio in ratios.items():
        if layer is not None:
            bar = "#" * math.ceil(_BAR * ratio / largest) if largest and math.isfinite(ratio) else ""
            rows.append(("distance", f"{ratio:.3e}", quoted(layer) if layer else "(root)", bar))
    yield from _table(rows)


def _distances(averaged: "Mapping[str, Tensor]", online: "Mapping[str, Tensor]") -> dict[str | None, float]:
    """‖averaged - online‖ / ‖online‖ of each layer, the names without their last parts, and of all under None."""
    import torch

    apart: dict[str | None, float] = {None: 0.0}
    norms: dict[str | None, float] = {None: 0.0}
    for name, tensor in averaged.items():
        if not tensor.is_floating_point() and not tensor.is_complex():
            continue
        raw = online[name].to(torch.complex128 if tensor.is_complex() else torch.float64)
        for layer in (None, name.rpartition(".")[0]):
            apart[layer] = apart.get(layer, 0.0) + float((tensor.to(raw.dtype) - raw).norm()) ** 2
            norms[layer] = norms.get(layer, 0.0) + float(raw.norm()) ** 2
    return {layer: _ratio(apart[layer], norms[layer]) for layer in apart}


def _ratio(apart: float, norm: float) -> float:
    return math.sqrt(apart / norm) if norm else math.inf if apart else 0.0


# --- export ---


def _export(arguments: argparse.Namespace) -> None:
    """Writes the averages as plain state dicts; nothing is written if one of them cannot be."""
    from .checkpoints import read, save_file
    from .checkpoints.files import size_of

    keys: list[str | None] = arguments.key or [None]
    outs = _outs(arguments, [key or "average" for key in keys])
    names, base, prefix = _names(arguments.names), arguments.base, arguments.strip_prefix
    averages = [read(arguments.file, key=key, names=names, base=base, strip_prefix=prefix) for key in keys]
    for found, out in zip(averages, outs, strict=True):
        save_file(found.tensors, out, force=arguments.force)
        origin = "plain weights: the file has no average" if found.system == "plain" else f"averaged by {found.system}"
        print(f"{str(out)!r}: {len(found.tensors)} tensors, {size_of(found.tensors) / 2**20:.3f} MiB, {origin}")
        if all(name.startswith("module.") for name in found.tensors):
            print("all names begin with 'module.', as a wrapped model's do; --strip-prefix module. takes it off")


# --- reconstruct ---


def _reconstruct(arguments: argparse.Namespace) -> None:
    """Writes averages of the lengths that are asked for, or lists what lengths there can be."""
    from .posthoc.snapshots import is_snapshot_name

    if bool(arguments.lengths) == arguments.list or arguments.json > arguments.list:
        arguments.usage_error(
            "reconstruct should have --list, or --list --json, or --out and a length, such as --sigma-rel 0.15; --list "
            "says which are good."
        )
    if arguments.list:
        facts = _facts_of_snapshots(arguments.file, arguments.step)
        _print(facts, _lines_of_snapshots(facts), arguments.json)
        return
    outs = _outs(arguments, [label for label, _ in arguments.lengths])
    for out in outs:
        if out.resolve().parent == arguments.file.resolve() and is_snapshot_name(out):
            raise ValueError(f"OUT should not be the name of a snapshot in DIR, got {str(out)!r}; choose another.")
    _write_averages(arguments, [profile for _, profile in arguments.lengths], outs)


def _write_averages(arguments: argparse.Namespace, targets: "list[Profile]", outs: Sequence[Path]) -> None:
    from . import posthoc
    from .checkpoints.files import save_file, size_of

    directory, step, progress = arguments.file, arguments.step, sys.stderr.isatty() and find_spec("tqdm") is not None
    options = {"max_residual": arguments.max_residual, "progress": progress, "base": arguments.base}
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


def _facts_of_snapshots(directory: Path, step: int | None) -> dict[str, Any]:
    """What --list says: the snapshots, and how closely each length that is tried can be rebuilt."""
    from . import posthoc

    snapshots = posthoc.stored(directory, step)
    last = snapshots[-1]
    tensors = [tensor for stream in last.averaged for tensor in stream.values()]
    windows = [1.0, *(1 - one.time / last.time for one in snapshots[:-1])]
    nearest = {min(windows, key=lambda window: abs(window - length)) for length in _LENGTHS["last"][2]}
    tried = [(name, length) for name in ("sigma_rel", "half_life") for length in _LENGTHS[name][2]]
    tried += [("last", float(f"{window:.9g}")) for window in sorted(nearest)]
    known = [known for one in snapshots for known in one.snapshots]
    coefficients, residuals = posthoc.fitted(known, [_profile(*one) for one in tried])
    lengths = []
    for (name, length), row, residual in zip(tried, coefficients, residuals, strict=True):
        errors = {"residual": residual, "rounding": posthoc.rounding(last, row)}
        worst = max(errors.values())
        verdict = "good" if worst <= posthoc.GOOD else "rough" if worst <= _ACCEPTED else "refused"
        lengths.append({"length": name, "value": length, **errors, "verdict": verdict})
    return {
        "dir": str(directory),
        "time_unit": last.time_unit,
        "sigma_rels": list(last.sigma_rels),
        "tensors": len(last.averaged[0]),
        "types": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "snapshots": [{"time": one.time, "iteration": one.iteration, "epoch": one.epoch} for one in snapshots],
        "lengths": lengths,
    }


def _lines_of_snapshots(facts: Mapping[str, Any]) -> Iterator[str]:
    widths = " and ".join(f"{sigma:g}" for sigma in facts["sigma_rels"])
    yield f"{len(facts['snapshots'])} snapshots of averages of sigma_rel {widths}"
    size = f"{facts['bytes'] / 2**20:.3f} MiB"
    yield f"{facts['tensors']} averaged tensors in {', '.join(facts['types'])}, {size} in each snapshot"
    yield ""
    columns = ("time", "iteration", "epoch")
    yield from _table(
        [(facts["time_unit"], *columns[1:]), *([one[key] for key in columns] for one in facts["snapshots"])]
    )
    yield ""
    yield f"what can be rebuilt at {facts['snapshots'][-1]['time']} {facts['time_unit']}:"
    rows = []
    for one in facts["lengths"]:
        rounded = f"rounding {one['rounding']:.3%}" if one["rounding"] > 1e-5 else ""
        verdict = "" if one["verdict"] == "good" else one["verdict"]
        rows.append(
            (f"{_flag(one['length'])} {one['value']:.9g}", f"residual {one['residual']:>8.3%}", rounded, verdict)
        )
    yield from _table(rows)
