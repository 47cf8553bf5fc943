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


class Group(NamedTuple):
    """The tensors from ``start`` to before ``stop`` of what :meth:`Pairing.read` gives: one kernel treats them."""

    kernel: kernels.Kernel
    start: int
    stop: int


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
        self._infinite = {pair.path for pair in self.pairs if kernels.holds_infinity(pair.tensors()[0])}
        self._arrange()

    @property
    def pairs(self) -> list[Pair]:
        """Every pair, in the order of the model, kept ones too."""
        return self._structure.pairs

    def read(self) -> tuple[Tensors, Tensors]:
        """The tensors (online, averaged) that an update treats, as they are now.

        Raises:
            Mismatch: where the model no longer matches its twin.
        """
        try:
            if self._structure.intact():
                tensors = self._tensors()
                if self._fingerprint(*tensors) == self._known:
                    return tensors
        except (KeyError, TypeError):  # a name is gone, or holds None: the walk says which
            pass
        self._structure = Structure(*self._roots)
        self._arrange()
        return self._tensors()

    def _tensors(self) -> tuple[Tensors, Tensors]:
        return [owner[key] for owner, key in self._online], [owner[key] for owner, key in self._averaged]

    def _fingerprint(self, online: Tensors, averaged: Tensors) -> tuple[list[Any], ...]:
        """Changes when a tensor is rebound to other memory, or to other shapes or types in the same memory."""
        online, averaged = online[: self._strided], averaged[: self._strided]
        return (
            list(map(Tensor.data_ptr, online)),
            list(map(Tensor.data_ptr, averaged)),
            [tensor.shape for tensor in online],
            [tensor.dtype for tensor in online],
        )

    def _arrange(self) -> None:
        """Sorts the pairs into groups; checks shapes and that the twin owns its memory."""
        sorted_pairs: dict[tuple[Any, ...], list[Pair]] = {}
        for pair in self.pairs:
            treatment = self._treatment(pair.path, pair.kind == "_buffers")
            if treatment != "keep":
                sorted_pairs.setdefault(self._kind_of(pair, treatment), []).append(pair)
        self._give_memory()
        self.groups: list[Group] = []
        self._online: list[Slot] = []
        self._averaged: list[Slot] = []
        self._strided = 0
        self.resolution = 0.0
        for kind in sorted(sorted_pairs, key=lambda kind: kind[0] is not torch.strided):
            layout, kernel, dtype = kind[:3]
            start = len(self._online)
            for pair in sorted_pairs[kind]:
                online, averaged = pair.slots()
                self._online.append(online)
                self._averaged.append(averaged)
            self.groups.append(Group(kernel, start, len(self._online)))
            if layout is torch.strided:
                self._strided = len(self._online)
            if kernel is not kernels.copy:
                self.resolution = max(self.resolution, torch.finfo(dtype).eps)
        self._known = self._fingerprint(*self._tensors())

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
