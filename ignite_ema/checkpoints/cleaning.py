"""Makes a plain state dict of what a file has: under the right names, tensors with values alone, none missing."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .comparison import plain_name
from .formats import Found, Names, State, Tensors
from .memory import REPEATED, has_memory, is_dense
from .naming import listed, quoted
from .unpickling import kind_of

__all__ = ["cleaned", "completed", "named"]


def named(found: Found, tensors: Tensors, names: Names, where: str) -> State:
    """The tensors under their names, which for a list have to come from outside."""
    if isinstance(tensors, Mapping):
        return tensors
    if names is None:
        raise ValueError(
            f"{where} holds a list of {len(tensors)} tensors without names, as {found.system} saves them; pass the "
            "model, or its dict(model.named_parameters()), as names (on the command line: --names FILE, a file of "
            "that mapping)."
        )
    if not isinstance(names, (nn.Module, Mapping)):
        raise TypeError(
            f"names should be a model, or a mapping from names to its parameters, got {kind_of(names)}; pass "
            "dict(model.named_parameters())."
        )
    known = dict(names.named_parameters() if isinstance(names, nn.Module) else names)
    if len(known) != len(tensors):
        raise ValueError(
            f"names should be of {len(tensors)} tensors, as many as {found.system} has in {where}, got {len(known)}; "
            "pass dict(model.named_parameters()) of the model that was averaged, without buffers."
        )
    for (name, value), tensor in zip(known.items(), tensors, strict=True):
        if not isinstance(value, Tensor) or not isinstance(tensor, Tensor) or _shape(value) != _shape(tensor):
            raise ValueError(
                f"{quoted(name)} of names should have the shape of its tensor in {where}, {_shape(tensor)}, got "
                f"{_shape(value)}; pass the parameters in the order of model.parameters()."
            )
    return dict(zip(known, tensors, strict=True))


def cleaned(state: State, where: str) -> dict[str, Tensor]:
    """A plain state dict: tensors with values alone, without gradients, under names without ``_orig_mod.``."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) and str(name).endswith("_extra_state"):
            continue
        plain = plain_name(name)
        if fault := _fault(value):
            raise ValueError(f"{quoted(name)} of the weights in {where} should {fault}.")
        if plain in tensors:
            raise ValueError(
                f"{quoted(plain)} should be in {where} once, but it is there with and without '_orig_mod.'; load the "
                "file, take one out, and pass the mapping."
            )
        tensors[plain] = value.detach()
    if not tensors:
        raise ValueError(f"The average in {where} should have tensors, but it is empty; take another checkpoint.")
    _check_memory(tensors, where)
    return tensors


def _fault(value: Any) -> str | None:
    """What is wrong with a value of a state dict, if anything is."""
    if not isinstance(value, Tensor):
        return f"be a tensor, got {kind_of(value)}; load the file, take it out, and pass the mapping"
    if value.is_nested:
        return "be a plain tensor, got a nested one; load the file, convert it, and pass the mapping"
    if value.is_meta:
        return "have values, got a tensor on the meta device, a shape alone; take another checkpoint"
    return None


def _check_memory(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuses what a small file can pretend to be: one number, expanded to any size."""
    dense = {name: tensor for name, tensor in tensors.items() if is_dense(tensor)}
    repeated = {name: one.nbytes for name, one in dense.items() if not has_memory(one)}
    if sum(repeated.values()) > REPEATED:
        largest = max(repeated, key=repeated.__getitem__)
        raise ValueError(
            f"{quoted(largest)} of the weights in {where} should have memory for its shape, {_shape(dense[largest])}, "
            f"got {dense[largest].untyped_storage().nbytes()} bytes that are repeated; take another checkpoint."
        )


def completed(tensors: dict[str, Tensor], base: State, missing: Sequence[str], where: str) -> dict[str, Tensor]:
    """The tensors of an average, and what a base has beside them.

    Args:
        tensors: of the average.
        base: a state dict of the same model.
        missing: the names that have to come from the base, and no others; where it is empty, all that it has.
        where: what holds the average, for messages.
    """
    held = cleaned(base, "base")
    for name in tensors.keys() & held.keys():
        if tensors[name].shape != held[name].shape:
            raise ValueError(
                f"{quoted(name)} of base should have the shape that it has in {where}, {_shape(tensors[name])}, got "
                f"{_shape(held[name])}; pass a state dict of the same model (--base)."
            )
    if lacking := [name for name in missing if name not in held]:
        raise ValueError(
            f"base should have what the average in {where} lacks, but has no {listed(lacking)}; pass a state dict of "
            "the same model (--base)."
        )
    added = {name: held[name] for name in (missing or held) if name not in tensors}
    if not added:
        raise ValueError(f"base should add to the average in {where}, but that has all of its tensors; leave it out.")
    return tensors | added


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {kind_of(value)}"
