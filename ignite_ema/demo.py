"""The library's main job on real data: ``python -m ignite_ema.demo``.

A small convolutional net learns scikit-learn's handwritten digits from training labels of which 30 % were drawn at
random, at a constant learning rate: its test accuracy jumps from one iteration to the next, that of its average does
not. (A learning rate that decays to zero calms the net too, for which the end has to be known beforehand.) Then one run
is stopped in the middle of an epoch, rebuilt from nothing and resumed from its checkpoint, and has to end with the bits
of the run that never stopped.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import TextIOWrapper
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

import torch
from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver, ProgressBar
from ignite.metrics import Accuracy
from torch import Tensor, nn

from .demo_report import draw, percent, print_table
from .handler import EMAHandler

__all__ = [
    "Run",
    "batches",
    "build",
    "checkpoint",
    "first_difference",
    "load_data",
    "main",
    "network",
    "show_progress",
    "stopped_and_resumed",
    "train",
]

Batch = tuple[Tensor, Tensor]

TRAINING_IMAGES, BATCH_SIZE, LABEL_NOISE = 1024, 32, 0.3
EPOCH_LENGTH = TRAINING_IMAGES // BATCH_SIZE
EVALUATE_EVERY = EPOCH_LENGTH // 4  # a divisor, so that the last iteration is evaluated
LEARNING_RATE, WEIGHT_DECAY = 0.1, 0.02
MOMENTUM, MOMENTUM_WARMUP, WARMUP_ITERS = 0.01, 0.2, 160
EXAMPLES = """examples:
  python -m ignite_ema.demo                          five seeds, 20 epochs each
  python -m ignite_ema.demo --seeds 1 --epochs 5     a quick look
  python -m ignite_ema.demo --out runs/ema --force   into a directory that may hold files already
"""


@dataclass(frozen=True)
class Run:
    """The parts of one training run, and the test accuracies of the online and of the averaged model."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    trainer: Engine
    handler: EMAHandler
    averaged_evaluator: Engine
    online: list[float] = field(default_factory=list)
    averaged: list[float] = field(default_factory=list)

    def to_save(self) -> dict[str, Any]:
        """What a checkpoint has to hold for an exact resume."""
        averaged = {"ema_model": self.handler.ema_model, "ema_handler": self.handler}
        return {"model": self.model, **averaged, "trainer": self.trainer, "optimizer": self.optimizer}

    def state(self) -> dict[str, object]:
        """The states of all of these, and the momentum that the trainer shows."""
        states = {name: part.state_dict() for name, part in self.to_save().items()}
        return {**states, "ema_momentum": getattr(self.trainer.state, "ema_momentum", None)}


def load_data() -> tuple[Batch, Batch]:
    """The training images, some with a wrong label, and the test images with the right ones."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    train, test = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    drawn = torch.randint(10, (TRAINING_IMAGES,), generator=generator)
    noisy = torch.rand(TRAINING_IMAGES, generator=generator) < LABEL_NOISE
    return (images[train], torch.where(noisy, drawn, labels[train])), (images[test], labels[test])


def network() -> nn.Module:
    """Two convolutions with batch norm and a linear layer, for 8 x 8 images."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )


def build(test: Batch, seed: int) -> Run:
    """A fresh model, its optimizer, trainer and average, evaluated on ``test`` every few iterations."""
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY)
    trainer = create_supervised_trainer(model, optimizer, nn.functional.cross_entropy)
    handler = EMAHandler(model, MOMENTUM, MOMENTUM_WARMUP, WARMUP_ITERS, handle_buffers="update")
    handler.attach(trainer)  # first, so that evaluations and checkpoints find the average of their own iteration
    online = create_supervised_evaluator(model, {"accuracy": Accuracy()})
    averaged = create_supervised_evaluator(handler.ema_model, {"accuracy": Accuracy()})
    run = Run(model, optimizer, trainer, handler, averaged)

    @trainer.on(Events.ITERATION_COMPLETED(every=EVALUATE_EVERY))
    def evaluate() -> None:
        run.online.append(online.run([test]).metrics["accuracy"])
        run.averaged.append(averaged.run([test]).metrics["accuracy"])

    return run


def batches(images: Tensor, labels: Tensor, seed: int, start: int) -> Iterator[Batch]:
    """The batches from iteration ``start`` on; each depends on its own number alone, so a resume can start anywhere."""
    for iteration in count(start):
        epoch, position = divmod(iteration, EPOCH_LENGTH)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        chosen = order[position * BATCH_SIZE : (position + 1) * BATCH_SIZE]
        yield images[chosen], labels[chosen]


def train(run: Run, data: Batch, seed: int, epochs: int) -> None:
    """Trains up to ``epochs``, from wherever the trainer is."""
    run.trainer.run(batches(*data, seed, run.trainer.state.iteration), max_epochs=epochs, epoch_length=EPOCH_LENGTH)


def show_progress(run: Run, title: str, epochs: int) -> None:
    """A bar on stderr with the loss and the momentum; it moves seldom enough for a log file."""
    ProgressBar(persist=True, desc=title).attach(
        run.trainer,
        output_transform=lambda loss: {"loss": loss},
        event_name=Events.EPOCH_COMPLETED(every=max(1, epochs // 5)),
        closing_event_name=Events.COMPLETED,
        state_attributes=["ema_momentum"],
    )


def checkpoint(objects: Mapping[str, Any], path: Path, score: str | None = None) -> Checkpoint:
    """Saves the objects as ``path``; with a score only where it is the best so far."""
    saver = DiskSaver(path.parent, require_empty=False)  # it writes a temporary file and renames it
    return Checkpoint(objects, saver, score_name=score, filename_pattern=path.name)


def stopped_and_resumed(data: Batch, test: Batch, seed: int, epochs: int, stop: int, path: Path) -> Run:
    """Trains to iteration ``stop``, then from the checkpoint to the end with objects that were never trained."""
    stopped = build(test, seed)
    at_stop = Events.ITERATION_COMPLETED(once=stop)
    stopped.trainer.add_event_handler(at_stop, checkpoint(stopped.to_save(), path))
    stopped.trainer.add_event_handler(at_stop, stopped.trainer.terminate)
    train(stopped, data, seed, epochs)
    resumed = build(test, seed + 1)  # other weights: all that it should know comes from the file
    Checkpoint.load_objects(resumed.to_save(), path)
    show_progress(resumed, f"Seed {seed}, resumed", epochs)
    train(resumed, data, seed, epochs)
    return resumed


def first_difference(expected: Mapping[str, object], got: Mapping[str, object]) -> str | None:
    """The path of the first tensor or value that differs by a bit, is missing or is not expected; None if none is.

    >>> first_difference({"model": {"weight": torch.ones(2)}}, {"model": {"weight": torch.ones(2) + 1e-7}})
    'model.weight'
    """
    ours, theirs = dict(_leaves(expected)), dict(_leaves(got))
    for path in [*ours, *theirs]:
        if path not in ours or path not in theirs or not _same_bits(ours[path], theirs[path]):
            return path[1:]
    return None


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, (Mapping, list)):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(inner, f"{path}.{key}")
    else:
        yield path, value


def _same_bits(one: object, other: object) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other) and one == other
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


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
