"""Averaged weights out of the files of other systems, as a plain ``state_dict`` under the model's own names."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from .cleaning import cleaned, completed, named
from .comparison import plain_name
from .detection import Detection
from .formats import FORMATS, Found, Names, State, within
from .memory import copied, mebibytes
from .naming import listed, quoted
from .safe_load import OpenFile, open_file
from .unpickling import ForeignObject, kind_of

__all__ = [
    "Averaged",
    "SeveralAverages",
    "averaged_state_dict",
    "choices",
    "read",
    "read_held",
    "read_mapped",
    "read_part",
]

Source: TypeAlias = str | os.PathLike[str] | State
Base: TypeAlias = nn.Module | Source | None
_MOST_SHOWN = 8


@dataclass(frozen=True)
class Averaged:
    """Averaged weights, and what else a file says about them.

    Attributes:
        system: whose format it is: "ignite_ema", "Ignite", "torch AveragedModel", "timm", "Lightning", "mmengine",
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

    def __repr__(self) -> str:
        raw = "no raw weights" if self.online is None else "raw weights"
        count = "unknown" if self.num_updates is None else self.num_updates
        return (
            f"Averaged({self.system}, {len(self.tensors)} tensors, {mebibytes(self.tensors)} MiB, {raw}, "
            f"num_updates={count})"
        )


