"""Signals that wait: Python's handlers of them run when what must not be cut short is done.

A handler of a signal may raise, as that of Ctrl-C does, at any line of Python code that the main thread runs. Blocking
the signal (``signal.pthread_sigmask``) does not help against one that has arrived and whose handler has not run yet.
Handlers that are wrapped do: they see where they would raise.
"""

import _thread
import signal
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

__all__ = ["DeferringHandler", "defers_signals", "deliver_signals", "uninterrupted", "unwrap_handlers", "wrap_handlers"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_main = threading.main_thread()
_delivering: set[CodeType] = set()
_uninterrupted: set[CodeType] = set()
_waiting: "list[tuple[DeferringHandler, int]]" = []
_PAUSE = 0.001  # seconds


def defers_signals(function: _Function) -> _Function:
    """Marks a function in which signals wait from its first instruction on, and that delivers them at last."""
    _delivering.add(function.__code__)
    return function


def uninterrupted(function: _Function) -> _Function:
    """Marks a function in which signals wait from its first instruction on until a moment after its last."""
    _uninterrupted.add(function.__code__)
    return function


class DeferringHandler:
    """A signal handler that calls ``previous``, but lets it wait where an exception would do harm."""

    def __init__(self, previous: Callable[[int, FrameType | None], Any]) -> None:
        self.previous = previous

    def __call__(self, number: int, frame: FrameType | None) -> Any:
        # Between contextlib and what it manages, too, where an exception would leave a context that is entered.
        later = frame is not None and frame.f_globals.get("__name__") == "contextlib"
        at = frame
        while at is not None and not later:
            if at.f_code in _delivering:
                _waiting.append((self, number))
                return None
            later, at = at.f_code in _uninterrupted, at.f_back
        if later:
            return threading.Timer(_PAUSE, _thread.interrupt_main, (number,)).start()
        return self.previous(number, frame)


def deliver_signals() -> None:
    """Calls the handlers that have waited; what they raise goes to the caller."""
    if threading.current_thread() is not _main:
        return
    while _waiting:
        handler, number = _waiting.pop(0)
        try:
            handler.previous(number, None)
        except BaseException:
            deliver_signals()  # of several that raise the last wins, as with Python
            raise


def wrap_handlers(wrapped: list[tuple[int, DeferringHandler]]) -> None:
    """Wraps the handlers of all signals that have one in Python, and adds them to ``wrapped``."""
    if threading.current_thread() is not _main:
        return  # where no handlers run
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if callable(handler) and not isinstance(handler, DeferringHandler):
            wrapped.append((number, DeferringHandler(handler)))
            signal.signal(*wrapped[-1])


def unwrap_handlers(wrapped: list[tuple[int, DeferringHandler]]) -> None:
    """Puts back the handlers of before, but not where there is another one by now."""
    if threading.current_thread() is not _main:
        return
    try:
        while wrapped:
            number, handler = wrapped[-1]
            if signal.getsignal(number) is handler:
                signal.signal(number, handler.previous)
            wrapped.pop()
    except BaseException:  # from a handler that is back already
        unwrap_handlers(wrapped)
        raise
