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
from .memory import has_values, is_dense, separate
from .names import Place, first_names
from .sharding import fsdp_modules, is_sharded, local, on_any_rank, reshard, sharding

SWAPPED = "_ignite_ema_swapped"  # an attribute of modules that hold averaged weights: their id, which a copy lacks

_requires_grad = attrgetter("requires_grad")


class Mismatch(RuntimeError):
    """Model and twin do not match; the message is a clause that says how."""


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
    """Tensors that one kernel call updates together: all of them parameters or all buffers, averaged or copied.

    Attributes:
        kernel: called as ``kernel(averaged, online, momentum)``.
        averaged: aliases of the twin's tensors.
        online: aliases of the model's tensors, in the same order.
        slots: the slots that they come from.
    """

    kernel: kernels.Kernel
    averaged: list[Tensor]
    online: list[Tensor]
    slots: list[Slot]

    @property
    def are_buffers(self) -> bool:
        """Whether the tensors are buffers."""
        return self.slots[0].online.is_buffer

    @property
    def averages(self) -> bool:
        """Whether the kernel averages; False if it copies."""
        return self.slots[0].treatment == "average"

    def first_nonfinite(self) -> str | None:
        """The quoted name of the first tensor that would bring a NaN or an infinity into the average, or None."""
        if self.averages and not kernels.is_finite(self.online, self.averaged[0].dtype):
            for slot, online, averaged in zip(self.slots, self.online, self.averaged, strict=True):
                if kernels.spoils(averaged, online):
                    return f"'{slot.name}'"
        return None


