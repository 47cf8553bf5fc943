"""What may be loaded into an averaged twin: checked, and named by path, before anything is changed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import is_sharded, local, sharding
from .storage import holds_values

__all__ = ["check_loadable", "part_for_rank", "tensors_by_path"]


def check_loadable(own: Mapping[str, Tensor], state: Mapping[str, object]) -> None:
    """Raises ValueError unless ``state`` has just the paths of ``own``, and tensors that those can hold."""
    for path in [*own, *state]:
        if path not in state or path not in own:
            what = "misses" if path in own else "should not have"
            raise ValueError(
                f"The averaged tensors should be those of this model, but the state {what} '{path}'; build the model, "
                "and freeze and share its parameters, as they were then."
            )
    for path, held in own.items():
        _check_one(path, held, state[path])


def part_for_rank(loaded: Tensor, held: Tensor) -> Tensor:
    """The part of ``loaded`` for what this rank has of ``held``: of a full tensor its shard, without communication."""
    if is_sharded(held) and not is_sharded(loaded):
        from torch.distributed.tensor import DTensor, Replicate

        spec: Any = held
        mesh = spec.device_mesh
        everywhere = DTensor.from_local(loaded.to(held.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
        loaded = everywhere.redistribute(placements=spec.placements)
    return local(loaded)


def tensors_by_path(
    plain: Mapping[str, Tensor], names: Mapping[str, str], own: Mapping[str, Tensor], shared: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a plain ``state_dict``, of parameters alone or with the buffers, by the paths of an average.

    Args:
        plain: parameters and buffers by name; where ``module.`` is before every name and the twin has no such names,
            it is taken for that of a wrapped model.
        names: the path in ``own`` for each name that a ``state_dict`` of the twin has; of tied tensors several.
        own: the tensors of the average by path. Buffers that ``plain`` has no place for keep their values.
        shared: the frozen parameters by name, which are the model's and not averaged; ``plain`` may have them.

    Raises:
        ValueError: for a name too few or too many, and for different values under names that are tied here.
    """
    found: dict[str, Tensor] = {}
    known = [*names, *shared]
    if all(name.startswith("module.") for name in plain) and not any(name.startswith("module.") for name in known):
        plain = {name.removeprefix("module."): tensor for name, tensor in plain.items()}
    for name, tensor in plain.items():
        if name in shared:
            if not _equal(shared[name], tensor):
                raise ValueError(
                    f"'{name}' is frozen and shared with the model, and should be equal there to what is loaded, but "
                    "is not; load the weights into the model first."
                )
            continue
        if name not in names:
            raise ValueError(
                f"The averaged tensors should be those of this model, but it has no '{name}'; they may be of another "
                "model, for which key= chooses where a file has several, or have a prefix too much."
            )
        path = names[name]
        if path in found and not _equal(found[path], tensor):
            raise ValueError(f"'{name}' is tied to '{path}' in the model and should be equal to it, but is not.")
        found[path] = tensor
    has_buffers = any(not isinstance(own[path], nn.Parameter) for path in found)
    for path in names.values():
        if path not in found and (has_buffers or isinstance(own[path], nn.Parameter)):
            raise ValueError(f"The averaged tensors should be those of this model, but '{path}' is missing.")
    return {**own, **found}


def _equal(held: Tensor, loaded: object) -> bool:
    if not isinstance(loaded, Tensor) or loaded.is_nested or held.shape != loaded.shape:
        return False
    if not holds_values(local(loaded)) or not holds_values(local(held)):
        return False
    held = held.to(loaded)
    return torch.equal(held, loaded) or bool(((held == loaded) | (held.isnan() & loaded.isnan())).all())


def _check_one(path: str, held: Tensor, loaded: object) -> None:
    if not isinstance(loaded, Tensor):
        raise ValueError(f"'{path}' of the averaged tensors should be a tensor, got {type(loaded).__name__}.")
    if loaded.is_nested:
        raise ValueError(
            f"'{path}' of the averaged tensors should have one shape, got a nested tensor; save it the way it is held."
        )
    if is_sharded(loaded) and sharding(loaded) != sharding(held):
        raise ValueError(
            f"'{path}' of the averaged tensors should be sharded as it is held, got one that is {sharding(loaded)}; "
            "load it with torch.distributed.checkpoint, which shards it anew."
        )
    if loaded.shape != held.shape:
        raise ValueError(
            f"'{path}' of the averaged tensors should have shape {tuple(held.shape)}, got {tuple(loaded.shape)}: the "
            "state is of another model."
        )
    if loaded.layout != held.layout or loaded.is_meta:
        raise ValueError(
            f"'{path}' of the averaged tensors should be {held.layout} and have values, got {loaded.layout} on "
            f"{loaded.device}; save it the way it is held."
        )
    if not holds_values(local(loaded)):
        raise ValueError(
            f"'{path}' of the averaged tensors should have values, got one whose memory was freed; load the state anew."
        )
    if not _fits(loaded, held):
        raise ValueError(
            f"'{path}' of the averaged tensors should fit into {held.dtype}, got {loaded.dtype}; hold the average in "
            "that type with dtype=."
        )


def _fits(loaded: Tensor, held: Tensor) -> bool:
    if loaded.dtype == held.dtype:
        return True
    if loaded.is_floating_point() != held.is_floating_point() or loaded.is_complex() != held.is_complex():
        return False
    if loaded.element_size() == 1 or held.element_size() == 1:  # torch promotes no 8-bit floats
        return loaded.is_floating_point() and loaded.element_size() < held.element_size()
    return torch.promote_types(loaded.dtype, held.dtype) == held.dtype
