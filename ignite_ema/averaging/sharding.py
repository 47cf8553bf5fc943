"""What is special about the tensors of a model that ``torch.distributed.fsdp.fully_shard`` has sharded."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from .traversal import modules_of

__all__ = ["is_at_rest", "is_sharded", "local", "on_any_rank", "reshard", "sharded_parts", "sharding", "whole"]

_PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``; told by a method, for the class is slow to import."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "to_local")


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


def sharded_parts(module: nn.Module) -> list[nn.Module]:
    """The modules inside ``module``, itself included, that ``fully_shard`` has wrapped."""
    # Asked of the class, which is faster than to ask a module.
    return [part for part in modules_of(module) if hasattr(type(part), "set_requires_gradient_sync")]


def reshard(module: nn.Module) -> None:
    """Brings every part that ``fully_shard`` has wrapped back to its shards, whatever a pass has left behind.

    Gathered weights are freed. A gather under way is awaited and dropped: the next forward pass would take what it
    brings for the weights of then. A part that an exception has left in the middle of a pass starts afresh. Gradients
    stay, which torch's own ``reset_iter_state()`` would drop.

    Raises:
        RuntimeError: inside a backward pass, which still needs the gathered weights.
    """
    parts = [part for part in sharded_parts(module) if not is_at_rest(part)]
    if parts and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "The average of a sharded model should be used between passes, got a call from inside a backward pass; "
            "call it after backward()."
        )
    for part in parts:
        _leave_pass(part)
        part.reshard()  # type: ignore[operator]


def is_at_rest(part: nn.Module) -> bool:
    """Whether a part that ``fully_shard`` has wrapped holds its shards, with no pass and no gather under way."""
    try:
        state, groups = _state_of(part)
        return all(one._training_state.name == "IDLE" for one in (state, *groups)) and all(
            group.is_sharded and group._all_gather_result is None for group in groups
        )
    except AttributeError:  # of a torch that keeps its state elsewhere
        return False


def _state_of(part: Any) -> tuple[Any, list[Any]]:
    """What ``fully_shard`` keeps of a part, and of each group of its parameters: private to torch, 2.6 to 2.15."""
    state = part._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return state, state._fsdp_param_groups
    return state, [state._fsdp_param_group] if state._fsdp_param_group else []


def _leave_pass(part: nn.Module) -> None:
    """Ends what a pass has begun in ``part`` and not ended; does nothing where torch keeps its state elsewhere."""
    with suppress(AttributeError):
        state, groups = _state_of(part)
        for one in (state, *groups):
            one._training_state = type(one._training_state).IDLE
        for group in groups:
            _drop_gather(group)
        state._modules_to_run_forward.clear()
        state._state_ctx.iter_forward_root = None
        state._state_ctx.post_backward_final_callback_queued = False


def _drop_gather(group: Any) -> None:
    gather, group._all_gather_result = group._all_gather_result, None
    if gather is None:
        return
    if gather.all_gather_event is not None:
        group.device_handle.current_stream().wait_event(gather.all_gather_event)
    if isinstance(gather.all_gather_work, torch.distributed.Work):
        gather.all_gather_work.wait()


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
