"""The command ``python -m ignite_ema.demo``: runs, a table, a picture."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from . import AVERAGED, DPI, ONLINE, WIDTH, dress, headline, name_lines, training
from .training import Run, stopped_and_resumed


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = "Trains a small net on noisy labels and shows what the average of its weights is worth."
    parser = argparse.ArgumentParser(prog="python -m ignite_ema.demo", description=about)
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="of each run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="number of runs (default: %(default)s)")
    out = Path("ignite_ema_demo")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="where files go (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="write into DIR even if it holds files")
    parsed = parser.parse_args(arguments)
    for name, least in (("epochs", 2), ("seed", 0), ("seeds", 1)):
        if getattr(parsed, name) < least:
            parser.error(f"--{name} should be at least {least}, got {getattr(parsed, name)}.")
    if missing := [module for module in ("matplotlib", "sklearn", "tqdm") if find_spec(module) is None]:
        parser.error(f'the demo needs {", ".join(missing)}, not installed here; pip install "ignite-ema[demo]".')
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out should be a directory, got '{parsed.out}' ({error.strerror}); pass another one.")
    if any(parsed.out.iterdir()) and not parsed.force:
        parser.error(f"--out should be empty, but '{parsed.out}' holds files; pass --force to overwrite them.")
    return parsed


def _percent(values: Sequence[float]) -> str:
    """The mean and, for several values, the standard deviation."""
    return f"{100 * mean(values):.1f}" + (f" (sd {100 * stdev(values):.1f})" if len(values) > 1 else "")


def _at_the_end(runs: Mapping[int, Run]) -> tuple[str, str]:
    return _percent([run.online[-1] for run in runs.values()]), _percent([run.averaged[-1] for run in runs.values()])


def _table(runs: Mapping[int, Run]) -> str:
    """Online and averaged test accuracy at the end, and the range of each over the last quarter."""
    lines = ["Test accuracy (%) at the end, and its range over the last quarter"]
    lines.append(f"{'seed':>4}{'online':>22}{'averaged':>22}{'gain':>7}")
    for seed, run in runs.items():
        tails = [curve[-(len(curve) // 4) :] for curve in (run.online, run.averaged)]
        cells = [f"{_percent(tail[-1:])}, {100 * min(tail):.1f} to {100 * max(tail):.1f}" for tail in tails]
        lines.append(f"{seed:>4}{cells[0]:>22}{cells[1]:>22}{100 * (run.averaged[-1] - run.online[-1]):>+7.1f}")
    online, averaged = _at_the_end(runs)
    return "\n".join([*lines, f"mean{online:>22}{averaged:>22}"])


def _draw(runs: Mapping[int, Run], path: Path) -> None:
    """Draws both accuracies over the iterations: the first seed strong, the others light."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    first, *others = runs
    iterations = [training.EVALUATE_EVERY * (i + 1) for i in range(len(runs[first].online))]
    lowest = min(min(run.online[4:] + run.averaged[4:]) for run in runs.values())
    dress(axes, xlabel="iteration", ylabel="test accuracy (%)", xlim=(0, iterations[-1]))
    axes.set_ylim(max(0, 10 * int(10 * lowest) - 5), 100)
    axes.axvspan(0, min(training.WARMUP_ITERS, iterations[-1]), color="0.95", lw=0)
    note: dict[str, Any] = {"color": "0.4", "fontsize": 8, "transform": axes.transAxes}
    axes.text(0.05, 0.04, "warm-up", **note)
    for name, color, width in (("online", ONLINE, 1.1), ("averaged", AVERAGED, 2.4)):
        for seed in [*others, first]:
            accuracies = [100 * accuracy for accuracy in getattr(runs[seed], name)]
            lw, alpha, label = (width, 1.0, name) if seed == first else (width / 2, 0.35, "_")
            axes.plot(iterations, accuracies, color=color, lw=lw, alpha=alpha, label=label)
    name_lines(axes)
    online, averaged = _at_the_end(runs)
    over = f"{len(runs)} seeds" if others else f"seed {first}"
    if others:
        axes.text(0.99, 0.04, f"light: all but seed {first}", ha="right", **note)
    noise = f"Digits, {100 * training.LABEL_NOISE:.0f} % of the training labels random, constant learning rate"
    headline(figure, f"{noise}\nAt the end (%): averaged {averaged}, online {online}; {over}")
    figure.savefig(path, pil_kwargs={"optimize": True})


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns its exit status: 0, or 1 if the resumed run differs."""
    options = _parsed(arguments)
    torch.set_num_threads(1)  # on tensors this small, threads cost more than they save
    (data, test), out, epochs, first = training.load_data(), options.out, options.epochs, options.seed
    runs: dict[int, Run] = {}
    for seed in range(first, first + options.seeds):
        runs[seed] = Run(test, seed, out / f"best_seed{seed}.pt")
        runs[seed].train(data, seed, epochs, f"Seed {seed}")
    stop, path = training.EPOCH_LENGTH * (2 * epochs + 1) // 4, out / f"resume_seed{first}.pt"  # within an epoch
    resumed = stopped_and_resumed(data, test, first, epochs, stop, path)
    print(_table(runs))
    _draw(runs, out / "demo.png")
    try:
        torch.testing.assert_close(resumed.state(), runs[first].state(), rtol=0, atol=0, equal_nan=True)
    except AssertionError as difference:
        print(
            f"The run resumed at iteration {stop} should end with the bits of the first:\n{difference}", file=sys.stderr
        )
        return 1
    best = max(runs, key=lambda seed: max(runs[seed].averaged))
    print(
        f"Resume   {path}: seed {first}, stopped at iteration {stop}, rebuilt, loaded and finished,\n"
        "         has the bits of the run that never stopped: weights, average, count, momentum and optimizer.\n"
        f"Best     {out / f'best_seed{best}.pt'}: the averaged model at its best on the test images,\n"
        f"         {_percent([max(runs[best].averaged)])} %; one file for each seed.\n"
        f"Picture  {out / 'demo.png'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
