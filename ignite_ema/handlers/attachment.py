"""What a handler leaves on an engine, and how it is taken away again: events, optimizer steps, checks at attach."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, TypeAlias
from weakref import ref

from ignite.engine import CallableEventWithFilter, Engine, Events, EventsList
from ignite.engine.events import RemovableEventHandle, State
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..averaging.checks import counted, one_line, warn_first_rank, warn_user
from ..averaging.sharding import fsdp_modules, reshard

__all__ = [
    "Attachment",
    "Attachments",
    "Event",
    "attachments",
    "check_attachable",
    "members_of",
    "optimizer_with_hooks",
]

Event: TypeAlias = "str | Events | CallableEventWithFilter | EventsList"

_ATTACHMENTS = "_ignite_ema_attachments"  # the attribute of an engine under which its attachments are found

_BEFORE_STEP = (None, Events.STARTED, Events.EPOCH_STARTED, Events.ITERATION_STARTED, Events.GET_BATCH_COMPLETED)
# Ignite passes these handlers more than the engine, and listening to the first swallows the exception.
_NOT_FOR_UPDATES = (Events.EXCEPTION_RAISED, Events.TERMINATE_SINGLE_EPOCH)


def attachments(engine: Engine) -> "list[Attachment]":
    """What is attached to ``engine`` now."""
    return list(vars(engine).get(_ATTACHMENTS, ()))


class Attachment(RemovableEventHandle):
    """Calls its owner back once per event, and when a run starts and completes, until it is removed; also a context.

    Of an ``EventsList`` the members that fire in the same iteration call back once. A single event calls back as often
    as it is fired. The start of a run is its first iteration: whatever listens to ``STARTED`` has run then.

    Args:
        owner: who attaches; its ``_on_event``, ``_on_run_start`` and ``_on_run_end`` are called with the engine and
            this attachment.
        engine: where to; referred to weakly.
        names: the attributes of ``engine.state`` that the owner publishes.
        event: the event, accepted by :func:`members_of`.
        new_names: those of ``names`` that ``remove`` deletes.
        optimizer: an optimizer with step hooks; events before which it has not stepped are left out.

    Attributes:
        is_attached: whether it still calls back.
        has_stepped: whether the optimizer has stepped since the last update.
        first_iteration: how many iterations the trainer had made when the run started.
        updates: how often the run has called back.
    """

    def __init__(
        self,
        owner: Any,
        engine: Engine,
        names: tuple[str, ...],
        event: Event,
        new_names: Iterable[str] = (),
        optimizer: Optimizer | None = None,
    ) -> None:
        # A function with a name: profilers list what Ignite calls. Held, since Ignite removes by weak references.
        def update(engine: Engine, member: int) -> None:
            self._fire(engine, member)

        update.__qualname__ = update.__name__ = f"{type(owner).__name__}.update"
        self._held: list[object] = [update]
        super().__init__(event, update, engine)  # type: ignore[arg-type]  # a string is as good
        self.owner = owner
        self.names = names
        self.is_attached = True
        self.has_stepped = False
        self.watches_steps = optimizer is not None
        self.updates = self.first_iteration = self._left_out = 0
        self._last: tuple[int, int] | None = None  # the iteration of the last update, and the member that made it
        self._noted_at: int | None = None  # the iteration in which the average was saved or evaluated last
        self._was_late = self._has_updated = self._has_begun = self._has_ended = False
        self._new_names = tuple(new_names)
        self._members = members_of(event, engine)
        for index, member in enumerate(self._members):
            engine.add_event_handler(member, update, index)
        self._undo = ExitStack()
        self.call_at(engine, Events.STARTED, self._on_started)
        self.call_at(engine, Events.ITERATION_STARTED, self._on_iteration_started)
        for end in (Events.TERMINATE, Events.COMPLETED):  # terminate() may leave the second out
            self.call_at(engine, end, self._on_end)
        if optimizer is not None:
            self._undo.callback(_watch_steps(optimizer, ref(self)).remove)
        vars(engine).setdefault(_ATTACHMENTS, []).append(self)

    def __repr__(self) -> str:
        return one_line(
            type(self).__name__,
            lambda: f"{type(self.owner).__name__} at {' or '.join(map(_word, self._members))} as {self.names_in_words}",
            lambda: "" if self.is_attached else "removed",
        )

    @property
    def names_in_words(self) -> str:
        """The attributes, quoted."""
        return " and ".join(f"'{name}'" for name in self.names)

    @property
    def iterations(self) -> int:
        """How many iterations the run has had so far."""
        engine = self.engine()
        return 0 if engine is None else engine.state.iteration - self.first_iteration

    def call_at(self, engine: Engine, event: Events, function: Callable[[Engine], object]) -> RemovableEventHandle:
        """Calls ``function`` with the engine at one more event, until ``remove``."""
        self._held.append(function)
        handle = engine.add_event_handler(event, function)
        self._undo.callback(handle.remove)
        return handle

    def note_reading(self) -> None:
        """Notes that the average is saved or evaluated now: an update that follows in the same iteration is late."""
        engine = self.engine()
        if engine is not None and engine.last_event_name not in _BEFORE_STEP:  # a step itself may use the average
            self._noted_at = engine.state.iteration

    def remove(self) -> None:
        """Takes everything off the engine again, new attributes of its state included; a second call does nothing."""
        engine = self.engine()
        if not self.is_attached or engine is None:
            self._undo.close()
            return
        self.is_attached = False
        super().remove()
        self._undo.close()
        vars(engine)[_ATTACHMENTS].remove(self)
        shared = {name for other in attachments(engine) for name in other.names}
        for name in set(self._new_names) - shared:
            vars(engine.state).pop(name, None)

    def _fire(self, engine: Engine, member: int) -> None:
        if not self.is_attached:  # removed by an earlier handler of this very event
            return
        if self.watches_steps and not self.has_stepped:
            self._left_out += 1
            return
        iteration = engine.state.iteration
        if self._last is not None and self._last[0] == iteration and self._last[1] != member:
            return
        if self._noted_at == iteration and not self._was_late:
            self._was_late = True
            warn_first_rank(
                f"The average of {self.names_in_words} was saved or evaluated in iteration {iteration} before the "
                "update of this iteration: it was the average of one update before, and a run that resumes from what "
                "was saved loses the update. Attach the handler before what saves or evaluates it."
            )
        self.owner._on_event(engine, self)
        self._last = iteration, member
        self.updates += 1
        self._has_updated, self.has_stepped = True, False

    def _on_started(self, engine: Engine) -> None:
        if engine.state.iteration == 0:
            self._last = None  # a new run counts from 1 again
        self.first_iteration, self.updates, self._noted_at = engine.state.iteration, 0, None
        self._has_begun = self._has_ended = False

    def _on_iteration_started(self, engine: Engine) -> None:
        if not self._has_begun:
            self._has_begun = True
            self.owner._on_run_start(engine, self)

    def _on_end(self, engine: Engine) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        if self._left_out and not self._has_updated and not engine.should_terminate:
            warn_first_rank(
                f"The optimizer of {self.names_in_words} should have stepped in this run, but "
                f"{counted(self._left_out, 'event')} passed without a step and the average has not moved. Attach with "
                "the optimizer that trains."
            )
        elif self.is_attached:
            self.owner._on_run_end(engine, self)


class Attachments:
    """The attachments of one handler. A copy, or a pickle, has none."""

    def __init__(self) -> None:
        self._references: list[ref[Attachment]] = []
        self._stepped: set[str] = set()  # names of attachments to come whose optimizer has stepped already

    def __getstate__(self) -> dict[str, Any]:
        return {"_references": [], "_stepped": self.stepped()}

    def __iter__(self) -> Any:
        found = [reference() for reference in self._references]
        return iter([one for one in found if one is not None and one.is_attached and one.engine() is not None])

    def add(self, attachment: Attachment) -> None:
        """Takes on one more, and hands it a step that waits for it."""
        attachment.has_stepped = attachment.watches_steps and attachment.names[0] in self._stepped
        self._stepped.discard(attachment.names[0])
        self._references = [*map(ref, self), ref(attachment)]

    def publish(self, momentum: float) -> None:
        """Shows ``momentum`` as the attribute of each engine."""
        for attachment in self:
            setattr(attachment.engine().state, attachment.names[0], momentum)

    def stepped(self) -> set[str]:
        """The names of those whose optimizer has stepped since their last update."""
        return self._stepped | {one.names[0] for one in self if one.has_stepped}

    def load_stepped(self, names: Iterable[str]) -> None:
        """Goes on from what :meth:`stepped` gave."""
        self._stepped = set(names)
        for attachment in self:
            if attachment.watches_steps:
                attachment.has_stepped = attachment.names[0] in self._stepped
                self._stepped.discard(attachment.names[0])


def check_attachable(owner: object, engine: Engine, names: Iterable[str], *events: Event) -> None:
    """Raises TypeError, ValueError or RuntimeError unless ``owner`` can be attached to ``engine``.

    Args:
        owner: a handler.
        engine: which should train, and not have the handler already.
        names: the attributes of ``engine.state``.
        events: when it is called.
    """
    for event in events:
        members_of(event, engine)
    for name in names:
        if not isinstance(name, str) or not name:
            got = repr(name) if isinstance(name, str) else type(name).__name__
            raise TypeError(
                f"name should be a string such as 'ema_momentum', got {got}; an optimizer goes to optimizer=."
            )
        if hasattr(State(), name):
            raise ValueError(
                f"name should not be one that engine.state already uses, got {name!r}; choose another name."
            )
    for other in attachments(engine):
        if other.owner is owner:
            raise RuntimeError(
                f"{type(owner).__name__} should be attached to an engine once, but this one is already, as "
                f"{other.names_in_words}. Call remove() on the handle of that attachment first, or use an EventsList."
            )


def members_of(event: Event, engine: Engine) -> "list[str | CallableEventWithFilter]":
    """The single events of ``event``; raises TypeError or ValueError unless ``engine`` can fire them all."""
    if not isinstance(engine, Engine):
        raise TypeError(f"engine should be an ignite Engine, the trainer, got {type(engine).__name__}.")
    members: list[str | CallableEventWithFilter] = list(event) if isinstance(event, EventsList) else [event]
    for member in members:
        # Engine.has_registered_events() says the same, but Ignite 0.5.1 does not have it
        known = isinstance(member, (str, CallableEventWithFilter)) and member in engine._allowed_events
        if not known or member in _NOT_FOR_UPDATES:
            raise ValueError(
                f"event should be one that the engine fires when weights have moved, got {member!r}. Pass one such as "
                "Events.ITERATION_COMPLETED, or register your own event with engine.register_events first."
            )
        if getattr(member, "filter", None) is not None and member not in State.event_to_attr:
            raise ValueError(
                f"event should have a counter to be filtered, got {member!r}. Name an attribute of engine.state that "
                "you count up with engine.register_events(..., event_to_attr={...})."
            )
    if not members:
        raise ValueError("event should contain at least one event, got an empty EventsList.")
    return members


def optimizer_with_hooks(optimizer: Any, model: nn.Module) -> Optimizer | None:
    """The optimizer to watch: a wrapper that has it as ``.optimizer`` (Accelerate, Lookahead) is looked through.

    Warns if it is that of another model.

    Raises:
        TypeError: unless it is an optimizer or None.
    """
    if optimizer is None:
        return None
    found = optimizer
    while not _takes_hooks(found):
        found = getattr(found, "optimizer", getattr(found, "optim", None))
        if found is None:
            raise TypeError(
                "optimizer should be a torch.optim.Optimizer, or have it as .optimizer, got "
                f"{type(optimizer).__name__}. Pass the one that trains."
            )
    reshard(fsdp_modules(model))  # or it has the gathered parameters, which no optimizer has
    parameters = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in parameters for group in found.param_groups for parameter in group["params"]):
        warn_user(
            "optimizer should train parameters of the model that is averaged, but has none of them. Pass the one whose "
            "steps move this model."
        )
    wrapped: Optimizer = found
    return wrapped


def _takes_hooks(optimizer: Any) -> bool:
    """Whether step hooks can be registered: a wrapper may be of the class, and not have been made as an optimizer."""
    if not isinstance(optimizer, Optimizer):
        return False
    try:
        optimizer.register_step_post_hook(lambda *_: None).remove()
    except AttributeError:
        return False
    return True


def _watch_steps(optimizer: Optimizer, attachment: "ref[Attachment]") -> RemovableHandle:
    """Notes the steps of an optimizer, which may outlive the attachment."""

    def note_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A fused optimizer is always called by a GradScaler, and skips the step itself unless this is 0.
        found_inf = getattr(optimizer, "found_inf", None)
        if (one := attachment()) is not None and (found_inf is None or not found_inf.item()):
            one.has_stepped = True

    return optimizer.register_step_post_hook(note_step)


def _word(event: object) -> str:
    return str(getattr(event, "value", event))
