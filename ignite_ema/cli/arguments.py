"""What each command takes. Nothing here imports torch, so that --help answers at once."""

import argparse
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from .. import __version__

__all__ = ["ACCEPTED", "CODES", "parser"]

_AddCommand: TypeAlias = Callable[..., argparse.ArgumentParser]

ACCEPTED = 0.1  # a residual up to which nothing is refused
CODES = """\
exit codes:
  0  done
  1  a file cannot be read, has no such average, or must not be written; the reason is on stderr
  2  wrong usage
  130, 141  stopped by Ctrl-C, or by a closed pipe
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command; ``run`` of what it parses does the work."""
    whole = argparse.ArgumentParser(
        prog="ignite-ema",
        description="Averaged weights in checkpoints of Ignite, ignite_ema, torch, timm, Lightning, mmengine, mmcv,\n"
        "mmagic, diffusers, ema-pytorch and torch_ema. Nothing that a file holds is run.",
        epilog="examples:\n"
        "  ignite-ema inspect checkpoint.pt\n"
        "  ignite-ema export checkpoint.pt averaged.safetensors\n"
        "  ignite-ema reconstruct snapshots --sigma-rel 0.15 --out averaged.pt\n\n" + CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"ignite-ema {__version__}")
    subparsers = whole.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_inspect, _add_export, _add_reconstruct):
        add(partial(_add_command, subparsers))
    return whole


def _add_command(subparsers: Any, name: str, module: str, summary: str, examples: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"examples:\n{examples}\n{CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def run(arguments: argparse.Namespace) -> None:
        getattr(import_module(module, __package__), name)(arguments)

    command.set_defaults(run=run, usage_error=command.error)
    return command


def _add_source(command: argparse.ArgumentParser, **key: Any) -> None:
    command.add_argument("file", metavar="FILE", type=Path, help="the checkpoint: a torch file, or .safetensors")
    command.add_argument("--key", help="which average, where there are several, such as generator_ema", **key)
    command.add_argument(
        "--names",
        metavar="FILE",
        type=Path,
        help="names for diffusers and torch_ema: torch.save(dict(model.named_parameters()), FILE)",
    )
    command.add_argument(
        "--base", metavar="FILE", type=Path, help="what has the tensors that the average lacks, such as frozen ones"
    )
    command.add_argument("--strip-prefix", metavar="PREFIX", help="taken off all names, such as module.")


def _add_inspect(add_command: _AddCommand) -> None:
    command = add_command(
        "inspect",
        ".checkpoints",
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


def _add_export(add_command: _AddCommand) -> None:
    command = add_command(
        "export",
        ".checkpoints",
        "Writes the averaged weights as a plain state dict.",
        "  ignite-ema export checkpoint.pt averaged.pt\n"
        "  ignite-ema export epoch_12.pth averaged.safetensors --force\n"
        "  ignite-ema export unet_ema.pt unet.pt --names names.pt\n"
        "  ignite-ema export lora.pt averaged.pt --base pretrained.safetensors\n"
        "  ignite-ema export gan.pth 'gan_{}.pt' --key generator_ema --key encoder_ema\n",
    )
    _add_source(command, action="append")
    command.add_argument(
        "out", metavar="OUT", type=Path, help="what to write: .pt, .pth or .safetensors; {} stands for the key"
    )
    command.add_argument("--force", action="store_true", help="overwrite OUT where it is there already")


def _add_reconstruct(add_command: _AddCommand) -> None:
    command = add_command(
        "reconstruct",
        ".reconstruct",
        "Rebuilds averages of any length from the snapshots of a PostHocEMA.",
        "  ignite-ema reconstruct snapshots --list\n"
        "  ignite-ema reconstruct snapshots --sigma-rel 0.15 --out averaged.safetensors\n"
        "  ignite-ema reconstruct snapshots --sigma-rel 0.1 0.15 --half-life 0.05 --out 'averaged_{}.pt'\n",
    )
    command.add_argument("file", metavar="DIR", type=Path, help="the directory of the snapshots")
    command.add_argument("--list", action="store_true", help="which snapshots there are, and what lengths they support")
    command.add_argument("--json", action="store_true", help="the list as one JSON object")
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
        "--base", metavar="FILE", type=Path, help="what has the frozen weights where snapshot_frozen.pt is missing"
    )
    command.add_argument(
        "--max-residual",
        metavar="X",
        type=float,
        default=ACCEPTED,
        help="how far from the length asked for (default: %(default)s)",
    )
