"""Reads averaged weights from files of other systems, as a plain ``state_dict`` under the model's own names."""

import os
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..averaging.checks import listed
from .detection import find, raw_beside
from .files import ForeignObject, compact, kind_of, load_file, quoted, size_of
from .formats import Found, Names, State, Tensors, covers, plain_name, within

Source: TypeAlias = str | os.PathLike[str] | State
Base: TypeAlias = nn.Module | Source | None


@dataclass(frozen=True)
class Averaged:
    """Averaged weights, and what else a file says about them.

    Attributes:
        system: the system whose format it is: "ignite_ema", "Ignite", "torch AveragedModel", "timm", "Lightning",
            "mmengine", "mmcv" (and mmdetection 2), "mmagic" (and mmgen), "diffusers", "ema-pytorch", "torch_ema", or
            "plain" for a state dict without an average.
        tensors: the averaged weights under the model's own names; copies if the source is a file.
        online: the raw weights under the same names, if the file has them.
        num_updates: the number of updates of the average; None if the file does not say. mmengine (``steps``) and
            ema-pytorch (``step``) count calls, only some of which update.
        entry: the keys that lead to the weights, joined by dots; empty if the source holds nothing else.
    """

    system: str
    tensors: dict[str, Tensor]
    online: dict[str, Tensor] | None = None
    num_updates: int | None = None
    entry: str = ""

    def __repr__(self) -> str:
        raw = "no raw weights" if self.online is None else "raw weights"
        count = "unknown" if self.num_updates is None else self.num_updates
        size = f"{len(self.tensors)} tensors, {size_of(self.tensors) / 2**20:.3f} MiB"
        return f"Averaged({self.system}, {size}, {raw}, num_updates={count})"


class SeveralAverages(ValueError):
    """A source holds several averages, ``choices``, and nothing says which to take."""

    def __init__(self, where: str, choices: list[Found]) -> None:
        super().__init__(
            f"{where} should hold one average, got several; choose one by its key (--key): {_enumerated(choices)}."
        )
        self.choices = choices


def read(
    source: Source, *, key: str | None = None, names: Names = None, base: Base = None, strip_prefix: str | None = None
) -> Averaged:
    """The averaged weights in a checkpoint of this or another system.

    The formats of the systems come first, then entries with "ema" or the like in their names, then plain weights. If
    there are several averages, or several entries that fit one model, choose one with ``key``; the message lists them.

    ``_orig_mod.`` (of ``torch.compile``) is removed from all names; ``module.`` only if the format itself puts it
    there, or with ``strip_prefix``: the names of a bare timm ``ModelEmaV3`` look like those of a wrapped model. Extra
    state (``_extra_state``) that is not a tensor is left out. diffusers and torch_ema keep only parameters, no buffers.

    mmcv and mmdetection 2 swap at the end of an epoch: ``key="model"`` is the average then. In a file that was saved
    within an epoch, or by an ``IterBasedRunner``, it is the other way around: ``key="ema_"`` takes the average from the
    ``ema_`` buffers. The file does not say which applies, so you have to choose.

    An average made with ``share_frozen=True`` lacks the frozen tensors. They are taken from the raw weights in the same
    file, or from ``base``.

    Nothing in a file runs. A file of ``torch.save`` is verified by the checksums in it; safetensors has none.

    Args:
        source: a path, or what was loaded from it. It may be a directory: of ``save_pretrained``, with one or several
            ``.safetensors`` or ``.bin`` files, or of ``ShardedSaver`` or torch.distributed.checkpoint, which is loaded
            whole, in one process.
        key: which of several averages: the last part of an entry's path, such as "generator_ema", the whole path,
            joined by dots, or the name of a system.
        names: for lists without names (diffusers, torch_ema), the model, or a mapping from its names to its
            parameters, in their order; the number and each shape have to agree. Other formats do not use it.
        base: a model, a state dict, or a file of one, with the tensors that the average lacks, such as frozen ones and
            buffers.
        strip_prefix: a prefix of all names of the average, to be removed from them, such as "module.".

    Raises:
        TypeError, ValueError, FileNotFoundError: if no average is recognized, or several are, or a list has no names,
            or the average has no tensors, or tensors without values.

    Examples:
        >>> import torch
        >>> model = nn.Linear(1, 1)
        >>> average = torch.optim.swa_utils.AveragedModel(model)
        >>> average.update_parameters(model)
        >>> found = read({"model": model.state_dict(), "average": average.state_dict()})
        >>> found.system, found.num_updates, sorted(found.tensors)
        ('torch AveragedModel', 1, ['bias', 'weight'])
    """
    found, lacks = read_part(source, key, names, base, strip_prefix)
    if lacks:
        raise ValueError(
            f"The average in {_called(source)} should have all tensors of its model, but it shared {len(lacks)} "
            f"frozen ones with it, {listed(lacks)}; pass the model, or its file, as base (--base FILE)."
        )
    if isinstance(source, Mapping):
        return found
    online = None if found.online is None else deepcopy(compact(found.online))
    return replace(found, tensors=deepcopy(compact(found.tensors)), online=online)


def averaged_state_dict(
    source: Source, *, key: str | None = None, names: Names = None, base: Base = None, strip_prefix: str | None = None
) -> dict[str, Tensor]:
    """Only the averaged weights, ready for ``model.load_state_dict``; the arguments are those of :func:`read`.

    Raises:
        TypeError, ValueError, FileNotFoundError: as :func:`read`, and if there are only plain weights and ``key`` does
            not choose them.
    """
    found = read(source, key=key, names=names, base=base, strip_prefix=strip_prefix)
    if found.system == "plain" and key is None:
        raise ValueError(
            f"{_called(source)} should hold an average, but it has only plain weights; use them as they are, or take "
            "another checkpoint."
        )
    return found.tensors


