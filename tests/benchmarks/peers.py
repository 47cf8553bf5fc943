"""What is measured: for each peer a function from a model to one update of its average, a call without arguments.

The peers of one run share the model, so an update has to leave it as it is.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler as IgniteHandler
from torch import nn

from ignite_ema import EMAHandler

__all__ = ["LIMIT", "OURS", "PEERS", "Update"]

Update: TypeAlias = Callable[[], object]

OURS, LIMIT = "ignite_ema", "lerp"
_MOMENTUM = 0.001


def ignite_ema(model: nn.Module) -> Update:
    engine, update = _event()
    EMAHandler(model, momentum=_MOMENTUM).attach(engine)
    return update


def ignite(model: nn.Module) -> Update:
    engine, update = _event()
    IgniteHandler(model, momentum=_MOMENTUM).attach(engine)
    return update


def event(model: nn.Module) -> Update:
    """What every handler pays: an event whose handler does nothing."""
    engine, update = _event()
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: None)
    return update


def lerp(model: nn.Module) -> Update:
    """The limit: one `lerp_` over as many contiguous floats as the model has parameters."""
    count = sum(p.numel() for p in model.parameters())
    online, averaged = torch.ones(count), torch.ones(count)
    return partial(averaged.lerp_, online, _MOMENTUM)


PEERS: dict[str, Callable[[nn.Module], Update]] = {OURS: ignite_ema, "ignite": ignite, "event": event, LIMIT: lerp}


def _event() -> tuple[Engine, Update]:
    engine = Engine(lambda engine, batch: None)
    return engine, partial(engine.fire_event, Events.ITERATION_COMPLETED)
