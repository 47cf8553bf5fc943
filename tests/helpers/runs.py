"""A small training run that depends on nothing but its iteration, and pieces of others."""

import torch
from ignite.engine import Engine, EventEnum, Events
from torch import nn

from ignite_ema import EMAHandler
from ignite_ema.schedules import LinearWarmup
from tests.helpers.models import constant

EPOCH_LENGTH = 10


class Run:
    """Model, optimizer, two handlers (warm-up every 2 iterations; a momentum that the run drives), trainer."""

    def __init__(self, attach=True):
        torch.set_num_threads(1)  # the bits of a sum depend on the number of threads
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        self.model.register_buffer("seen", torch.zeros(1), persistent=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.handler = EMAHandler(self.model, LinearWarmup(0.01, 0.5, 40), handle_buffers="update")
        self.driven = EMAHandler(self.model, 0.25, handle_buffers="ema_train")
        self.trainer = Engine(self.step)
        if attach:
            self.attach()

    def attach(self):
        self.handler.attach(self.trainer, event=Events.ITERATION_COMPLETED(every=2) | Events.EPOCH_COMPLETED)
        self.driven.attach(self.trainer, "driven_momentum")
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=10), self.drive)

    def drive(self):
        self.trainer.state.driven_momentum /= 2

    def step(self, engine, batch):
        torch.manual_seed(engine.state.iteration)
        self.model.seen.copy_(torch.rand(1))
        loss = nn.functional.cross_entropy(self.model(torch.randn(8, 1, 6, 6)), torch.randint(0, 3, (8,)))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def objects(self):
        return {
            "model": self.model,
            "ema_model": self.handler.ema_model,
            "ema_handler": self.handler,
            "driven_handler": self.driven,
            "trainer": self.trainer,
            "optimizer": self.optimizer,
        }

    def train(self, last):
        """Up to the end of iteration ``last``, as if the process ended there."""
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=last), self.trainer.terminate)
        self.trainer.run(max_epochs=100, epoch_length=EPOCH_LENGTH)

    def states(self):
        return {name: thing.state_dict() for name, thing in self.objects().items() if name != "trainer"}


def idle():
    """An engine that does nothing."""
    return Engine(lambda engine, batch: None)


class Steps(EventEnum):
    """Events of a user."""

    DONE = "done"


def scalar_handler(online=1.0, average=5.0):
    """A model of one weight and its handler, with these values."""
    model = constant(online)
    handler = EMAHandler(model, 0.25)
    handler.ema_model.weight.data.fill_(average)
    return model, handler


def evaluator_of(model, kind=Engine):
    """An engine whose output are the weights that it has seen; of a new run too."""
    return kind(lambda engine, batch: model.weight.item())


def trainer_for(model, *others):
    """A trainer whose k-th iteration adds 1 to the weight of every model."""

    def step(engine, batch):
        for each in (model, *others):
            each.weight.data.add_(1)

    return Engine(step)


def averaged(handler):
    """The averaged weight, where there is one."""
    return handler.ema_model.weight.item()
