"""Checks of arguments that several modules take, made before anything changes."""

import numbers

from torch import Tensor

__all__ = ["check_count", "checked_momentum"]


def checked_momentum(value: object, what: str) -> float:
    """``value`` as a momentum; raises with ``what``, the name of where it was read from."""
    if type(value) is float and 0 <= value <= 1:
        return value
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what} should be a momentum, a number in [0, 1], got {value!r}; 0.001 is usual.")
    momentum = float(value)
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"{what} should be a momentum in [0, 1], got {value!r}; it is the weight of the new weights, 1 - decay."
        )
    return momentum


def check_count(value: object, name: str = "num_updates") -> None:
    """Raises TypeError or ValueError unless ``value`` can be a number of updates."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} should be an integer, got {value!r}: it counts updates.")
    if value < 0:
        raise ValueError(f"{name} should be 0 or more, got {value!r}: it counts updates.")
