"""Which tensors of a model and of its averaged twin belong together, and what an update does with each.

A pair remembers where its tensors live, not the tensors, and both are read afresh at each update, so that rebinding
(``load_state_dict(assign=True)``, ``module.buffer = ...``, ``.to()``) is followed. What no longer matches raises
before anything is changed.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import kernels
from .structure import Pair, Slot, Structure

__all__ = ["Group", "Pairing", "Treatment"]

Treatment = Literal["average", "copy", "keep"]
Tensors = list[Tensor]
Fingerprint = tuple[list[int], list[torch.Size], list[torch.dtype]]


class Group(NamedTuple):
    """Which of the tensors that :meth:`Pairing.read` gives one kernel treats together."""

    kernel: kernels.Kernel
    averaged: slice
    online: slice


class Pairing:
    """The pairs of a model and its averaged twin, sorted into groups for the kernels.

    Args:
        online: the model.
        averaged: its averaged twin, of the same structure.
        treatment: called with the path of a tensor and whether it is a buffer; says what an update does with it.
            "average" means "copy" where the tensor is neither floating-point nor complex.

    Attributes:
        groups: what to do with the tensors that :meth:`read` gives.
        resolution: the largest relative rounding step (``torch.finfo(dtype).eps``) among the averaged tensors.

    Raises:
        Mismatch: where names, ties or shapes differ; see :class:`Structure`.
        TypeError: where a tensor that is not strided (a sparse one) would have to be averaged.
    """

    def __init__(self, online: nn.Module, averaged: nn.Module, treatment: Callable[[str, bool], Treatment]) -> None:
        self._roots = online, averaged
        self._treatment = treatment
        self._structure = Structure(online, averaged)
        self._known: Fingerprint
        self._infinite = {pair.path for pair in self.pairs if kernels.holds_infinity(pair.tensors()[0])}
        self._arrange()

    @property
    def pairs(self) -> list[Pair]:
        """Every pair, in the order of the model, kept ones too."""
        return self._structure.pairs

    def read(self) -> Tensors:
        """The tensors that an update treats, as they are now: the online ones, then their counterparts in the twin.

        Raises:
            Mismatch: where the model no longer matches its twin.
        """
        try:
            if self._structure.intact():
                tensors = self._tensors()
                seen = self._fingerprint(tensors)
                if seen == self._known or self._follows(tensors, seen):
                    return tensors
        except (KeyError, TypeError, RuntimeError):  # a name is gone, holds None, or a tensor without memory
            pass
        self._structure = Structure(*self._roots)
        self._arrange()
        return self._tensors()

    def _follows(self, tensors: Tensors, seen: Fingerprint) -> bool:
        """Whether nothing has changed but the memory of some of the model's tensors; takes note of it then."""
        count = len(tensors) // 2
        moved = [
            index for index, (now, before) in enumerate(zip(seen[0], self._known[0], strict=True)) if now != before
        ]
        alike = (
            self._watched is None
            and seen[1:] == self._known[1:]
            and moved[-1] < count
            and len(set(map(id, tensors[:count]))) == count
            and all(tensors[i].device == self._devices[i] and _storage(tensors[i]) not in self._taken for i in moved)
        )
        if alike:
            self._known = seen
        return alike

    def _tensors(self) -> Tensors:
        return [owner[key] for owner, key in self._slots]

    def _fingerprint(self, tensors: Tensors) -> Fingerprint:
        """Changes when a tensor is rebound to other memory, or the model's to other shapes or types in the same."""
        if self._watched is not None:
            tensors = [tensors[index] for index in self._watched]
        online = tensors[: len(tensors) // 2]
        return list(map(Tensor.data_ptr, tensors)), [t.shape for t in online], [t.dtype for t in online]

    def _arrange(self) -> None:
        """Sorts the pairs into groups; checks shapes and that the twin owns its memory."""
        by_kind: dict[tuple[Any, ...], list[Pair]] = {}
        for pair in self.pairs:
            treatment = self._treatment(pair.path, pair.kind == "_buffers")
            if treatment != "keep":
                by_kind.setdefault(self._kind_of(pair, treatment), []).append(pair)
        self._give_memory()
        slots = [pair.slots() for pairs in by_kind.values() for pair in pairs]
        self._slots: list[Slot] = [online for online, _ in slots] + [averaged for _, averaged in slots]
        self.groups: list[Group] = []
        watched: list[int] = []
        start, count = 0, len(slots)
        for (layout, kernel, *_), pairs in by_kind.items():
            stop = start + len(pairs)
            self.groups.append(Group(kernel, slice(count + start, count + stop), slice(start, stop)))
            watched += range(start, stop) if layout is torch.strided else ()  # the others have no one pointer
            start = stop
        averaged_types = [dtype for _, kernel, dtype, *_ in by_kind if kernel is not kernels.copy]
        self.resolution = max((torch.finfo(dtype).eps for dtype in averaged_types), default=0.0)
        self._watched = None if len(watched) == count else watched + [count + index for index in watched]
        tensors = self._tensors()
        self._devices = [tensor.device for tensor in tensors[:count]]
        self._taken = {_storage(tensor) for tensor in tensors[count:]}
        self._known = self._fingerprint(tensors)

    def _kind_of(self, pair: Pair, treatment: Treatment) -> tuple[Any, ...]:
        online, averaged = pair.tensors()
        if treatment == "average" and (averaged.is_floating_point() or averaged.is_complex()):
            if online.layout is not torch.strided:
                raise TypeError(
                    f"A tensor should be strided to be averaged, got '{pair.path}' with layout {online.layout}; "
                    f'as a buffer it can be copied: handle_buffers={{"{pair.path}": "copy"}}.'
                )
            kernel = kernels.kernel_for(averaged, online, pair.path in self._infinite)
        else:
            kernel = kernels.copy
        return online.layout, kernel, averaged.dtype, averaged.device, online.dtype, online.device

    def _give_memory(self) -> None:
        """Gives memory of its own to every tensor of the twin that shares it with the model, or with itself."""
        pairs = [[owner[key] for owner, key in pair.slots()] for pair in self.pairs]
        taken = {_storage(online) for online, _ in pairs} - {0}
        for _, averaged in pairs:
            if _storage(averaged) in taken or _overlaps_itself(averaged):
                averaged.data = averaged.detach().clone()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _overlaps_itself(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and any(
        step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
