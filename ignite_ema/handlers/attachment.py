"""What ``EMAHandler.attach`` leaves on an engine, and how it is taken away again."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Protocol
from weakref import finalize, ref

from ignite.engine import Engine, Events
from ignite.engine.events import RemovableEventHandle
from torch import nn
from torch.optim import Optimizer

from ..averaging.summaries import one_line
from ..averaging.swap import Swapped
from ..averaging.traversal import unwrapped
from ..averaging.user_warnings import warn_user
from ..averaging.validation import checked_momentum
from .evaluator_search import evaluators_among
from .events import Event, members_of
from .optimizer_steps import StepWatch

__all__ = ["Attachment", "Attachments", "Handles", "Owner", "attachments"]


# The attribute of an engine under which its attachments are found.
_ATTACHMENTS = "_ignite_ema_attachments"


def attachments(engine: Engine) -> "list[Attachment]":
    """What is attached to ``engine`` now."""
    return list(vars(engine).get(_ATTACHMENTS, ()))


class Owner(Protocol):
    """A handler, as what it leaves on engines calls it back."""

    @property
    def ema_model(self) -> nn.Module: ...

    def swapped(self) -> Swapped: ...

    def _check_start(self, name: str, engine: Engine) -> None: ...

    def _update(self, name: str, engine: Engine) -> None: ...

    def _check_end(self, name: str, iterations: int, updates: int) -> None: ...


class Attachment(RemovableEventHandle):
    """Calls its owner back once per event, and when a run starts and completes, until it is removed; also a context.

    Of an ``EventsList`` those members that fire in the same iteration call back once. A single event calls back as
    often as it is fired.

    Args:
        owner: who attaches.
        engine: where to; held weakly.
        name: the attribute of ``engine.state`` that ``owner`` publishes.
        event: the event, accepted by :func:`members_of`.
        owns_name: whether ``remove`` deletes that attribute.
        optimizer: where there is one, events are left out before which it has not stepped.
    """

    def __init__(
        self, owner: Owner, engine: Engine, name: str, event: Event, owns_name: bool, optimizer: Optimizer | None
    ) -> None:
        fire = self._on_event
        self._held: list[object] = [fire]  # Ignite removes handlers by weak references
        super().__init__(event, fire, engine)  # type: ignore[arg-type]  # a string is as good
        self.owner, self.name = owner, name
        self.steps = None if optimizer is None else StepWatch(optimizer)
        self.is_attached = True
        self._owns_name = owns_name
        self._last: tuple[int, int] | None = None  # the iteration of the last update, and the member that made it
        self._read_at: tuple[int, Any] | None = None  # the iteration and event in which the average was read last
        self._was_read_late = self._watches = False
        self._first_iteration = engine.state.iteration
        self._updates = 0  # of this run
        self._has_updated = False
        self._left_out = 0  # events without a step
        self._members = members_of(event, engine)
        for index, member in enumerate(self._members):
            engine.add_event_handler(member, fire, index)
        self._undo = ExitStack()
        self.call_at(engine, Events.STARTED, self._on_start)
        self.call_at(engine, Events.COMPLETED, self._on_end)
        if self.steps is not None:
            self._undo.callback(self.steps.remove)
            self._undo.callback(finalize(engine, self.steps.remove).detach)  # the optimizer may outlive the engine
        vars(engine).setdefault(_ATTACHMENTS, []).append(self)

    def __repr__(self) -> str:
        return one_line(
            type(self).__name__,
            lambda: f"{type(self.owner).__name__} at {' or '.join(map(_word, self._members))} as '{self.name}'",
            lambda: "" if self.is_attached else "removed",
        )

    def call_at(self, engine: Engine, event: Events, function: Callable[[Engine], object]) -> None:
        """Calls ``function`` with the engine at one more event, until ``remove``."""
        self._held.append(function)
        self._undo.callback(engine.add_event_handler(event, function).remove)

    @property
    def value(self) -> Any:
        """What the attribute holds, None where there is none."""
        return getattr(getattr(self.engine(), "state", None), self.name, None)

    @value.setter
    def value(self, momentum: float) -> None:
        engine = self.engine()
        if engine is not None:
            setattr(engine.state, self.name, momentum)

    def note_reading(self) -> None:
        """Notes that the average is being evaluated or saved now; before an update of the same event that is late."""
        engine = self.engine()
        if engine is not None:
            self._read_at = engine.state.iteration, engine.last_event_name

    def remove(self) -> None:
        """Takes everything off the engine again, ``engine.state.<name>`` included; does nothing the second time."""
        engine = self.engine()
        if engine is None or not self.is_attached:
            return
        self.is_attached = False
        super().remove()
        self._undo.close()
        vars(engine)[_ATTACHMENTS].remove(self)
        if self._owns_name:
            vars(engine.state).pop(self.name, None)

    def _on_event(self, engine: Engine, member: int) -> None:
        if not self.is_attached:  # removed by an earlier handler of this very event
            return
        if self.steps is not None and not self.steps.has_stepped:
            self._left_out += 1
            return
        iteration = engine.state.iteration
        if self._last is not None and self._last[0] == iteration and self._last[1] != member:
            return
        if (
            self._read_at is not None
            and self._read_at == (iteration, engine.last_event_name)
            and not self._was_read_late
        ):
            self._was_read_late = True
            warn_user(
                f"The average of '{self.name}' should be updated before it is evaluated or saved, but at this event "
                "that came first and saw the average of one update before; attach the handler earlier than what "
                "evaluates at the same event."
            )
        self.owner._update(self.name, engine)
        self._last = iteration, member
        self._updates += 1
        self._has_updated = True
        if self.steps is not None:
            self.steps.has_stepped = False

    def _watch_evaluators(self, engine: Engine) -> None:
        """Notes from here on the runs of those engines that evaluate the average at an event of this attachment."""
        self._watches = True
        handlers = [entry for member in self._members for entry in engine._event_handlers.get(member, ())]
        for evaluator in evaluators_among(handlers, self._is_average):
            if evaluator is not engine:
                self.call_at(evaluator, Events.STARTED, self._on_evaluation)

    def _is_average(self, thing: object) -> bool:
        is_twin = isinstance(thing, nn.Module) and unwrapped(thing) is unwrapped(self.owner.ema_model)
        return is_twin or thing is self.owner

    def _on_evaluation(self, evaluator: Engine) -> None:
        self.note_reading()

    def _on_start(self, engine: Engine) -> None:
        if engine.state.iteration == 0:
            self._last = None  # a new run counts from 1 again
        self._first_iteration, self._updates, self._read_at = engine.state.iteration, 0, None
        if self.is_attached:
            self.owner._check_start(self.name, engine)
        if self.is_attached and not self._watches:
            self._watch_evaluators(engine)

    def _on_end(self, engine: Engine) -> None:
        if not self.is_attached or engine.should_terminate:  # cut short, it may yet move
            return
        if self._left_out and not self._has_updated:
            warn_user(
                f"The optimizer of '{self.name}' should have stepped in this run, but {self._left_out} events passed "
                "without a step and the average has not moved; attach the handler with the optimizer that trains."
            )
        else:
            self.owner._check_end(self.name, engine.state.iteration - self._first_iteration, self._updates)


def _word(event: object) -> str:
    return str(getattr(event, "value", event))


class Attachments:
    """What attaches one handler, to engines that are still there. A copy, or a pickle, of it attaches nothing."""

    def __init__(self) -> None:
        self._references: list[ref[Attachment]] = []
        self._stepped: set[str] = set()  # names of attachments to come, whose optimizer has stepped already

    def __getstate__(self) -> dict[str, Any]:
        return {"_references": [], "_stepped": self.stepped()}

    def __iter__(self) -> Iterator[Attachment]:
        for reference in self._references:
            attachment = reference()
            if attachment is not None and attachment.is_attached and attachment.engine() is not None:
                yield attachment

    def add(self, attachment: Attachment) -> None:
        """Takes on one more, and hands it a step that waits for it."""
        if attachment.steps is not None:
            attachment.steps.has_stepped = attachment.name in self._stepped
        self._stepped.discard(attachment.name)
        self._references = [*map(ref, self), ref(attachment)]

    def publish(self, momentum: float) -> None:
        """Shows ``momentum`` as the attribute of each engine."""
        for attachment in self:
            attachment.value = momentum

    def driven(self, otherwise: float) -> float:
        """The attribute of the first engine, checked; ``otherwise`` where there is none."""
        for attachment in self:
            return checked_momentum(attachment.value, f"engine.state.{attachment.name}")
        return otherwise

    def stepped(self) -> set[str]:
        """The names of those whose optimizer has stepped since their last update."""
        return self._stepped | {one.name for one in self if one.steps is not None and one.steps.has_stepped}

    def load_stepped(self, names: Iterable[str]) -> None:
        """Goes on from what :meth:`stepped` gave."""
        self._stepped = set(names)
        for attachment in self:
            if attachment.steps is not None:
                attachment.steps.has_stepped = attachment.name in self._stepped
                self._stepped.discard(attachment.name)


class Handles:
    """Several handles as one: ``remove()`` takes everything off an engine again, as does leaving it as a context."""

    def __init__(self) -> None:
        self._handles: list[RemovableEventHandle] = []

    def __repr__(self) -> str:
        attached = [repr(one) for one in self._handles if isinstance(one, Attachment)]
        return f"{type(self).__name__}({'; '.join(attached) or 'removed'})"

    def __enter__(self) -> "Handles":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def add(self, handle: RemovableEventHandle) -> None:
        """Takes on one more."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Takes everything off the engine again; does nothing the second time."""
        while self._handles:
            self._handles.pop().remove()
