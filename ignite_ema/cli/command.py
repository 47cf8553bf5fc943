"""The command ``ignite-ema``, also ``python -m ignite_ema``: looks into checkpoints, takes or rebuilds the average."""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

from .checkpoints import add_export, add_inspect
from .reconstruct import add_reconstruct

__all__ = ["main"]

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
        print(f"ignite-ema: '{arguments.file}' cannot be worked on: {reason}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ignite-ema",
        description="Averaged weights in checkpoints of Ignite, ignite_ema, torch, timm, Lightning, mmengine, mmcv,\n"
        "mmagic, diffusers, ema-pytorch and torch_ema. Nothing that a file holds is run.",
        epilog="examples:\n"
        "  ignite-ema inspect checkpoint.pt\n"
        "  ignite-ema export checkpoint.pt averaged.safetensors\n"
        "  ignite-ema reconstruct snapshots --sigma-rel 0.15 --out averaged.pt\n\n" + _CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ignite-ema {version('ignite-ema')}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_inspect, add_export, add_reconstruct):
        add(partial(_add_command, subparsers))
    return parser


def _add_command(subparsers: Any, name: str, run: Any, summary: str, examples: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"examples:\n{examples}\n{_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command
