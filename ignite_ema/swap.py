"""The online model holds its averaged weights for a while, and then its own again, bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import kernels
from .structure import Pair, Structure, overlaps_itself, reshard

__all__ = ["any_swapped", "is_swapped", "swapped"]

# Marks of what is swapped now, of all averages: the models of two may have parts in common.
_swapped: set[int] = set()


def any_swapped() -> bool:
    """Whether any model holds averaged weights now."""
    return bool(_swapped)


def is_swapped(pairs: list[Pair]) -> bool:
    """Whether a tensor of the model of ``pairs`` holds averaged weights now, of this average or of another."""
    return bool(_swapped) and not _swapped.isdisjoint(_marks(pairs))


@contextmanager
def swapped(structure: Structure) -> Iterator[None]:
    """Inside the block each tensor of the model holds the values of its counterpart in the twin.

    The values change and the tensors stay, so that whatever holds on to them (an optimizer, a compiled module) sees the
    right ones before, inside and after. On every way out the model has the tensors and the bits that it had, whatever
    was done to them inside. While it lasts it costs one copy of what is swapped.
    """
    tensors = [pair.tensors() for pair in structure.pairs]
    expanded = [(online, averaged) for online, averaged in tensors if overlaps_itself(online)]  # cannot be written to
    written = [(online, averaged) for online, averaged in tensors if not overlaps_itself(online)]
    memory = [(pair, *_held(pair)) for pair in structure.names]
    saved = [(online, online.detach().clone()) for online, _ in written]
    marks = _marks(structure.pairs)
    interruption = None
    try:
        _swapped.update(marks)
        for online, averaged in expanded:
            online.data = averaged.detach().to(online.device, online.dtype, copy=True)
        _fill(written)
        yield
    finally:
        while marks:
            try:
                reshard(structure.roots[0])  # or it would go on with weights that were gathered in the block
                for pair, tensor, part, data in memory:
                    _put_back(pair, tensor, part, data)
                _fill(saved)
                _swapped.difference_update(marks)
                marks = set()
            except Exception:
                raise
            except BaseException as error:  # Ctrl-C: once more from the start, so that no half of it stays
                interruption = error
        if interruption is not None:
            raise interruption


def _marks(pairs: list[Pair]) -> set[int]:
    slots = [pair.slots()[0] for pair in pairs]
    return {mark for owner, key in slots for mark in (id(owner), id(owner[key]))}


def _held(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """A tensor of the model, the part of it that this rank holds, and its memory."""
    owner, key = pair.slots()[0]
    part = pair.tensors()[0]
    return owner[key], part, part.detach()


def _put_back(pair: Pair, tensor: Tensor, part: Tensor, memory: Tensor) -> None:
    """Puts a tensor of the model back into its place, and its memory into it, unless they are there."""
    owner, key = pair.slots()[0]
    if key not in owner:
        owner[key] = tensor
    elif owner[key] is not tensor:
        setattr(pair.online, key, tensor)  # by way of the module, since an LSTM keeps a list of its own
    if memory.layout is torch.strided and (
        part.data_ptr() != memory.data_ptr()
        or part.dtype != memory.dtype
        or part.shape != memory.shape
        or part.stride() != memory.stride()
    ):
        part.data = memory


def _fill(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copies the second of each pair into the first."""
    if pairs:
        online, values = zip(*pairs, strict=True)
        with torch.inference_mode(any(tensor.is_inference() for tensor in online)), torch.no_grad():
            kernels.copy(online, values)
    torch.clear_autocast_cache()  # it holds what autocast has made of the weights before
