"""The momentum of every update as Ignite's own loggers show it, through ``state_attributes``."""

import io
import re
import warnings

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar, TensorboardLogger
from torch import nn

from ignite_ema import EMAHandler
from ignite_ema.schedules import Annealing, Cosine, InverseGamma

ITERATIONS = 24


def trainer_with(**attached):
    """A trainer that has a handler for each name, given as (schedule, event)."""
    trainer = Engine(lambda engine, batch: None)
    for name, (schedule, event) in attached.items():
        EMAHandler(nn.Linear(2, 2), schedule).attach(trainer, name=name, event=event)
    return trainer


def run(trainer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what tqdm, tensorboard and protobuf have to say of each other
        trainer.run(max_epochs=2, epoch_length=ITERATIONS // 2)


def logged(trainer, path):
    """What a TensorboardLogger writes into a file: {tag: {iteration: value}}."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        names = [name for name in vars(trainer.state) if name.endswith("momentum")]
        with TensorboardLogger(log_dir=str(path)) as logger:
            logger.attach_output_handler(trainer, Events.ITERATION_COMPLETED, tag="training", state_attributes=names)
            run(trainer)
        files = event_accumulator.EventAccumulator(str(path)).Reload()
    return {tag: {scalar.step: scalar.value for scalar in files.Scalars(tag)} for tag in files.Tags()["scalars"]}


def float32(value):
    """As an event file holds it."""
    return torch.tensor(value, dtype=torch.float32).item()


def every(interval):
    return Events.ITERATION_COMPLETED(every=interval)


def test_tensorboard_shows_each_handler_under_its_own_name(tmp_path):
    generator, discriminator = Cosine(0.5, 0.0, ITERATIONS), InverseGamma(gamma=2, power=0.75)
    trainer = trainer_with(
        generator_momentum=(generator, Events.ITERATION_COMPLETED),
        discriminator_momentum=(discriminator, Events.ITERATION_COMPLETED(every=2)),
        fixed_momentum=(0.25, Events.EPOCH_COMPLETED),
    )
    seen = logged(trainer, tmp_path)
    iterations = range(1, ITERATIONS + 1)  # between updates the last momentum, and before them the first
    assert seen == {
        "training/generator_momentum": {k: float32(generator(k - 1)) for k in iterations},
        "training/discriminator_momentum": {k: float32(discriminator(max(0, k // 2 - 1))) for k in iterations},
        "training/fixed_momentum": dict.fromkeys(iterations, 0.25),
    }


@pytest.mark.parametrize("interval", [1, 3])
def test_the_progress_bar_shows_the_momentum(interval):
    schedule, text = Annealing(0.05, gamma=3), io.StringIO()
    trainer = trainer_with(ema_momentum=(schedule, every(interval)))
    bar = ProgressBar(persist=True, file=text, mininterval=0, ncols=200)
    bar.attach(trainer, state_attributes=["ema_momentum"])
    run(trainer)
    shown = {}
    for line in text.getvalue().replace("\r", "\n").splitlines():
        if found := re.match(r"Epoch \[(\d)/2\]: \[(\d+)/12\].*ema_momentum=([\d.e-]+)", line):
            epoch, iteration, value = found.groups()
            shown.setdefault(12 * int(epoch) - 12 + int(iteration), float(value))  # tqdm moves the bar, then the text
    for k in range(1, ITERATIONS + 1):
        assert shown[k] == pytest.approx(schedule(max(0, k // interval - 1)), rel=5e-3)  # tqdm shows three digits
