"""Who is measured: for each library a function that makes its average of a model, as its documentation recommends.

Every update goes through an event of an Ignite engine, as it would in a run: our handler and Ignite's are attached, and
what other libraries offer is called by an event handler. Averages of one model do not disturb each other: an update
leaves the model as it is. Buffers are treated as each library does by default; diffusers and torch_ema leave them out.
"""

import importlib
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler as IgniteHandler
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from ignite_ema import EMAHandler

OURS, LIMIT, FLOOR = "ignite_ema", "lerp", "foreach lerp"
_MOMENTUM = 0.001


class Unavailable(Exception):
    """A peer is not installed, or cannot do what is asked for; the text says which."""


@dataclass(frozen=True)
class Peer:
    """The average that one library keeps of one model.

    Attributes:
        attach: has an engine update the average at each completed iteration.
        averaged: gives its parameters as they are now, in the order of the model.
        state_dict: gives what its users put into a checkpoint.
        swapped: gives a context in which the model holds the averaged weights; None where the library has none.
    """

    attach: Callable
    averaged: Callable
    state_dict: Callable
    swapped: Callable | None = None


# Each makes an average of a model from a momentum and the type that holds it (None: that of the model). The first two
# updates may copy the model, whatever the momentum: some libraries have it so, and it cannot be changed in all.


def ignite_ema(model, momentum, dtype, **options):
    handler = EMAHandler(model, momentum=momentum, dtype=dtype, **options)
    return Peer(handler.attach, handler.ema_model.parameters, handler.state_dict, handler.swapped)


def ignite(model, momentum, dtype):
    handler = IgniteHandler(model, momentum=momentum)
    handler.ema_model.to(dtype=dtype)
    return Peer(handler.attach, handler.ema_model.parameters, handler.ema_model.state_dict)


def averaged_model(model, momentum, dtype):
    """torch's, as its documentation recommends for speed."""
    if any(parameter.dtype != (dtype or parameter.dtype) for parameter in model.parameters()):
        raise Unavailable("its multi_avg_fn cannot average weights of one type in another")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - momentum))
    return Peer(_at_event(partial(average.update_parameters, model)), average.module.parameters, average.state_dict)


def lightning(model, momentum, dtype):
    """The callback ``EMAWeightAveraging``, without its trainer: torch's averaging, tensor by tensor."""
    callback = _imported("lightning.pytorch.callbacks").EMAWeightAveraging(decay=1 - momentum)
    callback._average_model = average = AveragedModel(model, use_buffers=True, avg_fn=get_ema_avg_fn(1 - momentum))
    average.module.to(dtype=dtype)

    @contextmanager
    def swapped():
        callback._swap_models(model)
        yield
        callback._swap_models(model)

    update = _at_event(partial(average.update_parameters, model))
    return Peer(update, average.module.parameters, average.state_dict, swapped)


def timm(model, momentum, dtype):
    average = _imported("timm.utils").ModelEmaV3(model, decay=1 - momentum, dtype=dtype)
    return Peer(_at_event(partial(average.update, model)), average.module.parameters, average.module.state_dict)


def diffusers(model, momentum, dtype):
    make = _imported("diffusers.training_utils").EMAModel
    average = make(model.parameters(), decay=1 - momentum, min_decay=1 - momentum, foreach=True)
    average.to(dtype=dtype)

    @contextmanager
    def swapped():
        average.store(model.parameters())
        average.copy_to(model.parameters())
        yield
        average.restore(model.parameters())

    update = _at_event(lambda: average.step(model.parameters()))
    return Peer(update, lambda: average.shadow_params, average.state_dict, swapped)


def ema_pytorch(model, momentum, dtype):
    average = _imported("ema_pytorch").EMA(
        model,
        ema_model=None if dtype is None else deepcopy(model).to(dtype=dtype),
        beta=1 - momentum,
        min_value=1 - momentum,
        update_after_step=0,
        update_every=1,
        include_online_model=False,
        use_foreach=True,
        coerce_dtype=dtype is not None,
    )
    return Peer(_at_event(average.update), average.ema_model.parameters, average.state_dict)


def torch_ema(model, momentum, dtype):
    make = _imported("torch_ema").ExponentialMovingAverage
    average = make(model.parameters(), decay=1 - momentum, use_num_updates=False)
    average.to(dtype=dtype)
    update = _at_event(average.update)
    return Peer(update, lambda: average.shadow_params, average.state_dict, average.average_parameters)


PEERS = {
    OURS: ignite_ema,
    "ignite": ignite,
    "AveragedModel": averaged_model,
    "timm": timm,
    "ema-pytorch": ema_pytorch,
    "diffusers": diffusers,
    "torch_ema": torch_ema,
    "lightning": lightning,
}


def built(builds, model, momentum, dtype):
    """The averages of the peers, and of those that cannot take part the reasons."""
    peers, missing = {}, {}
    for name, build in builds.items():
        try:
            peers[name] = build(model, momentum, dtype)
        except Unavailable as reason:
            missing[name] = str(reason)
    return peers, missing


def update_of(peer):
    """One update of the average: an event of an engine of its own."""
    engine = Engine(lambda engine, batch: None)
    peer.attach(engine)
    return partial(engine.fire_event, Events.ITERATION_COMPLETED)


def event():
    """What every one of them pays: an event whose handler does nothing."""
    return update_of(Peer(_at_event(lambda: None), list, dict))


def limit(model, dtype=None):
    """One `lerp_` over contiguous floats that moves as many bytes as any average has to: two reads and a write."""
    moved = sum(p.numel() * (p.element_size() + 2 * (dtype or p.dtype).itemsize) for p in model.parameters())
    device = next(model.parameters()).device
    online, averaged = torch.ones(moved // 12, device=device), torch.ones(moved // 12, device=device)
    return partial(averaged.lerp_, online, _MOMENTUM)


def floor(model):
    """One bare foreach operation on the same tensors: what every average takes that leaves them where they are."""
    online = [parameter.detach() for parameter in model.parameters()]
    return partial(torch._foreach_lerp_, [parameter.clone() for parameter in online], online, _MOMENTUM)


def _at_event(function):
    # The lambda takes no engine, and Ignite looks at that when it is added.
    return lambda engine: engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: function())


def _imported(module):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable("not installed; the extra peers brings it") from error
