"""Where the elements of a tensor lie in memory."""

import torch
from torch import Tensor

__all__ = ["extent", "holds_values", "overlaps_itself"]


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements of a strided tensor lie in the same place, as those of an expanded one do."""
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return False
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step <= reach:
            return True
        reach += (size - 1) * step
    return False


def holds_values(tensor: Tensor) -> bool:
    """Whether there is memory for every element of ``tensor``."""
    if tensor.is_meta:
        return False
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.numel() == 0:
        return True
    stop = (tensor.storage_offset() + extent(tensor)) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= stop


def extent(tensor: Tensor) -> int:
    """How many elements lie between the first and the last of a strided tensor, both included."""
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
