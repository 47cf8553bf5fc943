"""The command ``ignite-ema``, also ``python -m ignite_ema``: looks into checkpoints, takes or rebuilds the average."""

import io
import os
import sys
from collections.abc import Sequence

from .arguments import parser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; argparse exits by itself, with 2, on wrong usage."""
    arguments = parser().parse_args(argv)
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
