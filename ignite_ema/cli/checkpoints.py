"""The commands ``ignite-ema inspect`` and ``ignite-ema export``: what is in a checkpoint, and its average taken out."""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.formats import Found
from ..checkpoints.memory import REPEATED, is_dense, mebibytes, view_of
from ..checkpoints.naming import listed, quoted
from ..checkpoints.reading import Averaged, SeveralAverages, choices, read_mapped, read_part
from ..checkpoints.safe_load import load_file
from ..checkpoints.saving import check_target, save_file

__all__ = ["export", "inspect"]

_WIDTH = 40  # of the longest bar
_WRAPPER = "module."


def _names(path: Path | None) -> Mapping[str, Tensor] | None:
    if path is None:
        return None
    if path.suffix == ".safetensors":
        raise ValueError(
            f"{quoted(path)} should keep the order of the parameters, but .safetensors sorts them; save "
            "dict(model.named_parameters()) with torch.save."
        )
    names: Mapping[str, Tensor] = load_file(path)
    return names


def inspect(arguments: argparse.Namespace) -> None:
    """Prints what a checkpoint holds: of several averages which, of one its tensors and its distance to the model."""
    try:
        source = arguments.file, arguments.key, _names(arguments.names)
        found, lacks = read_part(*source, arguments.base, arguments.strip_prefix)
    except SeveralAverages:
        several = [one for one in choices(arguments.file) if arguments.key is None or one.answers_to(arguments.key)]
        print(
            _json_of_several(arguments.file, several) if arguments.json else _list_of_several(arguments.file, several)
        )
        return
    facts = _facts(arguments.file, found, lacks)
    layers = None if found.online is None else _distances(found.tensors, found.online)
    print(_json_of_one(facts, layers) if arguments.json else "\n".join(_lines(facts, layers)))


def _list_of_several(file: Path, several: list[Found]) -> str:
    lines = [f"file      {quoted(file)}"]
    for one in several:
        note = f"; {one.note}" if one.note else ""
        lines.append(f"average   {quoted(one.label)}  ({one.system}, {len(one.tensors)} tensors{note})")
    lines.append("choose one by its key: --key, or its last part")
    return "\n".join(lines)


def _json_of_several(file: Path, several: list[Found]) -> str:
    averages = [
        {"key": one.label, "format": one.system, "tensors": len(one.tensors), "note": one.note or None}
        for one in several
    ]
    return json.dumps({"file": str(file), "averages": averages}, indent=2)


def _facts(file: Path, found: Averaged, lacks: list[str]) -> dict[str, Any]:
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in found.tensors.values())
    return {
        "file": str(file),
        "format": found.system,
        "tensors": len(found.tensors),
        "types": dict(types.most_common()),
        "bytes": sum(tensor.nbytes for tensor in found.tensors.values() if is_dense(tensor)),
        "num_updates": found.num_updates,
        "sparse": sum(not is_dense(tensor) for tensor in found.tensors.values()),
        "lacks": lacks,
    }


def _distances(averaged: Mapping[str, Tensor], online: Mapping[str, Tensor]) -> dict[str | None, float]:
    """The distance of each layer, the names without their last parts, and of all floating-point tensors under None."""
    squares: dict[str | None, tuple[float, float]] = {None: (0.0, 0.0)}
    known: dict[Any, tuple[float, float]] = {}  # of tied tensors, which a small file can have many of
    for name, tensor in averaged.items():
        if not (is_dense(tensor) and is_dense(online[name])):
            continue
        if tensor.is_floating_point() or tensor.is_complex():
            pair = view_of(tensor), view_of(online[name])
            if pair not in known:
                known[pair] = _square(tensor, online[name]), _square(online[name])
            apart, norm = known[pair]
            for key in (None, name.rpartition(".")[0]):
                before = squares.get(key, (0.0, 0.0))
                squares[key] = before[0] + apart, before[1] + norm
    return {layer: _ratio(*pair) for layer, pair in squares.items()}


