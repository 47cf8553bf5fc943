"""The saved form of a handler: what its ``state_dict`` holds, and how a state is checked before it is loaded."""

import numbers
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from ..averaging.validation import check_count, checked_momentum

__all__ = ["VERSION", "check_state", "described"]

VERSION = 2
_STATE: dict[str, tuple[type, ...]] = {
    "ignite_ema_version": (int,),
    "num_updates": (int,),
    "current_momentum": (float, type(None)),
    "momentum_schedule": (str,),
    "num_skipped": (int,),
    "optimizer_stepped": (list,),
    "saved_while_swapped": (bool,),
    "averaged_tensors": (Mapping,),
    "state_dict_names": (Mapping,),
}


def check_state(state: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError, naming the entry, unless ``state`` is of the form that a handler saves."""
    if not isinstance(state, Mapping):
        raise TypeError(
            f"The state of an EMAHandler should be a mapping from its state_dict(), got {type(state).__name__}."
        )
    if state.get("ignite_ema_version", VERSION) != VERSION:
        raise ValueError(
            f"'ignite_ema_version' of the state should be {VERSION}, got {state['ignite_ema_version']}; load it with "
            "the ignite_ema that wrote it, or a newer one."
        )
    for key, value in state.items():
        if isinstance(value, Mapping) and "ignite_ema_version" in value:
            raise ValueError(
                f"The state of an EMAHandler should be what its state_dict() gave, got a mapping that has one under "
                f"{key!r}; load that entry."
            )
    for key in [*_STATE, *state]:
        if key not in state or key not in _STATE:
            what = "misses" if key in _STATE else "should not have"
            raise ValueError(
                f"The state of an EMAHandler should be what its state_dict() gave, but it {what} {key!r}; the state of "
                "a model belongs into handler.ema_model."
            )
    for key, expected in _STATE.items():
        if not isinstance(state[key], expected) or (isinstance(state[key], bool) and bool not in expected):
            names = " or ".join(kind.__name__ for kind in expected)
            raise TypeError(
                f"{key!r} of the state should be of type {names}, got {type(state[key]).__name__}; load what "
                "state_dict() gave, unchanged."
            )
    if not all(isinstance(name, str) for name in state["optimizer_stepped"]):
        raise TypeError(
            f"'optimizer_stepped' of the state should be a list of names, got {state['optimizer_stepped']!r}; load "
            "what state_dict() gave, unchanged."
        )
    for key in ("num_updates", "num_skipped"):
        check_count(state[key], key)
    if state["current_momentum"] is not None:
        checked_momentum(state["current_momentum"], "'current_momentum' of the state")


def described(value: object) -> str:
    """A rule, or a field of one, in words that are the same in every process; functions by their names alone."""
    if is_dataclass(value) and not isinstance(value, type):
        inner = ", ".join(f"{field.name}={described(getattr(value, field.name))}" for field in fields(value))
        return f"{type(value).__qualname__}({inner})"
    if isinstance(value, numbers.Real):
        return repr(float(value))
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else repr(value)
