"""Checks of what a :class:`~ignite_ema.PostHocEMA` is made with and attached to, made before anything changes."""

from collections.abc import Sequence

import torch
from ignite.engine import Engine
from torch import nn

from ..averaging.buffers import BufferPolicy
from ..schedules import PowerFunction
from .attachment import attachments
from .power_average import PowerAverage

__all__ = ["check_options", "check_others", "check_parameters", "checked_twins", "checked_widths"]

_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def checked_widths(sigma_rels: Sequence[float]) -> tuple[float, ...]:
    """The widths as floats; raises TypeError or ValueError unless they are different, each in (0, 1/√12)."""
    if isinstance(sigma_rels, str) or not isinstance(sigma_rels, Sequence) or not sigma_rels:
        raise TypeError(f"sigma_rels should be a sequence of widths such as (0.05, 0.10), got {sigma_rels!r}.")
    widths = tuple(float(PowerFunction(sigma_rel).sigma_rel) for sigma_rel in sigma_rels)
    if len(set(widths)) < len(widths):
        raise ValueError(f"sigma_rels should be different widths, got {sigma_rels!r}; name each once.")
    return widths


def check_options(handle_buffers: BufferPolicy, samples: object, snapshot_dtype: torch.dtype) -> None:
    """Raises TypeError or ValueError, naming the argument, for an option that a ``PostHocEMA`` cannot have."""
    if handle_buffers == "ema_train":
        raise ValueError(
            "handle_buffers should be 'copy', 'update' or a mapping, got 'ema_train': an average that is rebuilt "
            "from snapshots has made no forward passes of its own."
        )
    if samples is not None and not callable(samples):
        raise TypeError(
            f"samples should be a function of the engine, got {samples!r}; pass one such as "
            "lambda engine: len(engine.state.batch[0])."
        )
    if snapshot_dtype not in _TYPES:
        names = ", ".join(str(one) for one in _TYPES)
        raise ValueError(f"snapshot_dtype should be one of {names}, got {snapshot_dtype!r}.")


def check_parameters(model: nn.Module) -> None:
    """Raises ValueError for a model without parameters."""
    if not any(True for _ in model.parameters()):
        raise ValueError("model should have parameters, got none; there is nothing to average.")


def checked_twins(twins: Sequence[nn.Module] | None, sigma_rels: Sequence[float]) -> Sequence[nn.Module | None]:
    """For each width one of the user's own twins, or None; raises ValueError where their number does not fit."""
    if twins is None:
        return [None] * len(sigma_rels)
    if len(twins) != len(sigma_rels):
        raise ValueError(f"ema_models should be one twin for each of {len(sigma_rels)} widths, got {len(twins)}.")
    if len({id(twin) for twin in twins}) < len(twins):
        raise ValueError("ema_models should be different modules, got one twice; each average needs its own.")
    return twins


def check_others(engine: Engine, name: str, averages: Sequence[PowerAverage]) -> None:
    """Raises ValueError where another ``PostHocEMA`` of this engine has the name or the directory of ``averages``."""
    others = [one for one in attachments(engine) if isinstance(one.owner, PowerAverage) and one.owner not in averages]
    if any(one.name.rpartition("_")[0] == name for one in others):
        raise ValueError(
            f"name should be another than {name!r}, which another PostHocEMA of this engine uses; give each one of "
            "its own, such as name='generator_momentum'."
        )
    place = averages[0].directory
    if any(isinstance(one.owner, PowerAverage) and one.owner.directory == place for one in others):
        raise ValueError(
            f"dirname should be another than '{place}', which another PostHocEMA of this engine writes to; give each "
            "one a directory of its own."
        )
