"""The momentum of every update as Ignite's own loggers show it, through ``state_attributes``."""

import warnings

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import TensorboardLogger
from torch import nn

from ignite_ema import EMAHandler
from ignite_ema.schedules import Cosine, InverseGamma

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
