"""Compares the state dicts of a file by names, shapes and values."""

import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from .memory import REPEATED, view_of

__all__ = ["Comparison", "plain_name"]

_T = TypeVar("_T")
_COMPILED = re.compile(r"(?:(?<=\.)|^)_orig_mod\.")


def plain_name(name: Any) -> str:
    """The name without the component that ``torch.compile`` puts into it."""
    return _COMPILED.sub("", str(name))


def _once(question: Callable[..., _T]) -> Callable[..., _T]:
    """Makes a method of a `Comparison`, which gets what a file holds, answer from memory the second time."""

    @wraps(question)
    def answered(self: "Comparison", *values: Any) -> _T:
        key = (question.__name__, *map(id, values))
        if key not in self._answers:
            self._asked.append(values)
            self._answers[key] = question(self, *values)
        answer: _T = self._answers[key]
        return answer

    return answered


class Comparison:
    """Compares mappings that stay as they are while it lives. No answer is worked out twice."""

    def __init__(self) -> None:
        self._asked: list[tuple[Any, ...]] = []  # keeps them alive, and their ids with them
        self._answers: dict[Any, Any] = {}

    @_once
    def shapes(self, state: Mapping[Any, Any]) -> dict[str, Any]:
        """The shapes of a state dict by plain names; None for what has none."""
        return {plain_name(name): _shape(value) for name, value in state.items()}

    @_once
    def is_state_dict(self, state: Any) -> bool:
        """Whether it is a mapping from names to tensors, with extra state at most."""
        return self.has_tensors(state) and all(
            isinstance(name, str) and (isinstance(value, Tensor) or name.endswith("_extra_state"))
            for name, value in state.items()
        )

    @_once
    def has_tensors(self, state: Any) -> bool:
        """Whether it is a mapping, and one of its values a tensor."""
        return isinstance(state, Mapping) and any(isinstance(value, Tensor) for value in state.values())

    @_once
    def unwrapped(self, state: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """The state dict without ``module.`` before all its names; itself where one has none."""
        prefix = "module."
        inner = {str(name)[len(prefix) :]: value for name, value in state.items() if str(name).startswith(prefix)}
        return inner if len(inner) == len(state) else state

    @_once
    def covers(self, state: Mapping[Any, Any], tensors: Mapping[Any, Any]) -> bool:
        """Whether ``state`` has a tensor of the same name and shape for each of ``tensors``, which has some."""
        return self.has_tensors(tensors) and self.shapes(tensors).items() <= self.shapes(state).items()

    def are_alike(self, one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
        """Whether one covers the other, wrapped or not."""
        one, other = self.unwrapped(one), self.unwrapped(other)
        return self.covers(one, other) or self.covers(other, one)

    @_once
    def are_same(self, tensors: Mapping[Any, Any], state: Mapping[Any, Any]) -> bool:
        """Whether all of ``tensors`` are in ``state``, bit for bit."""
        held = {plain_name(name): value for name, value in state.items()}
        return all(
            plain_name(name) in held and self._are_equal(value, held[plain_name(name)])
            for name, value in tensors.items()
        )

    def _are_equal(self, one: Any, other: Any) -> bool:
        if one is other:
            return True
        if not (_has_values(one) and _has_values(other) and one.shape == other.shape and one.dtype == other.dtype):
            return False
        views = view_of(one), view_of(other)
        if views not in self._answers:
            self._answers[views] = torch.equal(one, other) or torch.equal(_bits(one), _bits(other))
        return bool(self._answers[views])


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) and not value.is_nested else None


def _has_values(value: Any) -> bool:
    """Whether it is a tensor whose values can be compared, and in a reasonable time."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided or value.is_nested:
        return False
    return value.nbytes <= value.untyped_storage().nbytes() + REPEATED


def _bits(tensor: Tensor) -> Tensor:
    """Its bytes: a NaN is equal to itself there."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
