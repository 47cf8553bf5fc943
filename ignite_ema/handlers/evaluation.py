"""Swaps the averaged weights in during the runs of an evaluator: ``EMAHandler.swap_during``."""

import copy
from typing import Any

from ignite.engine import Engine, Events
from ignite.engine.events import RemovableEventHandle, State

from ..averaging.checks import check_flags, one_line, warn_user
from ..averaging.sharding import broadcast_buffers
from ..averaging.swap import Swapped
from .attachment import attached_to, check_not_attached


class EvaluationSwap(RemovableEventHandle):
    """Puts each ``run()`` of an engine inside ``owner.swapped()``, while ``is_attached``. Also a context manager.

    It wraps the run itself, because no set of events covers every end of a run: listening to ``EXCEPTION_RAISED`` would
    swallow the exception, and an interrupted run fires no ``COMPLETED``.
    """

    names = ()  # of attributes of engine.state, which an Attachment has
    _is_copy = False

    def __init__(self, owner: Any, engine: Engine, sync_buffers: bool) -> None:
        check_not_attached(owner, engine, "evaluator")
        check_flags(sync_buffers=sync_buffers)
        super().__init__(Events.ITERATION_STARTED, self, engine)
        self.owner, self.is_attached = owner, True
        self._buffers_from = broadcast_buffers if sync_buffers else None
        self._swap: Swapped | None = None
        self._engine, self._inner = engine, engine.run
        self._inner_is_own = "run" in vars(engine)  # something else has wrapped it before
        engine.run = self._run  # type: ignore[method-assign]
        engine.add_event_handler(Events.ITERATION_STARTED, self)
        attached_to(engine).append(self)

    def __repr__(self) -> str:
        return one_line(
            type(self).__name__,
            lambda: f"{type(self.owner).__name__} during the runs of an Engine",
            lambda: "" if self.is_attached else "removed",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "EvaluationSwap":
        """For a copied engine: does not swap, and warns when the engine runs."""
        copied = memo[id(self)] = copy.copy(self)
        copied._is_copy, copied.is_attached = self._is_copy or self.is_attached, False
        copied._engine = memo.get(id(self._engine), self._engine)
        copied._inner = copy.deepcopy(self._inner, memo)
        return copied

    def remove(self) -> None:
        """Lets the engine run with the model's own weights again; a second call does nothing."""
        if not self.is_attached:
            return
        self.is_attached = False
        super().remove()
        attached_to(self._engine).remove(self)
        if not self._is_outermost():
            return  # something has wrapped it again; this layer passes through from here on
        del self._engine.run
        if self._inner_is_own:
            self._engine.run = self._inner  # type: ignore[method-assign]

    def _is_outermost(self) -> bool:
        return bool(vars(self._engine).get("run") == self._run)

    def _run(self, *args: Any, **kwargs: Any) -> State:
        if self._is_copy and self._is_outermost():
            warn_user(
                "This engine is a copy of one that swap_during() was called with, and evaluates the model's own "
                "weights. Call swap_during() with the copy."
            )
        if not self.is_attached:
            return self._inner(*args, **kwargs)
        self.owner._note_reading()
        self._swap = self.owner.average.swapped(self._buffers_from)
        with self._swap:
            return self._inner(*args, **kwargs)

    def __call__(self, engine: Engine) -> None:
        """Raises RuntimeError if the run does not go through the wrapper, and has the model's own weights."""
        if self.is_attached and (self._swap is None or not self._swap.is_active):
            raise RuntimeError(
                "The evaluator should be started as evaluator.run(...) after swap_during(), but this run began before "
                "it, or through an older reference to run, and has the model's own weights. Call swap_during() first."
            )
