"""What ``EMAHandler.swap_during`` puts on an evaluator, and how it is taken away again."""

from collections.abc import Callable
from typing import Any

from ignite.engine import Engine, Events
from ignite.engine.events import State

from ..averaging.checks import check_flags, one_line, warn_user
from ..averaging.sharding import broadcast_buffers
from ..averaging.swap import Swapped
from .attachment import attachments

__all__ = ["EvaluationSwap", "swaps"]

_SWAPS = "_ignite_ema_swaps"  # the attribute of an engine under which its swaps are found


def swaps(engine: Engine) -> "list[EvaluationSwap]":
    """The swaps during the runs of ``engine``."""
    return [swap for swap in vars(engine).get(_SWAPS, ()) if swap.is_attached]


class EvaluationSwap:
    """Puts each ``run()`` of an engine inside ``owner.swapped()``, until it is removed; also a context manager.

    It wraps the run itself, because no set of events covers every end of a run: listening to ``EXCEPTION_RAISED`` would
    swallow the exception, and an interrupted run fires no ``COMPLETED``.

    Args:
        owner: who swaps.
        engine: whose runs.
        sync_buffers: whether the first rank's buffers are used on all ranks.

    Attributes:
        is_attached: whether it still swaps.
    """

    def __init__(self, owner: Any, engine: Engine, sync_buffers: bool) -> None:
        if not isinstance(engine, Engine):
            raise TypeError(f"evaluator should be an ignite Engine, got {type(engine).__name__}.")
        check_flags(sync_buffers=sync_buffers)
        if any(other.owner is owner for other in attachments(engine)):
            raise RuntimeError(
                "evaluator should be another engine than the trainer, but this handler is attached to it and updates "
                "the average there. Swap during the runs of another engine."
            )
        if any(other.owner is owner for other in swaps(engine)):
            raise RuntimeError(
                "An EMAHandler should swap during the runs of an evaluator once, but it does so already. Call remove() "
                "on the handle of that call first."
            )
        self.owner: Any = owner
        self.is_attached = True
        self._buffers_from = broadcast_buffers if sync_buffers else None
        self._swap: Swapped | None = None
        self._engine = engine
        self._inner: Callable[..., State] | None = engine.run
        self._inner_is_own = "run" in vars(engine)  # somebody else has wrapped it, too
        engine.run = self._outer = self._run  # type: ignore[method-assign]
        # A run that began before this call, or by a method that was taken before, has the model's own weights.
        started = Events.STARTED, Events.ITERATION_STARTED
        self._handles = [engine.add_event_handler(event, self._check_start) for event in started]
        vars(engine).setdefault(_SWAPS, []).append(self)

    def __repr__(self) -> str:
        return one_line(
            type(self).__name__,
            lambda: f"{type(self.owner).__name__} during the runs of an Engine",
            lambda: "" if self.is_attached else "removed",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "EvaluationSwap":
        """What a copied engine has in its place: it does not swap, and says so when the engine runs."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.owner, copied.is_attached, copied._handles, copied._inner = self.owner, False, [], None
        copied._engine = memo.get(id(self._engine), self._engine)
        return copied

    def remove(self) -> None:
        """Lets the engine run with the model's own weights again; a second call does nothing."""
        if not self.is_attached:
            return
        engine = self._engine
        self.is_attached = False
        for handle in self._handles:
            handle.remove()
        vars(engine)[_SWAPS].remove(self)
        if vars(engine).get("run") is not self._outer:
            return  # somebody has wrapped it once more, and this layer passes through from here on
        del engine.run
        if self._inner_is_own:
            engine.run = self._inner  # type: ignore[method-assign, assignment]

    def __enter__(self) -> "EvaluationSwap":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _run(self, *args: Any, **kwargs: Any) -> State:
        if self._inner is None:  # of a copy
            if not swaps(self._engine):
                warn_user(
                    "This engine is a copy of one that swap_during() was called with, and evaluates the model's own "
                    "weights. Call swap_during() with the copy."
                )
            return type(self._engine).run(self._engine, *args, **kwargs)
        if not self.is_attached:
            return self._inner(*args, **kwargs)
        self._swap = self.owner._swapped(self._buffers_from)
        with self._swap:
            return self._inner(*args, **kwargs)

    def _check_start(self, engine: Engine) -> None:
        if self.is_attached and (self._swap is None or not self._swap.is_active):
            raise RuntimeError(
                "The evaluator should be started as evaluator.run(...) after swap_during() was called, but this run "
                "began before, or through a reference to run taken before, and has the model's own weights. Call "
                "swap_during() first."
            )
