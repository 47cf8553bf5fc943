"""What an update does with buffers: the values of ``handle_buffers``."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from .checks import listed
from .names import Place, modules_by_path, places_of

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


@contextmanager
def buffers_followed(
    online: nn.Module, averaged: nn.Module, treatment_of: Callable[[str], Treatment], *, may_clear: bool
) -> Iterator[tuple[dict[str, Place], dict[str, Place]]]:
    """Gives the twin buffers that the model has gained, such as a cache, and clears those that it has lost.

    Yields the places of both. Undone if the block raises. Buffers that an update leaves alone may differ.
    """
    ours, theirs = places_of(online), places_of(averaged)
    changed = {
        name: place
        for name, place in (ours | theirs).items()
        if (name not in ours or name not in theirs) and place.is_buffer and treatment_of(name) != "keep"
        if isinstance(place.table, dict)  # the tables of TorchScript cannot change
    }
    if not changed:
        yield ours, theirs
        return
    twins = modules_by_path(averaged)
    tables = [twins[place.path]._buffers for place in changed.values() if place.path in twins]
    before = [(table, dict(table)) for table in tables]
    try:
        common = [(place, theirs[name]) for name, place in ours.items() if name in theirs]
        # Devices and types of averaged parameters by those of online ones.
        kinds = {_kind(mine.get()): _kind(own.get()) for mine, own in common if not mine.is_buffer}
        copies = {id(mine.get()): own.get() for mine, own in common}  # a buffer under several names stays one
        for name, place in changed.items():
            if name not in ours and may_clear:
                place.table[place.key] = None
            elif name in ours and place.path in twins:
                buffer = place.get()
                with torch.inference_mode(False), torch.no_grad():
                    kind = kinds.get(_kind(buffer), _kind(buffer))
                    copied = copies.setdefault(id(buffer), buffer.to(*kind, copy=True))
                twins[place.path].register_buffer(place.key, copied, persistent=place.is_saved)
        yield ours, places_of(averaged)
    except BaseException:
        for table, content in before:
            table.clear()
            table.update(content)
        raise


def _kind(tensor: Tensor) -> tuple[torch.device, torch.dtype]:
    return tensor.device, tensor.dtype
