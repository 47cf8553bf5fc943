"""What ``EMAHandler.attach`` leaves on an engine, and how it is taken away again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from ignite.engine import CallableEventWithFilter, Engine, Events, EventsList
from ignite.engine.events import RemovableEventHandle, State
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from .handler import EMAHandler

__all__ = ["Attachment", "Event", "attachments", "check_name", "check_optimizer", "members_of"]

Event: TypeAlias = "str | Events | CallableEventWithFilter | EventsList"

# The attribute of an engine under which its attachments are found.
_ATTACHMENTS = "_ignite_ema_attachments"

# Ignite passes these handlers more than the engine, and listening to the first one swallows the exception.
_NOT_FOR_UPDATES = (Events.EXCEPTION_RAISED, Events.TERMINATE_SINGLE_EPOCH)


def attachments(engine: Engine) -> list[Attachment]:
    """What is attached to ``engine`` now."""
    return list(vars(engine).get(_ATTACHMENTS, ()))


def check_name(name: str) -> None:
    """Raises unless ``name`` can be an attribute of ``engine.state`` beside the engine's own."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"name should be a string such as 'ema_momentum', got {name!r}.")
    if hasattr(State(), name):
        raise ValueError(f"name should not be an attribute of the engine's own, got {name!r}; choose another one.")


def check_optimizer(optimizer: Optimizer | None, model: nn.Module) -> None:
    """Raises TypeError unless it is an optimizer or None; warns where it is that of another model."""
    if optimizer is None:
        return
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer should be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    parameters = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in parameters for group in optimizer.param_groups for parameter in group["params"]):
        warnings.warn(
            "optimizer should train parameters of the model that is averaged, but has none of them; pass the one whose "
            "steps move this model.",
            stacklevel=3,
        )


def members_of(event: Event, engine: Engine) -> list[str | CallableEventWithFilter]:
    """The single events of ``event``; raises ValueError unless ``engine`` can fire them all."""
    if not isinstance(engine, Engine):
        raise TypeError(f"engine should be an ignite Engine, the trainer, got {type(engine).__name__}.")
    members: list[str | CallableEventWithFilter] = list(event) if isinstance(event, EventsList) else [event]
    for member in members:
        # Engine.has_registered_events() says the same, but Ignite 0.4 has none
        known = isinstance(member, (str, CallableEventWithFilter)) and member in engine._allowed_events
        if not known or member in _NOT_FOR_UPDATES:
            raise ValueError(
                f"event should be one that the engine fires when weights have moved, got {member!r}; pass one such as "
                "Events.ITERATION_COMPLETED, or register an event of your own with engine.register_events first."
            )
        if getattr(member, "filter", None) is not None and member not in State.event_to_attr:
            raise ValueError(
                f"event should have a counter to be filtered, got {member!r}; name an attribute of engine.state that "
                "you count up with engine.register_events(..., event_to_attr={...})."
            )
    if not members:
        raise ValueError("event should contain at least one event, got an empty EventsList.")
    return members


class Attachment(RemovableEventHandle):
    """Calls back once per event, until it is removed; also a context manager.

    Of an ``EventsList`` those members that fire in the same iteration call back once. A single event calls back as
    often as it is fired.

    Args:
        owner: who attaches.
        engine: where to; held weakly.
        name: the attribute of ``engine.state`` that ``owner`` publishes.
        owns_name: whether ``remove`` deletes that attribute.
        event: the event, accepted by :func:`members_of`.
        on_event: called with the engine at each event.
        on_started: called with the engine when a run starts.
        hook: what else ``remove`` takes away.
    """

    def __init__(
        self,
        owner: EMAHandler,
        engine: Engine,
        name: str,
        owns_name: bool,
        event: Event,
        on_event: Callable[[Engine], None],
        on_started: Callable[[Engine], None],
        hook: RemovableHandle | None = None,
    ) -> None:
        last: tuple[int, int] | None = None  # the iteration of the last call, and the member that made it

        def fire(engine: Engine, member: int) -> None:
            nonlocal last
            if not self.is_attached:  # removed by an earlier handler of this very event
                return
            iteration = engine.state.iteration
            if last is None or last[0] != iteration or last[1] == member:
                on_event(engine)
                last = iteration, member

        def start(engine: Engine) -> None:
            nonlocal last
            if engine.state.iteration == 0:
                last = None  # a new run counts from 1 again
            if self.is_attached:
                on_started(engine)

        super().__init__(event, fire, engine)  # type: ignore[arg-type]  # a string is as good
        self.owner = owner
        self.name = name
        self._owns_name = owns_name
        self._fire = fire  # Ignite removes handlers by weak references, so somebody has to hold them
        self._start = start
        for index, member in enumerate(members_of(event, engine)):
            engine.add_event_handler(member, fire, index)
        self._start_handle = engine.add_event_handler(Events.STARTED, start)
        self._hook = hook
        self.is_attached = True
        vars(engine).setdefault(_ATTACHMENTS, []).append(self)

    def remove(self) -> None:
        """Takes everything off the engine again, ``engine.state.<name>`` included; does nothing the second time."""
        engine = self.engine()
        if engine is None or not self.is_attached:
            return
        self.is_attached = False
        super().remove()
        self._start_handle.remove()
        if self._hook is not None:
            self._hook.remove()
        vars(engine)[_ATTACHMENTS].remove(self)
        if self._owns_name and all(other.name != self.name for other in attachments(engine)):
            vars(engine.state).pop(self.name, None)
