"""What memory tensors have, share and repeat."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["REPEATED", "compact", "copied", "has_memory", "is_dense", "mebibytes", "view_of"]

REPEATED = 2**24  # bytes: what tensors may be made of by repeating the memory that they have


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in memory of their own, which ties share."""
    copies: dict[Any, Tensor] = {}
    result = {}
    for name, value in tensors.items():
        view = view_of(value)
        if view not in copies:
            copies[view] = value.detach().clone()
        result[name] = copies[view]
    return result


def view_of(tensor: Tensor) -> Any:
    """What two tensors have in common that are one."""
    if tensor.layout != torch.strided:
        return id(tensor)
    place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return (*place, tensor.dtype, tensor.is_conj(), tensor.is_neg())


def compact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, ties kept, without what else their memory holds: torch saves the whole of it with each view."""
    parts = {name: value for name, value in tensors.items() if _is_part(value)}
    copies = copied(parts)
    return {name: copies[name] if name in parts else value.detach() for name, value in tensors.items()}


def _is_part(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.untyped_storage().nbytes() != tensor.nbytes


def is_dense(tensor: Tensor) -> bool:
    """Whether it is strided, and not sparse or of another layout."""
    return tensor.layout == torch.strided


def has_memory(tensor: Tensor) -> bool:
    """Whether a dense one is as large as it looks; of one number, expanded, a small file can make any size."""
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def mebibytes(tensors: Mapping[str, Tensor]) -> str:
    """The size of the dense ones, in MiB."""
    return f"{sum(one.nbytes for one in tensors.values() if is_dense(one)) / 2**20:.3f}"
