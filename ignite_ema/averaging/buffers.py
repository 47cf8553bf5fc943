"""What an update does with buffers: the values of ``handle_buffers``."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

from .pairing import Treatment

__all__ = ["BufferPolicy", "check_patterns", "check_policy", "treatment_of"]

BufferPolicy: TypeAlias = str | Mapping[str, str]

_MODES: dict[str, Treatment] = {"copy": "copy", "update": "average", "ema_train": "keep"}
_PER_BUFFER: dict[str, Treatment] = {"copy": "copy", "update": "average", "keep": "keep"}


def treatment_of(policy: BufferPolicy, path: str) -> Treatment:
    """What ``policy`` says of the buffer ``path``: of a mapping the first pattern that matches, "copy" if none does."""
    if isinstance(policy, str):
        return _MODES[policy]
    matches = (treatment for pattern, treatment in policy.items() if fnmatchcase(path, pattern))
    return _PER_BUFFER[next(matches, "copy")]


def check_policy(policy: BufferPolicy) -> None:
    """Raises ValueError unless ``policy`` is one."""
    if isinstance(policy, Mapping):
        for pattern, treatment in policy.items():
            if not (isinstance(pattern, str) and isinstance(treatment, str) and treatment in _PER_BUFFER):
                raise ValueError(
                    f"handle_buffers can only map to {_listed(_PER_BUFFER)}, but got {treatment!r} for {pattern!r}."
                )
    elif not isinstance(policy, str) or policy not in _MODES:
        raise ValueError(
            f"handle_buffers can only be one of {_listed(_MODES)}, but got {policy}; a mapping decides by name pattern."
        )


def check_patterns(policy: BufferPolicy, names: list[str]) -> None:
    """Raises ValueError where a pattern of ``policy`` matches none of the buffers ``names``."""
    for pattern in () if isinstance(policy, str) else policy:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"handle_buffers should have patterns that match a buffer, but got {pattern!r}; the buffers are "
                f"{_listed(names) or 'none'}."
            )


def _listed(names: Iterable[str], most: int = 8) -> str:
    quoted = [repr(name) for name in names]
    return ", ".join(quoted[:most]) + (f", … ({len(quoted)} in all)" if len(quoted) > most else "")
