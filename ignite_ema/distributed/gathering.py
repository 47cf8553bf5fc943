"""Whole tensors on one rank, and equal buffers on all."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..averaging.collectives import first_difference, is_first_rank, on_all_ranks, raise_first_error
from ..averaging.sharding import is_sharded, whole
from ..averaging.storage import overlaps_itself
from ..averaging.traversal import tensors_of
from ..handlers.ema import EMAHandler

__all__ = ["gathered_state_dict", "sync_buffers"]


def gathered_state_dict(handler: EMAHandler) -> dict[str, Tensor]:
    """The plain averaged ``state_dict``, whole, on the CPU of the first rank, and nothing on the others.

    It has the frozen parameters that the average shares with the model, too (``share_frozen``). Gathers one tensor at
    a time. To be called on all ranks; ``checkpoints.save_file`` writes it on the first.

    Raises:
        TypeError: where ``handler`` is none.
        ValueError: on all ranks, where their averages have other tensors.
    """
    if not isinstance(handler, EMAHandler):
        raise TypeError(
            f"handler should be an EMAHandler, got {type(handler).__name__}; pass the one that averages it."
        )
    state = on_all_ranks(handler.state_dict)
    held = {**tensors_of(handler.ema_model), **state["averaged_tensors"]}  # the former have the frozen ones, too
    described = {f"'{path}'": f"{tuple(one.shape)}" for path, one in held.items()}
    if difference := first_difference(described):
        raise ValueError(
            f"The average should have the same tensors on all ranks, got {difference}; make the handler on all ranks, "
            "of the same model."
        )
    tensors: dict[str, Tensor] = {}
    failure: Exception | None = None
    for path, tensor in held.items():
        gathered = whole(tensor)
        try:
            if is_first_rank() and failure is None:
                tensors[path] = gathered.detach().to("cpu", copy=True)
        except RuntimeError as error:  # the memory is full, perhaps; the others go on gathering
            failure = error
    raise_first_error(failure)
    return {name: tensors[path] for name, path in state["state_dict_names"].items() if tensors}


@torch.no_grad()
def sync_buffers(module: nn.Module, source: int = 0) -> None:
    """Gives all ranks the buffers of one, such as batch-norm statistics; to be called on all.

    Args:
        module: the averaged twin, or a model; its parameters, and buffers that are sharded, are left alone.
        source: the rank whose buffers the others get.

    Without a process group there is one rank, and nothing to do.

    Raises:
        ValueError: on all ranks, where ``source`` is no rank, their buffers differ in names, shapes or types, or one
            has elements that share memory in another way than an expanded tensor does; nothing is changed then.

    Examples:
        >>> sync_buffers(nn.BatchNorm1d(2))
    """
    if not dist.is_initialized():
        return
    buffers = {name: one for name, one in module.named_buffers() if not is_sharded(one)}
    described = {f"'{name}'": f"({one.dtype}, {_shape(one)})" for name, one in buffers.items()}
    if difference := first_difference({"source": str(source), **described}):
        raise ValueError(
            f"sync_buffers should be called with the same source and the same buffers on all ranks, got {difference}; "
            "build the module alike on all."
        )
    on_all_ranks(lambda: _check(buffers, source))
    for buffer in buffers.values():
        held = _distinct(buffer)
        sent = held.clone(memory_format=torch.contiguous_format).reshape(-1)
        dist.broadcast(sent.view(torch.uint8), source)  # of any type, which the backend need not know
        held.copy_(sent.view(held.shape))


def _shape(buffer: Tensor) -> str:
    distinct = tuple(_distinct(buffer).shape)
    return f"{distinct} expanded to {tuple(buffer.shape)}" if distinct != buffer.shape else f"{distinct}"


def _distinct(buffer: Tensor) -> Tensor:
    """The part of an expanded tensor that has memory of its own."""
    for dimension, step in enumerate(buffer.stride()):
        if step == 0 and buffer.shape[dimension] > 1:
            buffer = buffer.narrow(dimension, 0, 1)
    return buffer


def _check(buffers: dict[str, Tensor], source: int) -> None:
    if isinstance(source, bool) or not isinstance(source, int) or not 0 <= source < dist.get_world_size():
        raise ValueError(f"source should be a rank from 0 to {dist.get_world_size() - 1}, got {source!r}.")
    for name, buffer in buffers.items():
        if buffer.layout is not torch.strided:
            raise ValueError(f"'{name}' should be strided to be synchronised, got layout {buffer.layout}.")
        if overlaps_itself(_distinct(buffer)):
            raise ValueError(
                f"'{name}' should have an element for each place in memory, got strides {buffer.stride()} for shape "
                f"{tuple(buffer.shape)}; register a clone of it."
            )
