"""Pairs the tensors of a model with those of its averaged twin, and decides what an update does with each pair.

Tensors are paired by name (:mod:`ignite_ema.averaging.names`), never by position. This is done once. Each update then
checks that nothing has changed: every tensor must be the same object, at the same address, with the same number of
elements, every module the same object, and no table of tensors or modules may have grown. If anything differs,
everything is paired and checked again before anything is written: replaced tensors are followed, and what no longer
matches raises :class:`Mismatch`.

The groups for the kernels hold detached aliases of the tensors, so that an update needs no ``no_grad``.
"""

from collections.abc import Callable
from itertools import repeat
from operator import attrgetter, contains, getitem, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import kernels
from .buffers import Treatment, buffers_followed
from .memory import give_own_memory, has_values, is_dense, sharing_memory
from .names import Place, first_names, places_of
from .sharding import fsdp_modules, is_sharded, local, on_any_rank, reshard, sharding

SWAPPED = "_ignite_ema_swapped"  # an attribute of modules that hold averaged weights: their id, which a copy lacks

_requires_grad = attrgetter("requires_grad")


class Mismatch(RuntimeError):
    """The model and its averaged twin do not match; the message is a clause that says how."""


class Slot(NamedTuple):
    """A tensor of the model and its counterpart in the twin, as the places where their modules keep them.

    Attributes:
        name: the first of its names.
        online: its place in the model.
        averaged: the place in the twin.
        treatment: what an update does with it.
    """

    name: str
    online: Place
    averaged: Place
    treatment: Treatment

    @property
    def is_saved(self) -> bool:
        """Whether a saved state has it: a non-persistent buffer is saved only if it is averaged."""
        return self.online.is_saved or self.treatment == "average"

    @property
    def may_change_shape(self) -> bool:
        """Whether its shape may change: True for a buffer that is not averaged."""
        return self.online.is_buffer and self.treatment != "average"

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The current tensors (online, averaged), detached; if they are sharded, this rank's part."""
        return local(self.online.get()).detach(), local(self.averaged.get()).detach()


class Group(NamedTuple):
    """Tensors that one kernel call updates together.

    Attributes:
        kernel: called as ``kernel(averaged, online, momentum)``.
        averaged: aliases of the twin's tensors.
        online: aliases of the model's tensors, in the same order.
        slots: the slots that they come from.
        averages: True if the kernel averages, False if it copies.
    """

    kernel: kernels.Kernel
    averaged: list[Tensor]
    online: list[Tensor]
    slots: list[Slot]
    averages: bool

    @property
    def are_buffers(self) -> bool:
        """Whether the tensors are buffers; a group never mixes parameters and buffers."""
        return self.slots[0].online.is_buffer


