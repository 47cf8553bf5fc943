"""Checks of arguments that several modules take, made before anything changes."""

import math
import numbers
from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor

__all__ = [
    "as_float",
    "check_count",
    "check_flags",
    "check_saved_mapping",
    "checked_momentum",
    "refuse_shallow_copy",
    "shown_integer",
]

_LARGEST_COUNT = 2**63 - 1  # what files hold


def checked_momentum(value: object, what: str, verb: str = "be", when: str = "") -> float:
    """``value`` as a momentum; raises TypeError or ValueError unless it is one.

    Args:
        value: what should be a momentum.
        what: where it was read from, such as "momentum".
        verb: what that should do: "be" or "return" a momentum.
        when: said after the value, such as " after 3 updates".
    """
    if type(value) is float and 0 <= value <= 1:
        return value
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what} should {verb} a momentum, a number in [0, 1], got {value!r}{when}; 0.001 is usual.")
    momentum = as_float(value)
    if not 0 <= momentum <= 1:
        got = shown_integer(value) if isinstance(value, int) else repr(value)
        raise ValueError(
            f"{what} should {verb} a momentum in [0, 1], got {got}{when}; it is the weight of the new weights, 1 - "
            "decay."
        )
    return momentum


def as_float(value: numbers.Real) -> float:
    """``value``, or infinity where it is too large for a float."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_flags(**flags: object) -> None:
    """Raises TypeError, naming the argument, unless each of them is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} should be True or False, got {value!r}.")


def check_count(value: object, name: str = "num_updates") -> None:
    """Raises TypeError or ValueError unless ``value`` can be a number of updates."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} should be an integer, got {value!r}: it counts updates.")
    if not 0 <= value <= _LARGEST_COUNT:
        limit = "0 or more" if value < 0 else "2**63 - 1 or less"
        raise ValueError(f"{name} should be {limit}, got {shown_integer(value)}: it counts updates.")


def refuse_shallow_copy(thing: object) -> NoReturn:
    """Raises TypeError: ``thing`` would share its averaged twin with the copy."""
    raise TypeError(
        f"{type(thing).__name__} should be copied with copy.deepcopy, got copy.copy, after which both would move the "
        "same twin; deepcopy it, or make a new one of the same model."
    )


def shown_integer(value: int) -> str:
    """``value`` in words; of one with too many digits to read how many bits it has."""
    return str(value) if value.bit_length() <= 64 else f"an integer of {value.bit_length()} bits"


def check_saved_mapping(state: object, kinds: Mapping[str, type | tuple[type, ...]], what: str) -> None:
    """Raises TypeError or ValueError unless ``state`` has just these entries, each of its kind.

    Args:
        state: what was saved.
        kinds: the type or types of each entry; ``bool`` counts as an ``int`` only where it is listed.
        what: whose state it is, such as "an EMAHandler".
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"The state of {what} should be a mapping from its state_dict(), got {type(state).__name__}.")
    for key in [*kinds, *state]:
        if key not in state or key not in kinds:
            fault = "misses" if key in kinds else "should not have"
            raise ValueError(
                f"The state of {what} should be what its state_dict() gave, but it {fault} {key!r}; load it unchanged."
            )
    for key, kind in kinds.items():
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(state[key], allowed) or (isinstance(state[key], bool) and bool not in allowed):
            names = " or ".join(one.__name__ for one in allowed)
            raise TypeError(
                f"{key!r} of the state should be of type {names}, got {type(state[key]).__name__}; load what "
                "state_dict() gave, unchanged."
            )
