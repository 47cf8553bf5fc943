"""Averaged weights out of the files of other systems, as a plain ``state_dict`` under the model's own names."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .detection import LARGE, find, raw_beside, same
from .formats import LAYOUTS, Found, State, Tensors, covers, listed, plain_name
from .memory import copied, has_memory, is_dense
from .safe_load import open_file
from .unpickling import ForeignObject, kind_of

__all__ = ["Averaged", "SeveralAverages", "averaged_state_dict", "read", "read_average", "read_mapped"]

_Names = nn.Module | Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Averaged:
    """Averaged weights, and what else a file says about them.

    Attributes:
        system: whose layout it is: "ignite_ema", "Ignite", "torch AveragedModel", "timm", "Lightning", "mmengine",
            "mmcv" (and mmdetection 2), "mmagic" (and mmgen), "diffusers", "ema-pytorch", "torch_ema", or "plain" for
            a state dict without any average.
        tensors: the averaged weights under the model's own names: of a file in memory of their own, of a mapping not
            copied.
        online: the raw weights of the same names, where the file has them.
        num_updates: how many updates the average has behind it, where the file states just that. The counts of
            mmengine (``steps``) and ema-pytorch (``step``) are of calls, only some of which update: None.
    """

    system: str
    tensors: dict[str, Tensor]
    online: dict[str, Tensor] | None = None
    num_updates: int | None = None


def read(
    source: str | os.PathLike[str] | State,
    *,
    key: str | None = None,
    names: _Names = None,
) -> Averaged:
    """The averaged weights in a checkpoint of this or another system.

    ``_orig_mod.`` (of ``torch.compile``) is taken out of all names; ``module.`` only where the layout itself puts it
    there, so that the names of a bare timm ``ModelEmaV3``, which look like those of a wrapped model, stay as they are.
    Extra state (``_extra_state``) that is not a tensor is left out. diffusers and torch_ema keep parameters only, no
    buffers.

    mmcv and mmdetection 2 swap at the end of an epoch: the model's own names then hold the average. In a file that was
    saved within an epoch, or by an ``IterBasedRunner``, it is the other way round: ``key="ema_"`` takes the average
    from the ``ema_`` buffers, ``key="model"`` from the model's names. Where the counts and the config in the file do
    not show that it was saved at the end of an epoch, the choice has to be made.

    So it has to be where two entries have the same names and shapes but other values, and neither is called an average.

    Args:
        source: a path, or what was loaded from one.
        key: chooses where there are several averages: the last part of an entry's path, such as "generator_ema", the
            whole path, joined by dots, or the name of a system.
        names: for lists without names (diffusers, torch_ema), the model, or a mapping from its names to its
            parameters, in their order; the number and each shape have to agree. Unused for all other layouts.

    Raises:
        TypeError, ValueError, FileNotFoundError: where nothing is recognised, or several averages are, or a list has
            no names, or the average has no tensors, or tensors without values; says what was found and the way out.

    Examples:
        >>> import torch
        >>> model = nn.Linear(1, 1)
        >>> average = torch.optim.swa_utils.AveragedModel(model)
        >>> average.update_parameters(model)
        >>> found = read({"model": model.state_dict(), "average": average.state_dict()})
        >>> found.system, found.num_updates, sorted(found.tensors)
        ('torch AveragedModel', 1, ['bias', 'weight'])
    """
    found = read_mapped(source, key, names)
    if not isinstance(source, (str, os.PathLike)):
        return found
    online = None if found.online is None else copied(found.online)
    return replace(found, tensors=copied(found.tensors), online=online)


def averaged_state_dict(
    source: str | os.PathLike[str] | State,
    *,
    key: str | None = None,
    names: _Names = None,
) -> dict[str, Tensor]:
    """The averaged weights alone, ready for ``model.load_state_dict``; see :func:`read`.

    Raises:
        TypeError, ValueError, FileNotFoundError: as :func:`read`, and where there are plain weights alone.
    """
    tensors = read_average(source, key, names).tensors
    return copied(tensors) if isinstance(source, (str, os.PathLike)) else tensors


def read_average(source: str | os.PathLike[str] | State, key: str | None, names: _Names) -> Averaged:
    """What `read_mapped` gives, where it is an average."""
    found = read_mapped(source, key, names)
    if found.system == "plain":
        raise ValueError(
            f"{_named_source(source)} should hold an average, but it has plain weights alone; use them as they are, or "
            "take another checkpoint."
        )
    return found


def read_mapped(source: str | os.PathLike[str] | State, key: str | None, names: _Names) -> Averaged:
    """What `read` gives, with tensors that are still mapped to the file."""
    where = _named_source(source)
    opened = open_file(source) if isinstance(source, (str, os.PathLike)) else None
    content = source if opened is None else opened.content
    if not isinstance(content, Mapping) or (isinstance(content, ForeignObject) and not content):
        raise TypeError(
            f"{where} should be, or hold, a mapping such as a state dict, got {kind_of(content)}; pass the "
            "state_dict() of a module or an average."
        )
    if "ignite_ema_snapshot" in content:
        raise ValueError(
            f"{where} should hold an average by itself, but it is a snapshot of a PostHocEMA; rebuild an average "
            "from its directory with posthoc.reconstruct (ignite-ema reconstruct DIR)."
        )
    found = find(content)
    if not found:
        raise ValueError(
            f"{where} should hold averaged weights or a state dict, but has the keys {listed(content)}, none of "
            f"which is known; known are the files of {', '.join(LAYOUTS)} and Ignite. Load it and pass the part that "
            "is a state dict."
        )
    averaged = _averaged(_chosen(found, key, where), names, where)
    if opened is not None:
        opened.verify(averaged.tensors.items())
        opened.verify((averaged.online or {}).items())
    return averaged


def _named_source(source: str | os.PathLike[str] | State) -> str:
    return f"'{os.fspath(source)}'" if isinstance(source, (str, os.PathLike)) else "source"


# --- choosing ---


class SeveralAverages(ValueError):
    """A file holds several averages, and nothing says which is meant."""

    def __init__(self, where: str, choices: list[Found]) -> None:
        self.choices = choices
        super().__init__(
            f"{where} should hold one average, got several; choose one by its key (--key): {_listed_choices(choices)}."
        )


def _chosen(found: list[Found], key: str | None, where: str) -> Found:
    """The one average that is meant: by key, by rank, or as the only one."""
    chosen = found if key is None else [one for one in found if one.answers_to(key)]
    if not chosen:
        raise ValueError(f"key should be one of {_listed_choices(found)} in {where}, got '{key}'.")
    first = min(one.rank for one in chosen)
    chosen = [one for one in chosen if one.rank == first]
    if all(same(one.tensors, chosen[0].tensors) for one in chosen[1:]):
        return chosen[0]
    raise SeveralAverages(where, chosen)


def _listed_choices(found: list[Found]) -> str:
    return ", ".join(f"'{one.label}' ({one.system}{f'; {one.note}' if one.note else ''})" for one in found)


# --- checking ---


def _averaged(found: Found, names: _Names, where: str) -> Averaged:
    tensors = _cleaned(_named(found, found.tensors, names, where), where)
    _check_memory(tensors, where)
    if found.online is None:
        online = raw_beside(tensors, found.entry, found.beside)
    else:
        online = _named(found, found.online, names, where)
    raw = {plain_name(name): value for name, value in online.items()} if online else {}
    if not covers(raw, tensors) or any(raw[name].is_meta for name in tensors):
        return Averaged(found.system, tensors, None, found.num_updates)
    return Averaged(found.system, tensors, {name: raw[name].detach() for name in tensors}, found.num_updates)


def _named(found: Found, tensors: Tensors, names: _Names, where: str) -> State:
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
            f"names should be a model, or a mapping from names to its parameters, got {type(names).__name__}; pass "
            "dict(model.named_parameters())."
        )
    known = dict(names.named_parameters() if isinstance(names, nn.Module) else names)
    if len(known) != len(tensors):
        raise ValueError(
            f"names should be of {len(tensors)} tensors, as many as {found.system} has in {where}, got {len(known)}; "
            "pass dict(model.named_parameters()) of the model that was averaged, without buffers."
        )
    for (name, value), tensor in zip(known.items(), tensors, strict=True):
        if not covers({name: value}, {name: tensor}):
            raise ValueError(
                f"'{name}' of names should have the shape of its tensor in {where}, {_shape(tensor)}, got "
                f"{_shape(value)}; pass the parameters in the order of model.parameters()."
            )
    return dict(zip(known, tensors, strict=True))


def _cleaned(state: State, where: str) -> dict[str, Tensor]:
    """A plain state dict: tensors with values alone, without gradients, under names without ``_orig_mod.``."""
    cleaned: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            if str(name).endswith("_extra_state"):
                continue
            raise ValueError(
                f"'{name}' of the averaged weights in {where} should be a tensor, got {type(value).__name__}; load the "
                "file, take it out, and pass the mapping."
            )
        if value.is_meta:
            raise ValueError(
                f"'{name}' of the averaged weights in {where} should have values, got a tensor on the meta "
                "device, a shape alone; take another checkpoint."
            )
        plain = plain_name(name)
        if plain in cleaned:
            raise ValueError(
                f"'{plain}' should be in {where} once, but it is there with and without '_orig_mod.'; load the file, "
                "take one out, and pass the mapping."
            )
        cleaned[plain] = value.detach()
    if not cleaned:
        raise ValueError(f"The average in {where} should have tensors, but it is empty; take another checkpoint.")
    return cleaned


def _check_memory(tensors: dict[str, Tensor], where: str) -> None:
    """Refuses what a small file can pretend to be: one number, expanded to any size."""
    dense = {name: tensor for name, tensor in tensors.items() if is_dense(tensor)}
    repeated = {name: one.nbytes for name, one in dense.items() if not has_memory(one)}
    if sum(repeated.values()) > LARGE:
        largest = max(repeated, key=repeated.__getitem__)
        raise ValueError(
            f"'{largest}' of the averaged weights in {where} should have memory for its shape, "
            f"{_shape(dense[largest])}, got {dense[largest].untyped_storage().nbytes()} bytes that are repeated; take "
            "another checkpoint."
        )


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
