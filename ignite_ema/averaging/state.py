"""The saved form of an average, and what may be loaded into a twin: checked before anything changes."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import check_count, check_saved_mapping, shown_integer
from .memory import has_values
from .sharding import is_sharded, local, sharding

__all__ = [
    "AVERAGE_STATE",
    "STATE_VERSION",
    "check_average_state",
    "check_fit",
    "check_shared",
    "equal_values",
    "part_for_rank",
    "plain_tensors",
]

STATE_VERSION = 4
AVERAGE_STATE: dict[str, type | tuple[type, ...]] = {
    "ignite_ema_version": int,
    "num_updates": int,
    "num_skipped": int,
    "initial_share": float,
    "momentum_schedule": (str, type(None)),
    "averaged_tensors": Mapping,
    "state_dict_names": Mapping,
}
_ANOTHER_MODEL = "Start from what fits with load_averaged(state, strict=False)."


def check_average_state(
    state: object, kinds: Mapping[str, type | tuple[type, ...]] = AVERAGE_STATE, what: str = "a ModelAverage"
) -> None:
    """Raises TypeError or ValueError, naming the entry, unless ``state`` is of the form that an average saves.

    Args:
        state: what was saved.
        kinds: the entries and their types, more than those of an average if ``what`` saves more.
        what: whose state it is.
    """
    entries = state if isinstance(state, Mapping) else {}
    for key, value in entries.items():
        if isinstance(value, Mapping) and "ignite_ema_version" in value:
            raise ValueError(
                f"The state of {what} should be what its state_dict() gave, got a mapping that has one under {key!r}; "
                "load that entry."
            )
    if entries and "ignite_ema_version" not in entries:
        raise ValueError(
            f"The state of {what} should be what its state_dict() gave, but it misses 'ignite_ema_version'. To start "
            "from the state_dict of a model, call load_averaged() with it."
        )
    if entries:
        version = entries["ignite_ema_version"]
        if type(version) is not int or version != STATE_VERSION:
            got = shown_integer(version) if isinstance(version, int) else f"one of type {type(version).__name__}"
            raise ValueError(
                f"'ignite_ema_version' of the state should be {STATE_VERSION}, got {got}; load it with the ignite_ema "
                "that wrote it."
            )
    check_saved_mapping(state, kinds, what)
    for key in ("num_updates", "num_skipped"):
        check_count(entries[key], f"{key!r} of the state")
    share = entries["initial_share"]
    if not (0 <= share <= 1 or share != share):  # NaN means unknown
        raise ValueError(
            f"'initial_share' of the state should be in [0, 1], got {share}; load what state_dict() gave, unchanged."
        )


def plain_tensors(source: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The tensors of a state of an average, or of the plain ``state_dict`` of a model, by every name.

    Extra state of modules is left out. If ``module.`` is before every name, and not in ``known``, it is taken off.
    """
    if "averaged_tensors" in source:
        tensors, names = source["averaged_tensors"], source.get("state_dict_names", {})
        return {**tensors, **{name: tensors[first] for name, first in names.items() if first in tensors}}
    known = set(known)
    plain = {name: value for name, value in source.items() if name in known or not name.endswith("_extra_state")}
    if plain and all(name.startswith("module.") for name in plain) and not any(n.startswith("module.") for n in known):
        plain = {name.removeprefix("module."): value for name, value in plain.items()}
    return plain


def check_fit(name: str, own: Tensor, loaded: object, shape_may_differ: bool = False) -> None:
    """Raises ValueError unless ``loaded`` is a tensor whose values ``own`` can hold without loss."""
    if not isinstance(loaded, Tensor):
        raise ValueError(f"'{name}' of the averaged tensors should be a tensor, got {type(loaded).__name__}.")
    if loaded.is_nested or loaded.layout != own.layout or loaded.is_meta or not has_values(local(loaded)):
        got = "a nested tensor" if loaded.is_nested else f"{loaded.layout} on {loaded.device} without values"
        raise ValueError(
            f"'{name}' of the averaged tensors should be {own.layout} and have values, got {got}. Save it as a plain "
            "tensor."
        )
    if is_sharded(loaded) and sharding(loaded) != sharding(own):
        raise ValueError(
            f"'{name}' of the averaged tensors should be {sharding(own)}, got a tensor that is {sharding(loaded)}. "
            "Load it with ignite_ema.distributed.load_objects, which shards it anew."
        )
    if loaded.shape != own.shape and not shape_may_differ:
        raise ValueError(
            f"'{name}' of the averaged tensors should have shape {tuple(own.shape)}, got {tuple(loaded.shape)}: the "
            f"weights are of another model. {_ANOTHER_MODEL}"
        )
    if not _keeps_values(loaded, own):
        raise ValueError(
            f"'{name}' of the averaged tensors should fit into {own.dtype}, got {loaded.dtype}. "
            + (f"Make the average with dtype={loaded.dtype}." if loaded.is_floating_point() else "Convert it first.")
        )


def check_shared(name: str, own: Tensor, loaded: object) -> None:
    """Raises ValueError unless ``loaded`` equals ``own``, a frozen parameter that the model and the twin share."""
    if not equal_values(own, loaded):
        raise ValueError(
            f"'{name}' is frozen and shared with the model, and should be equal there to what is loaded, but is not. "
            "Load the weights into the model first."
        )


def equal_values(own: Tensor, loaded: object) -> bool:
    """Whether a tensor has the values of ``own``, in its own type."""
    if not isinstance(loaded, Tensor) or loaded.is_nested or own.shape != loaded.shape:
        return False
    if not has_values(local(loaded)) or not has_values(local(own)):
        return False
    own = own.to(loaded)
    return torch.equal(own, loaded) or bool(((own == loaded) | (own.isnan() & loaded.isnan())).all())


def part_for_rank(loaded: Tensor, own: Tensor) -> Tensor:
    """The part of ``loaded`` for this rank's part of ``own``: of a full tensor its shard, without communication."""
    if is_sharded(own) and not is_sharded(loaded):
        from torch.distributed.tensor import DTensor, Replicate

        target: Any = own
        mesh = target.device_mesh
        everywhere = DTensor.from_local(loaded.to(own.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
        loaded = everywhere.redistribute(placements=target.placements)
    return local(loaded)


def _keeps_values(loaded: Tensor, own: Tensor) -> bool:
    if loaded.dtype == own.dtype:
        return True
    if loaded.is_floating_point() != own.is_floating_point() or loaded.is_complex() != own.is_complex():
        return False
    if loaded.element_size() == 1 or own.element_size() == 1:  # torch promotes no 8-bit floats
        return loaded.is_floating_point() and loaded.element_size() < own.element_size()
    return torch.promote_types(loaded.dtype, own.dtype) == own.dtype
