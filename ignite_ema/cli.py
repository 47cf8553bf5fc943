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
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from .checkpoints.reading import Averaged
    from .posthoc import Profile

__all__ = ["main"]

_ACCEPTED = 0.1  # a residual up to which nothing is refused
_BAR = 40  # the width of the longest bar
_LENGTHS: dict[str, tuple[float, ...]] = {
    "sigma_rel": (0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.28),
    "half_life": (0.01, 0.02, 0.05, 0.1, 0.2),
    "last": (0.1, 0.2, 0.5),
}  # what can be asked for, and the lengths that --list tries: of "last" the nearest that begin at a snapshot
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
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"ignite-ema: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:  # of torch, about tensors that it cannot compute with
        reason = str(error).partition("\n")[0] or "out of memory"
        print(f"ignite-ema: {str(arguments.file)!r} cannot be worked on: {reason}", file=sys.stderr)
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
    command.add_argument("--list", action="store_true", help="which snapshots there are, and what lengths they support")
    command.add_argument("--json", action="store_true", help="the list as one JSON object")
    lengths = command.add_argument_group("lengths, one or several, as fractions of the run")
    helps = (
        "power-function averages of this relative width, below 0.2887",
        "ordinary EMAs: weights count half that far back",
        "means of the last part of the run, as in SWA",
    )
    for name, text in zip(_LENGTHS, helps, strict=True):
        lengths.add_argument(_flag(name), metavar="X", type=float, nargs="+", default=[], help=text)
    command.add_argument("--step", metavar="N", type=int, help="the time of a snapshot; without it the last")
    command.add_argument("--out", type=Path, help="what to write: .pt, .pth or .safetensors; {} stands for the length")
    command.add_argument("--force", action="store_true", help="overwrite what is there already")
    base = "a file with the frozen weights, if snapshot_frozen.pt is missing"
    command.add_argument("--base", metavar="FILE", type=Path, help=base)
    limit = "how far from the length asked for (default: %(default)s)"
    command.add_argument("--max-residual", metavar="X", type=float, default=_ACCEPTED, help=limit)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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


# --- inspect ---


def _inspect(arguments: argparse.Namespace) -> None:
    """Prints what a checkpoint holds: of several averages which, of one its tensors and its distance to the model."""
    from .checkpoints.reading import SeveralAverages, read_part

    file, key = arguments.file, arguments.key
    try:
        found, lacks = read_part(file, key, _names(arguments.names), arguments.base, arguments.strip_prefix)
    except SeveralAverages as several:
        averages = [
            {"key": one.label, "format": one.system, "tensors": len(one.tensors), "note": one.note or None}
            for one in several.choices
        ]
        shown = {"file": str(file), "averages": averages}
        print(json.dumps(shown, indent=2) if arguments.json else "\n".join(_lines_of_several(shown)))
        return
    facts = _facts_of_file(file, found, lacks)
    layers = None if found.online is None else _distances(found.tensors, found.online)
    print(_as_json(facts, layers) if arguments.json else "\n".join(_lines_of_file(facts, layers)))


def _lines_of_several(facts: Mapping[str, Any]) -> Iterator[str]:
    from .checkpoints.files import quoted

    yield f"file      {quoted(facts['file'])}"
    for one in facts["averages"]:
        note = f"; {one['note']}" if one["note"] else ""
        yield f"average   {quoted(one['key'])}  ({one['format']}, {one['tensors']} tensors{note})"
    yield "choose one by its key: --key, or its last part"


def _facts_of_file(file: Path, found: "Averaged", lacks: list[str]) -> dict[str, Any]:
    from .checkpoints.files import is_dense

    dense = [tensor for tensor in found.tensors.values() if is_dense(tensor)]
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in found.tensors.values())
    return {
        "file": str(file),
        "format": found.system,
        "tensors": len(found.tensors),
        "types": dict(types.most_common()),
        "bytes": sum(tensor.nbytes for tensor in dense),
        "num_updates": found.num_updates,
        "sparse": len(found.tensors) - len(dense),
        "lacks": lacks,
    }