def read_part(
    source: Source, key: str | None, names: Names, base: Base = None, strip_prefix: str | None = None, where: str = ""
) -> tuple[Averaged, list[str]]:
    """What `read` returns, still mapped to the file, and the frozen tensors that neither source nor base has.

    Messages call the source ``where``.
    """
    where = where or _called(source)
    content = _content(source, where)
    found = _chosen(content, key, where)
    tensors = _cleaned(_with_names(found, found.tensors, names, where), where)
    beside = raw_beside(tensors, found.path, content) if found.online is None else found.online
    raw = {plain_name(name): value for name, value in _with_names(found, beside or {}, names, where).items()}
    if frozen := {name: raw[name] for name in found.frozen if name in raw}:
        tensors |= _cleaned(frozen, where)
    is_whole = covers(raw, tensors) and not any(raw[name].is_meta for name in tensors)
    online = {name: raw[name].detach() for name in tensors} if is_whole else None
    lacks = [name for name in found.frozen if name not in tensors]
    if strip_prefix is not None:
        if not strip_prefix.endswith(".") or not all(name.startswith(strip_prefix) for name in [*tensors, *lacks]):
            raise ValueError(
                f"strip_prefix should begin all names of the average in {where}, with its dot, such as 'module.', got "
                f"{quoted(strip_prefix)}; the first name is {quoted(next(iter(tensors)))} (--strip-prefix)."
            )
        tensors, lacks = within(tensors, strip_prefix), [name.removeprefix(strip_prefix) for name in lacks]
        online = online and within(online, strip_prefix)
    if base is not None:
        other, _ = read_part(base.state_dict() if isinstance(base, nn.Module) else base, None, None, where="base")
        own = other.online or other.tensors
        if lacking := [name for name in lacks if name not in own]:
            raise ValueError(
                f"base should have what the average in {where} lacks, but has no {listed(lacking)}; pass a state dict "
                "of the same model (--base)."
            )
        tensors |= {name: own[name] for name in (lacks or own) if name not in tensors}
        online, lacks = None, []
    entry = ".".join(found.path) if len(content) > 1 else ""
    return Averaged(found.system, tensors, online, found.num_updates, entry), lacks


def _called(source: Source) -> str:
    return quoted(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else "source"


def _content(source: Source, where: str) -> State:
    """The mapping that the source is or holds."""
    content: Any = source
    if isinstance(source, (str, os.PathLike)):
        if Path(source).is_dir():
            from .directories import read_directory  # torch.distributed takes a while to import

            content = read_directory(Path(source))
        else:
            content = load_file(source)
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
    return content


def _chosen(content: State, key: str | None, where: str) -> Found:
    """The average of the lowest rank among those that match the key."""
    found = find(content)
    if not found:
        kinds = _enumerated(f"{quoted(name)} ({kind_of(value)})" for name, value in content.items())
        raise ValueError(
            f"{where} should hold averaged weights or a state dict, but has {kinds or 'nothing'}. Load it and pass the "
            "part that is a state dict, tensors by their names."
        )
    chosen = [average for average in found if key is None or average.answers_to(key)]
    if not chosen:
        raise ValueError(f"key should be one of {_enumerated(found)} in {where}, got {quoted(key)}.")
    first = min(average.rank for average in chosen)
    chosen = [average for average in chosen if average.rank == first]
    if len(chosen) > 1:
        raise SeveralAverages(where, chosen)
    return chosen[0]


def _enumerated(parts: Iterable[object], most: int = 8) -> str:
    shown = list(map(str, parts))
    return ", ".join(shown[:most] + [f"… ({len(shown)} in all)"] * (len(shown) > most))


def _with_names(found: Found, tensors: Tensors, names: Names, where: str) -> State:
    """The tensors by name; for a list, the names have to come from outside."""
    if isinstance(tensors, Mapping):
        return tensors
    known: Any = dict(names.named_parameters()) if isinstance(names, nn.Module) else names
    if isinstance(known, Mapping) and len(known) == len(tensors):
        named = dict(zip(known, tensors, strict=True))
        if not named or covers(known, named):
            return named
    got = f"{len(known)}, or other shapes" if isinstance(known, Mapping) else kind_of(names)
    raise ValueError(
        f"{where} holds a list of {len(tensors)} tensors without names, as {found.system} saves them; names should be "
        "the model that was averaged, or its dict(model.named_parameters()), with as many tensors of these shapes, got "
        f"{got} (on the command line: --names FILE, a file of that mapping)."
    )


def _cleaned(state: State, where: str) -> dict[str, Tensor]:
    """A plain state dict: only tensors with values, detached, under names without ``_orig_mod.``."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) and str(name).endswith("_extra_state"):
            continue
        if not isinstance(value, Tensor) or value.is_meta:
            got = "one on the meta device" if isinstance(value, Tensor) else kind_of(value)
            raise ValueError(
                f"{quoted(name)} of the weights in {where} should be a tensor with values, got {got}; load the file, "
                "take it out, and pass the mapping."
            )
        tensors[plain_name(name)] = value.detach()
    if not tensors:
        raise ValueError(f"The average in {where} should have tensors, but it is empty; take another checkpoint.")
    return tensors
