"""Finds tensors that overlap or share memory, and gives the twin's tensors memory of their own."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .sharding import local


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements of a strided tensor share a place in memory, as those of an expanded tensor do."""
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return False
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step <= reach:
            return True
        reach += (size - 1) * step
    return False


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements of a strided tensor fill the memory from the first to the last without gaps."""
    return tensor.is_contiguous() or (_extent(tensor) == tensor.numel() and not overlaps_itself(tensor))


def has_values(tensor: Tensor) -> bool:
    """Whether there is memory for every element of ``tensor``."""
    if tensor.is_meta:
        return False
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return True
    stop = (tensor.storage_offset() + _extent(tensor)) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= stop


def separate(online: Iterable[Tensor], averaged: Iterable[Tensor]) -> None:
    """Moves averaged tensors that share memory with the model, with one another, or with themselves to their own.

    Parts of one storage that do not overlap are fine within the twin: torch lays out LSTM weights that way.
    """
    of_model = {_storage(local(tensor)) for tensor in online} - {0}
    taken: dict[int, list[tuple[int, int]]] = {}
    shared = []
    for tensor in map(local, averaged):
        if (storage := _storage(tensor)) == 0:
            continue
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.element_size() * _extent(tensor)
        parts = taken.setdefault(storage, [])
        if storage in of_model or overlaps_itself(tensor) or any(start < end and begin < stop for begin, end in parts):
            shared.append(tensor)
        else:
            parts.append((start, stop))
    give_own_memory(shared)


def give_own_memory(tensors: Iterable[Tensor]) -> None:
    """Moves each tensor to its own memory."""
    with torch.inference_mode(False), torch.no_grad():
        for tensor in tensors:
            tensor.data = tensor.detach().clone()


def _extent(tensor: Tensor) -> int:
    """The distance in memory from the first to the last element of a strided tensor, both included, in elements."""
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _storage(tensor: Tensor) -> int:
    """The address of the storage; 0 if there is none, as for a quantized weight that keeps its values in tensors."""
    if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return 0
    return tensor.untyped_storage().data_ptr()
