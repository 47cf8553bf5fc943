"""Attaches handlers to engines, and removes them again: events, optimizer steps, checks at attach."""

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, TypeAlias
from weakref import ref

from ignite.engine import CallableEventWithFilter, Engine, Events, EventsList
from ignite.engine.events import RemovableEventHandle, State
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..averaging.average import ModelAverage
from ..averaging.checks import counted, one_line, warn_first_rank, warn_user
from ..averaging.names import parameters_of
from ..averaging.sharding import fsdp_modules, reshard

Event: TypeAlias = "str | Events | CallableEventWithFilter | EventsList"

_ATTACHED = "_ignite_ema_attachments"  # the attribute of an engine that lists what is attached to it

_BEFORE_STEP = (None, Events.STARTED, Events.EPOCH_STARTED, Events.ITERATION_STARTED, Events.GET_BATCH_COMPLETED)
# Ignite passes these handlers more than the engine, and listening to the first swallows the exception.
_NOT_FOR_UPDATES = (Events.EXCEPTION_RAISED, Events.TERMINATE_SINGLE_EPOCH)


def attached_to(engine: Engine) -> list[Any]:
    """The attachments of all handlers to ``engine``, and the swaps during its runs; not a copy."""
    found: list[Any] = vars(engine).setdefault(_ATTACHED, [])
    return found


class EngineHandler:
    """What ``EMAHandler`` and ``PostHocEMA`` have in common: attachments to engines. A copy or a pickle has none."""

    def __init__(self, average: ModelAverage) -> None:
        self.model = average.model
        self._average = average  # the first, whose count and finite weights stand for those of all
        self._all_attachments: list[Attachment] = []
        self._stepped: set[str] = set()  # names of attachments whose optimizer has stepped since their last update
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_all_attachments": []}

    @property
    def _attachments(self) -> list[Any]:
        """The attachments whose engines still exist."""
        return [attachment for attachment in self._all_attachments if attachment.engine() is not None]

    def _publish(self, *momenta: float) -> None:
        """Writes the momenta to the attributes of each engine."""
        for attachment in self._attachments:
            for name, momentum in zip(attachment.names, momenta, strict=True):
                setattr(attachment.engine().state, name, momentum)

    def _note_reading(self, *, by_step: bool = False) -> None:
        """Notes that the average is being saved or evaluated: a later update in the same iteration is too late."""
        for attachment in self._attachments:
            attachment.note_reading(by_step)

    def _tell_once(self, what: str, message: str) -> None:
        """Warns on the first rank, unless it has warned of ``what`` before."""
        if what not in self._told:
            self._told.add(what)
            warn_first_rank(message)


