"""What a model and its averaged twin have in common: two trees of modules, walked side by side.

Tensors are paired by owner and name, never by position, and wrappers (``DistributedDataParallel``, ``DataParallel``,
what ``torch.compile`` returns) are looked through. What does not match raises :class:`Mismatch` and names the path.
"""

from collections.abc import Iterator
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .sharding import is_sharded, local, sharding

__all__ = [
    "Mismatch",
    "Pair",
    "Slot",
    "Structure",
    "inside",
    "names_of",
    "overlaps_itself",
    "tensors_of",
    "unwrapped",
]

Slot = tuple[dict[str, Any], str]


class Mismatch(RuntimeError):
    """The model and its averaged twin do not match; the text is a clause that says where."""


def inside(module: nn.Module) -> nn.Module | None:
    """What ``module`` wraps, if it is a ``DistributedDataParallel``, ``DataParallel`` or compiled module, else None."""
    if isinstance(module, (DistributedDataParallel, DataParallel)):
        wrapped: nn.Module = module.module
        return wrapped
    # What torch.compile returns, by name: importing the class would cost a second.
    return module._modules["_orig_mod"] if type(module).__name__ == "OptimizedModule" else None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``, in any nesting."""
    while (wrapped := inside(module)) is not None:
        module = wrapped
    return module


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
        """
        online, averaged = (owner[key] for owner, key in self.slots())
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
        return online, averaged


_UNFROZEN = "'{}' was frozen and is shared with the average, but requires gradients now"


def _is_shared_no_longer(shared: tuple[Pair, Slot, Slot]) -> bool:
    _, (ours, key), (theirs, name) = shared
    return ours[key] is not theirs[name] or ours[key].requires_grad


class Structure:
    """Every parameter and buffer of two equal trees of modules, in pairs, each tied tensor once.

    Args:
        online: the model.
        averaged: its averaged twin.
        share_frozen: whether the two may share parameters that do not require gradients.

    Attributes:
        roots: the two modules (online, averaged).
        pairs: the pairs, in the order of the model, but not those of shared parameters.
        shared: the shared parameters.
        names: all of them, tied tensors under each name.

    Raises:
        Mismatch: where the trees differ in the names or ties of their tensors, or share a module or a tensor.
    """

    def __init__(self, online: nn.Module, averaged: nn.Module, share_frozen: bool = False) -> None:
        self.roots = online, averaged
        self.pairs: list[Pair] = []
        self.shared: list[Pair] = []
        self.names: list[Pair] = []
        self._share_frozen = share_frozen
        self._ties: list[tuple[Slot, Slot]] = []
        # intact() looks at the sizes of all dictionaries, most of which are empty, and the modules and Nones in them.
        self._owners: list[dict[str, Any]] = []
        self._fixed: list[Slot] = []
        self._walk(unwrapped(online), unwrapped(averaged), "", {}, set())
        self._empty = [owner for owner in self._owners if not owner]
        self._filled = [owner for owner in self._owners if owner]
        self._sizes = list(map(len, self._filled))
        self._expected = [owner[key] for owner, key in self._fixed]
        shared = [(pair, *pair.slots()) for pair in self.names] if share_frozen else []
        self._shared = [(pair, a, b) for pair, a, b in shared if a[0][a[1]] is b[0][b[1]]]

    def followed(self) -> "Structure":
        """The structure as it is now; the twin shares what the model holds in place of a shared parameter."""
        replaced: list[tuple[Pair, Any]] = []
        for pair, (ours, key), (theirs, name) in self._shared:
            new, old = ours.get(key), theirs.get(name)
            if isinstance(new, nn.Parameter) and isinstance(old, nn.Parameter) and new is not old:
                if new.requires_grad:
                    raise Mismatch(_UNFROZEN.format(pair.path))
                replaced.append((pair, old))
        try:
            for pair, _ in replaced:
                setattr(pair.averaged, pair.key, getattr(pair.online, pair.key))
            return Structure(*self.roots, self._share_frozen)
        except Mismatch:
            for pair, old in replaced:
                setattr(pair.averaged, pair.key, old)
            raise

    def intact(self) -> bool:
        """Whether no name, module or tie has come, gone or changed; KeyError where a name is gone."""
        return (
            not any(self._empty)
            and list(map(len, self._filled)) == self._sizes
            and all(map(is_, [owner[key] for owner, key in self._fixed], self._expected))
            and not (self._ties and any(a[i] is not b[j] for (a, i), (b, j) in self._ties))
            and not (self._shared and any(map(_is_shared_no_longer, self._shared)))
        )

    def _walk(
        self, online: nn.Module, averaged: nn.Module, prefix: str, known: dict[int, Pair], visited: set[tuple[int, int]]
    ) -> None:
        if (id(online), id(averaged)) in visited:
            return
        visited.add((id(online), id(averaged)))
        if online is averaged:
            place = f"'{prefix.removesuffix('.')}'" if prefix else "the root"
            raise Mismatch(f"{place} is one and the same module in the model and in the twin")
        for kind in ("_parameters", "_buffers", "_modules"):
            owners: list[dict[str, Any]] = [getattr(module, kind) for module in (online, averaged)]
            self._owners += owners
            self._fixed += [(o, key) for o in owners for key, value in o.items() if value is None or kind == "_modules"]
            names, theirs = ([key for key, value in o.items() if value is not None] for o in owners)
            for name in sorted(set(names) ^ set(theirs)):
                here, there = ("model", "twin") if name in names else ("twin", "model")
                raise Mismatch(f"'{prefix}{name}' is in the {here} but not in the {there}")
            for name in names:
                if kind == "_modules":
                    inner = [unwrapped(o[name]) for o in owners]
                    self._walk(inner[0], inner[1], f"{prefix}{name}.", known, visited)
                else:
                    self._add(Pair(prefix + name, online, averaged, kind, name), known)

    def _add(self, pair: Pair, known: dict[int, Pair]) -> None:
        self.names.append(pair)
        ours, theirs = (owner[key] for owner, key in pair.slots())
        if ours is theirs and not (self._share_frozen and isinstance(ours, nn.Parameter)):
            raise Mismatch(f"'{pair.path}' is one and the same tensor in the model and in the twin")
        if ours is theirs and ours.requires_grad:
            raise Mismatch(_UNFROZEN.format(pair.path))
        in_model, in_twin = known.get(id(ours)), known.get(id(theirs))
        if in_model is not in_twin:
            here, there = ("model", "twin") if in_model else ("twin", "model")
            path = (in_model or in_twin or pair).path
            raise Mismatch(f"'{pair.path}' is tied to '{path}' in the {here} but not in the {there}")
        if in_model is not None:
            self._ties += zip(pair.slots(), in_model.slots(), strict=True)
            return
        known[id(ours)] = known[id(theirs)] = pair
        (self.shared if ours is theirs else self.pairs).append(pair)