class Pairing:
    """The tensors of a model and of its averaged twin in pairs, sorted into groups for the kernels.

    Args:
        online: the model.
        averaged: its averaged twin.
        treatment_of: called with the name of a buffer, returns what an update does with it. Parameters are averaged.
            "average" means "copy" if the tensor is neither floating-point nor complex.
        share_frozen: whether the two may share parameters that do not require gradients.
        narrow: a special kernel for parameters whose average is in 16 bits, or None.
        before: the pairing that this one replaces. What was shared there stays shared if the model has replaced it.

    Attributes:
        slots: every tensor once, except shared ones.
        shared: the frozen parameters that the two share.
        first_names: for each name, including those of tied tensors, the first name of its tensor.
        saved_names: the same for the names in ``state_dict()``.
        groups: the kernel calls of an update.
        resolution: the largest relative rounding step (``torch.finfo(dtype).eps``) among the averages of buffers and
            of trained parameters.

    Raises:
        Mismatch: if the two do not match; nothing has changed then.
        TypeError: for a tensor that cannot be averaged.
    """

    def __init__(
        self,
        online: nn.Module,
        averaged: nn.Module,
        treatment_of: Callable[[str], Treatment],
        *,
        share_frozen: bool = False,
        narrow: kernels.Kernel | None = None,
        before: "Pairing | None" = None,
    ) -> None:
        self._fsdp_modules = [*fsdp_modules(online), *fsdp_modules(averaged)]
        reshard(self._fsdp_modules)
        self._narrow = narrow
        ours = places_of(online)
        with buffers_followed(online, averaged, ours, treatment_of, may_clear=before is not None):
            theirs = places_of(averaged)
            _check_names(ours, theirs, treatment_of)
            once_shared = {} if before is None else before._once_shared
            followed = {name for name, place in theirs.items() if id(place.get()) in once_shared}
            self.first_names = _checked_ties(ours, theirs, followed)
            self.slots: list[Slot] = []
            self.shared: list[Slot] = []
            for name in dict.fromkeys(self.first_names.values()):
                slot = Slot(name, ours[name], theirs[name], _treatment(ours[name], name, treatment_of))
                is_shared = ours[name].get() is theirs[name].get() or name in followed
                (self.shared if is_shared else self.slots).append(slot)
            for slot in self.shared:
                _check_shared(slot, share_frozen)
            kinds = [self._kind_of(slot) for slot in self.slots]
        # All checks have passed. From here on the twin may change, to follow the model in what is shared or copied.
        for name in followed:
            theirs[name].table[theirs[name].key] = ours[name].get()
        self._once_shared: dict[int, Tensor] = {id(slot.online.get()): slot.online.get() for slot in self.shared}
        self._follow_shapes()
        names = sharing_memory(
            [place.get() for place in ours.values()],
            {slot.name: slot.averaged.get() for slot in self.slots},
        )
        give_own_memory(local(theirs[name].get()) for name in names)
        self.saved_names = {name: first for name, first in self.first_names.items() if ours[name].is_saved}
        self._group(kinds)
        self._remember(online, averaged, [*ours.values()], [*theirs.values()])

    def is_current(self) -> bool:
        """Whether model and twin still have the paired tensors, at the same addresses."""
        if self._fsdp_modules:
            reshard(self._fsdp_modules)
        try:
            found = list(map(getitem, self._tables, self._keys))
        except KeyError:
            return False
        tensors = found[: self._count]
        return (
            all(map(is_, found, self._objects))
            and list(map(self._address, tensors)) == self._addresses
            and list(map(Tensor.numel, tensors)) == self._numbers
            and sum(map(len, self._all_tables)) == self._size
            and not (self.shared and any(_requires_grad(slot.online.get()) for slot in self.shared))
        )

    def has_swapped_part(self) -> bool:
        """Whether a module of the model holds averaged weights now, perhaps those of an average of that part alone."""
        return any(map(contains, self._attributes, repeat(SWAPPED)))

    @property
    def is_sharded(self) -> bool:
        """Whether any of the tensors is sharded."""
        return bool(self._sharded)

    def first_nonfinite(self) -> str | None:
        """The name of the first parameter whose NaN or infinity an update would bring into the average, or None.

        All ranks of a sharded model must call this together; if any rank finds such a parameter, all get a name.
        """
        names = (nonfinite_in(group) for group in self.groups if not group.are_buffers)
        name = next(filter(None, names), None)
        if self._sharded and on_any_rank(name is not None, self._sharded) and name is None:
            return "a tensor on another rank"
        return name

    def _kind_of(self, slot: Slot) -> tuple[Any, ...]:
        """The key of the slot's group; raises Mismatch or TypeError if the two tensors do not fit."""
        online, averaged = slot.online.get(), slot.averaged.get()
        _check_pair(slot, online, averaged)
        online, averaged = slot.tensors()
        if slot.treatment == "keep":
            return ()
        places = averaged.dtype, averaged.device, online.dtype, online.device, slot.online.is_buffer
        if slot.treatment == "copy":
            return kernels.copying_kernel_for(online, averaged), False, 0.0, *places
        _check_arithmetic(slot, online, averaged)
        is_trained = slot.online.get().requires_grad
        kernel = kernels.lerping_kernel_for(
            online, averaged, is_buffer=slot.online.is_buffer, is_trained=is_trained, narrow=self._narrow
        )
        dtype = torch.float32 if kernel == self._narrow else averaged.dtype
        resolution = torch.finfo(dtype).eps if is_trained or slot.online.is_buffer else 0.0
        return kernel, True, resolution, *places

    def _follow_shapes(self) -> None:
        """Replaces copied buffers of the twin if the model's have another shape, layout or kind of number now."""
        with torch.inference_mode(False), torch.no_grad():
            for slot in self.slots:
                online, averaged = slot.online.get(), slot.averaged.get()
                if slot.treatment == "copy" and not _alike(online, averaged):
                    replace(slot.averaged, online)

    def _group(self, kinds: list[tuple[Any, ...]]) -> None:
        members: dict[tuple[Any, ...], list[tuple[Slot, Tensor, Tensor]]] = {}
        with torch.inference_mode(False):
            for kind, slot in zip(kinds, self.slots, strict=True):
                if kind:
                    online, averaged, are_dense = _aliases(slot, kernels.needs_flat(kind[0]))
                    # A single tensor that is not dense would put the whole group on a slower path on a GPU.
                    members.setdefault((*kind, are_dense), []).append((slot, online, averaged))
        self.groups: list[Group] = []
        for (kernel, averages, *_), group in members.items():
            slots, online_ones, averaged_ones = map(list, zip(*group, strict=True))
            self.groups.append(Group(kernel, averaged_ones, online_ones, slots, averages))
        self.resolution = max((kind[2] for kind in kinds if kind), default=0.0)

    def _remember(self, online: nn.Module, averaged: nn.Module, ours: list[Place], theirs: list[Place]) -> None:
        """Records what :meth:`is_current` compares with."""
        shared = {(id(place.table), place.key) for slot in self.shared for place in (slot.online, slot.averaged)}
        places = {(id(place.table), place.key): place for place in (*ours, *theirs)}
        read = [place for key, place in places.items() if key not in shared]
        self._attributes = list(map(vars, online.modules()))
        modules = [*online.modules(), *averaged.modules()]
        self._all_tables = [table for part in modules for table in (part._parameters, part._buffers, part._modules)]
        self._size = sum(map(len, self._all_tables))
        others = [  # modules, shared parameters and entries that are None: compared only by identity
            (table, key)
            for table in self._all_tables
            for key, _ in table.items()  # the tables of TorchScript cannot be iterated over
            if (id(table), key) not in places or (id(table), key) in shared
        ]
        # Deleting from a Sequential makes a new table; a traced module has none.
        others += [(vars(part), "_modules") for part in modules if vars(part).get("_modules")]
        self._tables: list[Any] = [*(place.table for place in read), *(table for table, _ in others)]
        self._keys = [*(place.key for place in read), *(key for _, key in others)]
        self._objects = list(map(getitem, self._tables, self._keys))
        self._count = len(read)
        tensors = self._objects[: self._count]
        self._sharded = [tensor for tensor in tensors if is_sharded(tensor)]
        is_plain = not self._sharded and all(tensor.layout is torch.strided for tensor in tensors)
        is_complex = any(tensor.is_complex() for tensor in tensors)
        self._address: Callable[[Tensor], Any] = Tensor.data_ptr if is_plain and not is_complex else _address
        self._addresses = list(map(self._address, tensors))
        self._numbers = list(map(Tensor.numel, tensors))


