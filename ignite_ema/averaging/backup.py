"""What a model is made of, held so that it can be put back whatever is done to it meanwhile: all but the values."""

from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .module_trees import Pair
from .traversal import TABLES

__all__ = ["ModuleBackup", "TensorBackup"]

_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


class ModuleBackup(NamedTuple):
    """A module, its class, its attributes, its tables of tensors and sub-modules, its hooks, and what these contain."""

    module: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, Any]
    tables: list[tuple[str, dict[str, Any], dict[str, Any]]]
    hooks: dict[str, dict[int, Any]]
    not_saved: set[str]
    flat_weights: list[Tensor] | None

    @classmethod
    def of(cls, module: nn.Module) -> "ModuleBackup":
        attributes = vars(module).copy()
        tables = [(name, held, held.copy()) for name in TABLES if isinstance(held := attributes.get(name), dict)]
        hooks = {name: held.copy() for name in _HOOKS if (held := attributes.get(name))}
        flat_weights = attributes.get("_flat_weights")  # the list that an LSTM keeps of its parameters
        not_saved = module._non_persistent_buffers_set.copy()
        kept = None if flat_weights is None else list(flat_weights)
        return cls(module, type(module), attributes, tables, hooks, not_saved, kept)

    def put_back(self) -> None:
        """Makes the module what it was; can be done again after it was cut short anywhere."""
        if self._is_rebuilt():
            self._put_back_attributes()
        for _, table, contents in self.tables:
            if not _alike(table, contents):
                table.clear()
                table.update(contents)
        if self.module._non_persistent_buffers_set != self.not_saved:
            self.module._non_persistent_buffers_set = self.not_saved.copy()
        if self.flat_weights is not None:
            vars(self.module)["_flat_weights"] = self.flat_weights.copy()

    def _is_rebuilt(self) -> bool:
        """Whether names, or the class, are others: pruning, a parametrization, a norm of weights, a list that grew."""
        now = vars(self.module)
        return type(self.module) is not self.kind or any(
            now.get(name) is not table or table.keys() != contents.keys() or not now.keys().isdisjoint(contents)
            for name, table, contents in self.tables
        )

    def _put_back_attributes(self) -> None:
        now = vars(self.module)
        for name in now.keys() - self.attributes.keys():
            del now[name]
        now.update((name, value) for name, value in self.attributes.items() if name != "training")
        for name in _HOOKS:
            if (held := self.attributes.get(name)) is not None:
                held.clear()
                held.update(self.hooks.get(name, {}))
        self.module.__class__ = self.kind


def _alike(table: dict[str, Any], contents: dict[str, Any]) -> bool:
    return list(table) == list(contents) and all(map(is_, table.values(), contents.values()))


class TensorBackup(NamedTuple):
    """A tensor of a model, the part that this rank has of it, and its memory."""

    path: str
    tensor: Tensor
    part: Tensor
    memory: Tensor
    size: int
    requires_grad: bool

    @classmethod
    def of(cls, pair: Pair, part: Tensor) -> "TensorBackup":
        owner, key = pair.slots()[0]
        return cls(pair.path, owner[key], part, part.detach(), _size(part), owner[key].requires_grad)

    def version(self) -> int:
        """Counts what was written into the tensor in place."""
        return 0 if self.part.is_inference() else self.part._version

    def put_back(self) -> None:
        """Makes the tensor what it was, but for its values."""
        if self.memory.layout is torch.strided:
            if _size(self.memory) < self.size:  # freed to save memory
                self.memory.untyped_storage().resize_(self.size)
            if self.part.dtype != self.memory.dtype or not self.part.is_set_to(self.memory):
                self.part.data = self.memory
        if self.tensor.requires_grad != self.requires_grad and self.tensor.is_leaf:
            self.tensor.requires_grad_(self.requires_grad)


def _size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else 0
