"""What is special about the tensors of a model that ``torch.distributed.fsdp.fully_shard`` has sharded."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["is_sharded", "local", "on_any_rank", "reshard", "sharding", "whole"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``; told by a method, for the class is slow to import."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of a ``DTensor`` that this rank holds; any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks, which have to call this; any other tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharding(tensor: Any) -> str:
    """How a tensor is sharded, in words that are equal for tensors that are sharded alike."""
    return f"sharded as {tensor.placements} over {tensor.device_mesh}" if is_sharded(tensor) else "not sharded"


def reshard(module: nn.Module) -> None:
    """Lets what ``fully_shard`` has wrapped hold its shards again, where a forward pass left the gathered weights."""
    for part in module.modules():
        if hasattr(type(part), "set_reshard_after_forward"):  # of its class, which is faster to ask than a module
            part.reshard()  # type: ignore[operator]


def on_any_rank(flag: bool, tensors: Iterable[Tensor]) -> bool:
    """Whether ``flag`` is true on any of the ranks that hold parts of ``tensors``; all of them have to call this."""
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if is_sharded(tensor))  # type: ignore[attr-defined]
    for _ in meshes:  # as often as there are meshes, so that it comes from each to each
        for mesh in meshes:
            agreed = torch.tensor(int(flag), device=mesh.device_type)
            for dimension in range(mesh.ndim):
                torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dimension))
            flag = bool(agreed.item())
    return flag
