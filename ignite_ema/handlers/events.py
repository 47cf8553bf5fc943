"""Which events an update may follow, and which attribute of the engine may show its momentum."""

from typing import TypeAlias

from ignite.engine import CallableEventWithFilter, Engine, Events, EventsList
from ignite.engine.events import State

__all__ = ["Event", "check_name", "members_of"]

Event: TypeAlias = "str | Events | CallableEventWithFilter | EventsList"

# Ignite passes these handlers more than the engine, and listening to the first one swallows the exception.
_NOT_FOR_UPDATES = (Events.EXCEPTION_RAISED, Events.TERMINATE_SINGLE_EPOCH)


def check_name(name: str) -> None:
    """Raises unless ``name`` can be an attribute of ``engine.state`` beside the engine's own."""
    if not isinstance(name, str) or not name:
        got = repr(name) if isinstance(name, str) else type(name).__name__
        raise TypeError(f"name should be a string such as 'ema_momentum', got {got}; an optimizer goes to optimizer=.")
    if hasattr(State(), name):
        raise ValueError(f"name should not be an attribute of the engine's own, got {name!r}; choose another one.")


def members_of(event: Event, engine: Engine) -> list[str | CallableEventWithFilter]:
    """The single events of ``event``; raises ValueError unless ``engine`` can fire them all."""
    if not isinstance(engine, Engine):
        raise TypeError(f"engine should be an ignite Engine, the trainer, got {type(engine).__name__}.")
    members: list[str | CallableEventWithFilter] = list(event) if isinstance(event, EventsList) else [event]
    for member in members:
        # Engine.has_registered_events() says the same, but Ignite 0.5.1 has none
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
