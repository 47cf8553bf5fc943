"""Finds averaged weights in the content of a file: first by the format of a system, then by name."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from .formats import FORMATS, Found, State, covers, has_tensors, within

_WORDS = {"ema", "swa", "avg", "average", "averaged"}
_MODEL_NAMES = ("state_dict", "model", "model_state_dict", "net", "network")
_DEPTH = 2  # how many levels of mappings to search below the first


def find(content: State) -> list[Found]:
    """The averages in the content of a file, or its plain state dicts if there are none.

    Any state dict that fits the model may be an average, whatever its name: the user has to choose.
    """
    found = _candidates(content, _DEPTH)
    if averages := [average for average in found if average.rank < 2]:
        return averages
    states = {plain.path: plain.tensors for plain in found if isinstance(plain.tensors, Mapping)}
    models = [state for path, state in states.items() if path and path[0] in _MODEL_NAMES]
    plain = []
    for path, state in states.items():
        fits = any(covers(model, state) or covers(state, model) for model in models)
        is_likely = fits if models else len(path) == 1
        plain.append(Found("plain", state, path=path, rank=2 if is_likely else 3))
    return plain


def _candidates(state: State, depth: int) -> list[Found]:
    """What a format recognizes in a mapping; if none does, what is found in its entries."""
    found = [average for recognize in (*FORMATS, _plain) for average in recognize(state)]
    if found or not depth:
        return found
    for name, entry in _mappings(state).items():
        inside = _candidates(entry, depth - 1)
        if all(average.rank for average in inside):  # a model may have parts that look like averages
            inside += _named(name, entry, state)
        found += [replace(average, path=(name, *average.path)) for average in inside]
    return found


def _named(name: str, state: State, parent: State) -> Iterator[Found]:
    """A model's state dict under a name with "ema" in it, as ``Checkpoint`` writes it, or with another such word.

    Meters also use the other words ("avg_loss"): these count only if the model is beside it.
    """
    words = _WORDS.intersection(_words(name))
    if not words or not has_tensors(state):
        return
    inner = within(state, "module.")  # a timm ModelEmaV3 has this prefix; a model with the bare names gives it away
    models = [model for key, model in _mappings(parent).items() if not _WORDS.intersection(_words(key))]
    models += [within(model, "module.") for model in models]
    is_whole = any(covers(model, state) for model in models)
    is_wrapped = len(inner) == len(state) and any(covers(model, inner) for model in models)
    if "ema" in words or is_whole or is_wrapped:
        yield Found("Ignite", inner if is_wrapped and not is_whole else state, rank=1)


def _plain(state: State) -> Iterator[Found]:
    """A mapping from names to tensors, apart from extra state."""
    others = [name for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if has_tensors(state) and all(str(name).endswith("_extra_state") for name in others):
        yield Found("plain", state, rank=2)


def raw_beside(tensors: State, path: Sequence[str], content: State) -> State | None:
    """The raw weights beside the average at ``path``: the nearest entry that covers its names and shapes.

    If several do, the name decides; if it does not, there are none.
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


def _words(name: str) -> list[str]:
    """The words of ``netEMA_2`` are "net", "ema" and "2"."""
    snake = re.sub("(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    return re.findall("[a-z]+|[0-9]+", snake)


def _mappings(state: State) -> dict[str, State]:
    """The entries of a mapping that are mappings."""
    return {str(name): entry for name, entry in state.items() if isinstance(entry, Mapping)}
