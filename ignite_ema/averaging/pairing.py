"""Which tensors of a model and of its averaged twin belong together, and what an update does with each.

A pair remembers where its tensors live, not the tensors, and both are read afresh at each update, so that rebinding
(``load_state_dict(assign=True)``, ``module.buffer = ...``, ``.to()``) is followed. What no longer matches raises
before anything is changed.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import kernels
from .module_trees import Mismatch, Pair, Slot, Structure, overlaps_itself
from .sharding import is_at_rest, is_sharded, local, on_any_rank, reshard, sharded_parts

__all__ = ["Group", "Pairing", "Treatment"]

Treatment = Literal["average", "copy", "keep"]
Tensors = list[Tensor]
Fingerprint = tuple[list[int], list[torch.Size], list[torch.dtype]]


class Group(NamedTuple):
    """Which of the tensors that :meth:`Pairing.read` gives one kernel treats together; of one dtype and device."""

    kernel: kernels.Kernel
    averaged: slice
    online: slice
    averages: bool


class Pairing:
    """The pairs of a model and its averaged twin, sorted into groups for the kernels.

    Args:
        structure: the model and its averaged twin, side by side.
        treat_buffer: called with the path of a buffer, says what an update does with it. Parameters are averaged.
            "average" means "copy" where the tensor is neither floating-point nor complex.
        narrow: the kernel for parameters that are held in 16 bits, if they have one of their own.

    Attributes:
        groups: what to do with the tensors that :meth:`read` gives.
        resolution: the largest relative rounding step (``torch.finfo(dtype).eps``) among the averaged tensors; of those
            that ``narrow`` treats, that of float32.

    Raises:
        Mismatch: where shapes, layouts or kinds of number differ.
        TypeError: where a tensor that is not strided (a sparse one) would have to be averaged.
    """

    def __init__(
        self, structure: Structure, treat_buffer: Callable[[str], Treatment], narrow: kernels.Kernel | None = None
    ) -> None:
        self._treat_buffer = treat_buffer
        self._narrow = narrow
        self._known: Fingerprint
        self._arrange(structure)

    @property
    def structure(self) -> Structure:
        """The two trees as :meth:`read` last found them."""
        return self._structure

    def read(self) -> Tensors:
        """The tensors that an update treats, as they are now: the online ones, then their counterparts in the twin.

        Raises:
            Mismatch: where the model no longer matches its twin.
        """
        try:
            if self._structure.intact() and all(map(is_at_rest, self._parts)):
                tensors = self._tensors()
                pointers, shapes, types = self._known
                online = tensors[: len(shapes)]
                if (
                    list(map(self._pointer_of, tensors)) == pointers
                    and [tensor.shape for tensor in online] == shapes
                    and [tensor.dtype for tensor in online] == types
                ) or self._follows(tensors):
                    return tensors
        except (AttributeError, KeyError, TypeError, RuntimeError):
            pass  # a name is gone, holds None, a tensor without memory, or one that is gathered from its shards
        self.choose_anew()
        return self._tensors()

    def choose_anew(self) -> None:
        """Pairs and sorts everything again: where the structure has changed, or values that were loaded are infinite.

        Raises:
            Mismatch: where the model no longer matches its twin.
        """
        for root in self._structure.roots:
            reshard(root)
        try:
            self._arrange(self._structure.followed())
        except Mismatch as mismatch:
            if not self._sharded and any(map(is_sharded, self._structure.roots[0].parameters())):
                raise Mismatch(f"{mismatch} (call fully_shard before the handler is made)") from None
            raise

    def _tensors(self) -> Tensors:
        tensors = [owner[key] for owner, key in self._slots]
        for index in self._sharded:
            tensors[index] = tensors[index].to_local()
        return tensors

    def spoiler(self, tensors: Tensors) -> str | None:
        """Names a tensor to be averaged whose NaN or infinity would come into the average, if there is one.

        Of sharded models all ranks have to call this, and agree: one number goes from each to each.

        Args:
            tensors: what :meth:`read` gave.
        """
        path = self._spoiler_here(tensors)
        if self._sharded and on_any_rank(path is not None, (owner[key] for owner, key in self._slots)) and not path:
            return "a tensor on another rank"
        return path

    def _spoiler_here(self, tensors: Tensors) -> str | None:
        for _, averaged, online, averages in self.groups:
            if averages and not kernels.is_finite(tensors[online], tensors[averaged][0].dtype):
                paths = self._paths[online]
                for path, average, value in zip(paths, tensors[averaged], tensors[online], strict=True):
                    if kernels.spoils(average, value):
                        return f"'{path}'"
        return None

    def _follows(self, tensors: Tensors) -> bool:
        """Whether nothing has changed but the memory of some of the model's tensors; takes note of it then."""
        seen = self._fingerprint(tensors)
        count = len(tensors) // 2
        moved = [
            index for index, (now, before) in enumerate(zip(seen[0], self._known[0], strict=True)) if now != before
        ]
        alike = (
            self._pointer_of is Tensor.data_ptr
            and seen[1:] == self._known[1:]
            and moved[-1] < count
            and self._frozen.isdisjoint(moved)
            and len(set(map(id, tensors[:count]))) == count
            and all(tensors[i].device == self._devices[i] and _storage(tensors[i]) not in self._taken for i in moved)
        )
        if alike:
            self._known = seen
        return alike

    def _fingerprint(self, tensors: Tensors) -> Fingerprint:
        """Changes when a tensor is rebound to other memory, or the model's to other shapes or types in the same."""
        online = tensors[: len(tensors) // 2]
        return list(map(self._pointer_of, tensors)), [t.shape for t in online], [t.dtype for t in online]

    @torch.no_grad()
    def _arrange(self, structure: Structure) -> None:
        """Sorts the pairs into groups; checks shapes and that the twin owns its memory."""
        by_kind: dict[tuple[Any, ...], list[Pair]] = {}
        for pair in structure.pairs:
            treatment = self._treat_buffer(pair.path) if pair.kind == "_buffers" else "average"
            if treatment != "keep":
                by_kind.setdefault(self._kind_of(pair, treatment), []).append(pair)
        _give_memory(structure)
        # Nothing has raised: from here on the new structure counts.
        self._structure = structure
        slots = [pair.slots() for pairs in by_kind.values() for pair in pairs]
        self._paths = [pair.path for pairs in by_kind.values() for pair in pairs]
        count = len(slots)
        self._slots: list[Slot] = [online for online, _ in slots] + [averaged for _, averaged in slots]
        self.groups: list[Group] = []
        start = 0
        for (kernel, resolution, *_), pairs in by_kind.items():
            stop = start + len(pairs)
            group = Group(kernel, slice(count + start, count + stop), slice(start, stop), averages=resolution > 0)
            self.groups.append(group)
            start = stop
        self.resolution = max((resolution for _, resolution, *_ in by_kind), default=0.0)
        self._parts = [part for root in structure.roots for part in sharded_parts(root)]
        self._sharded = [index for index, (owner, key) in enumerate(self._slots) if is_sharded(owner[key])]
        tensors = self._tensors()
        all_strided = all(tensor.layout is torch.strided for tensor in tensors)
        self._pointer_of = Tensor.data_ptr if all_strided else _pointer
        frozen = [isinstance(o[key], nn.Parameter) and not o[key].requires_grad for o, key in self._slots[:count]]
        self._frozen = {index for index in range(count) if frozen[index]}  # whose kernel depends on what they hold
        self._devices = [tensor.device for tensor in tensors[:count]]
        self._taken = {_storage(tensor) for tensor in tensors[count:]}
        self._known = self._fingerprint(tensors)

    def _kind_of(self, pair: Pair, treatment: Treatment) -> tuple[Any, ...]:
        online, averaged = pair.tensors()
        if treatment == "average" and (averaged.is_floating_point() or averaged.is_complex()):
            if online.layout is not torch.strided:
                raise TypeError(
                    f"A tensor should be strided to be averaged, got '{pair.path}' with layout {online.layout}; a "
                    f'buffer can be copied instead: handle_buffers={{"{pair.path}": "copy", "*": "update"}}.'
                )
            if not {type(online), type(averaged)} <= {Tensor, nn.Parameter}:
                _try(pair.path, averaged, online)
            kernel = kernels.lerping_kernel_for(averaged, online, pair.kind == "_buffers", self._narrow)
            resolution = torch.finfo(torch.float32 if kernel == self._narrow else averaged.dtype).eps
        else:
            kernel, resolution = kernels.copying_kernel_for(averaged, online), 0.0
        return kernel, resolution, averaged.dtype, averaged.device, online.dtype, online.device


def _try(path: str, averaged: Tensor, online: Tensor) -> None:
    """Raises TypeError where tensors of a type of their own cannot be interpolated."""
    try:
        torch._foreach_lerp_([averaged.detach().clone()], [online.detach()], 0.5)
    except Exception as error:
        raise TypeError(
            f"A parameter should be of a type that can be averaged, got '{path}', a {type(online).__name__}, for which "
            f"lerp fails ({str(error).splitlines()[0]}); freeze it and pass share_frozen=True, or leave it out."
        ) from error


def _give_memory(structure: Structure) -> None:
    """Gives memory of its own to every tensor of the twin that shares some with the model, another one, or itself."""
    pairs = [[owner[key] for owner, key in pair.slots()] for pair in structure.pairs]
    taken: dict[int, list[tuple[float, float]]] = {_storage(local(online)): [(0, math.inf)] for online, _ in pairs}
    for pair, (_, held) in zip(structure.pairs, pairs, strict=True):
        averaged = local(held)
        if (storage := _storage(averaged)) == 0:
            continue
        # Parts of one storage that do not overlap are fine: torch lays out the weights of an LSTM so.
        extent = _extent(averaged)
        start, stop = averaged.data_ptr(), averaged.data_ptr() + averaged.element_size() * extent
        others = taken.setdefault(storage, [])
        if overlaps_itself(averaged) or any(start < end and begin < stop for begin, end in others):
            if is_sharded(held):
                raise Mismatch(f"'{pair.path}' of the twin shares memory with another tensor")
            with torch.inference_mode(False):
                averaged.data = averaged.detach().clone()
        else:
            others.append((start, stop))


def _storage(tensor: Tensor) -> int:
    """Where the storage begins; 0 if there is none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _pointer(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout is torch.strided else id(tensor.layout)


def _extent(tensor: Tensor) -> int:
    """How many elements lie between the first and the last, both included."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
