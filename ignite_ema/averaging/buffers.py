"""What an update does with buffers: the values of ``handle_buffers``."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

from .checks import listed

__all__ = ["STATISTICS", "BufferPolicy", "Treatment", "check_patterns", "check_policy", "treatment_of"]

BufferPolicy: TypeAlias = str | Mapping[str, str]
Treatment: TypeAlias = Literal["average", "copy", "keep"]

STATISTICS = {"*running_mean": "update", "*running_var": "update"}  # of normalization layers

_MODES: dict[str, Treatment] = {"copy": "copy", "update": "average", "ema_train": "keep"}
_PER_BUFFER: dict[str, Treatment] = {"copy": "copy", "update": "average", "keep": "keep"}


def treatment_of(policy: BufferPolicy, name: str) -> Treatment:
    """What ``policy`` says of the buffer ``name``: in a mapping the first match decides, and no match means "copy"."""
    if isinstance(policy, str) and policy != "statistics":
        return _MODES[policy]
    patterns = STATISTICS if isinstance(policy, str) else policy
    matches = (treatment for pattern, treatment in patterns.items() if fnmatchcase(name, pattern))
    return _PER_BUFFER[next(matches, "copy")]


def check_policy(policy: BufferPolicy) -> None:
    """Raises ValueError unless ``policy`` is a value of ``handle_buffers``."""
    if isinstance(policy, Mapping):
        for pattern, treatment in policy.items():
            if not (isinstance(pattern, str) and isinstance(treatment, str) and treatment in _PER_BUFFER):
                raise ValueError(
                    f"handle_buffers can only map to {listed(_PER_BUFFER)}, but got {treatment!r} for {pattern!r}."
                )
    elif not isinstance(policy, str) or policy not in (*_MODES, "statistics"):
        raise ValueError(
            f"handle_buffers can only be one of {listed((*_MODES, 'statistics'))}, but got {policy}. A mapping decides "
            "by name pattern."
        )


def check_patterns(policy: BufferPolicy, names: list[str]) -> None:
    """Raises ValueError if a pattern of a mapping matches none of the buffers ``names``."""
    for pattern in () if isinstance(policy, str) else policy:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"handle_buffers should have patterns that match a buffer, but got {pattern!r}. The buffers are "
                f"{listed(names) or 'none'}."
            )
