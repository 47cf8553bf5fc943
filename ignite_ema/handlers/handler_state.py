"""The state of a handler: what is saved of it, and what becomes of it where it is loaded, reset or set."""

from collections.abc import Mapping
from typing import Any

from ..averaging.average import ModelAverage
from ..averaging.average_state import AVERAGE_STATE, check_average_state
from ..averaging.schedule_argument import described
from ..averaging.traversal import unwrapped
from ..averaging.user_warnings import warn_user
from ..averaging.validation import check_count, checked_momentum
from ..checkpoints.formats import Names
from ..checkpoints.reading import Source, read_part
from .attachment import Attachments
from .guidance import Guidance
from .momentum import DrivenMomentum, Momentum, settable

__all__ = ["HandlerState", "check_state"]

_STATE: dict[str, type | tuple[type, ...]] = {
    **AVERAGE_STATE,
    "current_momentum": (float, type(None)),
    "optimizer_stepped": list,
    "saved_while_swapped": bool,
}


def check_state(state: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError, naming the entry, unless ``state`` is of the form that a handler saves."""
    check_average_state(state, _STATE, "an EMAHandler")
    if not all(isinstance(name, str) for name in state["optimizer_stepped"]):
        raise TypeError(
            f"'optimizer_stepped' of the state should be a list of names, got {state['optimizer_stepped']!r}; load "
            "what state_dict() gave, unchanged."
        )
    if state["current_momentum"] is not None:
        checked_momentum(state["current_momentum"], "'current_momentum' of the state")


class HandlerState:
    """An average, its momentum, and what follows for the engines and for the warnings where one of them is changed.

    Nothing has changed where one of these methods raises.

    Args:
        average: the average.
        momentum: its momentum.
        guidance: is told that the average is what it is meant to be.
        attachments: what attaches the handler.
    """

    def __init__(self, average: ModelAverage, momentum: Momentum, guidance: Guidance, attachments: Attachments) -> None:
        self._average, self._momentum = average, momentum
        self._guidance, self._attachments = guidance, attachments

    def set_momentum(self, value: float) -> None:
        """Another plain momentum."""
        momentum = settable(self._momentum, value)
        self._average.momentum = value  # raises before it has changed
        momentum.set(value)

    def set_count(self, value: int) -> None:
        """Another number of updates."""
        check_count(value)
        self._momentum.at(value)  # raises before anything has changed
        self._average.num_updates = value
        self._go_on(share_is_unknown=value > 0)

    def reset(self, buffers_only: bool) -> None:
        """The average becomes the model, or its buffers those of the model."""
        self._average.reset(buffers_only=buffers_only)
        if not buffers_only:
            self._go_on()

    def saved(self) -> dict[str, Any]:
        """What :meth:`load` goes on from."""
        return {
            **self._average.state_dict(),
            "current_momentum": self._momentum.in_force() if isinstance(self._momentum, DrivenMomentum) else None,
            "optimizer_stepped": sorted(self._attachments.stepped()),
            "saved_while_swapped": self._average.is_swapped(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`saved` gave; with a momentum that was driven, if it started from the same value."""
        check_state(state)
        self._average.load_state_dict({key: state[key] for key in AVERAGE_STATE})
        self._attachments.load_stepped(state["optimizer_stepped"])
        is_same = state["momentum_schedule"] == described(self._average.schedule)
        self._go_on(momentum=state["current_momentum"] if is_same else None)
        if state["saved_while_swapped"]:
            warn_user(
                "The EMA handler was saved inside swapped() or swap_during(): its own state is right, but a model "
                "that was saved beside it holds averaged weights, too; save what you resume from at an event of the "
                "trainer."
            )

    def load_averaged(self, source: Source, key: str | None, names: Names, num_updates: int | None) -> None:
        """Starts from the average in a checkpoint, and from the count that is passed, or in it, or else stays."""
        found, _ = read_part(source, key, unwrapped(self._average.module) if names is None else names)
        count = found.num_updates if num_updates is None else num_updates
        if count is None and self._momentum.counts and not self._guidance.start_is_known:
            raise ValueError(
                "num_updates should be the number of updates that the loaded average has behind it, which the "
                f"checkpoint does not say: {described(self._momentum.schedule)} would go on with a momentum of "
                f"{self._momentum.at(0):g}; pass num_updates=, 0 to start the schedule."
            )
        count = self._average.num_updates if count is None else count
        check_count(count)
        self._momentum.at(count)  # raises before anything has changed
        self._average.load_plain(found.tensors)
        self.set_count(count)
        if found.system == "plain":
            warn_user("The checkpoint has no average; this one starts from the weights in it.")

    def _go_on(self, share_is_unknown: bool = False, momentum: float | None = None) -> None:
        """Notes that the average is what it is meant to be, and shows what the momentum goes on with."""
        self._guidance.start_is_known, self._guidance.share_is_unknown = True, share_is_unknown
        self._momentum.go_on(self._average.num_updates, momentum)
