"""Tells the warnings that this package issues from those of others, so that ours alone can be errors in the tests."""

import sys
import warnings
from functools import cache


class OwnWarning(Warning):
    """What each warning of ``ignite_ema`` is in the tests, beside the category that users see."""


@cache
def _own(category):
    return type(category.__name__, (category, OwnWarning), {"__module__": category.__module__})


def mark_own_warnings():
    """Makes every warning that code of ``ignite_ema`` issues an ``OwnWarning``, from now on in this process."""
    warn = warnings.warn

    def marking_warn(message, category=None, stacklevel=1, **options):
        if sys._getframe(1).f_globals.get("__name__", "").split(".")[0] == "ignite_ema":
            category, message = type(message) if isinstance(message, Warning) else category, str(message)
            category = _own(category or UserWarning)
        warn(message, category, stacklevel + 1, **options)

    warnings.warn = marking_warn
