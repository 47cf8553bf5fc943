"""Warns of an average whose type is too narrow for what an update adds to it."""

from collections.abc import Callable

import torch

from .user_warnings import warn_user

__all__ = ["Precision"]

_EPS = torch.finfo(torch.float32).eps


class Precision:
    """Warns, once, of updates that the type of the average rounds away.

    Args:
        type_was_chosen: whether the user has said what type holds the average, and wants no advice.

    Attributes:
        has_moved: whether an update was large enough for the type, or weights were loaded.
    """

    def __init__(self, type_was_chosen: bool) -> None:
        self._is_silent = type_was_chosen
        self.has_moved = False

    def check(self, momentum: float, resolution: float, can_round: Callable[[], bool]) -> None:
        """Warns where updates of this momentum stall.

        Args:
            momentum: λ of the update, smaller than ``resolution``.
            resolution: the relative rounding step of the type that holds the average.
            can_round: called where it warns; whether ``stochastic_rounding`` would be a remedy.
        """
        if momentum == 0 or self._is_silent:
            return
        if self.has_moved and resolution <= _EPS:
            return  # the end of a schedule that goes to 0; 16 bits stall long before
        self._is_silent = True
        needed = resolution / 2 / momentum
        far = f"{needed:.0%} of" if needed < 2 else f"{needed:.0f} times"
        wider = torch.float32 if resolution > _EPS else torch.float64
        or_rounded = ", or stochastic_rounding=True" if can_round() else ""
        warn_user(
            f"A momentum of {momentum:g} is too small for the type that holds the average: a weight moves only where "
            f"it differs from its average by about {far} its size, and is rounded back otherwise; pass "
            f"dtype={wider} to hold the average in {str(wider).removeprefix('torch.')} (or an ema_model of that type)"
            f"{or_rounded}."
        )