def _distances(averaged: Mapping[str, "Tensor"], online: Mapping[str, "Tensor"]) -> dict[str | None, float]:
    """The distance of each layer, the names without their last parts, and of all floating-point tensors under None."""
    from .checkpoints.files import is_dense

    squares: dict[str | None, tuple[float, float]] = {None: (0.0, 0.0)}
    for name, tensor in averaged.items():
        raw = online[name]
        if is_dense(tensor) and is_dense(raw) and (tensor.is_floating_point() or tensor.is_complex()):
            apart, norm = _square(tensor, raw), _square(raw)
            for key in (None, name.rpartition(".")[0]):
                before = squares.get(key, (0.0, 0.0))
                squares[key] = before[0] + apart, before[1] + norm
    return {layer: _ratio(*pair) for layer, pair in squares.items()}


def _square(tensor: "Tensor", other: "Tensor | None" = None) -> float:
    """‖tensor - other‖², in float64."""
    import torch

    wide = torch.complex128 if tensor.is_complex() else torch.float64
    apart = tensor.to(wide) if other is None else tensor.to(wide) - other.to(wide)
    return float(torch.linalg.vector_norm(apart)) ** 2


def _ratio(apart: float, norm: float) -> float:
    return math.sqrt(apart / norm) if norm else math.inf if apart else 0.0


def _as_json(facts: Mapping[str, Any], layers: Mapping[str | None, float] | None) -> str:
    """JSON has no infinities: a distance that is not finite is null."""
    finite = None if layers is None else {key: one if math.isfinite(one) else None for key, one in layers.items()}
    distance = None if finite is None else finite.pop(None)
    return json.dumps({**facts, "distance": distance, "layers": finite}, indent=2, allow_nan=False)


def _lines_of_file(facts: Mapping[str, Any], layers: Mapping[str | None, float] | None) -> Iterator[str]:
    from .averaging.checks import listed
    from .checkpoints.files import quoted

    yield f"file      {quoted(facts['file'])}"
    yield f"format    {facts['format'] if facts['format'] != 'plain' else 'plain (no average)'}"
    yield f"tensors   {facts['tensors']} ({', '.join(f'{count} {name}' for name, count in facts['types'].items())})"
    yield f"size      {facts['bytes'] / 2**20:.3f} MiB"
    yield f"updates   {'not stated' if facts['num_updates'] is None else facts['num_updates']}"
    if facts["sparse"]:
        yield f"sparse    {facts['sparse']} of the tensors, in neither the size nor the distance"
    if facts["lacks"]:
        yield f"lacks     {listed(facts['lacks'])}: frozen, and shared with the model; --base has them"
    if layers is None:
        yield "distance  not known: the file has no averaged and raw weights side by side"
        return
    yield f"distance  {layers[None]:.3e}  all"
    ratios = {"(root)" if layer == "" else quoted(layer): ratio for layer, ratio in layers.items() if layer is not None}
    largest = max((ratio for ratio in ratios.values() if math.isfinite(ratio)), default=0.0)
    width, block = max(map(len, ratios), default=0), _block()
    for layer, ratio in ratios.items():
        bar = block * math.ceil(_BAR * ratio / largest) if largest and math.isfinite(ratio) else ""
        yield f"distance  {ratio:.3e}  {layer:<{width}}  {bar}".rstrip()


