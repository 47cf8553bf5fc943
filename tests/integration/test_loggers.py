"""The momentum of every update as Ignite's own loggers show it, through ``state_attributes``."""

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import TensorboardLogger
from torch import nn

from ignite_ema import EMAHandler
from ignite_ema.schedules import Cosine, InverseGamma


@pytest.mark.filterwarnings("ignore")  # what tensorboard and protobuf have to say of each other
def test_tensorboard_shows_each_handler_under_its_own_name(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    generator, discriminator = Cosine(0.5, 0.0, 24), InverseGamma(gamma=2, power=0.75)
    trainer = Engine(lambda engine, batch: None)
    for name, momentum, event in (
        ("generator", generator, Events.ITERATION_COMPLETED),
        ("discriminator", discriminator, Events.ITERATION_COMPLETED(every=2)),
        ("fixed", 0.25, Events.EPOCH_COMPLETED),
    ):
        EMAHandler(nn.Linear(2, 2), momentum).attach(trainer, name=name, event=event)
    names = ["generator", "discriminator", "fixed"]
    with TensorboardLogger(log_dir=str(tmp_path)) as logger:
        logger.attach_output_handler(trainer, Events.ITERATION_COMPLETED, tag="training", state_attributes=names)
        trainer.run(max_epochs=2, epoch_length=12)
    files = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    seen = {tag: [scalar.value for scalar in files.Scalars(tag)] for tag in files.Tags()["scalars"]}
    # between updates the last momentum, and before them the first
    due = {
        "training/generator": [generator(k - 1) for k in range(1, 25)],
        "training/discriminator": [discriminator(max(0, k // 2 - 1)) for k in range(1, 25)],
        "training/fixed": [0.25] * 24,
    }
    assert seen == {tag: torch.tensor(values).tolist() for tag, values in due.items()}  # float32, as the files hold