def read(
    source: Source,
    *,
    key: str | None = None,
    names: Names = None,
    base: Base = None,
    strip_prefix: str | None = None,
) -> Averaged:
    """The averaged weights in a checkpoint of this or another system.

    ``_orig_mod.`` (of ``torch.compile``) is taken out of all names; ``module.`` only where the format itself puts it
    there, or with ``strip_prefix``: the names of a bare timm ``ModelEmaV3`` look like those of a wrapped model. Extra
    state (``_extra_state``) that is not a tensor is left out. diffusers and torch_ema keep parameters only, no buffers.

    Where a file holds several averages, ``key`` has to choose, and the message lists them. Averages that are bit for
    bit the same are one. A file without a known average gives its plain weights; where several entries have the same
    names and shapes but other values, the choice has to be made, too.

    mmcv and mmdetection 2 swap at the end of an epoch: ``key="model"`` is the average then. In a file that was saved
    within an epoch, or by an ``IterBasedRunner``, it is the other way round: ``key="ema_"`` takes the average from the
    ``ema_`` buffers. The file does not say which, so that the choice has to be made.

    An average of ``share_frozen=True`` lacks the frozen tensors. They are taken from the raw weights in the same file,
    or from ``base``.

    Of a file of ``torch.save`` all that is returned is verified by the checksums in it. safetensors has none.

    Args:
        source: a path, or what was loaded from one.
        key: chooses where there are several averages: the last part of an entry's path, such as "generator_ema", the
            whole path, joined by dots, or the name of a system.
        names: for lists without names (diffusers, torch_ema), the model, or a mapping from its names to its
            parameters, in their order; the number and each shape have to agree. Unused for all other formats.
        base: what has the tensors that the average lacks, such as frozen ones and buffers: a model, a state dict, or a
            file of one.
        strip_prefix: what begins all names of the average and is taken off them, such as "module.".

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
    found = read_mapped(source, key, names, base, strip_prefix)
    return _changed(found, copied) if isinstance(source, (str, os.PathLike)) else found


def averaged_state_dict(
    source: Source,
    *,
    key: str | None = None,
    names: Names = None,
    base: Base = None,
    strip_prefix: str | None = None,
) -> dict[str, Tensor]:
    """The averaged weights alone, ready for ``model.load_state_dict``; see :func:`read`.

    Raises:
        TypeError, ValueError, FileNotFoundError: as :func:`read`, and where there are plain weights alone and ``key``
            does not choose them.
    """
    found = read_mapped(source, key, names, base, strip_prefix)
    if found.system == "plain" and key is None:
        raise ValueError(
            f"{_named_source(source)} should hold an average, but it has plain weights alone; use them as they are, or "
            "take another checkpoint."
        )
    return copied(found.tensors) if isinstance(source, (str, os.PathLike)) else found.tensors


def read_mapped(source: Source, key: str | None, names: Names, base: Base, strip_prefix: str | None) -> Averaged:
    """What `read` gives, with tensors that are still mapped to the file."""
    averaged, lacks = read_part(source, key, names, base, strip_prefix)
    if lacks:
        raise ValueError(
            f"The average in {_named_source(source)} should have all tensors of its model, but it shared {len(lacks)} "
            f"frozen ones with it, {listed(lacks)}; pass the model, or its file, as base (--base FILE)."
        )
    return averaged


def read_part(
    source: Source, key: str | None, names: Names, base: Base, strip_prefix: str | None
) -> tuple[Averaged, list[str]]:
    """As `read_mapped`, and the frozen tensors that neither the source nor the base has."""
    _check_prefix(strip_prefix)
    averaged, frozen = read_held(source, key, names)
    where = _named_source(source)
    averaged = _stripped(averaged, strip_prefix, where)
    lacks = [name for name in frozen if name not in averaged.tensors]
    return (averaged, lacks) if base is None else (_based(averaged, lacks, base, where), [])


def read_held(source: Source, key: str | None, names: Names, role: str = "source") -> tuple[Averaged, Sequence[str]]:
    """What a source itself has of an average, still mapped to the file, and the names of all frozen tensors."""
    where, detection = _named_source(source, role), Detection()
    opened = _opened(source)
    found = _chosen(_found(opened.content, detection, where), key, where, detection)
    averaged = _averaged(found, names, where, detection)
    opened.verify(averaged.tensors.items())
    opened.verify((averaged.online or {}).items())
    return averaged, found.frozen


def choices(source: Source) -> list[Found]:
    """The averages in a file, or where there are none its plain weights, each of them once."""
    detection = Detection()
    return detection.merged(_found(_opened(source).content, detection, _named_source(source)))


def _opened(source: Source) -> OpenFile:
    """The file, or for a mapping one that has no checksums."""
    return open_file(source) if isinstance(source, (str, os.PathLike)) else OpenFile(Path(), source)


def _found(content: Any, detection: Detection, where: str) -> list[Found]:
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
    if not content:
        raise ValueError(
            f"{where} should hold averaged weights or a state dict, but is empty; take another checkpoint."
        )
    found = detection.find(content)
    if not found:
        if fault := detection.fault(content):
            raise ValueError(
                f"{where} should hold averaged weights or a state dict, but {fault}; load it, correct that, and pass "
                "the mapping."
            )
        raise ValueError(
            f"{where} should hold averaged weights or a state dict, but has the keys {listed(content)}, none of "
            f"which is known; known are the files of {', '.join(FORMATS)} and Ignite. Load it and pass the part that "
            "is a state dict."
        )
    return found


def _named_source(source: Source, role: str = "source") -> str:
    return quoted(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else role


class SeveralAverages(ValueError):
    """A file holds several averages, and nothing says which is meant."""


def _chosen(found: list[Found], key: str | None, where: str, detection: Detection) -> Found:
    """The one average that is meant: by key, by rank, or as the only one."""
    if key is None:
        first = min(one.rank for one in found)
        chosen = [one for one in found if one.rank == first]
    else:
        chosen = [one for one in found if one.answers_to(key)]
    if not chosen:
        raise ValueError(f"key should be one of {_listed_choices(found)} in {where}, got {quoted(key)}.")
    chosen = detection.merged(chosen)
    if len(chosen) > 1:
        raise SeveralAverages(
            f"{where} should hold one average, got several; choose one by its key (--key): {_listed_choices(chosen)}."
        )
    return chosen[0]


def _listed_choices(found: list[Found]) -> str:
    notes = [f"; {one.note}" if one.note else "" for one in found]
    shown = [f"{quoted(one.label)} ({one.system}{note})" for one, note in zip(found, notes, strict=True)]
    return ", ".join(shown[:_MOST_SHOWN] + [f"… ({len(shown)} in all)"] * (len(shown) > _MOST_SHOWN))


def _averaged(found: Found, names: Names, where: str, detection: Detection) -> Averaged:
    tensors = cleaned(named(found, found.tensors, names, where), where)
    if (online := found.online) is None:
        online = detection.raw_beside(tensors, found)
    online = None if online is None else named(found, online, names, where)
    raw = {plain_name(name): value for name, value in (online or {}).items()}
    frozen = {name: raw[name] for name in found.frozen if name in raw}
    tensors |= cleaned(frozen, where) if frozen else {}
    if not detection.comparison.covers(raw, tensors) or any(raw[name].is_meta for name in tensors):
        return Averaged(found.system, tensors, None, found.num_updates)
    return Averaged(found.system, tensors, cleaned({name: raw[name] for name in tensors}, where), found.num_updates)


def _based(averaged: Averaged, lacks: Sequence[str], base: nn.Module | Source, where: str) -> Averaged:
    """The average with what it lacks taken from the base."""
    held, _ = read_held(base.state_dict() if isinstance(base, nn.Module) else base, None, None, "base")
    tensors = completed(averaged.tensors, held.online or held.tensors, lacks, where)
    return replace(averaged, tensors=tensors, online=None)


def _check_prefix(prefix: object) -> None:
    if prefix is None:
        return
    if not isinstance(prefix, str):
        raise TypeError(f"strip_prefix should be text such as 'module.', got {kind_of(prefix)}; leave it out for none.")
    if not prefix.endswith("."):
        raise ValueError(
            f"strip_prefix should be whole parts of the names, each with its dot, such as 'module.', got "
            f"{quoted(prefix)}; add the dot (--strip-prefix)."
        )


def _stripped(averaged: Averaged, prefix: str | None, where: str) -> Averaged:
    if prefix is None:
        return averaged
    if other := next((name for name in averaged.tensors if not name.startswith(prefix) or name == prefix), None):
        raise ValueError(
            f"strip_prefix should begin all names of the average in {where}, got {quoted(prefix)}, which does not "
            f"begin {quoted(other)}; leave it out (--strip-prefix)."
        )
    return _changed(averaged, partial(within, prefix=prefix))


def _changed(averaged: Averaged, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Averaged:
    """The same with another state dict for the averaged weights, and for the raw ones where there are some."""
    online = None if averaged.online is None else change(averaged.online)
    return replace(averaged, tensors=change(averaged.tensors), online=online)