def nonfinite_in(group: Group) -> str | None:
    """The quoted name of the first tensor that would bring a NaN or an infinity into the average here, or None."""
    if group.averages and not kernels.is_finite(group.online, group.averaged[0].dtype):
        for slot, online, averaged in zip(group.slots, group.online, group.averaged, strict=True):
            if kernels.spoils(averaged, online):
                return f"'{slot.name}'"
    return None


def replace(place: Place, source: Tensor) -> None:
    """Gives the tensor at ``place`` the values of ``source``, which has another shape, layout or kind of number.

    The tensor object stays, and so do its ties, unless the layout changes.
    """
    tensor = place.get()
    same_kind = source.is_floating_point() == tensor.is_floating_point()
    dtype = tensor.dtype if same_kind and source.is_complex() == tensor.is_complex() else source.dtype
    values = source.detach().to(tensor.device, dtype, copy=True)
    if tensor.layout is values.layout is torch.strided:
        tensor.data = values
    else:
        place.table[place.key] = values


def _aliases(slot: Slot, flat: bool) -> tuple[Tensor, Tensor, bool]:
    """The two, as one-dimensional views if ``flat``, and whether their elements lie in one order without gaps."""
    online, averaged = slot.tensors()
    if online.layout is not torch.strided:  # an alias would not follow a new number of elements
        return slot.online.get(), slot.averaged.get(), False
    are_dense = online.stride() == averaged.stride() and is_dense(online)
    if flat and are_dense:
        shape = (online.numel(),)
        return online.as_strided(shape, (1,)), averaged.as_strided(shape, (1,)), True
    return online, averaged, are_dense


def _address(tensor: Tensor) -> object:
    """The address of a tensor that may be sharded, sparse or a lazy conjugate."""
    part = local(tensor)
    return (part.data_ptr(), part.is_conj()) if part.layout is torch.strided else part.layout


