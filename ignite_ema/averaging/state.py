"""The saved form of an average, and what can be loaded into a twin: checked before anything changes."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import check_count, check_saved_mapping
from .kernels import copy
from .memory import has_values
from .pairing import Pairing, Slot, replace
from .sharding import is_sharded, local, sharding

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
_WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod)\.")  # DistributedDataParallel and torch.compile add these
_AS_THEN = "Build the model, and freeze and share its parameters, as they were then. "
_ANOTHER_MODEL = "Start from what fits with load_averaged(state, strict=False)."
_OTHER_NAMES = "No name fits: take off the prefix if the names have one, or pass a state_dict of the model."


def check_average_state(
    state: object, kinds: Mapping[str, type | tuple[type, ...]] = AVERAGE_STATE, what: str = "a ModelAverage"
) -> None:
    """Raises TypeError or ValueError, naming the entry, unless ``state`` has the form that an average saves.

    ``kinds`` has the types of its entries, which may be more than those of an average; ``what`` says whose state it is.
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
            raise ValueError(
                f"'ignite_ema_version' of the state should be {STATE_VERSION}, got {version!r}; load it with the "
                "ignite_ema that wrote it."
            )
    check_saved_mapping(state, kinds, what)
    for key in ("num_updates", "num_skipped"):
        check_count(entries[key], f"{key!r} of the state")
    share = entries["initial_share"]
    if not (0 <= share <= 1 or share != share):  # NaN means unknown
        raise ValueError(
            f"'initial_share' of the state should be in [0, 1], got {share}; load what state_dict() gave, unchanged."
        )


def fitting_tensors(
    pairing: Pairing, source: Mapping[str, Any], *, strict: bool = True, complete: bool = False
) -> tuple[dict[str, Tensor], list[Slot], list[str]]:
    """The tensors for the twin, by first name, from the state of an average or the plain ``state_dict`` of a model.

    If ``strict``, raises ValueError unless all are present and fit; otherwise also returns the slots without a tensor,
    and the names of shared parameters that have other values in the model. Raises ValueError if nothing fits. Unless
    ``complete``, parameters alone will do: the buffers may all be missing.
    """
    slots = {slot.name: slot for slot in pairing.slots}
    shared = {slot.name: slot for slot in pairing.shared}
    found: dict[str, Tensor] = {}
    unequal: list[str] = []
    plain = _plain(source, pairing.first_names)
    for name, value in plain.items():
        fault, first = None, pairing.first_names.get(name)
        if first is None:
            way_out = _OTHER_NAMES if pairing.first_names.keys().isdisjoint(plain) else _ANOTHER_MODEL
            fault = f"The averaged tensors should be those of this model, but it has no '{name}'. {way_out}"
        elif first not in shared:
            fault = _misfit(name, slots[first], value)
            if fault is None and not _are_equal(found.setdefault(first, value), value):
                fault = f"'{name}' is tied to '{first}' in the model and should be equal to it, but is not."
        elif not isinstance(value, Tensor) or not _are_equal(shared[first].online.get(), value):
            fault = (
                f"'{name}' is frozen and shared with the model, and should be equal there to what is loaded, but is "
                "not. Load the weights into the model first."
            )
            unequal.append(name)
        if fault is not None and strict:
            raise ValueError(fault)
    if not found and not unequal and slots and not complete:
        raise ValueError(
            "The loaded weights should have tensors of this model, but none fits by name and shape. Pass a state_dict "
            "of the model."
        )
    has_buffers = complete or any(slots[name].online.is_buffer for name in found)
    missing = [
        slot
        for slot in pairing.slots
        if slot.name not in found
        and (slot.is_saved if complete else slot.online.is_saved)
        and (has_buffers or not slot.online.is_buffer)
    ]
    if strict and missing:
        raise ValueError(
            f"The averaged tensors should be those of this model, but '{missing[0].name}' is missing. "
            f"{_AS_THEN if complete else ''}{_ANOTHER_MODEL}"
        )
    return found, missing, unequal


def fill(pairing: Pairing, values: Mapping[str, Tensor]) -> None:
    """Copies ``values`` into the twin, by first name; a buffer of another shape is replaced."""
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    with torch.inference_mode(False), torch.no_grad():
        for slot in pairing.slots:
            if slot.name in values:
                own, value = slot.averaged.get(), values[slot.name]
                if own.shape == value.shape and own.layout == value.layout:
                    targets.append(local(own))
                    sources.append(_part_for_rank(value, own))
                else:
                    replace(slot.averaged, value)
        copy(targets, sources)


def _plain(source: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The tensors by each of their names, without extra state of modules, and without the prefixes of wrappers."""
    if "averaged_tensors" in source:
        tensors, names = source["averaged_tensors"], source.get("state_dict_names") or {}
        return {**tensors, **{name: tensors[first] for name, first in names.items() if first in tensors}}
    known, plain = set(known), {}
    for name, value in source.items():
        unwrapped = name if name in known else _WRAPPER.sub("", name)
        if name in known or not name.endswith("_extra_state"):
            plain[unwrapped if unwrapped in known else name] = value
    return plain


def _misfit(name: str, slot: Slot, loaded: object) -> str | None:
    """Says why ``loaded`` is not a tensor whose values the twin's tensor can hold without loss; None if it is."""
    own, this = slot.averaged.get(), f"'{name}' of the averaged tensors"
    if not isinstance(loaded, Tensor):
        return f"{this} should be a tensor, got {type(loaded).__name__}."
    if loaded.is_nested or loaded.layout != own.layout or loaded.is_meta or not has_values(local(loaded)):
        got = "a nested tensor" if loaded.is_nested else f"{loaded.layout} on {loaded.device} without values"
        return f"{this} should be {own.layout} and have values, got {got}. Save it as a plain tensor."
    if is_sharded(loaded) and sharding(loaded) != sharding(own):
        return (
            f"{this} should be {sharding(own)}, got a tensor that is {sharding(loaded)}. Load it with "
            "ignite_ema.distributed.load_objects, which reshards it."
        )
    if loaded.shape != own.shape and not slot.may_change_shape:
        return (
            f"{this} should have shape {tuple(own.shape)}, got {tuple(loaded.shape)}: the weights are of another "
            f"model. {_ANOTHER_MODEL}"
        )
    if not _keeps_values(loaded, own):
        is_narrow = loaded.is_floating_point() and own.is_floating_point()
        way_out = f"Make the average with dtype={loaded.dtype}." if is_narrow else "Convert it first."
        return f"{this} should fit into {own.dtype}, got {loaded.dtype}. {way_out}"
    return None


def _are_equal(own: Tensor, loaded: Tensor) -> bool:
    """Whether ``loaded`` has the values of ``own``, compared in the type of ``loaded``."""
    if own is loaded:
        return True
    if own.shape != loaded.shape or not has_values(local(loaded)):
        return False
    own = own.to(loaded)
    return torch.equal(own, loaded) or bool(((own == loaded) | (own.isnan() & loaded.isnan())).all())


def _part_for_rank(loaded: Tensor, own: Tensor) -> Tensor:
    """The part of ``loaded`` that this rank's part of ``own`` needs; shards a full tensor without communication."""
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
    if loaded.element_size() == 1 or own.element_size() == 1:  # torch does not promote 8-bit floats
        return loaded.is_floating_point() and loaded.element_size() < own.element_size()
    return torch.promote_types(loaded.dtype, own.dtype) == own.dtype
