"""What ``EMAHandler.swap_during`` puts on an evaluator, and how it is taken away again."""

from typing import Any

from ignite.engine import Engine, Events
from ignite.engine.events import State

from ..averaging.summaries import one_line
from ..averaging.swap import Swapped
from .attachment import Owner, attachments

__all__ = ["EvaluationSwap", "swaps"]

# The attribute of an engine under which its swaps are found.
_SWAPS = "_ignite_ema_swaps"


def swaps(engine: Engine) -> "list[EvaluationSwap]":
    """The swaps during the runs of ``engine``."""
    return list(vars(engine).get(_SWAPS, ()))


class EvaluationSwap:
    """Puts each ``run()`` of an engine inside ``owner.swapped()``, until it is removed; also a context manager.

    It wraps the run itself, because no set of events covers every way out of one: listening to ``EXCEPTION_RAISED``
    would swallow the exception, and an interrupted run fires no ``COMPLETED``.

    Args:
        owner: who swaps.
        engine: whose runs.
    """

    owner: Owner

    def __init__(self, owner: Owner, engine: Engine) -> None:
        if not isinstance(engine, Engine):
            raise TypeError(f"evaluator should be an ignite Engine, got {type(engine).__name__}.")
        if any(other.owner is owner for other in attachments(engine)):
            raise RuntimeError(
                "evaluator should be an engine of its own, but this handler is attached to this one and updates the "
                "average there; swap during the runs of another engine."
            )
        if any(other.owner is owner for other in swaps(engine)):
            raise RuntimeError(
                "An EMAHandler should swap during the runs of an evaluator once, but this one does so already; "
                "remove() the handle of that call first."
            )
        self.owner = owner
        self.is_active = True
        self._swap: Swapped | None = None
        self._engine = engine
        self._inner = engine.run
        self._inner_is_own = "run" in vars(engine)  # somebody else has wrapped it, too
        engine.run = self._outer = self._run  # type: ignore[method-assign]
        # A run that began before this call, or by a method that was taken before, is on the model's own weights.
        started = Events.STARTED, Events.ITERATION_STARTED
        self._handles = [engine.add_event_handler(event, self._check_start) for event in started]
        vars(engine).setdefault(_SWAPS, []).append(self)

    def __repr__(self) -> str:
        return one_line(
            type(self).__name__,
            lambda: f"{type(self.owner).__name__} during the runs of an Engine",
            lambda: "" if self.is_active else "removed",
        )

    def remove(self) -> None:
        """Lets the engine run on the model's own weights again; does nothing the second time."""
        if not self.is_active:
            return
        engine = self._engine
        self.is_active = False
        for handle in self._handles:
            handle.remove()
        vars(engine)[_SWAPS].remove(self)
        if vars(engine).get("run") is not self._outer:
            return  # somebody has wrapped it once more, and this layer passes through from here on
        del engine.run
        if self._inner_is_own:
            engine.run = self._inner  # type: ignore[method-assign]

    def __enter__(self) -> "EvaluationSwap":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _run(self, *args: Any, **kwargs: Any) -> State:
        if not self.is_active:
            return self._inner(*args, **kwargs)
        self._swap = self.owner.swapped()
        with self._swap:
            return self._inner(*args, **kwargs)

    def _check_start(self, engine: Engine) -> None:
        if self._swap is None or not self._swap.is_active:
            raise RuntimeError(
                "The evaluator should be started as evaluator.run(...) after swap_during() was called, but this run "
                "began before, or by a method taken before, and is on the model's own weights; call it earlier."
            )
