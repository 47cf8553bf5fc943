"""Which tensors of a model and of its averaged twin belong together, and what an update does with each.

A pair remembers where its tensors live, not the tensors, and both are read afresh at each update, so that rebinding
(``load_state_dict(assign=True)``, ``module.buffer = ...``, ``.to()``) is followed. What no longer matches raises
before anything is changed.

What is checked, and when:

- At every update, of both trees: each module has the tables of tensors and modules that it had, with as many names and
  the same modules in them, so that no name, tie, wrapper or shared parameter has come, gone or changed; each averaged
  tensor has the address that it had, and in the model the shape and the type; it requires gradients as it did where
  that matters; each part that FSDP2 has sharded holds its shards. Where only tensors of the model have moved, these are
  checked.
- Where any of this has changed, when a run starts and when the average is made, everything: names, ties, shapes,
  layouts, types, sharding; that there is memory for every element; and that nothing that an update writes to shares
  memory with the model, with a parameter that was ever shared, or with another tensor of the twin.
- When weights are loaded into the twin: the names, shapes and types of what is loaded, and who owns the memory.
- :meth:`~ignite_ema.ModelAverage.state_dict` looks at the twin alone.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter, eq
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from . import kernels
from .module_trees import Mismatch, Pair, Structure, TreeWatch
from .sharding import is_at_rest, is_sharded, local, on_any_rank, reshard, sharded_parts
from .storage import extent, holds_values, overlaps_itself

__all__ = ["Group", "Pairing", "Step", "Treatment", "part_memory", "sharing_memory"]

Treatment = Literal["average", "copy", "keep"]
Tensors = list[Tensor]

_shape, _dtype, _requires_grad = attrgetter("shape"), attrgetter("dtype"), attrgetter("requires_grad")


class Group(NamedTuple):
    """Which of the tensors that :meth:`Pairing.read` gives one kernel treats together; of one dtype and device."""

    kernel: kernels.Kernel
    averaged: slice
    online: slice
    averages: bool
    are_buffers: bool


Step: TypeAlias = tuple[Group, kernels.Tensors, kernels.Tensors]


class _Kind(NamedTuple):
    """What the tensors of a group have in common."""

    kernel: kernels.Kernel
    averages: bool
    are_buffers: bool
    resolution: float
    types: tuple[torch.dtype, torch.device, torch.dtype, torch.device]


class _Noted(NamedTuple):
    """What :meth:`Pairing.read` compares with: addresses of all tensors, the rest of those of the model."""

    addresses: list[int]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    gradients: tuple[list[bool], bool]


class Pairing:
    """The pairs of a model and its averaged twin, sorted into groups for the kernels.

    Args:
        structure: the model and its averaged twin, side by side.
        treat_buffer: called with the path of a buffer, says what an update does with it. Parameters are averaged.
            "average" means "copy" where the tensor is neither floating-point nor complex.
        narrow: the kernel for parameters that are held in 16 bits, if they have one of their own.

    Attributes:
        structure: the two trees as :meth:`read` last found them.
        once_shared: the parameters that the two share or have shared, as far as they still exist.
        groups: what to do with the tensors that :meth:`read` gives.
        resolution: the largest relative rounding step (``torch.finfo(dtype).eps``) among the averaged tensors that
            are trained; of those that ``narrow`` treats, that of float32.
        noted: where the tensors lie; another object once one of them lies elsewhere.

    Raises:
        Mismatch: where shapes, layouts or kinds of number differ.
        TypeError: where a tensor that is not strided (a sparse one) would have to be averaged.
    """

    def __init__(
        self, structure: Structure, treat_buffer: Callable[[str], Treatment], narrow: kernels.Kernel | None = None
    ) -> None:
        self._treat_buffer = treat_buffer
        self._narrow = narrow
        self.once_shared = WeakIdKeyDictionary()
        self.noted: _Noted | None = None
        self._arrange(structure)

    def read(self) -> Tensors:
        """The tensors that an update treats, as they are now: the online ones, then their counterparts in the twin.

        Raises:
            Mismatch: where the model no longer matches its twin.
        """
        try:
            found = self._watch.read()
            if found is not None and (not self._parts or all(map(is_at_rest, self._parts))):
                tensors = self._local(found)
                if self._is_unchanged(tensors, found) or self._accepts_moves(tensors, found):
                    return tensors
        except (AttributeError, KeyError, TypeError, RuntimeError):
            pass  # a name is gone, holds None, a tensor without memory, or one that is gathered from its shards
        self.pair_anew()
        return self._local(self._found())

    def pair_anew(self) -> None:
        """Pairs and sorts everything as it is now.

        Raises:
            Mismatch: where the model no longer matches its twin; nothing has changed then.
        """
        old = self.structure
        for root in old.roots:
            reshard(root)
        self.noted = None  # until it matches again, every update looks at everything
        try:
            self._arrange(Structure(*old.roots, old.share_frozen, self.once_shared))
        except Mismatch as mismatch:
            if not self._sharded and any(map(is_sharded, old.roots[0].parameters())):
                raise Mismatch(f"{mismatch} (call fully_shard before the handler is made)") from None
            raise

    def steps(self, tensors: Tensors) -> list[Step]:
        """What an update has to do: each group with its averaged and its online tensors.

        Args:
            tensors: what :meth:`read` gave.
        """
        return [(group, tensors[group.averaged], tensors[group.online]) for group in self.groups]

    def first_nonfinite(self, tensors: Tensors) -> str | None:
        """Path of the first parameter whose NaN or infinity would come into the average, or None.

        Of sharded models all ranks have to call this, and agree: one number goes from each to each.

        Args:
            tensors: what :meth:`read` gave.
        """
        groups = [group for group in self.groups if not group.are_buffers]
        path = next(filter(None, (self.nonfinite_in(group, tensors) for group in groups)), None)
        slots = self._slots[: 2 * self._count]
        if self._sharded and on_any_rank(path is not None, (owner[key] for owner, key in slots)) and path is None:
            return "a tensor on another rank"
        return path

    def nonfinite_in(self, group: Group, tensors: Tensors) -> str | None:
        """Path of the first tensor of a group whose NaN or infinity would come into the average here, or None."""
        _, averaged, online, averages, _ = group
        if averages and not kernels.is_finite(tensors[online], tensors[averaged][0].dtype):
            for path, value, average in zip(self._paths[online], tensors[online], tensors[averaged], strict=True):
                if kernels.spoils(average, value):
                    return f"'{path}'"
        return None

    def _found(self) -> Tensors:
        """What is in the slots."""
        return [owner[key] for owner, key in self._slots]

    def _local(self, slots: Tensors) -> Tensors:
        """Of what is in the slots the tensors of the pairs, of sharded ones the part that this rank holds."""
        tensors = slots[: 2 * self._count]
        for index in self._sharded:
            tensors[index] = tensors[index].to_local()  # type: ignore[attr-defined]
        return tensors

    def _is_unchanged(self, tensors: Tensors, found: Tensors) -> bool:
        """Whether each tensor has the address, and those of the model the shapes and types, that were noted."""
        noted = self.noted
        return (
            noted is not None
            and list(map(self._address, tensors)) == noted.addresses
            and all(map(eq, map(_shape, tensors), noted.shapes))  # no list of shapes: the collector would count them
            and list(map(_dtype, tensors[: self._count])) == noted.dtypes
            and (not self._watches_gradients or self._gradients(found) == noted.gradients)
        )

    def _gradients(self, found: Tensors) -> tuple[list[bool], bool]:
        """Which tensors of the model are trained, where kernels depend on it, and whether one that is shared is."""
        count = self._count
        trained = list(map(_requires_grad, found[:count])) if self._narrow else []
        return trained, any(map(_requires_grad, found[2 * count : len(self._slots)]))

    def _look(self, tensors: Tensors, found: Tensors) -> _Noted:
        online = tensors[: self._count]
        addresses = list(map(self._address, tensors))
        return _Noted(addresses, list(map(_shape, online)), list(map(_dtype, online)), self._gradients(found))

    def _accepts_moves(self, tensors: Tensors, found: Tensors) -> bool:
        """Whether all that has changed is that tensors of the model have moved, or others like them took their place.

        Then it notes the new addresses. So it is at each iteration where a module registers its buffers anew.
        """
        old, new, count = self.noted, self._look(tensors, found), self._count
        if old is None or not self._all_strided or old[1:] != new[1:]:
            return False
        moved = [index for index in range(count) if old.addresses[index] != new.addresses[index]]
        accepts = (
            old.addresses[count:] == new.addresses[count:]
            and all(_is_like(tensors[index], self._kinds[index], self._written) for index in moved)
            and self._number_of_tensors() == self._distinct
        )
        if accepts:
            self.noted = new
        return accepts

    def _number_of_tensors(self) -> int:
        """How many tensors the model has, each tied one once."""
        return len({id(owner[key]) for owner, key in (pair.slots()[0] for pair in self.structure.names)})

    @torch.no_grad()
    def _arrange(self, structure: Structure) -> None:
        """Sorts the pairs into groups; checks shapes and that the twin owns its memory."""
        by_kind: dict[_Kind, list[Pair]] = {}
        for pair in structure.pairs:
            treatment = self._treat_buffer(pair.path) if pair.kind == "_buffers" else "average"
            if treatment != "keep":
                by_kind.setdefault(self._kind_of(pair, treatment), []).append(pair)
        twin = {pair.path: pair.slots()[1][0][pair.key] for pair in structure.pairs}
        model = [pair.slots()[0][0][pair.key] for pair in (*structure.pairs, *structure.shared)]
        to_part = sharing_memory([*model, *self.once_shared], twin)
        # Nothing has raised: from here on the new structure counts.
        structure.share()
        part_memory(to_part)
        self.structure = structure
        for pair in structure.shared:
            self.once_shared[pair.slots()[0][0][pair.key]] = None
        self._group(by_kind)
        self._watch_over(structure)

    def _group(self, by_kind: dict[_Kind, list[Pair]]) -> None:
        pairs = [pair for pairs in by_kind.values() for pair in pairs]
        self._count = count = len(pairs)
        self._paths = [pair.path for pair in pairs]
        slots = [pair.slots() for pair in pairs]
        shared = [pair.slots()[0] for pair in self.structure.shared]
        self._slots = [*(online for online, _ in slots), *(averaged for _, averaged in slots), *shared]
        self.groups: list[Group] = []
        start = 0
        for kind, members in by_kind.items():
            stop = start + len(members)
            group = Group(
                kind.kernel, slice(count + start, count + stop), slice(start, stop), kind.averages, kind.are_buffers
            )
            self.groups.append(group)
            start = stop
        self.resolution = max((kind.resolution for kind in by_kind), default=0.0)

    def _watch_over(self, structure: Structure) -> None:
        """Remembers what :meth:`read` compares with."""
        self._parts = [part for root in structure.roots for part in sharded_parts(root)]
        self._watch = TreeWatch(structure, self._slots)
        self._watches_gradients = self._narrow is not None or bool(structure.shared)
        self._distinct = self._number_of_tensors()
        found = self._found()
        self._sharded = [index for index, tensor in enumerate(found[: 2 * self._count]) if is_sharded(tensor)]
        tensors = self._local(found)
        self._all_strided = all(tensor.layout is torch.strided for tensor in tensors)
        self._address: Callable[[Tensor], int] = Tensor.data_ptr if self._all_strided else _address
        self._kinds = [(type(tensor), tensor.device) for tensor in tensors[: self._count]]
        self.note_memory()

    def note_memory(self) -> None:
        """Remembers where the tensors lie now."""
        found = self._found()
        tensors = self._local(found)
        self._written = {_storage(tensor) for tensor in tensors[self._count :]}
        self.noted = self._look(tensors, found)

    def _kind_of(self, pair: Pair, treatment: Treatment) -> _Kind:
        online, averaged = pair.tensors()
        is_buffer = pair.kind == "_buffers"
        types = averaged.dtype, averaged.device, online.dtype, online.device
        if treatment == "copy" or not (averaged.is_floating_point() or averaged.is_complex()):
            return _Kind(kernels.copying_kernel_for(averaged, online), False, is_buffer, 0.0, types)
        if online.layout is not torch.strided:
            raise TypeError(
                f"A tensor should be strided to be averaged, got '{pair.path}' with layout {online.layout}; a "
                f'buffer can be copied instead: handle_buffers={{"{pair.path}": "copy", "*": "update"}}.'
            )
        if not {type(online), type(averaged)} <= {Tensor, nn.Parameter}:
            _try(pair.path, averaged, online)
        is_trained = pair.kind == "_parameters" and pair.online._parameters[pair.key].requires_grad  # type: ignore[union-attr]
        kernel = kernels.lerping_kernel_for(averaged, online, is_trained, self._narrow)
        held = torch.float32 if kernel == self._narrow else averaged.dtype
        return _Kind(kernel, True, is_buffer, torch.finfo(held).eps if is_trained or is_buffer else 0.0, types)


def _try(path: str, averaged: Tensor, online: Tensor) -> None:
    """Raises TypeError where tensors of a type of their own cannot be interpolated."""
    try:
        torch._foreach_lerp_([averaged.detach().clone()], [online.detach()], 0.5)
    except Exception as error:
        raise TypeError(
            f"A parameter should be of a type that can be averaged, got '{path}', a {type(online).__name__}, for which "
            f"lerp fails ({str(error).splitlines()[0]}); freeze it and pass share_frozen=True, or leave it out."
        ) from error


def sharing_memory(others: Iterable[Tensor], averaged: Mapping[str, Tensor]) -> Tensors:
    """The tensors of a twin that share memory with others, with one another, or with themselves.

    Args:
        others: what may not be written to: the tensors of the model, and those that were ever shared.
        averaged: the tensors of the twin by path.

    Raises:
        Mismatch: where they cannot be parted: one that is also among the others, or one that is sharded.
    """
    others = list(others)
    theirs = set(map(id, others))
    taken: dict[int, list[tuple[float, float]]] = {_storage(local(other)): [(0, math.inf)] for other in others}
    found = []
    for path, held in averaged.items():
        if id(held) in theirs:
            raise Mismatch(f"'{path}' is one and the same tensor in the model and in the twin")
        tensor = local(held)
        if (storage := _storage(tensor)) == 0:
            continue
        # Parts of one storage that do not overlap are fine: torch lays out the weights of an LSTM so.
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.element_size() * extent(tensor)
        parts = taken.setdefault(storage, [])
        if not overlaps_itself(tensor) and not any(start < end and begin < stop for begin, end in parts):
            parts.append((start, stop))
        elif is_sharded(held):
            raise Mismatch(f"'{path}' of the twin shares memory with another tensor")
        else:
            found.append(tensor)
    return found


def part_memory(tensors: Tensors) -> None:
    """Gives each of them memory of its own."""
    with torch.inference_mode(False), torch.no_grad():
        for tensor in tensors:
            tensor.data = tensor.detach().clone()


def _is_like(tensor: Tensor, kind: tuple[type, torch.device], written: set[int]) -> bool:
    """Whether it is of that class and on that device, and has memory, which nothing is written to."""
    return (type(tensor), tensor.device) == kind and holds_values(tensor) and _storage(tensor) not in written


def _storage(tensor: Tensor) -> int:
    """Where the storage begins; 0 if there is none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout is torch.strided else id(tensor.layout)
