"""Whole tensors on one rank, and equal buffers on all."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..averaging.collectives import is_first_rank
from ..averaging.sharding import is_sharded, whole
from ..handlers.ema import EMAHandler

__all__ = ["gathered_state_dict", "sync_buffers"]


def gathered_state_dict(handler: EMAHandler) -> dict[str, Tensor]:
    """The plain averaged ``state_dict``, whole, on the CPU of the first rank, and nothing on the others.

    Gathers one tensor at a time. To be called on all ranks; ``checkpoints.save_file`` writes it on the first.
    """
    if not isinstance(handler, EMAHandler):
        raise TypeError(
            f"handler should be an EMAHandler, got {type(handler).__name__}; pass the one that averages it."
        )
    state = handler.state_dict()
    tensors: dict[str, Tensor] = {}
    for path, tensor in state["averaged_tensors"].items():
        gathered = whole(tensor)
        if is_first_rank():
            tensors[path] = gathered.detach().to("cpu", copy=True)
    return {name: tensors[path] for name, path in state["state_dict_names"].items() if path in tensors}


@torch.no_grad()
def sync_buffers(module: nn.Module, source: int = 0) -> None:
    """Gives all ranks the buffers of one, such as batch-norm statistics; to be called on all.

    Args:
        module: the averaged twin, or a model; its parameters, and buffers that are sharded, are left alone.
        source: the rank whose buffers the others get.

    Without a process group there is one rank, and nothing to do.

    Examples:
        >>> sync_buffers(nn.BatchNorm1d(2))
    """
    for buffer in module.buffers() if dist.is_initialized() else ():
        if not is_sharded(buffer):
            sent = buffer.contiguous()
            dist.broadcast(sent.reshape(-1).view(torch.uint8), source)  # of any type, which the backend need not know
            if sent is not buffer:
                buffer.copy_(sent)
