"""Finds averaged weights in what a file holds: in the format of a system, or under a name that says so, or nowhere."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .files import ForeignObject, is_dense, kind_of, quoted
from .formats import FORMATS, Found, State, within

__all__ = ["covers", "fault", "find", "merged", "plain_name", "raw_beside"]

_WORDS = {"ema", "swa", "avg", "average", "averaged"}
_MODEL_NAMES = ("state_dict", "model", "model_state_dict", "net", "network")
_COMPILED = re.compile(r"(?:(?<=\.)|^)_orig_mod\.")
_DEPTH = 2  # levels of mappings below the first that are searched


def find(state: State) -> list[Found]:
    """The averages in what a file holds, or if there are none its plain state dicts."""
    return _averages(state, _DEPTH) or _plain(state)


def _averages(state: State, depth: int) -> list[Found]:
    """All averages that a mapping is, or that are in it.

    A model under the name of an average may have parts that look like one (an ``encoder_ema`` of its own): both count.
    """
    found = [one for recognize in FORMATS.values() for one in recognize(state)]
    parts = {part for one in found for part in one.parts}
    if not depth or any(one.system == "ignite_ema" for one in found):
        return found
    for name, entry in ((str(name), entry) for name, entry in state.items() if isinstance(entry, Mapping)):
        inside = _averages(entry, depth - 1)
        if name not in parts and all(one.system == "mmagic" for one in inside):
            inside += _named(name, entry, state)
        for one in inside:
            parent, entry_name = (one.parent, one.entry) if one.entry else (state, name)
            found.append(replace(one, path=(name, *one.path), parent=parent, entry=entry_name))
    return found


def _named(name: str, state: State, parent: State) -> Iterator[Found]:
    """A model's state dict under a name with "ema" in it, as ``Checkpoint`` writes it, or with another such word.

    The other words are those of meters too ("avg_loss"): they count if the model lies beside.
    """
    words = _WORDS.intersection(_words(name))
    if not words or not _has_tensors(state):
        return
    models = [model for key, model in _models_in(parent).items() if not _WORDS.intersection(_words(key))]
    if "ema" not in words and not any(_are_alike(state, model) for model in models):
        return
    inner = _unwrapped(state)  # a timm ModelEmaV3 has this prefix; a model of the bare names gives it away
    if any(covers(model, inner) for model in models) and not any(covers(model, state) for model in models):
        state = inner
    yield Found("Ignite", state)


def _plain(state: State) -> list[Found]:
    """The state dicts of a file without a known average: the file itself, or entries of it.

    An entry with the names and shapes of the model but other values may be an average, whatever its name: it has to
    be chosen.
    """
    if _is_state_dict(state):
        return [Found("plain", state)]
    entries = dict(_state_dicts(state, _DEPTH))
    outer = [path for path in entries if len(path) == 1]
    models = [path for path in outer if path[0] in _MODEL_NAMES]
    likely, models = models or outer, models or outer[:1]
    parent = {".".join(path): entry for path, entry in entries.items()}
    found = []
    for path, entry in entries.items():
        twins = [model for model in models if model != path and _are_alike(entry, entries[model])]
        twins = [model for model in twins if not _are_same(entry, entries[model])]
        note = f"of the names and shapes of {quoted(twins[0][0])}" if twins and path not in models[:1] else ""
        if len(path) == 1 or note:
            rank = 1 if note or path in likely else 2
            found.append(Found("plain", entry, None, None, path, parent, ".".join(path), rank=rank, note=note))
    return found


def _state_dicts(state: State, depth: int) -> Iterator[tuple[tuple[str, ...], State]]:
    """The state dicts in a mapping, and the keys that lead to them."""
    for name, entry in state.items():
        if _is_state_dict(entry):
            yield (str(name),), entry
        elif isinstance(entry, Mapping) and depth > 1:
            for path, inner in _state_dicts(entry, depth - 1):
                yield (str(name), *path), inner


def merged(found: list[Found]) -> list[Found]:
    """Those that differ: if several are bit for bit the same, one is enough; of ours, which has its count."""
    first, *others = sorted(found, key=lambda one: one.system != "ignite_ema")
    return [first, *(one for one in others if not _repeats(first, one))]


def _repeats(first: Found, other: Found) -> bool:
    if isinstance(first.tensors, list) or isinstance(other.tensors, list):
        return False
    if first.system == "ignite_ema":  # which may lack frozen tensors
        return bool(first.tensors) and _holds(other.tensors, first.tensors)
    return _are_same(first.tensors, other.tensors)


def raw_beside(tensors: State, found: Found) -> State | None:
    """The raw weights among the other entries of a file: what covers all names and shapes, if only one does.

    An entry that repeats the average, as in a checkpoint for deployment, is taken only if there is no other.
    """
    models = {name: entry for name, entry in _models_in(found.parent).items() if name != found.entry}
    fitting = {name: entry for name, entry in models.items() if covers(entry, tensors)}
    others = {name: entry for name, entry in fitting.items() if not _holds(entry, tensors)}
    fitting = {_snake(name): entry for name, entry in (others or fitting).items()}
    own = "_".join(word for word in re.split("[^a-z0-9]+", _snake(found.entry)) if word not in _WORDS)
    for model in ("raw_model", own, "model", "state_dict"):
        if model in fitting:
            return fitting[model]
    return next(iter(fitting.values())) if len(fitting) == 1 else None


def fault(state: State) -> str | None:
    """What is wrong in a mapping in which nothing was found, if it looks like a state dict, or one lies in it."""
    if _has_tensors(state):
        return f"in it, {_wrong_in(state)}"
    for name, entry in state.items():
        is_model = str(name) in _MODEL_NAMES or _WORDS.intersection(_words(str(name)))
        if is_model and (isinstance(entry, (list, tuple)) or (isinstance(entry, ForeignObject) and not entry)):
            return f"its {quoted(name)} is no state dict, but {kind_of(entry)}"
        if isinstance(entry, Mapping) and (is_model or _has_tensors(entry)):
            return f"in its {quoted(name)}, {_wrong_in(entry)}"
    return None


def _wrong_in(state: State) -> str:
    """Why a mapping is no state dict."""
    for name, value in state.items():
        if not isinstance(name, str):
            return f"the name {quoted(name)} is no text, but {kind_of(name)}"
        if not isinstance(value, Tensor) and not name.endswith("_extra_state"):
            return f"{quoted(name)} is no tensor, but {kind_of(value)}"
    return "there are no tensors"


# --- names ---


def plain_name(name: Any) -> str:
    """The name without the component that ``torch.compile`` puts into it."""
    return _COMPILED.sub("", str(name))


def _words(name: str) -> list[str]:
    """``netEMA_2`` is of the words "net" and "ema"."""
    return [word for word in re.split("[^a-z]+", _snake(name)) if word]


def _snake(name: str) -> str:
    """``netEMA`` as ``net_ema``."""
    return re.sub("(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


# --- comparisons of state dicts by names, shapes and values ---


def _has_tensors(state: Any) -> bool:
    return isinstance(state, Mapping) and any(isinstance(value, Tensor) for value in state.values())


def _is_state_dict(state: Any) -> bool:
    """True for a mapping from names to tensors, with extra state at most."""
    return _has_tensors(state) and all(
        isinstance(name, str) and (isinstance(value, Tensor) or name.endswith("_extra_state"))
        for name, value in state.items()
    )


def _models_in(parent: State) -> dict[str, State]:
    return {str(name): entry for name, entry in parent.items() if _has_tensors(entry)}


def _unwrapped(state: State) -> State:
    """The state dict without ``module.`` before all of its names; itself if a name has none."""
    inner = within(state, "module.")
    return inner if len(inner) == len(state) else state


def _shapes(state: State) -> dict[str, Any]:
    shapes = ((plain_name(name), value) for name, value in state.items())
    return {name: value.shape if isinstance(value, Tensor) and not value.is_nested else None for name, value in shapes}


def covers(state: State, tensors: State) -> bool:
    """True if ``state`` has a tensor of the same name and shape for each of ``tensors``, which has some."""
    return _has_tensors(tensors) and _shapes(tensors).items() <= _shapes(state).items()


def _are_alike(one: State, other: State) -> bool:
    """True if one covers the other, wrapped or not."""
    one, other = _unwrapped(one), _unwrapped(other)
    return covers(one, other) or covers(other, one)


def _are_same(one: State, other: State) -> bool:
    return len(one) == len(other) and _holds(one, other)


def _holds(state: State, tensors: State) -> bool:
    """True if all of ``tensors`` are in ``state``, bit for bit."""
    own = {plain_name(name): value for name, value in state.items()}
    return all(
        plain_name(name) in own and (own[plain_name(name)] is value or _are_equal(own[plain_name(name)], value))
        for name, value in tensors.items()
    )


def _are_equal(one: Any, other: Any) -> bool:
    for value in (one, other):
        if not isinstance(value, Tensor) or value.is_nested or value.is_meta or not is_dense(value):
            return False
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    """Its bytes: a NaN is equal to itself there."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
