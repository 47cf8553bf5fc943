"""What to say of an average whose type is too narrow for what an update adds to it."""

import torch

__all__ = ["stalled"]


def stalled(momentum: float, resolution: float, can_round: bool) -> str:
    """The warning of an update that the type of the average rounds away.

    Args:
        momentum: λ of the update, smaller than ``resolution``.
        resolution: the relative rounding step of the type.
        can_round: whether ``stochastic_rounding`` would be a remedy.
    """
    needed = resolution / 2 / momentum
    far = f"{needed:.0%} of" if needed < 2 else f"{needed:.0f} times"
    wider = torch.float32 if resolution > torch.finfo(torch.float32).eps else torch.float64
    return (
        f"A momentum of {momentum:g} is too small for the type of the average: a weight moves only if it differs from "
        f"its average by about {far} its size, and is rounded back otherwise. Pass dtype={wider} to average in "
        f"{str(wider).removeprefix('torch.')} (or an ema_model of that type)"
        f"{', or stochastic_rounding=True' if can_round else ''}."
    )
