"""The commands ``ignite-ema inspect`` and ``ignite-ema export``: what is in a checkpoint, and its average taken out."""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from ..checkpoints.memory import is_dense, mebibytes
from ..checkpoints.reading import SeveralAverages, read_average, read_mapped
from ..checkpoints.safe_load import load_file
from ..checkpoints.saving import save_file

__all__ = ["AddCommand", "add_export", "add_inspect"]

AddCommand: TypeAlias = Callable[..., argparse.ArgumentParser]

_WIDTH = 40  # of the longest bar


def _add_source(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", type=Path, help="the checkpoint: a torch file, or .safetensors")
    command.add_argument("--key", help="which average, where there are several, such as generator_ema")
    command.add_argument(
        "--names",
        metavar="FILE",
        type=Path,
        help="names for diffusers and torch_ema: torch.save(dict(model.named_parameters()), FILE)",
    )


def _names(path: Path | None) -> Mapping[str, Tensor] | None:
    if path is None:
        return None
    if path.suffix == ".safetensors":
        raise ValueError(
            f"'{path}' should keep the order of the parameters, but .safetensors sorts them; save "
            "dict(model.named_parameters()) with torch.save."
        )
    names: Mapping[str, Tensor] = load_file(path)
    return names


def add_inspect(add_command: AddCommand) -> None:
    """The command ``inspect``."""
    command = add_command(
        "inspect",
        _inspect,
        "What is in a checkpoint, and how far the average is from the model.",
        "  ignite-ema inspect checkpoint.pt\n"
        "  ignite-ema inspect gan.pth --key generator_ema\n"
        "  ignite-ema inspect checkpoint.pt | grep ^distance\n\n"
        "A distance is |average - model| / |model|, of all floating-point tensors, or of one layer.\n",
    )
    _add_source(command)


def _inspect(arguments: argparse.Namespace) -> None:
    try:
        found = read_mapped(arguments.file, arguments.key, _names(arguments.names))
    except SeveralAverages as several:
        print(f"file      {arguments.file}")
        for one in several.choices:
            note = f"; {one.note}" if one.note else ""
            print(f"average   {one.label}  ({one.system}, {len(one.tensors)} tensors{note})")
        raise
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in found.tensors.values())
    rows = {
        "file": arguments.file,
        "format": found.system if found.system != "plain" else "plain (no average)",
        "tensors": f"{len(found.tensors)} ({', '.join(f'{count} {name}' for name, count in types.most_common())})",
        "size": f"{mebibytes(found.tensors)} MiB",
        "updates": "not stated" if found.num_updates is None else found.num_updates,
    }
    if sparse := sum(not is_dense(tensor) for tensor in found.tensors.values()):
        rows["sparse"] = f"{sparse} of the tensors, in neither the size nor the distance"
    for name, value in rows.items():
        print(f"{name:<8}  {value}")
    if found.online is None:
        print("distance  not known: the file has no averaged and raw weights side by side")
        return
    for line in _distances(found.tensors, found.online):
        print(line)


def _distances(averaged: Mapping[str, Tensor], online: Mapping[str, Tensor]) -> Iterator[str]:
    """The distance of all floating-point tensors, then a line for each layer: the names without their last parts."""
    squares: dict[str, tuple[float, float]] = {}
    for name, tensor in averaged.items():
        if not (is_dense(tensor) and is_dense(online[name])):
            continue
        if tensor.is_floating_point() or tensor.is_complex():
            layer = name.rpartition(".")[0] or "(root)"
            apart, norm = squares.get(layer, (0.0, 0.0))
            squares[layer] = apart + _square(tensor, online[name]), norm + _square(online[name])
    total = _ratio(sum(apart for apart, _ in squares.values()), sum(norm for _, norm in squares.values()))
    yield f"distance  {total:.3e}  all"
    ratios = {layer: _ratio(*pair) for layer, pair in squares.items()}
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


def add_export(add_command: AddCommand) -> None:
    """The command ``export``."""
    command = add_command(
        "export",
        _export,
        "Writes the averaged weights as a plain state dict.",
        "  ignite-ema export checkpoint.pt averaged.pt\n"
        "  ignite-ema export epoch_12.pth averaged.safetensors --force\n"
        "  ignite-ema export unet_ema.pt unet.pt --names names.pt\n",
    )
    _add_source(command)
    command.add_argument("out", metavar="OUT", type=Path, help="what to write: .pt, .pth or .safetensors")
    command.add_argument("--force", action="store_true", help="overwrite OUT where it is there already")


def _export(arguments: argparse.Namespace) -> None:
    if arguments.out.exists() and arguments.file.exists() and arguments.out.samefile(arguments.file):
        raise ValueError(f"OUT should be another file than FILE, got '{arguments.out}' for both; name a new one.")
    found = read_average(arguments.file, arguments.key, _names(arguments.names))
    save_file(found.tensors, arguments.out, force=arguments.force)
    print(f"{arguments.out}: {len(found.tensors)} tensors, {mebibytes(found.tensors)} MiB, averaged by {found.system}")
