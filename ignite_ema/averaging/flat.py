"""Tensors side by side in memory: an update, a swap or a finite check is one operation for many of them.

The tensors of a model that one kernel treats together are moved into one piece of memory, and their counterparts in the
twin into another, in the same order and at the same places. Each tensor keeps its identity, its strides and a storage
of its own, of its own size, over its part of that memory: what is saved, copied or compiled is what it was.

Left where they are, and averaged one by one: tensors that do not own the whole of a storage (views, expanded ones, the
weights of an LSTM as cuDNN lays them out), those in shared memory, those of ``torch.inference_mode``, sparse and empty
ones, and what another average, with other options, has laid out already.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from operator import eq
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils.dlpack import from_dlpack

from . import kernels
from .module_trees import Structure
from .pairing import Group, Pairing, Step
from .sharding import is_sharded
from .storage import overlaps_itself

__all__ = ["Block", "Flat", "refuse_unflattable"]

_PLACE = 64  # elements: so many bytes at least, in every type
_BLOCK = 2**28  # bytes: what the model needs twice while it is laid out
_memories: "weakref.WeakValueDictionary[int, Tensor]" = weakref.WeakValueDictionary()  # by address


class Block(NamedTuple):
    """Tensors of the model, the memory that they make up together, and the same of the twin."""

    online: list[Tensor]
    averaged: list[Tensor]
    online_memory: Tensor
    averaged_memory: Tensor


def refuse_unflattable(model: nn.Module) -> None:
    """Raises TypeError where ``flatten`` cannot lay out a tensor of ``model``."""
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_sharded(tensor):
            raise TypeError(
                f"flatten should be False for a model that is sharded, got True where '{path}' is a DTensor: "
                "fully_shard lays out its shards; leave flatten out."
            )
        if type(tensor) not in (Tensor, nn.Parameter):
            raise TypeError(
                f"flatten should be False for tensors of a type of their own, got True where '{path}' is a "
                f"{type(tensor).__name__}; leave flatten out."
            )


class Flat:
    """What the pairs of a model and its twin are, laid out; laid out again where a tensor has moved.

    Args:
        pairing: the pairs.

    Attributes:
        blocks: what is laid out.
    """

    def __init__(self, pairing: Pairing) -> None:
        self._pairing = pairing
        self._seen: object = None
        self._steps: list[Step] = []
        self._rows: list[int] = []  # the model's tensors that are contiguous, and those that are not, with strides
        self._turned: list[int] = []
        self._strides: list[tuple[int, ...]] = []
        self._written: list[Tensor] = []  # those of the twin
        self.blocks: list[Block] = []

    def first_nonfinite(self, tensors: list[Tensor]) -> str | None:
        """As ``pairing.first_nonfinite`` says, which looks closer where one operation for each step finds something."""
        if all(
            kernels.is_finite(online, averaged[0].dtype)
            for group, averaged, online in self.steps(tensors)
            if group.averages and not group.are_buffers
        ):
            return None
        return self._pairing.first_nonfinite(tensors)

    def steps(self, tensors: list[Tensor]) -> list[Step]:
        """As ``pairing.steps`` says, with the memory of those that lie side by side in their place.

        Args:
            tensors: what ``pairing.read()`` gave.

        Raises:
            TypeError: as :func:`refuse_unflattable` does.
        """
        if not self._lies_as_it_did(tensors):
            self._lay_out(tensors)
        return self._steps

    def _lies_as_it_did(self, tensors: list[Tensor]) -> bool:
        """Whether no tensor has other memory or another shape, which the pairing notices, or is turned in its place."""
        return (
            self._seen is not None
            and self._seen is self._pairing.noted
            and all(map(eq, map(Tensor.stride, map(tensors.__getitem__, self._turned)), self._strides))
            and all(map(Tensor.is_contiguous, map(tensors.__getitem__, self._rows)))
        )

    def laid_out(self) -> set[int]:
        """The identities of the model's tensors in the blocks."""
        return {id(one) for block in self.blocks for one in block.online}

    def note_writes(self) -> None:
        """Lets autograd know that the twin was written to, as it would see by itself without this memory."""
        increment_version(self._written)

    @torch.no_grad()
    def _lay_out(self, tensors: list[Tensor]) -> None:
        refuse_unflattable(self._pairing.structure.roots[0])
        self._seen = None
        before, self.blocks, self._steps = self.blocks, [], []
        own = {memory.data_ptr() for block in before for memory in block[2:]}
        several = _storages_of_several(self._pairing.structure)
        for group in self._pairing.groups:
            pairs = list(zip(tensors[group.online], tensors[group.averaged], strict=True))
            self._lay_out_group(group, pairs, several, own)
        self._pairing.note_memory()
        laid_out = self.laid_out()
        indices = [index for index, tensor in enumerate(tensors) if id(tensor) in laid_out]
        self._rows = [index for index in indices if tensors[index].is_contiguous()]
        self._turned = [index for index in indices if not tensors[index].is_contiguous()]
        self._strides = [tensors[index].stride() for index in self._turned]
        self._written = [tensor for block in self.blocks for tensor in block.averaged]
        self._seen = self._pairing.noted

    def _lay_out_group(
        self, group: Group, pairs: list[tuple[Tensor, Tensor]], several: set[int], own: set[int]
    ) -> None:
        laid_out: set[int] = set()
        for chunk in _chunks([pair for pair in pairs if all(_owns_its_memory(one, several) for one in pair)]):
            online, averaged = [one for one, _ in chunk], [one for _, one in chunk]
            memory, held = _side_by_side(online, online, own), _side_by_side(averaged, online, own)
            if memory is not None and held is not None:
                self.blocks.append(Block(online, averaged, memory, held))
                self._steps.append((group, [held], [memory]))
                laid_out.update(map(id, online))
        if rest := [pair for pair in pairs if id(pair[0]) not in laid_out]:
            online, averaged = [one for one, _ in rest], [one for _, one in rest]
            self._steps.append((group, averaged, online))


