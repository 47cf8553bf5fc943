"""What an update does with buffers: the values of ``handle_buffers``."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

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
) -> Iterator[None]:
    """Gives the twin buffers that the model has gained, such as a cache, and clears those that it has lost.

    Undone if the block raises. Buffers that an update leaves alone may differ.
    """
    twins = modules_by_path(averaged)
    pairs = {path: (module, twins[path]) for path, module in modules_by_path(online).items() if path in twins}
    changed = [
        (module, twin, key)
        for path, (module, twin) in pairs.items()
        if isinstance(module._buffers, dict)  # the tables of TorchScript cannot change
        for key in {**module._buffers, **twin._buffers}
        if (module._buffers.get(key) is None) != (twin._buffers.get(key) is None) and treatment_of(path + key) != "keep"
    ]
    before = [(twin._buffers, dict(twin._buffers)) for _, twin, _ in changed]
    try:
        if changed:
            _follow(changed, pairs.values(), places_of(online), may_clear)
        yield
    except BaseException:
        for table, content in before:
            table.clear()
            table.update(content)
        raise


def _follow(
    changed: Iterable[tuple[nn.Module, nn.Module, str]],
    pairs: Iterable[tuple[nn.Module, nn.Module]],
    places: Mapping[str, Place],
    may_clear: bool,
) -> None:
    """Copies to the twin, or clears there, each changed buffer: its module, the module's twin, and its key."""
    is_saved = {(id(place.table), place.key): place.is_saved for place in places.values()}
    kinds: dict[Any, tuple[torch.device, torch.dtype]] = {}  # of averaged parameters by those of online ones
    copies: dict[int, Tensor] = {}  # a buffer under several names stays one
    for module, twin in pairs:
        for key, value in module._parameters.items():
            if value is not None and (average := twin._parameters.get(key)) is not None:
                kinds[value.device, value.dtype] = average.device, average.dtype
        for key, buffer in module._buffers.items():
            if buffer is not None and (own := twin._buffers.get(key)) is not None:
                copies[id(buffer)] = own
    for module, twin, key in changed:
        buffer = module._buffers.get(key)
        if buffer is not None:
            with torch.inference_mode(False), torch.no_grad():
                kind = kinds.get((buffer.device, buffer.dtype), (buffer.device, buffer.dtype))
                copied = copies.setdefault(id(buffer), buffer.to(*kind, copy=True))
            twin.register_buffer(key, copied, persistent=is_saved[id(module._buffers), key])
        elif may_clear:
            twin._buffers[key] = None
