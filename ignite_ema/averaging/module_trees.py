"""What a model and its averaged twin have in common: two trees of modules, walked side by side.

Tensors are paired by owner and name, never by position, and wrappers (``DistributedDataParallel``, ``DataParallel``,
what ``torch.compile`` returns) are looked through. What does not match raises :class:`Mismatch` and names the path.
"""

from collections.abc import Container, Iterator
from operator import getitem, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .sharding import is_sharded, local, sharding

__all__ = [
    "LostValues",
    "Mismatch",
    "Pair",
    "Slot",
    "Structure",
    "TreeWatch",
    "extent",
    "holds_values",
    "names_of",
    "overlaps_itself",
    "tensors_of",
    "unwrapped",
]

Slot = tuple[dict[str, Any], str]


class Mismatch(RuntimeError):
    """The model and its averaged twin do not match; the text is a clause that says where."""

    way_out = "make the change before the average, or make a new average and load the old weights into it"


class LostValues(Mismatch):
    """There is no memory for the values of the tensor ``path`` of the model or the twin, which ``where`` names."""

    way_out = "give the tensor its values back (to_empty, then load_state_dict), or make a new average"

    def __init__(self, path: str, where: str) -> None:
        super().__init__(f"'{path}' has lost its values in the {where} (moved to meta, or its memory freed)")


def unwrapped(module: nn.Module, *, keep: type[nn.Module] | tuple[()] = ()) -> nn.Module:
    """The module inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``, in any nesting.

    Args:
        module: the module, wrapped or not.
        keep: a wrapper that is not looked into.
    """
    while not isinstance(module, keep) and (wrapped := _inside(module)) is not None:
        module = wrapped
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    if isinstance(module, (DistributedDataParallel, DataParallel)):
        wrapped: nn.Module = module.module
        return wrapped
    # What torch.compile returns, by name: importing the class would cost a second.
    return module._modules["_orig_mod"] if type(module).__name__ == "OptimizedModule" else None


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of ``module`` by its path without wrappers, each tied tensor once, by its first."""
    found: dict[int, tuple[str, Tensor]] = {}
    _collect(unwrapped(module), "", found, set())
    return dict(found.values())


def _collect(module: nn.Module, prefix: str, found: dict[int, tuple[str, Tensor]], visited: set[int]) -> None:
    if id(module) in visited:
        return
    visited.add(id(module))
    for owner in (module._parameters, module._buffers):
        for key, tensor in owner.items():
            if tensor is not None:
                found.setdefault(id(tensor), (prefix + key, tensor))
    for key, child in module._modules.items():
        if child is not None:
            _collect(unwrapped(child), f"{prefix}{key}.", found, visited)


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements of a strided tensor lie in the same place, as those of an expanded one do."""
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return False
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step <= reach:
            return True
        reach += (size - 1) * step
    return False


