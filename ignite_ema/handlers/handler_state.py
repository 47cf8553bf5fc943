"""The saved form of a handler: that of its average and a few entries more, checked before it is loaded."""

from collections.abc import Mapping
from typing import Any

from ..averaging.average_state import AVERAGE_STATE, check_average_state
from ..averaging.user_warnings import warn_user
from ..averaging.validation import checked_momentum

__all__ = ["check_state", "warn_of_swap"]

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


def warn_of_swap(state: Mapping[str, Any]) -> None:
    """Warns where ``state`` was saved while the model held averaged weights."""
    if state["saved_while_swapped"]:
        warn_user(
            "The EMA handler was saved inside swapped() or swap_during(): its own state is right, but a model that was "
            "saved beside it holds averaged weights, too; save what you resume from at an event of the trainer."
        )
