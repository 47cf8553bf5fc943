"""Warnings that point at the user's line, however deep inside the library they are found."""

import sys
import warnings

__all__ = ["warn_user"]

# Whose frames are passed over: this package, and those through which a user's call reaches it.
_PASSED_OVER = ("ignite_ema", "ignite", "torch", "contextlib")


def warn_user(message: str) -> None:
    """Warns with a ``UserWarning`` at the innermost line that is in none of the libraries between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _PASSED_OVER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
