"""Checks of what a handler is attached to and with, made before anything changes."""

from ignite.engine import Engine
from torch import nn
from torch.optim import Optimizer

from ..averaging.sharding import reshard
from ..averaging.user_warnings import warn_user
from .attachment import Owner, attachments
from .evaluation import swaps
from .events import Event, check_name, members_of

__all__ = ["check_attachable"]


def check_attachable(
    handler: Owner, model: nn.Module, engine: Engine, name: str, event: Event, optimizer: Optimizer | None
) -> None:
    """Raises TypeError, ValueError or RuntimeError unless ``handler`` can be attached to ``engine``.

    Args:
        handler: a handler.
        model: its model; there is a warning where the optimizer is that of another one.
        engine: which should train, and not have it already.
        name: the attribute of ``engine.state``.
        event: when to update.
        optimizer: whose steps the updates follow.
    """
    members_of(event, engine)
    check_name(name)
    _check_alone(engine, handler, name)
    if any(swap.owner is handler for swap in swaps(engine)):
        raise RuntimeError(
            "engine should be one that trains, but swap_during() was called with it and its runs are on the averaged "
            "weights; train with another engine."
        )
    _check_optimizer(optimizer, model)


def _check_alone(engine: Engine, handler: Owner, name: str) -> None:
    """Raises RuntimeError where ``handler`` is attached already, ValueError where another one has ``name``."""
    for other in attachments(engine):
        if other.owner is handler:
            raise RuntimeError(
                f"An EMAHandler should be attached to an engine once, but this one is already, as '{other.name}'; "
                "remove() the handle of that attachment first, or use an EventsList."
            )
        if other.name == name:
            raise ValueError(
                f"name should be another than '{name}', the attribute of {other.owner!r}; two handlers of one name "
                "would drive each other's momentum, so choose a name such as 'generator_momentum'."
            )


def _check_optimizer(optimizer: Optimizer | None, model: nn.Module) -> None:
    """Raises TypeError unless it is an optimizer or None; warns where it is that of another model."""
    if optimizer is None:
        return
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer should be a torch.optim.Optimizer, got {type(optimizer).__name__}; pass the one that trains."
        )
    reshard(model)  # an optimizer has the shards
    parameters = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in parameters for group in optimizer.param_groups for parameter in group["params"]):
        warn_user(
            "optimizer should train parameters of the model that is averaged, but has none of them; pass the one whose "
            "steps move this model."
        )