def _storages_of_several(structure: Structure) -> set[int]:
    """The addresses of the storages that more than one tensor of the model, or of the twin, uses."""
    slots = [slot for pair in (*structure.pairs, *structure.shared) for slot in pair.slots()]
    tensors = {id(owner[key]): owner[key] for owner, key in slots if owner[key].layout is torch.strided}
    counts = Counter(one.untyped_storage().data_ptr() for one in tensors.values())
    return {address for address, count in counts.items() if count > 1}


def _owns_its_memory(tensor: Tensor, several: set[int]) -> bool:
    """Whether nothing else is known to use the memory of ``tensor``, all of which it uses itself."""
    return (
        tensor.layout is torch.strided
        and tensor.numel() > 0
        and not (tensor.is_inference() or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
        and tensor.is_leaf
        and not (tensor.device.type == "cpu" and tensor.untyped_storage().is_shared())
        and not overlaps_itself(tensor)
        and tensor.untyped_storage().nbytes() == tensor.nbytes
        and tensor.untyped_storage().data_ptr() not in several
    )


def _chunks(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Neighbours that have up to ``_BLOCK`` bytes together, but at least one pair."""
    chunk: list[tuple[Tensor, Tensor]] = []
    size = 0
    for pair in pairs:
        nbytes = max(one.nbytes for one in pair)
        if chunk and size + nbytes > _BLOCK:
            yield chunk
            chunk, size = [], 0
        chunk.append(pair)
        size += nbytes
    if chunk:
        yield chunk


def _side_by_side(tensors: list[Tensor], models: list[Tensor], own: set[int]) -> Tensor | None:
    """The memory in which ``tensors`` lie side by side, each with the strides of its model, once they are moved there.

    Where they lie so already, they stay. None where some lie so for another average, in memory that is not ``own``.
    """
    starts = list(accumulate((-(-one.numel() // _PLACE) * _PLACE for one in models), initial=0))
    size, dtype = tensors[0].element_size(), tensors[0].dtype
    addresses = [tensors[0].data_ptr() + start * size for start in starts[:-1]]
    now = [(tensor.data_ptr(), tensor.stride()) for tensor in tensors]
    known = _memories.get(addresses[0])
    due = list(zip(addresses, [model.stride() for model in models], strict=True))
    if known is not None and (known.dtype, known.numel()) == (dtype, starts[-1]) and now == due:
        return known
    for memory in list(_memories.values()):
        start, stop = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        if start not in own and any(start <= tensor.data_ptr() < stop for tensor in tensors):
            return None
    raw = torch.empty(starts[-1] * size, dtype=torch.uint8, device=tensors[0].device)
    for tensor, model, start, next_start in zip(tensors, models, starts[:-1], starts[1:], strict=True):
        stop = start * size + tensor.nbytes
        part = from_dlpack(raw[start * size : stop]).view(dtype)
        tensor.data = part.as_strided(model.shape, model.stride()).copy_(tensor)
        raw[stop : next_start * size].zero_()  # what lies between must be finite
    memory = raw.view(dtype)
    _memories[memory.data_ptr()] = memory
    return memory