def names_of(module: nn.Module, prefix: str = "", above: tuple[nn.Module, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """The names that ``module.state_dict()`` has for tensors, for tied ones and shared modules all, and the tensors."""
    for owner, left_out in ((module._parameters, ()), (module._buffers, module._non_persistent_buffers_set)):
        for key, tensor in owner.items():
            if tensor is not None and key not in left_out:
                yield prefix + key, tensor
    for key, child in module._modules.items():
        if child is not None and not any(child is one for one in (*above, module)):
            yield from names_of(child, f"{prefix}{key}.", (*above, module))


class Pair(NamedTuple):
    """A tensor of the model and its counterpart in the averaged twin, as the places where they live.

    Attributes:
        path: dotted name of the tensor in the model, without the names of wrappers; of a tied tensor the first one.
        online: the module of the model that owns the tensor.
        averaged: the module of the twin that owns the counterpart.
        kind: the dictionary of these modules that holds it, ``"_parameters"`` or ``"_buffers"``.
        key: its key there.
    """

    path: str
    online: nn.Module
    averaged: nn.Module
    kind: str
    key: str

    def slots(self) -> tuple[Slot, Slot]:
        """Where the two tensors (online, averaged) are read from: a dictionary and a key each."""
        return (getattr(self.online, self.kind), self.key), (getattr(self.averaged, self.kind), self.key)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The two tensors (online, averaged) as they are now, of the same shape, layout and kind of number.

        Of sharded ones the parts that this rank holds.

        Raises:
            Mismatch: where they differ in that, or one of them cannot be read or written.
        """
        online, averaged = (owner[key] for owner, key in self.slots())
        self.refuse_nested(online, averaged)
        if is_sharded(online) or is_sharded(averaged):
            if (ours := sharding(online)) != (theirs := sharding(averaged)):
                raise Mismatch(f"'{self.path}' is {ours} in the model and {theirs} in the twin")
            if online.shape == averaged.shape:
                online, averaged = local(online), local(averaged)
        if online.shape != averaged.shape:
            raise Mismatch(
                f"'{self.path}' has shape {tuple(online.shape)} in the model and {tuple(averaged.shape)} in the twin"
            )
        if online.layout != averaged.layout:
            raise Mismatch(f"'{self.path}' has {online.layout} in the model and {averaged.layout} in the twin")
        if online.dtype != averaged.dtype and (
            online.is_floating_point() != averaged.is_floating_point() or online.is_complex() != averaged.is_complex()
        ):
            raise Mismatch(f"'{self.path}' has {online.dtype} in the model and {averaged.dtype} in the twin")
        for tensor, where in ((online, "model"), (averaged, "twin")):
            if not holds_values(tensor):
                raise LostValues(self.path, where)
        if averaged.is_inference():
            raise Mismatch(f"'{self.path}' of the twin was made inside torch.inference_mode() and cannot be written")
        return online, averaged

    def refuse_nested(self, online: Tensor, averaged: Tensor) -> None:
        """Raises Mismatch where one of the two tensors is nested, and has no one shape."""
        if online.is_nested or averaged.is_nested:
            where = "model" if online.is_nested else "twin"
            raise Mismatch(f"'{self.path}' is a nested tensor in the {where}")


def holds_values(tensor: Tensor) -> bool:
    """Whether there is memory for every element of ``tensor``."""
    if tensor.is_meta:
        return False
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.numel() == 0:
        return True
    stop = (tensor.storage_offset() + extent(tensor)) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= stop


def extent(tensor: Tensor) -> int:
    """How many elements lie between the first and the last of a strided tensor, both included."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


class Structure:
    """Every parameter and buffer of two equal trees of modules, in pairs, each tied tensor once.

    Args:
        online: the model.
        averaged: its averaged twin.
        share_frozen: whether the two may share parameters that do not require gradients.
        once_shared: parameters that they have shared. Where the twin still holds one of these and the model holds
            another one in its place, :meth:`share` lets the twin share that.

    Attributes:
        roots: the two modules (online, averaged).
        modules: all modules of both, wrappers included.
        pairs: the pairs, in the order of the model, but not those of shared parameters.
        shared: the shared parameters.
        names: all of them, tied tensors under each name.

    Raises:
        Mismatch: where the trees differ in the names or ties of their tensors, or share a module or a tensor.
    """

    def __init__(
        self,
        online: nn.Module,
        averaged: nn.Module,
        share_frozen: bool = False,
        once_shared: Container[Tensor] = (),
    ) -> None:
        self.roots = online, averaged
        self.share_frozen = share_frozen
        self.modules: list[nn.Module] = []
        self.pairs: list[Pair] = []
        self.shared: list[Pair] = []
        self.names: list[Pair] = []
        self._once_shared = once_shared
        self._to_share: list[Pair] = []
        self._walk(online, averaged, "", {}, set())

    def share(self) -> None:
        """Lets the twin hold what the model holds in place of a parameter that was shared."""
        for pair in self._to_share:
            setattr(pair.averaged, pair.key, pair.online._parameters[pair.key])

    def _walk(
        self, online: nn.Module, averaged: nn.Module, prefix: str, known: dict[int, Pair], visited: set[tuple[int, int]]
    ) -> None:
        online, averaged = (self._unwrapped(module) for module in (online, averaged))
        if (id(online), id(averaged)) in visited:
            return
        visited.add((id(online), id(averaged)))
        if online is averaged:
            place = f"'{prefix.removesuffix('.')}'" if prefix else "the root"
            raise Mismatch(f"{place} is one and the same module in the model and in the twin")
        self.modules += (online, averaged)
        for kind in ("_parameters", "_buffers", "_modules"):
            owners: list[dict[str, Any]] = [getattr(module, kind) for module in (online, averaged)]
            names, theirs = ([key for key, value in o.items() if value is not None] for o in owners)
            for name in sorted(set(names) ^ set(theirs)):
                here, there = ("model", "twin") if name in names else ("twin", "model")
                raise Mismatch(f"'{prefix}{name}' is in the {here} but not in the {there}")
            for name in names:
                if kind == "_modules":
                    self._walk(owners[0][name], owners[1][name], f"{prefix}{name}.", known, visited)
                else:
                    self._add(Pair(prefix + name, online, averaged, kind, name), known)

    def _unwrapped(self, module: nn.Module) -> nn.Module:
        while (wrapped := _inside(module)) is not None:
            self.modules.append(module)
            module = wrapped
        return module

    def _add(self, pair: Pair, known: dict[int, Pair]) -> None:
        self.names.append(pair)
        ours, theirs = (owner[key] for owner, key in pair.slots())
        pair.refuse_nested(ours, theirs)
        if theirs is not ours and theirs in self._once_shared:
            self._to_share.append(pair)
            theirs = ours
        if ours is theirs:
            self._check_shared(pair, ours)
        in_model, in_twin = known.get(id(ours)), known.get(id(theirs))
        if in_model is not in_twin:
            here, there = ("model", "twin") if in_model else ("twin", "model")
            path = (in_model or in_twin or pair).path
            raise Mismatch(f"'{pair.path}' is tied to '{path}' in the {here} but not in the {there}")
        if in_model is None:
            known[id(ours)] = known[id(theirs)] = pair
            (self.shared if ours is theirs else self.pairs).append(pair)

    def _check_shared(self, pair: Pair, tensor: Tensor) -> None:
        if not (self.share_frozen and isinstance(tensor, nn.Parameter)):
            raise Mismatch(f"'{pair.path}' is one and the same tensor in the model and in the twin")
        if tensor.requires_grad:
            raise Mismatch(f"'{pair.path}' was frozen and is shared with the average, but requires gradients now")


_TABLES = ("_parameters", "_buffers", "_modules")


class TreeWatch:
    """Reads tensors out of two module trees, in microseconds, as long as these have the structure that they had.

    That is: each module has the tables that it had (``_parameters``, ``_buffers`` and ``_modules``; of those without
    entries one stands for all), of as many entries, with the same modules in them; what was tied, or shared, still is.
    It holds no tensors itself.

    Args:
        structure: the two trees.
        slots: where the tensors are, all of them in tables of the two trees.
    """

    def __init__(self, structure: Structure, slots: list[Slot]) -> None:
        tables = [(module, name, getattr(module, name)) for module in structure.modules for name in _TABLES]
        self._empty = [table for _, _, table in tables if not table]
        self._filled = [table for _, _, table in tables if table]
        self._sizes = list(map(len, self._filled))
        fixed: list[tuple[Slot, object]] = [
            ((vars(module), name), table) for module, name, table in tables if table or name == _shown_by(module)
        ]
        for table in self._filled:
            fixed += [((table, key), value) for key, value in table.items() if not isinstance(value, Tensor)]
        self._tables, self._keys = map(list, zip(*slots, *(place for place, _ in fixed), strict=True))
        self._fixed = slice(len(slots), None)
        self._held = [value for _, value in fixed]
        named = [slot for pair in structure.names for slot in pair.slots()]
        first = {id(table[key]): (table, key) for table, key in reversed(named)}
        alike = [(slot, first[id(slot[0][slot[1]])]) for slot in named]
        self._ties = [(*one, *other) for one, other in alike if one[0] is not other[0] or one[1] != other[1]]

    def read(self) -> list[Any] | None:
        """What is in the slots now, and other things after it; None where the structure has changed.

        Raises:
            KeyError: where a name is gone.
        """
        found = list(map(getitem, self._tables, self._keys))
        if any(self._empty) or list(map(len, self._filled)) != self._sizes:
            return None
        if not all(map(is_, found[self._fixed], self._held)):
            return None
        if self._ties and any(a[i] is not b[j] for a, i, b, j in self._ties):
            return None
        return found


def _shown_by(module: nn.Module) -> str | None:
    """The table that stands for all three where they have no entries."""
    return None if any(getattr(module, name) for name in _TABLES) else "_parameters"