def _alike(online: Tensor, averaged: Tensor) -> bool:
    kinds = [(one.shape, one.layout, one.is_floating_point(), one.is_complex()) for one in (online, averaged)]
    return kinds[0] == kinds[1]


def _check_names(ours: dict[str, Place], theirs: dict[str, Place], treatment_of: Callable[[str], Treatment]) -> None:
    for name in sorted(ours.keys() ^ theirs.keys()):
        places = ours if name in ours else theirs
        if places[name].is_buffer and treatment_of(name) == "keep":
            del places[name]  # each may have its own
            continue
        here, there = ("model", "twin") if name in ours else ("twin", "model")
        raise Mismatch(f"'{name}' is in the {here} but not in the {there}")
    for name, place in ours.items():
        if place.is_buffer != theirs[name].is_buffer:
            raise Mismatch(f"'{name}' is a parameter in one of model and twin, and a buffer in the other")


def _checked_ties(ours: dict[str, Place], theirs: dict[str, Place], followed: set[str]) -> dict[str, str]:
    """The first name of each tensor; raises Mismatch if tensors are tied in only one of the two."""
    in_model, in_twin = first_names(ours), first_names(theirs)
    for name, first in in_model.items():
        if first != in_twin[name] and name not in followed:
            here, there = ("model", "twin") if first != name else ("twin", "model")
            other = first if first != name else in_twin[name]
            raise Mismatch(f"'{name}' is tied to '{other}' in the {here} but not in the {there}")
    return in_model


def _check_shared(slot: Slot, share_frozen: bool) -> None:
    if not share_frozen or slot.online.is_buffer:
        raise Mismatch(f"'{slot.name}' is one and the same tensor in the model and in the twin")
    if slot.online.get().requires_grad:
        raise Mismatch(f"'{slot.name}' was frozen and is shared with the average, but requires gradients now")


def _treatment(place: Place, name: str, treatment_of: Callable[[str], Treatment]) -> Treatment:
    treatment = treatment_of(name) if place.is_buffer else "average"
    is_averageable = place.get().is_floating_point() or place.get().is_complex()
    return "copy" if treatment == "average" and not is_averageable else treatment


def _check_pair(slot: Slot, online: Tensor, averaged: Tensor) -> None:
    are_sharded = is_sharded(online) or is_sharded(averaged)
    if are_sharded and (ours := sharding(online)) != (theirs := sharding(averaged)):
        raise Mismatch(f"'{slot.name}' is {ours} in the model and {theirs} in the twin")
    if not slot.may_change_shape and not _alike(online, averaged):
        if online.shape != averaged.shape:
            ours, theirs = (f"shape {tuple(one.shape)}" for one in (online, averaged))
        else:
            ours, theirs = (f"{one.dtype} and {one.layout}" for one in (online, averaged))
        raise Mismatch(f"'{slot.name}' has {ours} in the model and {theirs} in the twin")
    for tensor, where in ((online, "model"), (averaged, "twin")):
        if not has_values(local(tensor)):
            raise Mismatch(
                f"'{slot.name}' has no memory for its values in the {where} (it was moved to meta, or freed): give it "
                "values first"
            )
    if averaged.is_inference():
        raise Mismatch(f"'{slot.name}' of the twin was made inside torch.inference_mode(): make it outside")


def _check_arithmetic(slot: Slot, online: Tensor, averaged: Tensor) -> None:
    """Raises TypeError for a tensor that cannot be averaged."""
    if online.layout is not torch.strided:
        raise TypeError(
            f"A tensor should be strided to be averaged, got '{slot.name}' with layout {online.layout}. "
            f"{_instead(slot)}"
        )
    if {type(online), type(averaged)} <= {Tensor, nn.Parameter}:
        return
    try:
        torch._foreach_lerp_([averaged.clone()], [online], 0.5)
    except Exception as error:  # the kind of error depends on the type
        raise TypeError(
            f"A tensor should be of a type that can be averaged, got '{slot.name}', a {type(online).__name__}, for "
            f"which lerp fails ({str(error).splitlines()[0]}). {_instead(slot)}"
        ) from error


def _instead(slot: Slot) -> str:
    """The way out for a tensor that cannot be averaged."""
    if slot.online.is_buffer:
        return f'Copy it instead: handle_buffers={{"{slot.name}": "copy", "*": "update"}}.'
    return "Freeze it and pass share_frozen=True."
