"""What is measured: for each peer a function from a model to one update of its average, a call without arguments.

Every update goes through an event of an Ignite engine, as it would in a run: our handler and Ignite's are attached, and
what other libraries offer is called by an event handler. The peers of one run share the model, so an update has to
leave it as it is. Buffers are treated as each library does by default; diffusers and torch_ema leave them out.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler as IgniteHandler
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from ignite_ema import EMAHandler

__all__ = ["EVENT", "LIMIT", "OURS", "PEERS", "Unavailable", "Update"]

Update: TypeAlias = Callable[[], object]

OURS, EVENT, LIMIT = "ignite_ema", "event", "lerp"
_MOMENTUM = 0.001
_DECAY = 1 - _MOMENTUM


class Unavailable(Exception):
    """A peer is not installed, or cannot do what is asked for; the text says which."""


def ignite_ema(model: nn.Module) -> Update:
    engine, update = _event()
    EMAHandler(model, momentum=_MOMENTUM, dtype=torch.float32).attach(engine)
    return update


def ignite(model: nn.Module) -> Update:
    _check_float32(model)
    engine, update = _event()
    IgniteHandler(model, momentum=_MOMENTUM).attach(engine)
    return update


def averaged_model(model: nn.Module) -> Update:
    """torch's, as its documentation recommends for speed."""
    _check_float32(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(_DECAY))
    return _called(partial(average.update_parameters, model))


def lightning(model: nn.Module) -> Update:
    """The averaging of the callback ``EMAWeightAveraging``, which is torch's, tensor by tensor."""
    _package("lightning")
    _check_float32(model)
    average = AveragedModel(model, use_buffers=True, avg_fn=get_ema_avg_fn(_DECAY))
    return _called(partial(average.update_parameters, model))


def timm(model: nn.Module) -> Update:
    path = Path(_package("timm"), "utils", "model_ema.py")  # the package itself wants torchvision
    spec = importlib.util.spec_from_file_location("timm_model_ema", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    average = module.ModelEmaV3(model, decay=_DECAY, dtype=torch.float32)
    return _called(partial(average.update, model))


def diffusers(model: nn.Module) -> Update:
    _package("diffusers")
    _check_float32(model)
    from diffusers.training_utils import EMAModel

    average = EMAModel(model.parameters(), decay=_DECAY, foreach=True)
    return _called(lambda: average.step(model.parameters()))


def ema_pytorch(model: nn.Module) -> Update:
    _package("ema_pytorch")
    _check_float32(model)
    from ema_pytorch import EMA

    average = EMA(model, beta=_DECAY, update_after_step=0, update_every=1, include_online_model=False, use_foreach=True)
    return _called(average.update)


def torch_ema(model: nn.Module) -> Update:
    _package("torch_ema")
    _check_float32(model)
    from torch_ema import ExponentialMovingAverage

    average = ExponentialMovingAverage(model.parameters(), decay=_DECAY)
    return _called(average.update)


def event(model: nn.Module) -> Update:
    """What every one of them pays: an event whose handler does nothing."""
    return _called(lambda: None)


def lerp(model: nn.Module) -> Update:
    """The limit: one `lerp_` over contiguous floats that moves as many bytes as an average in float32 has to."""
    moved = sum(p.numel() * (8 + p.element_size()) for p in model.parameters())
    online, averaged = torch.ones(moved // 12), torch.ones(moved // 12)
    return partial(averaged.lerp_, online, _MOMENTUM)


PEERS: dict[str, Callable[[nn.Module], Update]] = {
    OURS: ignite_ema,
    "ignite": ignite,
    "torch AveragedModel": averaged_model,
    "timm": timm,
    "ema-pytorch": ema_pytorch,
    "diffusers": diffusers,
    "torch_ema": torch_ema,
    "lightning": lightning,
    EVENT: event,
    LIMIT: lerp,
}


def _event() -> tuple[Engine, Update]:
    engine = Engine(lambda engine, batch: None)
    return engine, partial(engine.fire_event, Events.ITERATION_COMPLETED)


def _called(function: Callable[[], Any]) -> Update:
    engine, update = _event()
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: function())  # without the engine
    return update


def _package(name: str) -> str:
    """Where a package is; without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(f"{name} is not installed")
    return spec.submodule_search_locations[0]


def _check_float32(model: nn.Module) -> None:
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise Unavailable("it cannot hold the average in float32")
