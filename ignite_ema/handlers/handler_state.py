"""The saved form of a handler: that of its average and a few entries more, checked before it is loaded."""

from collections.abc import Mapping
from typing import Any

from ..averaging.average_state import AVERAGE_STATE, check_average_state
from ..averaging.validation import checked_momentum

__all__ = ["check_state"]

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
