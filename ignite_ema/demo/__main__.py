"""The command ``python -m ignite_ema.demo``."""

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path

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


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ignite_ema.demo",
        description="Trains a small net on noisy labels and shows what the average of its weights is worth.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="of each run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="number of seeds (default: %(default)s)")
    out = Path("ignite_ema_demo")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="where files go (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="write into DIR although it holds files")
    parsed = parser.parse_args(arguments)
    for name, least in (("epochs", 2), ("seed", 0), ("seeds", 1)):
        if getattr(parsed, name) < least:
            parser.error(f"--{name} should be at least {least}, got {getattr(parsed, name)}.")
    if missing := [module for module in ("matplotlib", "rich", "sklearn", "tqdm") if find_spec(module) is None]:
        parser.error(
            f'the demo needs {", ".join(missing)}, which is not installed; pip install "ignite-ema[demo]" brings it.'
        )
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
        occupied = any(parsed.out.iterdir())
    except OSError as error:
        parser.error(f"--out should be a directory, got '{parsed.out}' ({error.strerror}); pass another one.")
    if occupied and not parsed.force:
        parser.error(
            f"--out should be a new or an empty directory, got '{parsed.out}', which holds files; pass --force to "
            "overwrite those of an earlier demo, or another --out."
        )
    return parsed


def _difference(expected: Run, got: Run) -> str | None:
    """Where two runs differ by a bit, in the words of ``torch.testing``; None where they do not."""
    try:
        torch.testing.assert_close(got.state(), expected.state(), rtol=0, atol=0, equal_nan=True)
    except AssertionError as error:
        return str(error)
    return None


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
    if (difference := _difference(runs[first], resumed)) is not None:
        print(
            f"The run that resumed at iteration {stop} should end with the bits of the run that never stopped; please "
            f"report this with your versions of torch and pytorch-ignite:\n{difference}",
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