def _block() -> str:
    """What bars are made of: a block if stdout can show it."""
    try:
        "█".encode(sys.stdout.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return "#"
    return "█"


# --- export ---


def _export(arguments: argparse.Namespace) -> None:
    """Writes the averages as plain state dicts; nothing is written if one of them cannot be."""
    from .checkpoints import read, save_file
    from .checkpoints.files import check_target, mebibytes

    keys: list[str | None] = arguments.key or [None]
    outs = [_out_for(arguments, key) for key in keys]
    if len(set(outs)) < len(outs):
        arguments.usage_error(f"OUT should have {{}} in its name for {len(outs)} keys, got {str(arguments.out)!r}.")
    for out in outs:
        if out.exists() and arguments.file.exists() and out.samefile(arguments.file):
            raise ValueError(f"OUT should be another file than FILE, got {str(out)!r} for both; name a new one.")
        check_target(out, force=arguments.force)
    names, base, prefix = _names(arguments.names), arguments.base, arguments.strip_prefix
    averages = [read(arguments.file, key=key, names=names, base=base, strip_prefix=prefix) for key in keys]
    for found, out in zip(averages, outs, strict=True):
        save_file(found.tensors, out, force=arguments.force)
        origin = "plain weights: the file has no average" if found.system == "plain" else f"averaged by {found.system}"
        print(f"{str(out)!r}: {len(found.tensors)} tensors, {mebibytes(found.tensors)} MiB, {origin}")
        if all(name.startswith("module.") for name in found.tensors):
            print("all names begin with 'module.', as a wrapped model's do; --strip-prefix module. takes it off")


def _out_for(arguments: argparse.Namespace, key: str | None) -> Path:
    """What to write for a key; exits if that cannot be the name of a file."""
    out: Path = arguments.out
    name = out.name.replace("{}", key or "average")
    if not out.name:
        arguments.usage_error(f"OUT should name a file, got {str(out)!r}.")
    if Path(name).name != name:
        arguments.usage_error(
            f"OUT should give a file name for each key, but {key!r} cannot be in one; name OUT without {{}}, and "
            "export each key by itself."
        )
    return out.with_name(name)


# --- reconstruct ---


def _reconstruct(arguments: argparse.Namespace) -> None:
    """Writes averages of the lengths that are asked for, or lists what lengths there can be."""
    given = [(name, length) for name in _LENGTHS for length in getattr(arguments, name)]
    if problem := _problem(arguments, given):
        arguments.usage_error(problem)
    if arguments.list:
        facts = _facts_of_snapshots(arguments.file, arguments.step)
        print(json.dumps(facts, indent=2, allow_nan=False) if arguments.json else "\n".join(_lines_of_snapshots(facts)))
        return
    targets = {f"{name}_{length}": _target(arguments, name, length) for name, length in given}
    outs = [arguments.out.with_name(arguments.out.name.replace("{}", label)) for label in targets]
    _check_outs(arguments, outs)
    _write_averages(arguments, list(targets.values()), outs)


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


def _profile(name: str, length: float) -> "Profile":
    from . import posthoc

    if name == "sigma_rel":
        return posthoc.PowerProfile(length)
    return posthoc.ExponentialProfile(length) if name == "half_life" else posthoc.UniformProfile(length)


def _target(arguments: argparse.Namespace, name: str, length: float) -> "Profile":
    """The profile that a flag asks for; exits if the length is out of range."""
    try:
        return _profile(name, length)
    except ValueError as error:
        arguments.usage_error(f"{_flag(name)}: {error}")
        raise


def _check_outs(arguments: argparse.Namespace, outs: Sequence[Path]) -> None:
    """Raises before minutes of work."""
    from .checkpoints.files import check_target
    from .posthoc.snapshots import is_snapshot_name

    for out in outs:
        check_target(out, force=arguments.force)
        if out.resolve().parent == arguments.file.resolve() and is_snapshot_name(out):
            raise ValueError(f"OUT should not be the name of a snapshot in DIR, got {str(out)!r}; choose another.")


def _write_averages(arguments: argparse.Namespace, targets: "list[Profile]", outs: Sequence[Path]) -> None:
    from . import posthoc
    from .checkpoints.files import mebibytes, save_file

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
            f"residual {residual:.2%}, {len(state)} tensors, {mebibytes(state)} MiB"
        )


def _facts_of_snapshots(directory: Path, step: int | None) -> dict[str, Any]:
    """What --list says: the snapshots, and how closely each length that is tried can be rebuilt."""
    from . import posthoc

    snapshots = posthoc.stored(directory, step)
    last = snapshots[-1]
    tensors = [tensor for stream in last.averaged for tensor in stream.values()]
    windows = [1.0, *(1 - one.time / last.time for one in snapshots[:-1])]
    nearest = {min(windows, key=lambda window: abs(window - length)) for length in _LENGTHS["last"]}
    tried = [(name, length) for name in ("sigma_rel", "half_life") for length in _LENGTHS[name]]
    tried += [("last", float(f"{window:.9g}")) for window in sorted(nearest)]
    known = [known for one in snapshots for known in one.snapshots]
    coefficients, residuals = posthoc.fitted(known, [_profile(*one) for one in tried])
    lengths = []
    for (name, length), row, residual in zip(tried, coefficients, residuals, strict=True):
        rounding = posthoc.rounding(last, row)
        worst = max(residual, rounding)
        verdict = "good" if worst <= posthoc.GOOD else "rough" if worst <= _ACCEPTED else "refused"
        lengths.append(
            {"length": name, "value": length, "residual": residual, "rounding": rounding, "verdict": verdict}
        )
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
