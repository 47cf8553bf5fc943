"""Handles models sharded by ``torch.distributed.fsdp.fully_shard``, and communication between ranks."""

import pickle
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

_T = TypeVar("_T")
_PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``; recognized by a method, since importing the class is slow."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a ``DTensor``; any other tensor unchanged."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered from all ranks, which must all call this; any other tensor unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharding(tensor: Any) -> str:
    """How a tensor is sharded, in words; the same for tensors that are sharded alike."""
    return f"sharded as {tensor.placements} over {tensor.device_mesh}" if is_sharded(tensor) else "not sharded"


def fsdp_modules(module: nn.Module) -> list[nn.Module]:
    """The modules inside ``module``, itself included, that ``fully_shard`` was applied to."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a program that shards has imported it
    return [] if fsdp is None else [part for part in module.modules() if isinstance(part, fsdp.FSDPModule)]


def reshard(parts: Iterable[nn.Module]) -> None:
    """Reshards parts that a pass has left gathered.

    Call it between passes: ``FSDPModule.reshard`` does nothing in the middle of a forward pass, while a
    ``state_dict()`` of the part reshards even there.
    """
    for part in parts:
        part.reshard()  # type: ignore[operator]


def on_any_rank(flag: bool, tensors: Iterable[Tensor]) -> bool:
    """Whether ``flag`` is true on any of the ranks that share ``tensors``, which must all call this."""
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if is_sharded(tensor))  # type: ignore[attr-defined]
    for _ in meshes:  # once for each mesh, so that the answer reaches every mesh from every other
        for mesh in meshes:
            agreed = torch.tensor(int(flag), device=mesh.device_type)
            for dimension in range(mesh.ndim):
                dist.all_reduce(agreed, dist.ReduceOp.MAX, group=mesh.get_group(dimension))
            flag = bool(agreed.item())
    return flag


def broadcast_buffers(module: nn.Module, source: int = 0) -> None:
    """Copies the buffers of rank ``source`` to all ranks, which must all call this; sharded buffers stay."""
    if not dist.is_initialized():
        return
    for buffer in module.buffers():
        if not is_sharded(buffer):
            written = buffer.detach()
            for dimension, step in enumerate(buffer.stride()):
                if step == 0 and buffer.shape[dimension] > 1:  # expanded: one part has the memory of all
                    written = written.narrow(dimension, 0, 1)
            sent = written.clone(memory_format=torch.contiguous_format)
            dist.broadcast(sent.reshape(-1).view(torch.uint8), source)  # as bytes, which every backend knows
            written.copy_(sent)


def is_first_rank() -> bool:
    """Whether this process is alone, or the first of its group."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_first_rank(action: Callable[[], _T]) -> _T:
    """Calls ``action`` on the first rank while the others wait; all return its result, or raise what it raised."""
    if not dist.is_initialized():
        return action()
    answer: list[Any] = [None, None]
    if is_first_rank():
        try:
            answer[0] = action()
        except Exception as error:
            answer[1] = _sendable(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    result: _T = answer[0]
    return result


def on_all_ranks(action: Callable[[], _T], group: dist.ProcessGroup | None = None) -> _T:
    """Calls ``action`` on each rank of ``group``; if it raises on some, all raise the error of the first of these."""
    if not dist.is_initialized():
        return action()
    error: Exception | None = None
    try:
        result = action()
    except Exception as raised:
        error = raised
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else _sendable(error), group=group)
    first = next((rank for rank, one in enumerate(errors) if one is not None), None)
    if first is None:
        return result
    if error is not None and first == dist.get_rank():
        raise error
    raise type(errors[first])(f"{errors[first]} (raised on rank {first})") from errors[first]  # type: ignore[misc]


def _sendable(error: Exception) -> Exception:
    """The error, or a RuntimeError that says the same if it cannot be pickled or rebuilt from its message."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (our own)
        type(error)(str(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
