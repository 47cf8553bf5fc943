"""Finds averaged weights in the content of a file: first by the format of a system, then by name."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from .formats import FORMATS, Found, State, within

_WORDS = {"ema", "swa", "avg", "average", "averaged"}
_MODEL_NAMES = ("state_dict", "model", "model_state_dict", "net", "network")
_COMPILED = re.compile(r"(?:(?<=\.)|^)_orig_mod\.")
_DEPTH = 2  # how many levels of mappings to search below the first


def find(content: State) -> list[Found]:
    """The averages in the content of a file, or its plain state dicts if there are none."""
    return list(_averages(content, _DEPTH) or _plain(content))


def _averages(state: State, depth: int) -> list[Found]:
    """The averages that a format recognizes in a mapping; if no format does, those in its entries."""
    found = [average for recognize in FORMATS for average in recognize(state)]
    if found or not depth:
        return found
    for name, entry in _mappings(state).items():
        inside = _averages(entry, depth - 1)
        if all(average.rank for average in inside):  # a model may have parts that look like averages
            inside += _named(name, entry, state)
        found += [replace(average, path=(name, *average.path)) for average in inside]
    return found


def _named(name: str, state: State, parent: State) -> Iterator[Found]:
    """A model's state dict under a name with "ema" in it, as ``Checkpoint`` writes it, or with another such word.

    Meters also use the other words ("avg_loss"): these count only if the model is beside it.
    """
    words = _WORDS.intersection(_words(name))
    if not words or not _has_tensors(state):
        return
    inner = within(state, "module.")  # a timm ModelEmaV3 has this prefix; a model with the bare names gives it away
    models = [model for key, model in _mappings(parent).items() if not _WORDS.intersection(_words(key))]
    models += [within(model, "module.") for model in models]
    is_whole = any(covers(model, state) for model in models)
    is_wrapped = len(inner) == len(state) and any(covers(model, inner) for model in models)
    if "ema" in words or is_whole or is_wrapped:
        yield Found("Ignite", inner if is_wrapped and not is_whole else state, rank=1)


def _plain(content: State) -> Iterator[Found]:
    """The state dicts of a file without a known average: the file itself, or entries of it.

    Any entry that fits the model may be an average, whatever its name: the user has to choose.
    """
    if _is_state_dict(content):
        yield Found("plain", content)
        return
    entries = dict(_state_dicts(content, _DEPTH))
    models = [entry for path, entry in entries.items() if path[0] in _MODEL_NAMES]
    for path, entry in entries.items():
        fits = any(covers(model, entry) or covers(entry, model) for model in models)
        is_likely = fits if models else len(path) == 1
        yield Found("plain", entry, path=path, rank=1 if is_likely else 2)


def _state_dicts(state: State, depth: int) -> Iterator[tuple[tuple[str, ...], State]]:
    """The state dicts in a mapping, and the keys that lead to them."""
    for name, entry in _mappings(state).items():
        if _is_state_dict(entry):
            yield (name,), entry
        elif depth > 1:
            for path, inner in _state_dicts(entry, depth - 1):
                yield (name, *path), inner


def raw_beside(tensors: State, path: Sequence[str], content: State) -> State | None:
    """The raw weights beside an average: an entry that covers its names and shapes, if only one does.

    Args:
        tensors: the average.
        path: the keys that lead to it; nearer entries are preferred.
        content: what the file holds.
    """
    if not path:
        return None
    *outer, entry = path
    parent = content
    for name in outer:
        parent = _mappings(parent)[name]
    others = {"_".join(_words(name)): other for name, other in _mappings(parent).items() if name != entry}
    fitting = {name: other for name, other in others.items() if covers(other, tensors)}
    own = "_".join(word for word in _words(entry) if word not in _WORDS)
    for name in ("raw_model", own, "model", "state_dict"):
        if name in fitting:
            return fitting[name]
    if fitting:
        return next(iter(fitting.values())) if len(fitting) == 1 else None
    return raw_beside(tensors, outer, content)


def plain_name(name: Any) -> str:
    """The name without the component that ``torch.compile`` adds."""
    return _COMPILED.sub("", str(name))


def _words(name: str) -> list[str]:
    """The words of ``netEMA_2`` are "net", "ema" and "2"."""
    snake = re.sub("(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    return re.findall("[a-z]+|[0-9]+", snake)


def _mappings(state: State) -> dict[str, State]:
    """The entries of a mapping that are mappings."""
    return {str(name): entry for name, entry in state.items() if isinstance(entry, Mapping)}


def _has_tensors(state: State) -> bool:
    return any(isinstance(value, Tensor) for value in state.values())


def _is_state_dict(state: State) -> bool:
    """True for a mapping from names to tensors, apart from extra state."""
    return _has_tensors(state) and all(
        isinstance(name, str) and (isinstance(value, Tensor) or name.endswith("_extra_state"))
        for name, value in state.items()
    )


def covers(state: State, tensors: State) -> bool:
    """True if ``state`` has a tensor of the same name and shape for each of ``tensors``, which is not empty."""
    return _has_tensors(tensors) and _shapes(tensors).items() <= _shapes(state).items()


def _shapes(state: State) -> dict[str, Any]:
    return {plain_name(name): value.shape if isinstance(value, Tensor) else None for name, value in state.items()}
