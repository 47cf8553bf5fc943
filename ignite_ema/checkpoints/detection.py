"""Where in a file averaged weights lie: in the layout of a system, or under a name that says so, or else nowhere."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .formats import LAYOUTS, Found, State, Tensors, covers, plain_name, within

__all__ = ["LARGE", "find", "raw_beside", "same"]

LARGE = 2**30  # bytes: what tensors may be made of by repeating the memory that their file has for them
_WORDS = r"(?<![a-z])(ema|swa|avg|averaged?)(?![a-z])"
_MODEL_NAMES = ("state_dict", "model", "model_state_dict", "net", "network")


def find(state: State) -> list[Found]:
    """The averages in what a file holds, or, where there are none, its plain state dicts."""
    return _search(state) or _plain(state)


def _ignite(name: str, state: State, beside: State) -> Iterator[Found]:
    """A model's state dict under a name with "ema" in it, as ``Checkpoint`` writes it, or with another such word.

    The other words are those of meters too ("avg_loss"): they count where the model lies beside.
    """
    word = re.search(_WORDS, _snake(name).lower())
    if not word or not any(isinstance(value, Tensor) for value in state.values()):
        return
    models = [entry for key, entry in beside.items() if key != name and isinstance(entry, Mapping)]
    if word[1] != "ema" and not any(_alike(state, entry) for entry in models):
        return
    inner = within(state, "module.")  # such as timm's ModelEmaV3, which a model of these names beside it gives away
    wrapped = len(inner) == len(state) and not raw_beside(state, name, beside) and raw_beside(inner, name, beside)
    yield Found("Ignite", inner if wrapped else state)


def _search(state: State, depth: int = 2) -> list[Found]:
    """The averages that a mapping is, or else those that are in it.

    A model under the name of an average may have parts that look like one (an ``encoder_ema`` of its own): both count.
    """
    found = [one for layout in LAYOUTS.values() for one in layout(state)]
    if found or not depth:
        return found
    for name, entry in ((str(name), entry) for name, entry in state.items() if isinstance(entry, Mapping)):
        inside = _search(entry, depth - 1)
        if all(one.system == "mmagic" for one in inside):
            inside += _ignite(name, entry, state)
        found += [
            replace(one, path=(name, *one.path), beside=one.beside or state, entry=one.entry or name) for one in inside
        ]
    return found


def _plain(state: State) -> list[Found]:
    """The state dicts of a file without a known average: itself, or the entries that are some.

    What has the names and shapes of the model but other values may be an average, of whatever name.
    """
    if _is_state_dict(state):
        return [Found("plain", state)]
    entries = dict(_state_dicts(state))
    outer = [path for path in entries if len(path) == 1]
    models = [path for path in outer if path[0] in _MODEL_NAMES] or outer
    beside = {".".join(path): entry for path, entry in entries.items()}
    found = []
    for path, entry in entries.items():
        others = (other for other in models if other != path and _alike(entry, entries[other]))
        twin = next((other for other in others if not same(entry, entries[other])), None)
        if twin and path[0] not in _MODEL_NAMES:
            label, note = ".".join(path), f"perhaps: of the names and shapes of '{twin[0]}'"
            found.append(Found("Ignite", entry, path=path, beside=beside, entry=label, note=note))
        elif len(path) == 1:
            found.append(Found("plain", entry, path=path, rank=1 if path in models else 2))
    return found


def _state_dicts(state: State, depth: int = 2) -> Iterator[tuple[tuple[str, ...], State]]:
    """The state dicts in a mapping, and the keys that lead to them."""
    for name, entry in state.items():
        if _is_state_dict(entry):
            yield (str(name),), entry
        elif isinstance(entry, Mapping) and depth > 1:
            for path, inner in _state_dicts(entry, depth - 1):
                yield (str(name), *path), inner


def raw_beside(tensors: State, name: str, beside: State) -> State | None:
    """The raw weights among the other entries of a file: what covers all names and shapes, if that is one alone.

    An entry that is the average once more, as in a checkpoint for deployment, is taken only where there is no other.
    """
    entries = {str(key): entry for key, entry in beside.items() if key != name and isinstance(entry, Mapping)}
    fitting = {_snake(key): entry for key, entry in entries.items() if covers(entry, tensors)}
    fitting = {key: entry for key, entry in fitting.items() if not _repeats(entry, tensors)} or fitting
    for model in ("raw_model", re.sub(f"_?{_WORDS}_?", "", _snake(name), flags=re.IGNORECASE), "model", "state_dict"):
        if model in fitting:
            return fitting[model]
    return next(iter(fitting.values())) if len(fitting) == 1 else None


def _repeats(entry: State, tensors: State) -> bool:
    held = {plain_name(name): value for name, value in entry.items()}
    return all(_equal(value, held[plain_name(name)]) for name, value in tensors.items())


def same(one: Tensors, other: Tensors) -> bool:
    """Whether two averages are bit for bit the same; lists without names never are."""
    if isinstance(one, list) or isinstance(other, list) or one.keys() != other.keys():
        return False
    return all(_equal(value, other[name]) for name, value in one.items())


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if not all(isinstance(value, Tensor) and _is_dense(value) for value in (one, other)):
        return False
    return bool(one.dtype == other.dtype and torch.equal(one, other))


def _is_dense(tensor: Tensor) -> bool:
    """Whether it has values to compare, and in a reasonable time."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return False
    return tensor.nbytes <= max(tensor.untyped_storage().nbytes(), LARGE)


def _alike(one: State, other: State) -> bool:
    """Whether the tensors of one are among those of the other, by name and shape, wrappers aside."""
    few, many = sorted((_shapes(one), _shapes(other)), key=len)
    return bool(few) and few.items() <= many.items()


def _shapes(state: State) -> dict[str, torch.Size]:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {plain_name(name).removeprefix("module."): value.shape for name, value in tensors.items()}


def _is_state_dict(state: Any) -> bool:
    """Whether it is a mapping from names to tensors, with extra state at most."""
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        return False
    return all(
        isinstance(name, str) and (isinstance(value, Tensor) or name.endswith("_extra_state"))
        for name, value in state.items()
    )


def _snake(name: str) -> str:
    """``netEMA`` and ``EMAModel`` with their words apart."""
    return re.sub("(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
