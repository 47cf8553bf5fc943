"""Compares the state dicts of a file by names, shapes and values."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .memory import REPEATED, view_of

__all__ = ["Comparison", "plain_name"]

_COMPILED = re.compile(r"(?:(?<=\.)|^)_orig_mod\.")


def plain_name(name: Any) -> str:
    """The name without the component that ``torch.compile`` puts into it."""
    return _COMPILED.sub("", str(name))


class Comparison:
    """Compares mappings that stay as they are while it lives. No answer is worked out twice."""

    def __init__(self) -> None:
        self._states: dict[int, Mapping[Any, Any]] = {}  # keeps them alive, and their ids with them
        self._answers: dict[Any, Any] = {}

    def _once(self, question: Callable[..., Any], *states: Mapping[Any, Any]) -> Any:
        key = (question.__name__, *map(id, states))
        if key not in self._answers:
            self._states.update((id(state), state) for state in states)
            self._answers[key] = question(*states)
        return self._answers[key]

    def shapes(self, state: Mapping[Any, Any]) -> dict[str, Any]:
        """The shapes of a state dict by plain names; None for what has none."""
        return self._once(_shapes, state)  # type: ignore[no-any-return]

    def is_state_dict(self, state: Any) -> bool:
        """Whether it is a mapping from names to tensors, with extra state at most."""
        return isinstance(state, Mapping) and self._once(_is_state_dict, state)

    def has_tensors(self, state: Any) -> bool:
        """Whether it is a mapping, and one of its values a tensor."""
        return isinstance(state, Mapping) and self._once(_has_tensors, state)

    def unwrapped(self, state: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """The state dict without ``module.`` before all its names; itself where one has none."""
        return self._once(_unwrapped, state)  # type: ignore[no-any-return]

    def covers(self, state: Mapping[Any, Any], tensors: Mapping[Any, Any]) -> bool:
        """Whether ``state`` has a tensor of the same name and shape for each of ``tensors``, which has some."""
        return self.has_tensors(tensors) and self._once(self._covers, state, tensors)

    def _covers(self, state: Mapping[Any, Any], tensors: Mapping[Any, Any]) -> bool:
        return self.shapes(tensors).items() <= self.shapes(state).items()

    def are_alike(self, one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
        """Whether one covers the other, wrapped or not."""
        one, other = self.unwrapped(one), self.unwrapped(other)
        return self.covers(one, other) or self.covers(other, one)

    def are_same(self, tensors: Mapping[Any, Any], state: Mapping[Any, Any]) -> bool:
        """Whether all of ``tensors`` are in ``state``, bit for bit."""
        return self._once(self._are_same, tensors, state)  # type: ignore[no-any-return]

    def _are_same(self, tensors: Mapping[Any, Any], state: Mapping[Any, Any]) -> bool:
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


def _shapes(state: Mapping[Any, Any]) -> dict[str, Any]:
    return {plain_name(name): _shape(value) for name, value in state.items()}


def _unwrapped(state: Mapping[Any, Any]) -> Mapping[Any, Any]:
    inner = {str(name)[len("module.") :]: value for name, value in state.items() if str(name).startswith("module.")}
    return inner if len(inner) == len(state) else state


def _has_tensors(state: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in state.values())


def _is_state_dict(state: Mapping[Any, Any]) -> bool:
    return _has_tensors(state) and all(
        isinstance(name, str) and (isinstance(value, Tensor) or name.endswith("_extra_state"))
        for name, value in state.items()
    )


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
