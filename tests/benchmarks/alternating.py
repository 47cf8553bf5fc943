"""Averages of a model whose weights alternate, so that the exact average is known after any number of updates."""

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import NamedTuple

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from ignite_ema import EMAHandler, ModelAverage
from ignite_ema.schedules import PowerFunction

from .peers import Peer, update_of

__all__ = ["RUNS", "Alternating", "Run"]

_MOMENTUM, _RULE = 0.001, PowerFunction(0.1)


class Alternating:
    """A model whose weights are a, and from its first turn on b, a, b, …; a and b are normal, and always the same."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
        self._weights = [parameter.detach() for parameter in self.model.parameters()]
        self.values = [[torch.randn(w.shape, generator=generator) for w in self._weights] for _ in range(2)]
        self._turns = -1
        self.turn()

    def turn(self) -> None:
        self._turns += 1
        torch._foreach_copy_(self._weights, self.values[self._turns % 2])


class Run(NamedTuple):
    """An average that is updated many times, after a turn each.

    Attributes:
        advance: makes so many updates and gives the seconds that they took.
        averaged: gives the averaged parameters.
        momentum: gives λ from the number of updates already made.
        num_updates: gives the number of updates already made, as it has been counted there.
    """

    advance: Callable[[int], float]
    averaged: Callable[[], Iterable[Tensor]]
    momentum: Callable[[int], float]
    num_updates: Callable[[], int]


def handler_fired(alternating: Alternating) -> Run:
    """Updates by events that are fired; their time is without that of the turns."""
    handler = EMAHandler(alternating.model, momentum=_RULE)
    peer = Peer(handler.attach, handler.ema_model.parameters, handler.state_dict)
    return Run(_firing(alternating, peer), peer.averaged, _RULE, lambda: handler.num_updates)


def average_fired(alternating: Alternating) -> Run:
    average, made = ModelAverage(alternating.model), 0

    def update() -> None:
        nonlocal made
        made += average.update(_MOMENTUM)

    def attach(engine: Engine) -> object:
        return engine.add_event_handler(Events.ITERATION_COMPLETED, update)

    peer = Peer(attach, average.module.parameters, average.state_dict)
    return Run(_firing(alternating, peer), peer.averaged, lambda n: _MOMENTUM, lambda: made)


def handler_run(alternating: Alternating) -> Run:
    """Updates by an engine that runs, an epoch at a time; their time is that of the whole iterations."""
    handler = EMAHandler(alternating.model, momentum=_RULE)
    engine = Engine(lambda engine, batch: alternating.turn())
    handler.attach(engine)

    def advance(updates: int) -> float:
        start = perf_counter()
        engine.run(range(updates), max_epochs=engine.state.epoch + 1)
        return perf_counter() - start

    return Run(advance, handler.ema_model.parameters, _RULE, lambda: handler.num_updates)


def _firing(alternating: Alternating, peer: Peer) -> Callable[[int], float]:
    update, turn = update_of(peer), alternating.turn

    def advance(updates: int) -> float:
        seconds = 0.0
        for _ in range(updates):
            turn()
            start = perf_counter()
            update()
            seconds += perf_counter() - start
        return seconds

    return advance


# With the part of the updates that each makes: an iteration of Ignite takes several times as long as an update.
RUNS: dict[str, tuple[Callable[[Alternating], Run], float]] = {
    "EMAHandler with a schedule": (handler_fired, 1),
    "ModelAverage": (average_fired, 1),
    "EMAHandler, Engine.run": (handler_run, 0.1),
}
