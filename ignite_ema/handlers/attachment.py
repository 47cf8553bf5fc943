"""What ``EMAHandler.attach`` leaves on an engine, and how it is taken away again."""

import warnings
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias
from weakref import finalize

from ignite.engine import CallableEventWithFilter, Engine, Events, EventsList
from ignite.engine.events import RemovableEventHandle, State

from .optimizer_steps import StepWatch

__all__ = ["Attachment", "Event", "Handles", "attachments", "check_name", "members_of"]

Event: TypeAlias = "str | Events | CallableEventWithFilter | EventsList"

# The attribute of an engine under which its attachments are found.
_ATTACHMENTS = "_ignite_ema_attachments"

# Ignite passes these handlers more than the engine, and listening to the first one swallows the exception.
_NOT_FOR_UPDATES = (Events.EXCEPTION_RAISED, Events.TERMINATE_SINGLE_EPOCH)


def attachments(engine: Engine) -> "list[Attachment]":
    """What is attached to ``engine`` now."""
    return list(vars(engine).get(_ATTACHMENTS, ()))


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
        is_scheduled: whether a schedule writes that attribute.
        owns_name: whether ``remove`` deletes that attribute.
        event: the event, accepted by :func:`members_of`.
        on_event: called with the engine at each event.
        on_started: called with the engine when a run starts.
        steps: where there is one, events are left out before which it has seen no step.
    """

    def __init__(
        self,
        owner: object,
        engine: Engine,
        name: str,
        is_scheduled: bool,
        owns_name: bool,
        event: Event,
        on_event: Callable[[Engine], None],
        on_started: Callable[[Engine], None],
        steps: StepWatch | None = None,
    ) -> None:
        last: tuple[int, int] | None = None  # the iteration of the last call, and the member that made it
        left_out, moved = 0, False

        def fire(engine: Engine, member: int) -> None:
            nonlocal last, left_out, moved
            if not self.is_attached:  # removed by an earlier handler of this very event
                return
            if steps is not None and not steps.has_stepped:
                left_out += 1
                return
            iteration = engine.state.iteration
            if last is None or last[0] != iteration or last[1] == member:
                on_event(engine)
                last, moved = (iteration, member), True
                if steps is not None:
                    steps.has_stepped = False

        def start(engine: Engine) -> None:
            nonlocal last
            if engine.state.iteration == 0:
                last = None  # a new run counts from 1 again
            if self.is_attached:
                on_started(engine)

        def complete(engine: Engine) -> None:
            if left_out and not moved and not engine.should_terminate:  # cut short, it may yet step
                warnings.warn(
                    f"The optimizer of '{name}' should have stepped in this run, but {left_out} events passed without "
                    "a step and the average has not moved; attach the handler with the optimizer that trains.",
                    stacklevel=2,
                )

        super().__init__(event, fire, engine)  # type: ignore[arg-type]  # a string is as good
        self.owner = owner
        self.is_scheduled = is_scheduled
        self.name = name
        self._owns_name = owns_name
        self._fire = fire  # Ignite removes handlers by weak references, so somebody has to hold them
        self._start = start
        for index, member in enumerate(members_of(event, engine)):
            engine.add_event_handler(member, fire, index)
        self._handles: list[RemovableEventHandle | StepWatch] = [engine.add_event_handler(Events.STARTED, start)]
        self.steps = steps
        if steps is not None:
            self._complete = complete
            self._handles += [steps, engine.add_event_handler(Events.COMPLETED, complete)]
            finalize(engine, steps.remove)  # the optimizer may outlive the engine
        self.is_attached = True
        vars(engine).setdefault(_ATTACHMENTS, []).append(self)

    def call_at(self, engine: Engine, event: Events, function: Callable[[Engine], object]) -> None:
        """Calls ``function`` with the engine at one more event, until ``remove``."""
        self._handles.append(engine.add_event_handler(event, function))

    @property
    def value(self) -> Any:
        """What the attribute holds, None where there is none."""
        return getattr(getattr(self.engine(), "state", None), self.name, None)

    @value.setter
    def value(self, momentum: float) -> None:
        engine = self.engine()
        if engine is not None:
            setattr(engine.state, self.name, momentum)

    def remove(self) -> None:
        """Takes everything off the engine again, ``engine.state.<name>`` included; does nothing the second time."""
        engine = self.engine()
        if engine is None or not self.is_attached:
            return
        self.is_attached = False
        super().remove()
        for handle in self._handles:
            handle.remove()
        vars(engine)[_ATTACHMENTS].remove(self)
        if self._owns_name and all(other.name != self.name for other in attachments(engine)):
            vars(engine.state).pop(self.name, None)


class _Removable(Protocol):
    def remove(self) -> None: ...


class Handles:
    """Several handles as one: ``remove()`` takes everything off an engine again, as does leaving it as a context."""

    def __init__(self) -> None:
        self._handles: list[_Removable] = []

    def add(self, handle: _Removable) -> None:
        """Takes on one more."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Takes everything off the engine again; does nothing the second time."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> "Handles":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()