class Pairing:
    """The tensors of a model and of its averaged twin in pairs, sorted into groups for the kernels.

    Args:
        online, averaged: the model and its averaged twin.
        treatment_of: what an update does with a buffer, by its name. "average" means "copy" if the tensor is neither
            floating-point nor complex.
        share_frozen: whether the two may share parameters that do not require gradients.
        narrow: a special kernel for parameters whose average is in 16 bits, or None.
        before: the pairing that this one replaces. What was shared there stays shared if the model has replaced it.

    Attributes:
        slots: every tensor once, except shared ones.
        shared: the frozen parameters that the two share.
        first_names: for each name, including those of tied tensors, the first name of its tensor.
        saved_names: the same for the names in ``state_dict()``.
        groups: the kernel calls of an update.
        sharded: the tensors that are sharded.
        resolution: the largest relative rounding step (``torch.finfo(dtype).eps``) among the averages of buffers and
            of trained parameters.

    Raises:
        Mismatch: if the two do not match; no tensor has changed then.
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
        with buffers_followed(online, averaged, treatment_of, may_clear=before is not None) as (ours, theirs):
            _match(ours, theirs, treatment_of)
            once_shared = {} if before is None else before._once_shared
            followed = {name for name, place in theirs.items() if id(place.get()) in once_shared}
            self.first_names = _checked_ties(ours, theirs, followed)
            self.slots: list[Slot] = []
            self.shared: list[Slot] = []
            for name in dict.fromkeys(self.first_names.values()):
                slot = Slot(name, ours[name], theirs[name], _treatment(ours[name], name, treatment_of))
                if slot.online.get() is slot.averaged.get() or name in followed:
                    _check_shared(slot, share_frozen)
                    self.shared.append(slot)
                else:
                    _check_pair(slot)
                    self.slots.append(slot)
        # All checks have passed. From here on the twin may change, to follow the model in what is shared or copied.
        for name in followed:
            theirs[name].table[theirs[name].key] = ours[name].get()
        self._once_shared: dict[int, Tensor] = {id(slot.online.get()): slot.online.get() for slot in self.shared}
        with torch.inference_mode(False), torch.no_grad():
            for slot in self.slots:
                if slot.treatment == "copy" and not _alike(slot.online.get(), slot.averaged.get()):
                    replace(slot.averaged, slot.online.get())
        separate([place.get() for place in ours.values()], [slot.averaged.get() for slot in self.slots])
        self.saved_names = {name: first for name, first in self.first_names.items() if ours[name].is_saved}
        self.groups = _grouped(self.slots, narrow)
        holding = [
            torch.float32 if group.kernel == narrow else group.averaged[0].dtype
            for group in self.groups
            if group.averages and (group.are_buffers or any(slot.online.get().requires_grad for slot in group.slots))
        ]
        self.resolution = max((torch.finfo(dtype).eps for dtype in holding), default=0.0)
        self._remember(online, averaged)

    def _remember(self, online: nn.Module, averaged: nn.Module) -> None:
        """Records what :meth:`is_current` compares: first the tensors, then what is compared only by identity."""
        modules = [*online.modules(), *averaged.modules()]
        self._all_tables = [table for part in modules for table in (part._parameters, part._buffers, part._modules)]
        self._size = sum(map(len, self._all_tables))
        tensors: list[Tensor] = []
        entries: list[tuple[Any, str, Any]] = []
        others: list[tuple[Any, str, Any]] = []
        for table in self._all_tables:
            for key, value in table.items():  # the tables of TorchScript cannot be iterated over
                if isinstance(value, Tensor) and id(value) not in self._once_shared:
                    tensors.append(value)
                    entries.append((table, key, value))
                else:
                    others.append((table, key, value))
        # Deleting from a Sequential makes a new table; a traced module has none.
        others += [(vars(part), "_modules", found) for part in modules if (found := vars(part).get("_modules"))]
        entries += others
        self._tables = [table for table, _, _ in entries]
        self._keys = [key for _, key, _ in entries]
        self._objects = [value for _, _, value in entries]
        self._count = len(tensors)
        self._attributes = list(map(vars, online.modules()))
        self.sharded = list(filter(is_sharded, tensors))
        is_plain = all(tensor.layout is torch.strided and not tensor.is_complex() for tensor in tensors)
        self._address: Callable[[Tensor], Any] = Tensor.data_ptr if is_plain and not self.sharded else _address
        self._addresses = list(map(self._address, tensors))
        self._numbers = list(map(Tensor.numel, tensors))

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

    def first_nonfinite(self) -> str | None:
        """The name of the first parameter whose NaN or infinity an update would bring into the average, or None.

        All ranks of a sharded model must call this together; if any rank finds such a parameter, all get a name.
        """
        names = (group.first_nonfinite() for group in self.groups if not group.are_buffers)
        name = next(filter(None, names), None)
        if self.sharded and on_any_rank(name is not None, self.sharded) and name is None:
            return "a tensor on another rank"
        return name


def replace(place: Place, source: Tensor) -> None:
    """Gives the tensor at ``place`` the values of ``source``, which has another shape, layout or kind of number.

    The tensor object stays, and so do its ties, unless the layout changes.
    """
    tensor = place.get()
    dtype = tensor.dtype if _kind_of_number(source) == _kind_of_number(tensor) else source.dtype
    values = source.detach().to(tensor.device, dtype, copy=True)
    if tensor.layout is values.layout is torch.strided:
        tensor.data = values
    else:
        place.table[place.key] = values


def _grouped(slots: list[Slot], narrow: kernels.Kernel | None) -> list[Group]:
    """Groups slots by kernel, type and device."""
    groups: dict[tuple[Any, ...], Group] = {}
    with torch.inference_mode(False):
        for slot in slots:
            if slot.treatment == "keep":
                continue
            (online, averaged), is_buffer = slot.tensors(), slot.online.is_buffer
            are_dense = online.layout is torch.strided and online.stride() == averaged.stride() and is_dense(online)
            if slot.treatment == "copy":
                kernel = kernels.copying_kernel_for(online, averaged)
            else:
                is_trained = slot.online.get().requires_grad
                kernel = kernels.lerping_kernel_for(online, averaged, is_buffer, is_trained, narrow)
            # A single tensor that is not dense would put the whole group on a slower path on a GPU.
            kind = (kernel, is_buffer, are_dense, averaged.dtype, averaged.device, online.dtype, online.device)
            if kind not in groups:
                groups[kind] = Group(kernel, [], [], [])
            group = groups[kind]
            if online.layout is not torch.strided:  # an alias would not follow a new number of elements
                online, averaged = slot.online.get(), slot.averaged.get()
            elif are_dense and kernels.needs_flat(kernel):
                online, averaged = (one.as_strided((one.numel(),), (1,)) for one in (online, averaged))
            group.averaged.append(averaged)
            group.online.append(online)
            group.slots.append(slot)
    return list(groups.values())


def _address(tensor: Tensor) -> object:
    """The address of a tensor that may be sharded, sparse or a lazy conjugate."""
    part = local(tensor)
    return (part.data_ptr(), part.is_conj()) if part.layout is torch.strided else part.layout


def _alike(online: Tensor, averaged: Tensor) -> bool:
    """Whether the two have the same shape, layout and kind of number."""
    return (
        online.shape == averaged.shape
        and online.layout == averaged.layout
        and (online.dtype == averaged.dtype or _kind_of_number(online) == _kind_of_number(averaged))
    )


def _kind_of_number(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _match(ours: dict[str, Place], theirs: dict[str, Place], treatment_of: Callable[[str], Treatment]) -> None:
    """Drops buffers that only one of the two has and that are left alone; raises Mismatch for whatever else differs."""
    for name in sorted(ours.keys() ^ theirs.keys()):
        here, there = ("model", "twin") if name in ours else ("twin", "model")
        place = ours.pop(name) if name in ours else theirs.pop(name)
        if not (place.is_buffer and treatment_of(name) == "keep"):
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


def _check_pair(slot: Slot) -> None:
    """Raises Mismatch or TypeError unless an update can do what it should with the two tensors."""
    online, averaged = slot.online.get(), slot.averaged.get()
    ours, theirs = sharding(online), sharding(averaged)
    if ours != theirs:
        raise Mismatch(f"'{slot.name}' is {ours} in the model and {theirs} in the twin")
    if not slot.may_change_shape and not _alike(online, averaged):
        is_shape = online.shape != averaged.shape
        ours, theirs = (
            f"shape {tuple(one.shape)}" if is_shape else f"{one.dtype} and {one.layout}" for one in (online, averaged)
        )
        raise Mismatch(f"'{slot.name}' has {ours} in the model and {theirs} in the twin")
    if not (has_values(local(online)) and has_values(local(averaged))):
        where = "twin" if has_values(local(online)) else "model"
        raise Mismatch(
            f"'{slot.name}' has no memory for its values in the {where} (it was moved to meta, or freed): give it "
            "values first"
        )
    if averaged.is_inference():
        raise Mismatch(f"'{slot.name}' of the twin was made inside torch.inference_mode(): make it outside")
    is_plain = online.layout is torch.strided and {type(online), type(averaged)} <= {Tensor, nn.Parameter}
    if slot.treatment == "average" and not is_plain:
        _try_arithmetic(slot)


def _try_arithmetic(slot: Slot) -> None:
    """Raises TypeError if the tensor cannot be averaged, because of its layout or because its type has no lerp."""
    online, averaged = slot.tensors()
    if online.layout is torch.strided:
        try:
            torch._foreach_lerp_([averaged.clone()], [online], 0.5)
        except Exception as error:  # the kind of error depends on the type
            fault = f", a {type(online).__name__}, for which lerp fails ({str(error).splitlines()[0]})"
        else:
            return
    else:
        fault = f" with layout {online.layout}"
    way_out = "Freeze it and pass share_frozen=True."
    if slot.online.is_buffer:
        way_out = f'Copy it instead: handle_buffers={{"{slot.name}": "copy", "*": "update"}}.'
    raise TypeError(
        f"A tensor should be strided and of a type with arithmetic to be averaged, got '{slot.name}'{fault}. {way_out}"
    )
