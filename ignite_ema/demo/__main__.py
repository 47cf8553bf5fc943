"""The command ``python -m ignite_ema.demo``."""

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from tempfile import TemporaryFile
from typing import NoReturn

import torch
from ignite.engine import Events

from .report import draw, percent, print_table
from .training import (
    EPOCH_LENGTH,
    EVALUATE_EVERY,
    LABEL_NOISE,
    WARMUP_ITERS,
    Run,
    build,
    checkpoint,
    first_difference,
    load_data,
    show_progress,
    stopped_and_resumed,
    train,
)

__all__ = ["main"]

EXAMPLES = """examples:
  python -m ignite_ema.demo                          five seeds, 20 epochs each
  python -m ignite_ema.demo --seeds 1 --epochs 5     a quick look
  python -m ignite_ema.demo --out runs/ema --force   into a directory that may hold files already
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        way_out = "" if message.endswith(".") else "; see --help."
        self.exit(2, f"{self.prog}: {message}{way_out}\n")

    def add_number(self, name: str, low: int, high: int, default: int, text: str) -> None:
        def number(given: str) -> int:
            if given.isascii() and given.isdigit() and low <= int(given) <= high:
                return int(given)
            raise argparse.ArgumentTypeError(
                f"should be a whole number from {low} to {high}, got {given!r}; leave it out for {default}."
            )

        self.add_argument(name, type=number, default=default, metavar="N", help=f"{text} (default: {default})")


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m ignite_ema.demo",
        description="Trains a small net on noisy labels and shows what the average of its weights is worth.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_number("--epochs", 2, 999, 20, "epochs of each run")
    parser.add_number("--seed", 0, 999_999, 0, "the first seed")
    parser.add_number("--seeds", 1, 99, 5, "number of seeds")
    out = Path("ignite_ema_demo")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="where files go (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="write into DIR although it holds files")
    parsed = parser.parse_args(arguments)
    missing = [module for module in ("matplotlib", "rich", "sklearn", "tqdm") if find_spec(module) is None]
    if missing:
        names = ", ".join(missing)
        parser.error(
            f'the demo\'s packages should be installed, got no {names}; pip install "ignite-ema[demo]" brings them.'
        )
    _make_directory(parser, parsed.out, parsed.force)
    return parsed


def _make_directory(parser: argparse.ArgumentParser, out: Path, force: bool) -> None:
    try:
        if not out.exists():
            out.mkdir(parents=True)
        occupied = any(out.iterdir())
        TemporaryFile(dir=out).close()
    except OSError as error:
        reason = error.strerror or error
        parser.error(f"--out should be a directory to write to, got '{out}' ({reason}); pass another one.")
    if occupied and not force:
        parser.error(
            f"--out should be a new or an empty directory, got '{out}', which holds files; pass --force to write there "
            "all the same, over the files of an earlier demo, or pass another --out."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns its exit status: 0, or 1 where the resumed run differs."""
    started = time.perf_counter()
    options = _parsed(arguments)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # ± is not worth a traceback on an ASCII terminal
    torch.set_num_threads(1)  # on tensors this small, threads cost more than they bring
    (data, test), out, epochs, first = load_data(), options.out, options.epochs, options.seed
    runs: dict[int, Run] = {}
    for seed in range(first, first + options.seeds):
        runs[seed] = run = build(test, seed)
        best = checkpoint({"ema_model": run.handler.ema_model}, out / f"best_seed{seed}.pt", score="accuracy")
        run.averaged_evaluator.add_event_handler(Events.COMPLETED, best)
        show_progress(run, f"Seed {seed}", epochs)
        train(run, data, seed, epochs)
    stop, path = EPOCH_LENGTH * epochs // 2 + EPOCH_LENGTH // 4, out / f"resume_seed{first}.pt"
    resumed = stopped_and_resumed(data, test, first, epochs, stop, path)
    print_table(runs)
    title = f"Digits, {100 * LABEL_NOISE:.0f} % of the training labels random, constant learning rate"
    draw(runs, title, EVALUATE_EVERY, WARMUP_ITERS, out / "demo.png")
    difference = first_difference(runs[first].state(), resumed.state())
    if difference is not None:
        print(
            f"The run that resumed at iteration {stop} should end with the bits of the run that never stopped, got a "
            f"difference, first in '{difference}'; please report it with your versions of torch and pytorch-ignite.",
            file=sys.stderr,
        )
        return 1
    winner = max(runs, key=lambda seed: max(runs[seed].averaged))
    print(
        f"Resume   {path}: seed {first}, stopped at iteration {stop} of {EPOCH_LENGTH * epochs}, rebuilt,\n"
        "         loaded and finished, has the bits of the run that never stopped: weights,\n"
        "         average, count, momentum and optimizer.\n"
        f"Best     {out / f'best_seed{winner}.pt'}: the averaged model at its best on the test images,\n"
        f"         {percent([max(runs[winner].averaged)])} %; one file for each seed.\n"
        f"Picture  {out / 'demo.png'}\n"
        f"Took     {time.perf_counter() - started:.1f} s, imports apart"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
