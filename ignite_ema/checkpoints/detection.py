"""Where in a file averaged weights lie: in the format of a system, or under a name that says so, or else nowhere."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from .comparison import Comparison
from .formats import FORMATS, Found, State
from .naming import quoted
from .unpickling import ForeignObject, kind_of

__all__ = ["Detection"]

_WORDS = {"ema", "swa", "avg", "average", "averaged"}
_MODEL_NAMES = ("state_dict", "model", "model_state_dict", "net", "network")
_MOST_MODELS = 16  # state dicts side by side among which the raw weights are looked for


class Detection:
    """Searches what a file holds."""

    def __init__(self) -> None:
        self.comparison = Comparison()
        self._seen: set[int] = set()
        self._models: dict[int, dict[str, State]] = {}

    def find(self, state: State) -> list[Found]:
        """The averages in what a file holds, or, where there are none, its plain state dicts."""
        return self._search(state) or self._plain(state)

    def _search(self, state: State, depth: int = 2) -> list[Found]:
        """All averages that a mapping is, or that are in it.

        A model under the name of an average may have parts that look like one (an ``encoder_ema`` of its own): both
        count.
        """
        self._seen.add(id(state))
        found = [one for recognise in FORMATS.values() for one in recognise(state)]
        parts = {part for one in found for part in one.parts}
        if not depth or any(one.system == "ignite_ema" for one in found):
            return found
        for name, entry in ((str(name), entry) for name, entry in state.items() if isinstance(entry, Mapping)):
            inside = self._search(entry, depth - 1) if id(entry) not in self._seen else []
            if name not in parts and all(one.system == "mmagic" for one in inside):
                inside += self._named(name, entry, state)
            for one in inside:
                parent, entry_name = (one.parent, one.entry) if one.entry else (state, name)
                found.append(replace(one, path=(name, *one.path), parent=parent, entry=entry_name))
        return found

    def _named(self, name: str, state: State, parent: State) -> Iterator[Found]:
        """A model's state dict under a name with "ema" in it, as ``Checkpoint`` writes it, or with another such word.

        The other words are those of meters too ("avg_loss"): they count where the model lies beside.
        """
        words = _WORDS.intersection(_words(name))
        if not words or not self.comparison.has_tensors(state):
            return
        models = [model for key, model in self._models_in(parent).items() if not _WORDS.intersection(_words(key))]
        if "ema" not in words and not any(self.comparison.are_alike(state, model) for model in models):
            return
        inner = self.comparison.unwrapped(state)  # as timm's ModelEmaV3 is, which a model of these names gives away
        if not any(self.comparison.covers(model, state) for model in models):
            state = inner if any(self.comparison.covers(model, inner) for model in models) else state
        yield Found("Ignite", state)

    def _models_in(self, parent: State) -> dict[str, State]:
        """The entries of a mapping that hold tensors; of more than a few, those whose names are a model's."""
        if id(parent) not in self._models:
            models = {str(name): entry for name, entry in parent.items() if self.comparison.has_tensors(entry)}
            if len(models) > _MOST_MODELS:
                models = {name: entry for name, entry in models.items() if name in ("raw_model", *_MODEL_NAMES)}
            self._models[id(parent)] = models
        return self._models[id(parent)]

    def _plain(self, state: State) -> list[Found]:
        """The state dicts of a file without a known average: itself, or the entries that are some.

        What has the names and shapes of the model but other values may be an average, of whatever name: it has to be
        chosen.
        """
        if self.comparison.is_state_dict(state):
            return [Found("plain", state)]
        entries = dict(self._state_dicts(state, set()))
        outer = [path for path in entries if len(path) == 1]
        models = [path for path in outer if path[0] in _MODEL_NAMES] or outer[:_MOST_MODELS]
        parent = {".".join(path): entry for path, entry in entries.items()}
        found = []
        for path, entry in entries.items():
            alike = [other for other in models if other != path and self.comparison.are_alike(entry, entries[other])]
            twin = next((other for other in alike if not self._are_same(entry, entries[other])), None)
            note = "" if twin is None or path in models[:1] else f"of the names and shapes of {quoted(twin[0])}"
            if len(path) == 1 or note:
                rank = 1 if note or path in models else 2
                label = ".".join(path)
                found.append(Found("plain", entry, None, None, path, parent, label, rank=rank, note=note))
        return found

    def fault(self, state: State) -> str | None:
        """What is wrong in a mapping in which nothing was found, if it looks like a state dict, or one lies in it."""
        if self.comparison.has_tensors(state):
            return f"in it, {_wrong_in(state)}"
        for name, entry in state.items():
            is_model = str(name) in _MODEL_NAMES or _WORDS.intersection(_words(str(name)))
            if is_model and (isinstance(entry, (list, tuple)) or (isinstance(entry, ForeignObject) and not entry)):
                return f"its {quoted(name)} is no state dict, but {kind_of(entry)}"
            if isinstance(entry, Mapping) and (is_model or self.comparison.has_tensors(entry)):
                return f"in its {quoted(name)}, {_wrong_in(entry)}"
        return None

    def _state_dicts(self, state: State, seen: set[int], depth: int = 2) -> Iterator[tuple[tuple[str, ...], State]]:
        """The state dicts in a mapping, and the keys that lead to them."""
        for name, entry in state.items():
            if self.comparison.is_state_dict(entry):
                yield (str(name),), entry
            elif isinstance(entry, Mapping) and depth > 1 and id(entry) not in seen:
                seen.add(id(entry))
                for path, inner in self._state_dicts(entry, seen, depth - 1):
                    yield (str(name), *path), inner

    def _are_same(self, one: State, other: State) -> bool:
        return len(one) == len(other) and self.comparison.are_same(one, other)

    def merged(self, found: list[Found]) -> list[Found]:
        """Those that differ: where several are bit for bit the same, one is enough, and ours has its count."""
        first, *others = sorted(found, key=lambda one: one.system != "ignite_ema")
        return [first, *(one for one in others if not self._repeats(first, one))]

    def _repeats(self, first: Found, other: Found) -> bool:
        if isinstance(first.tensors, list) or isinstance(other.tensors, list):
            return False
        if first.system == "ignite_ema":  # which may lack frozen tensors
            return bool(first.tensors) and self.comparison.are_same(first.tensors, other.tensors)
        return self._are_same(first.tensors, other.tensors)

    def raw_beside(self, tensors: State, found: Found) -> State | None:
        """The raw weights among the other entries of a file: what covers all names and shapes, if that is one alone.

        An entry that is the average once more, as in a checkpoint for deployment, is taken only where there is no
        other.
        """
        models = {name: entry for name, entry in self._models_in(found.parent).items() if name != found.entry}
        fitting = {name: entry for name, entry in models.items() if self.comparison.covers(entry, tensors)}
        others = {name: entry for name, entry in fitting.items() if not self.comparison.are_same(tensors, entry)}
        fitting = {_snake(name): entry for name, entry in (others or fitting).items()}
        own = "_".join(word for word in re.split("[^a-z0-9]+", _snake(found.entry)) if word not in _WORDS)
        for model in ("raw_model", own, "model", "state_dict"):
            if model in fitting:
                return fitting[model]
        return next(iter(fitting.values())) if len(fitting) == 1 else None


def _wrong_in(state: State) -> str:
    """Why a mapping is no state dict."""
    for name, value in state.items():
        if not isinstance(name, str):
            return f"the name {quoted(name)} is no text, but {kind_of(name)}"
        if not isinstance(value, Tensor) and not name.endswith("_extra_state"):
            return f"{quoted(name)} is no tensor, but {kind_of(value)}"
    return "there are no tensors"


def _words(name: str) -> list[str]:
    """``netEMA_2`` is of the words "net" and "ema"."""
    return [word for word in re.split("[^a-z]+", _snake(name)) if word]


def _snake(name: str) -> str:
    """``netEMA`` as ``net_ema``."""
    return re.sub("(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
