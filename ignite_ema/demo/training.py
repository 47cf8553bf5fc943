"""The training runs of the demo: data, network, training, and a run that is stopped and resumed."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver, ProgressBar
from ignite.metrics import Accuracy
from torch import Tensor, nn

from ..handlers.ema import EMAHandler

Batch = tuple[Tensor, Tensor]

TRAINING_IMAGES, BATCH_SIZE, LABEL_NOISE = 1024, 32, 0.3
EPOCH_LENGTH = TRAINING_IMAGES // BATCH_SIZE
EVALUATE_EVERY = EPOCH_LENGTH // 4  # a divisor, so that the last iteration is evaluated
MOMENTUM, MOMENTUM_WARMUP, WARMUP_ITERS = 0.01, 0.2, 160


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


def batches(images: Tensor, labels: Tensor, seed: int, start: int) -> Iterator[Batch]:
    """The batches from iteration ``start`` on; each depends only on its own number, so a resume can start anywhere."""
    for iteration in count(start):
        epoch, position = divmod(iteration, EPOCH_LENGTH)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        chosen = order[position * BATCH_SIZE : (position + 1) * BATCH_SIZE]
        yield images[chosen], labels[chosen]


class Run:
    """A model with its optimizer, trainer and average, both evaluated on ``test`` every few iterations.

    The file ``best`` gets the averaged model whenever its accuracy is the highest so far.
    """

    def __init__(self, test: Batch, seed: int, best: Path | None = None) -> None:
        torch.manual_seed(seed)
        self.model = network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.02)
        self.trainer = create_supervised_trainer(self.model, self.optimizer, nn.functional.cross_entropy)
        self.handler = EMAHandler(self.model, MOMENTUM, MOMENTUM_WARMUP, WARMUP_ITERS, handle_buffers="update")
        self.handler.attach(self.trainer)  # first, so that evaluations and checkpoints find this iteration's average
        online = create_supervised_evaluator(self.model, {"accuracy": Accuracy()})
        averaged = create_supervised_evaluator(self.handler.ema_model, {"accuracy": Accuracy()})
        self.online: list[float] = []  # accuracies in [0, 1]
        self.averaged: list[float] = []

        @self.trainer.on(Events.ITERATION_COMPLETED(every=EVALUATE_EVERY))
        def evaluate() -> None:
            self.online.append(online.run([test]).metrics["accuracy"])
            self.averaged.append(averaged.run([test]).metrics["accuracy"])

        if best is not None:
            saver = _saver(best, {"ema_model": self.handler.ema_model}, score_name="accuracy")
            averaged.add_event_handler(Events.COMPLETED, saver)

    def train(self, data: Batch, seed: int, epochs: int, title: str = "") -> None:
        """Trains up to ``epochs`` from wherever the trainer is; a title adds a bar that shows loss and momentum."""
        if title:
            ProgressBar(persist=True, desc=title).attach(
                self.trainer,
                output_transform=lambda loss: {"loss": loss},
                event_name=Events.EPOCH_COMPLETED(every=max(1, epochs // 5)),  # rarely enough for a log file
                closing_event_name=Events.COMPLETED,
                state_attributes=["ema_momentum"],
            )
        start = self.trainer.state.iteration
        self.trainer.run(batches(*data, seed, start), max_epochs=epochs, epoch_length=EPOCH_LENGTH)

    def to_save(self) -> dict[str, Any]:
        """What a checkpoint needs for an exact resume."""
        return {"model": self.model, "ema_handler": self.handler, "trainer": self.trainer, "optimizer": self.optimizer}

    def state(self) -> dict[str, Any]:
        """What a resumed run has to reproduce: tensors and numbers."""
        modules = {"model": self.model.state_dict(), "ema_model": self.handler.ema_model.state_dict()}
        numbers = [self.handler.num_updates, self.trainer.state.iteration, vars(self.trainer.state)["ema_momentum"]]
        return {**modules, "optimizer": self.optimizer.state_dict()["state"], "count, iteration, momentum": numbers}


def _saver(path: Path, objects: dict[str, Any], **options: Any) -> Checkpoint:
    return Checkpoint(objects, DiskSaver(path.parent, require_empty=False), filename_pattern=path.name, **options)


def stopped_and_resumed(data: Batch, test: Batch, seed: int, epochs: int, stop: int, path: Path) -> Run:
    """Trains to iteration ``stop``, then from the checkpoint to the end with objects that were never trained."""
    stopped = Run(test, seed)
    at_stop = Events.ITERATION_COMPLETED(once=stop)
    stopped.trainer.add_event_handler(at_stop, _saver(path, stopped.to_save()))
    stopped.trainer.add_event_handler(at_stop, stopped.trainer.terminate)
    stopped.train(data, seed, epochs)
    resumed = Run(test, seed + 1)  # other weights: everything that it needs has to come from the file
    Checkpoint.load_objects(resumed.to_save(), path)
    resumed.train(data, seed, epochs, f"Seed {seed}, resumed")
    return resumed