def _json_of_one(facts: Mapping[str, Any], layers: Mapping[str | None, float] | None) -> str:
    """JSON has no infinities: a distance that is none is null."""
    finite = None if layers is None else {key: one if math.isfinite(one) else None for key, one in layers.items()}
    distance = None if finite is None else finite.pop(None)
    return json.dumps({**facts, "distance": distance, "layers": finite}, indent=2, allow_nan=False)


def _lines(facts: Mapping[str, Any], layers: Mapping[str | None, float] | None) -> Iterator[str]:
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
    width = max(map(len, ratios), default=0)
    block = _block()
    for layer, ratio in ratios.items():
        bar = block * math.ceil(_WIDTH * ratio / largest) if largest and math.isfinite(ratio) else ""
        yield f"distance  {ratio:.3e}  {layer:<{width}}  {bar}".rstrip()


def _square(tensor: Tensor, other: Tensor | None = None) -> float:
    """‖tensor - other‖², in float64."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    apart = tensor.to(wide) if other is None else tensor.to(wide) - other.to(wide)
    return float(torch.linalg.vector_norm(apart)) ** 2


def _ratio(apart: float, norm: float) -> float:
    if norm == 0:
        return math.inf if apart else 0.0
    return math.sqrt(apart / norm)


def _block() -> str:
    """What bars are made of: a block where stdout can show it."""
    try:
        "█".encode(sys.stdout.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return "#"
    return "█"


def export(arguments: argparse.Namespace) -> None:
    """Writes the averages as plain state dicts; nothing is written where one of them cannot be."""
    keys: list[str | None] = arguments.key or [None]
    outs = [_out(arguments, key) for key in keys]
    if len(set(outs)) < len(outs):
        arguments.usage_error(f"OUT should have {{}} in its name for {len(outs)} keys, got {quoted(arguments.out)}.")
    for out in outs:
        if out.exists() and arguments.file.exists() and out.samefile(arguments.file):
            raise ValueError(f"OUT should be another file than FILE, got {quoted(out)} for both; name a new one.")
        check_target(out, force=arguments.force)
    names, base, prefix = _names(arguments.names), arguments.base, arguments.strip_prefix
    averages = [read_mapped(arguments.file, key, names, base, prefix) for key in keys]
    for found, out in zip(averages, outs, strict=True):
        _check_copies(found.tensors, out)
    for found, out in zip(averages, outs, strict=True):
        save_file(found.tensors, out, force=arguments.force)
        origin = "plain weights: the file has no average" if found.system == "plain" else f"averaged by {found.system}"
        print(f"{str(out)!r}: {len(found.tensors)} tensors, {mebibytes(found.tensors)} MiB, {origin}")
        if all(name.startswith(_WRAPPER) for name in found.tensors):
            print(f"all names begin with {_WRAPPER!r}, as a wrapped model's do; --strip-prefix {_WRAPPER} takes it off")


def _out(arguments: argparse.Namespace, key: str | None) -> Path:
    """What to write for a key; exits where that is no name of a file."""
    out: Path = arguments.out
    if not out.name:
        arguments.usage_error(f"OUT should name a file, got {quoted(out)}.")
    try:
        return out.with_name(out.name.replace("{}", key or "average"))
    except ValueError:
        arguments.usage_error(
            f"OUT should give a file name for each key, but {quoted(key)} cannot be in one; name OUT without {{}}, and "
            "export each key by itself."
        )
        raise


def _check_copies(tensors: Mapping[str, Tensor], out: Path) -> None:
    """Refuses to make a large file of a small one, in which many names have the same memory."""
    if out.suffix != ".safetensors":
        return
    dense = [tensor for tensor in tensors.values() if is_dense(tensor)]
    storages = [tensor.untyped_storage() for tensor in dense]
    held = sum({one.data_ptr(): one.nbytes() for one in storages}.values())
    if sum(tensor.nbytes for tensor in dense) > 2 * held + REPEATED:
        raise ValueError(
            f"{quoted(out)} should be about as large as what its tensors have in memory, {held / 2**20:.3f} MiB, but "
            f"they share it, and safetensors has a copy for each name, {mebibytes(tensors)} MiB in all; write a .pt "
            "file, which keeps them shared."
        )
