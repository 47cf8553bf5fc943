"""The online model holds its averaged weights for a while, and then its own again, bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import kernels
from .structure import Pair, Slot, overlaps_itself

__all__ = ["any_swapped", "is_swapped", "swapped"]

# Marks of what is swapped now, of all averages: the models of two may have parts in common.
_swapped: set[int] = set()


def any_swapped() -> bool:
    """Whether any model holds averaged weights now."""
    return bool(_swapped)


def is_swapped(pairs: list[Pair]) -> bool:
    """Whether a tensor of the model of ``pairs`` holds averaged weights now, of this average or of another."""
    return bool(_swapped) and not _swapped.isdisjoint(_marks([pair.slots()[0] for pair in pairs]))


@contextmanager
def swapped(pairs: list[Pair]) -> Iterator[None]:
    """Inside the block each tensor of the model holds the values of its counterpart in the twin.

    The values change and the tensors stay, so that whatever holds on to them (an optimizer, a compiled module) sees the
    right ones before, inside and after. On every way out the model has the tensors and the bits that it had, whatever
    was done to it inside. While it lasts it costs one copy of what is swapped.
    """
    slots = [pair.slots()[0] for pair in pairs]
    online, averaged = ([pair.tensors()[side] for pair in pairs] for side in (0, 1))
    memory = [tensor.detach() for tensor in online]
    saved = [tensor.clone() for tensor in memory]
    marks = _marks(slots)
    try:
        _swapped.update(marks)
        for tensor in online:
            if overlaps_itself(tensor):  # an expanded one cannot be written to; this is undone below
                tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)
        _fill(online, averaged)
        yield
    finally:
        interruption = None
        while marks:
            try:
                _rebind(slots, online, memory)
                _fill(online, saved)
                _swapped.difference_update(marks)
                marks = set()
            except KeyboardInterrupt as error:  # once more from the start, so that no half of it stays
                interruption = error
        if interruption is not None:
            raise interruption


def _marks(slots: list[Slot]) -> set[int]:
    return {mark for owner, key in slots for mark in (id(owner), id(owner[key]))}


def _rebind(slots: list[Slot], online: list[Tensor], memory: list[Tensor]) -> None:
    """Puts the tensors of the model back into their places, and their memory into them."""
    for (owner, key), tensor, data in zip(slots, online, memory, strict=True):
        owner[key] = tensor
        if data.layout is torch.strided and (
            tensor.data_ptr() != data.data_ptr() or tensor.dtype != data.dtype or tensor.stride() != data.stride()
        ):
            tensor.data = data


def _fill(online: list[Tensor], values: list[Tensor]) -> None:
    chosen = [pair for pair in zip(online, values, strict=True) if not overlaps_itself(pair[0])]
    with torch.inference_mode(any(tensor.is_inference() for tensor in online)), torch.no_grad():
        if chosen:
            kernels.copy(*zip(*chosen, strict=True))
    torch.clear_autocast_cache()  # what autocast has made of the weights before