class Attachment(RemovableEventHandle):
    """Makes a handler update at an event, while ``is_attached``: until ``remove()``. Also a context manager.

    Members of an ``EventsList`` that fire in the same iteration update once. A single event updates as often as it
    fires. A run starts with its first iteration: whatever listens to ``STARTED`` has run by then. It calls
    ``_on_event``, ``_on_run_start`` and ``_on_run_end`` of its owner, and keeps only a weak reference to the engine.
    """

    def __init__(self, owner: Any, engine: Engine, names: tuple[str, ...], event: Event, optimizer: Any) -> None:
        super().__init__(event, self, engine)  # type: ignore[arg-type]  # a string works, too
        vars(self)["__qualname__"] = f"{type(owner).__name__}.update"  # profilers list it
        self.owner, self.names, self.is_attached = owner, names, True
        self.names_in_words = " and ".join(f"'{name}'" for name in names)
        self._watches_steps = optimizer is not None
        taken = {other._steps_as for other in owner._attachments}  # on other engines
        numbered = (f"{names[0]} {number}" for number in range(2, len(taken) + 2))
        self._steps_as = next(name for name in (names[0], *numbered) if name not in taken)
        self._has_updated = False
        self._start_run(0)
        self._new_names = {name for name in names if not hasattr(engine.state, name)}
        self._members = _members_of(event, engine)
        self._undo = ExitStack()
        if optimizer is not None:  # first, since it may not be an optimizer
            self._undo.callback(_watch_steps(optimizer, self).remove)
        for index, member in enumerate(self._members):
            self.call_at(engine, member, self, index)
        self.call_at(engine, Events.STARTED, lambda engine: self._start_run(engine.state.iteration))
        self.call_at(engine, Events.ITERATION_STARTED, self._on_iteration_started)
        self.call_at(engine, Events.TERMINATE | Events.COMPLETED, self._on_end)  # terminate() may skip the second
        attached_to(engine).append(self)
        owner._all_attachments = [*owner._attachments, self]

    def _start_run(self, iteration: int) -> None:
        self.first_iteration, self.updates = iteration, 0  # of the run
        self._waited = self._idle = 0  # events without a step: before the last update of the run, and since then
        self._last = (-1, 0)  # the iteration of the last update of the run, and the member of the event that made it
        self._read_in = -1  # the last iteration in which the average was saved or evaluated before the update
        self._has_begun = self._has_ended = False

    def __repr__(self) -> str:
        events = [str(getattr(member, "value", member)) for member in self._members]
        return one_line(
            type(self).__name__,
            lambda: f"{type(self.owner).__name__} at {' or '.join(events)} as {self.names_in_words}",
            lambda: "" if self.is_attached else "removed",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attachment":
        """A copied engine calls the same handlers."""
        return self

    def call_at(self, engine: Engine, event: Event, function: Callable[..., object], *arguments: object) -> None:
        """Calls ``function`` with the engine at an event, until ``remove``."""
        self._undo.callback(engine.add_event_handler(event, function, *arguments).remove)

    def remove(self) -> None:
        """Removes everything from the engine, including new attributes of its state; a second call does nothing."""
        self._undo.close()
        engine = self.engine()
        if not self.is_attached or engine is None:
            return
        self.is_attached = False
        attached_to(engine).remove(self)
        self.owner._all_attachments.remove(self)
        self.owner._stepped.discard(self._steps_as)
        for name in self._new_names.difference(*(other.names for other in attached_to(engine))):
            vars(engine.state).pop(name, None)

    def note_reading(self, by_step: bool) -> None:
        """Notes that the average is being saved or evaluated, unless before or in a step, or after an update.

        ``by_step``: it may be a step that uses the average. A step may fire events of the user's own.
        """
        engine: Any = self.engine()
        event, iteration = engine.last_event_name, engine.state.iteration
        in_step = by_step and not isinstance(event, Events) and event not in self._members
        if event not in _BEFORE_STEP and not in_step and self._last[0] != iteration:
            self._read_in = iteration

    def __call__(self, engine: Engine, member: int) -> None:
        """Updates, unless the event does not count."""
        if not self.is_attached:  # removed by an earlier handler of this very event
            return
        if self._watches_steps and self._steps_as not in self.owner._stepped:
            self._idle += 1
            return
        iteration = engine.state.iteration
        if self._last[0] == iteration and self._last[1] != member:
            return
        if self._read_in == iteration:
            self.owner._tell_once(
                f"late {self.names}",
                f"The average of {self.names_in_words} was saved or evaluated in iteration {iteration} before the "
                "update of this iteration, which a run that resumes from it loses. Attach the handler before whatever "
                "saves or evaluates it, at the same event or an earlier one.",
            )
        # TerminateOnNan only sets a flag, and its event still updates
        broken = self.owner._average.first_nonfinite() if engine.should_terminate else None
        if broken is None:
            self.owner._on_event(engine, self)
        else:
            warn_user(f"{broken} holds a NaN or an infinity while the run is being terminated, and was not averaged.")
        self._last = iteration, member
        self.updates += 1
        self._waited, self._idle = self._waited + self._idle, 0
        self._has_updated = True
        self.owner._stepped.discard(self._steps_as)

    def _on_iteration_started(self, engine: Engine) -> None:
        if not self._has_begun:
            self._has_begun = True
            self.owner._on_run_start(engine, self)

    def _on_end(self, engine: Engine) -> None:
        if self._has_ended or not self.is_attached:
            return
        self._has_ended = True
        iterations = engine.state.iteration - self.first_iteration
        usual: float = math.inf if self._has_updated else 0  # events from one update to the next
        if self.updates:
            usual = (self.updates + self._waited) / self.updates
        fault = None
        if self._idle > 2 * usual:
            fault = (
                f"The optimizer of {self.names_in_words} should have stepped in this run, but the last "
                f"{counted(self._idle, 'event')} passed without a step. Attach with the optimizer that trains."
            )
        elif not self._idle and not self._has_updated and not self.owner.num_updates:
            fault = (
                f"The run of {counted(iterations, 'iteration')} should have updated the average of "
                f"{self.names_in_words}, but its event never fired. Attach with an event that this run fires."
            )
        if fault is not None and iterations and not engine.should_terminate:
            self.owner._tell_once(f"no update {self.names}", fault)
        self.owner._on_run_end(engine, self)


def check_not_attached(owner: object, engine: Any, what: str = "engine") -> None:
    """Raises TypeError or RuntimeError unless ``engine`` is an engine to which ``owner`` is not attached yet."""
    if not isinstance(engine, Engine):
        raise TypeError(f"{what} should be an ignite Engine, got {type(engine).__name__}.")
    for other in attached_to(engine):
        if other.owner is owner and other.is_attached:
            raise RuntimeError(
                f"{type(owner).__name__} should be attached to an engine once, but this {what} has {other!r} already. "
                "Call remove() on that handle first, or use another engine."
            )


def check_attachable(owner: object, engine: Engine, names: Iterable[str], *events: Event) -> None:
    """Raises TypeError, ValueError or RuntimeError unless ``owner`` can publish these names and be called then."""
    check_not_attached(owner, engine)
    for event in events:
        _members_of(event, engine)
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(
                f"name should be text like 'ema_momentum', got {type(name).__name__}; an optimizer goes to optimizer=."
            )
        if hasattr(State(), name):
            raise ValueError(
                f"name should not be one that engine.state already uses, got {name!r}; choose another name."
            )


def _members_of(event: Event, engine: Engine) -> "list[str | CallableEventWithFilter]":
    """The single events of ``event``; raises ValueError unless ``engine`` can fire them all."""
    members: list[str | CallableEventWithFilter] = list(event) if isinstance(event, EventsList) else [event]
    for member in members:
        # Engine.has_registered_events() says the same, but Ignite 0.5.1 does not have it
        if member not in engine._allowed_events or member in _NOT_FOR_UPDATES:
            raise ValueError(
                f"event should be one that the engine fires when weights have moved, got {member!r}. Pass one such as "
                "Events.ITERATION_COMPLETED, or register your own event with engine.register_events first."
            )
    return members


def _watch_steps(optimizer: Any, attachment: Attachment) -> RemovableHandle:
    """Notes the steps of an optimizer, or of the one that it wraps as ``.optimizer`` (as Accelerate does) or the like.

    Warns if it trains another model; raises TypeError unless it is an optimizer.
    """
    found = optimizer
    # SAM also takes hooks, but steps by other methods.
    while hasattr(found, "base_optimizer") or not _takes_hooks(found):
        inner = (getattr(found, name, None) for name in ("base_optimizer", "optimizer", "optim"))
        found = next(filter(None, inner), None)
        if found is None:
            raise TypeError(
                "optimizer should be a torch.optim.Optimizer, or have one as .optimizer, got "
                f"{type(optimizer).__name__}. Pass the one that trains."
            )
    model = attachment.owner.model
    reshard(fsdp_modules(model))  # else it may have the gathered parameters, which no optimizer has
    parameters = {id(parameter) for parameter in parameters_of(model)}
    if not any(id(parameter) in parameters for group in found.param_groups for parameter in group["params"]):
        warn_user(
            "optimizer should train parameters of the model that is averaged, but has none of them. Pass the one that "
            "trains this model."
        )
    watching = ref(attachment)  # the optimizer may outlive it

    def note_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A GradScaler always calls a fused optimizer, which skips the step itself unless this is 0.
        found_inf = getattr(optimizer, "found_inf", None)
        if (alive := watching()) is not None and (found_inf is None or not found_inf.item()):
            alive.owner._stepped.add(alive._steps_as)

    handle: RemovableHandle = found.register_step_post_hook(note_step)
    return handle


def _takes_hooks(optimizer: Any) -> bool:
    """Whether step hooks can be registered: a wrapper may be an ``Optimizer`` whose ``__init__`` never ran."""
    try:
        optimizer.register_step_post_hook(print).remove()
    except (AttributeError, TypeError):
        return False
    return True
