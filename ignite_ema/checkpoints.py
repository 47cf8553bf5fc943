"""Averaged weights out of the files of other systems, as a plain ``state_dict`` under the model's own names.

Each system has one function here that recognises its layout in a mapping, and a row in one table. What these layouts
are was read in the systems' sources, which the functions name; nothing of them is needed to read their files.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .files import load_file, save_file

__all__ = ["Averaged", "averaged_state_dict", "load_file", "read", "save_file"]

_State = Mapping[str, Any]


@dataclass(frozen=True)
class Averaged:
    """Averaged weights, and what else a file says about them.

    Attributes:
        system: whose layout it is: "ignite_ema", "Ignite", "torch AveragedModel", "timm", "Lightning", "mmengine",
            "mmcv" (and mmdetection 2), "mmagic" (and mmgen), "diffusers", "ema-pytorch", "torch_ema", or "plain" for
            a state dict without any average.
        tensors: the averaged weights under the model's own names; not copies.
        online: the raw weights of the same names, where the file has them.
        num_updates: how many updates the average has behind it, where the file states just that. The counts of
            mmengine (``steps``) and ema-pytorch (``step``) are of calls, only some of which update: None.
    """

    system: str
    tensors: dict[str, Tensor]
    online: dict[str, Tensor] | None = None
    num_updates: int | None = None


def read(
    source: str | os.PathLike[str] | _State,
    *,
    key: str | None = None,
    names: nn.Module | Mapping[str, Tensor] | None = None,
) -> Averaged:
    """The averaged weights in a checkpoint of this or another system.

    ``_orig_mod.`` (of ``torch.compile``) is taken out of all names; ``module.`` only where the layout itself puts it
    there, so that the names of a bare timm ``ModelEmaV3``, which look like those of a wrapped model, stay as they are.
    Extra state (``_extra_state``) that is not a tensor is left out. diffusers and torch_ema keep parameters only, no
    buffers.

    mmcv and mmdetection 2 swap at the end of an epoch: the model's own names then hold the average. In a file that was
    saved within an epoch, or by an ``IterBasedRunner``, it is the other way round: ``key="ema_"`` takes the average
    from the ``ema_`` buffers, ``key="model"`` from the model's names. Where the counts in the file show that it was not
    saved at the end of an epoch, the choice has to be made.

    Args:
        source: a path, or what was loaded from one.
        key: chooses where there are several averages: the last part of an entry's path, such as "generator_ema", the
            whole path, joined by dots, or the name of a system.
        names: for lists without names (diffusers, torch_ema), the model, or a mapping from its names to its
            parameters, in their order; the number and each shape have to agree. Unused for all other layouts.

    Raises:
        TypeError, ValueError, FileNotFoundError: where nothing is recognised, or several averages are, or a list has
            no names; says what was found and the way out.

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> average = torch.optim.swa_utils.AveragedModel(model)
        >>> average.update_parameters(model)
        >>> found = read({"model": model.state_dict(), "average": average.state_dict()})
        >>> found.system, found.num_updates, sorted(found.tensors)
        ('torch AveragedModel', 1, ['bias', 'weight'])
    """
    if isinstance(source, (str, os.PathLike)):
        where, content = f"'{os.fspath(source)}'", load_file(source)
    else:
        where, content = "source", source
    if not isinstance(content, Mapping):
        raise TypeError(
            f"{where} should be, or hold, a mapping such as a state dict, got {type(content).__name__}; pass the "
            "state_dict() of a module or an average."
        )
    found = _search(content) or _plain(content)
    if not found:
        raise ValueError(
            f"{where} should hold averaged weights or a state dict, but has the keys {_listed(content)}, none of "
            f"which is known; known are the files of {', '.join(_LAYOUTS)} and Ignite. Load it and pass the part that "
            "is a state dict."
        )
    return _averaged(_chosen(found, key, where), names, where)


def averaged_state_dict(
    source: str | os.PathLike[str] | _State,
    *,
    key: str | None = None,
    names: nn.Module | Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The averaged weights alone, ready for ``model.load_state_dict``; see :func:`read`."""
    return read(source, key=key, names=names).tensors


_Tensors = _State | list[Any]


@dataclass(frozen=True, eq=False)
class _Found:
    """An average as it lies in the file, unchecked; lists have no names yet.

    Attributes:
        path: the keys that lead to it.
        beside: the mapping in which it is, or is part of, an entry, and ``entry`` the key there.
        doubt: why this is perhaps not the average; it is taken only by key then, unless all have one.
    """

    system: str
    tensors: _Tensors
    online: _Tensors | None = None
    num_updates: int | None = None
    path: tuple[str, ...] = ()
    beside: _State = field(default_factory=dict)
    entry: str = ""
    doubt: str = ""

    @property
    def label(self) -> str:
        return ".".join(self.path) or self.system

    def answers_to(self, key: str) -> bool:
        return key in {self.label, self.path[-1] if self.path else "", self.system}


# --- recognising: each of these gets a mapping and gives the averages that it holds in the layout of one system ---


def _ignite_ema(state: _State) -> Iterator[_Found]:
    """The state of our handler: averaged tensors by path, and the names that a ``state_dict`` has for the paths."""
    if "ignite_ema_version" not in state or "averaged_tensors" not in state:
        return
    tensors, paths = state["averaged_tensors"], state.get("state_dict_names")
    if not isinstance(tensors, Mapping) or not isinstance(paths, Mapping):
        raise ValueError(
            "The state of an EMAHandler should have the mappings 'averaged_tensors' and 'state_dict_names', got "
            f"{_listed(state)}; save it again with this version of ignite_ema."
        )
    if missing := [path for path in paths.values() if path not in tensors]:
        raise ValueError(
            f"'averaged_tensors' should have '{missing[0]}', which 'state_dict_names' asks for; the state of the "
            "EMAHandler was changed, take another checkpoint."
        )
    yield _Found(
        "ignite_ema", {name: tensors[path] for name, path in paths.items()}, None, _count(state, "num_updates")
    )


def _mmengine(state: _State) -> Iterator[_Found]:
    """``EMAHook.before_save_checkpoint`` swaps: the average is in ``state_dict``, the raw weights in the ema field."""
    if _has_states(state, "ema_state_dict", "state_dict"):
        yield _Found("mmengine", state["state_dict"], _within(state["ema_state_dict"], "module."))


def _timm(state: _State) -> Iterator[_Found]:
    """What ``CheckpointSaver`` writes, both parts without wrappers."""
    if _has_states(state, "state_dict_ema"):
        yield _Found("timm", state["state_dict_ema"], state.get("state_dict"))


def _lightning(state: _State) -> Iterator[_Found]:
    """``WeightAveraging.on_save_checkpoint``: the average in ``state_dict``, the raw weights beside it."""
    if _has_states(state, "state_dict", "current_model_state") and isinstance(state.get("averaging_state"), Mapping):
        count = _count(state["averaging_state"], "n_averaged")
        yield _Found("Lightning", state["state_dict"], state["current_model_state"], count)


def _averaged_model(state: _State) -> Iterator[_Found]:
    """The state dict of ``torch.optim.swa_utils.AveragedModel``."""
    inner = _within(state, "module.")
    if inner and len(inner) == len(state) - 1 and "n_averaged" in state:
        yield _Found("torch AveragedModel", inner, None, _count(state, "n_averaged"))


def _ema_pytorch(state: _State) -> Iterator[_Found]:
    """The state dict of ``ema_pytorch.EMA``, with the online model or without."""
    inner = _within(state, "ema_model.")
    if inner and "initted" in state and "step" in state:
        yield _Found("ema-pytorch", inner, _within(state, "online_model.") or None)


def _diffusers(state: _State) -> Iterator[_Found]:
    """The state of ``diffusers.training_utils.EMAModel``; each of its steps updates."""
    if isinstance(state.get("shadow_params"), list) and "optimization_step" in state:
        yield _Found("diffusers", state["shadow_params"], None, _count(state, "optimization_step"))


def _torch_ema(state: _State) -> Iterator[_Found]:
    """The state of ``torch_ema.ExponentialMovingAverage``, which may be saved while it has the raw weights put by."""
    if isinstance(state.get("shadow_params"), list) and "num_updates" in state:
        yield _Found("torch_ema", state["shadow_params"], state.get("collected_params"), _count(state, "num_updates"))


def _mmcv(state: _State) -> Iterator[_Found]:
    """Buffers ``ema_<name>`` with underscores for dots, beside the model's own names.

    ``EMAHook`` (mmcv 1.x, ``mmcv/runner/hooks/ema.py``) and ``BaseEMAHook`` (mmdetection 2.x,
    ``mmdet/core/hook/ema.py``) swap in ``after_train_epoch``, ahead of the ``CheckpointHook``, and back in
    ``before_train_epoch``. ``IterBasedRunner`` calls neither.
    """
    model = state["state_dict"] if _has_states(state, "state_dict") else state
    buffers = {name for name in model if isinstance(name, str) and name.startswith("ema_") and "." not in name}
    own = {name: value for name, value in model.items() if name not in buffers}
    partners: dict[str, list[str]] = {}
    for name in own:
        partners.setdefault(f"ema_{str(name).replace('.', '_')}", []).append(name)
    if not all(name in partners for name in buffers):
        return
    if not _covers(own, {partners[name][0]: model[name] for name in buffers}):
        return
    for name in sorted(buffers):
        if len(partners[name]) > 1:
            both = "' and '".join(partners[name])
            raise ValueError(
                f"'{name}' should belong to one tensor of the model, got '{both}': mmcv writes both under this name, "
                "and the average of one is lost; rename one of them and train again."
            )
    other = own | {partners[name][0]: model[name] for name in buffers}
    yield _Found("mmcv", own, other, path=("model",), doubt=_within_epoch(state.get("meta")))
    yield _Found("mmcv", other, own, path=("ema_",), doubt="at the end of an epoch these are the raw weights")


def _within_epoch(meta: Any) -> str:
    """Why a file of mmcv was not saved at the end of an epoch, by its counts, or nothing."""
    epoch, iteration = (meta.get(key) if isinstance(meta, Mapping) else None for key in ("epoch", "iter"))
    if isinstance(epoch, int) and isinstance(iteration, int) and epoch > 0 and iteration % epoch:
        return f"{iteration} iterations are no {epoch} whole epochs: saved within one, these are the raw weights"
    return ""


def _mmagic(state: _State) -> Iterator[_Found]:
    """Submodules ``<name>_ema`` beside ``<name>``; mmagic wraps them (``module.``, ``steps``), mmgen does not.

    ``ExponentialMovingAverageHook`` (mmgen, ``mmgen/core/hooks/ema_hook.py``) and ``BaseGAN`` (mmagic,
    ``mmagic/models/base_models/base_gan.py``) never swap.
    """
    heads = dict.fromkeys(str(name).partition(".")[0] for name in state if "_ema." in str(name))
    for head in heads:
        if not head.endswith("_ema"):
            continue
        twin, online = _within(state, f"{head}."), _within(state, f"{head.removesuffix('_ema')}.")
        if "steps" in twin and len(inner := _within(twin, "module.")) == len(twin) - 1:
            twin = inner
        if online.keys() != twin.keys():  # DDP around a part of the model
            online = _within(online, "module.")
        if online.keys() == twin.keys():
            yield _Found("mmagic", twin, online, path=(head,))


_LAYOUTS: dict[str, Callable[[_State], Iterable[_Found]]] = {
    "ignite_ema": _ignite_ema,
    "mmengine": _mmengine,
    "timm": _timm,
    "Lightning": _lightning,
    "torch AveragedModel": _averaged_model,
    "ema-pytorch": _ema_pytorch,
    "diffusers": _diffusers,
    "torch_ema": _torch_ema,
    "mmcv": _mmcv,
    "mmagic": _mmagic,
}


def _ignite(name: str, state: _State, beside: _State) -> Iterator[_Found]:
    """A model's state dict that is an entry of a ``Checkpoint`` file under a name with "ema" in it."""
    if not re.search(r"(?<![a-z])ema(?![a-z])", name.lower()) or not any(isinstance(v, Tensor) for v in state.values()):
        return
    inner = _within(state, "module.")  # such as timm's ModelEmaV3, which a model of these names beside it gives away
    wrapped = len(inner) == len(state) and not _online(state, name, beside) and _online(inner, name, beside)
    yield _Found("Ignite", inner if wrapped else state)


def _search(state: _State, depth: int = 2) -> list[_Found]:
    """The averages that a mapping is, or else those that are in it."""
    found = [one for layout in _LAYOUTS.values() for one in layout(state)]
    if found or not depth:
        return found
    return [
        replace(one, path=(str(name), *one.path), beside=one.beside or state, entry=one.entry or str(name))
        for name, entry in state.items()
        if isinstance(entry, Mapping)
        for one in _search(entry, depth - 1) or _ignite(str(name), entry, state)
    ]


_MODEL_NAMES = ("state_dict", "model", "model_state_dict", "net", "network")


def _plain(state: _State) -> list[_Found]:
    """The state dicts of a file without an average: itself, or the entries that are some."""
    if _is_state_dict(state):
        return [_Found("plain", state)]
    found = [_Found("plain", entry, path=(str(name),)) for name, entry in state.items() if _is_state_dict(entry)]
    if not any(one.label in _MODEL_NAMES for one in found):
        return found
    return [one if one.label in _MODEL_NAMES else replace(one, doubt="not called a model") for one in found]


# --- choosing and checking ---


def _chosen(found: list[_Found], key: str | None, where: str) -> _Found:
    """The one average that is meant: by key, else ours before all others, else the only one."""
    if key is not None:
        chosen = [one for one in found if one.answers_to(key)]
        if not chosen:
            raise ValueError(f"key should be one of {_choices(found)} in {where}, got '{key}'.")
    else:
        chosen = [one for one in found if one.system == "ignite_ema"] or found
    chosen = [one for one in chosen if not one.doubt] or chosen
    if all(_same(one.tensors, chosen[0].tensors) for one in chosen[1:]):
        return chosen[0]
    raise ValueError(f"{where} should hold one average, got several; choose one by its key: {_choices(chosen)}.")


def _choices(found: list[_Found]) -> str:
    return ", ".join(f"'{one.label}' ({one.system}{f'; {one.doubt}' if one.doubt else ''})" for one in found)


def _same(one: _Tensors, other: _Tensors) -> bool:
    if isinstance(one, list) or isinstance(other, list) or one.keys() != other.keys():
        return False
    return all(
        isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(one.values(), (other[name] for name in one), strict=True)
    )


def _averaged(found: _Found, names: nn.Module | Mapping[str, Tensor] | None, where: str) -> Averaged:
    tensors = _cleaned(_named(found, found.tensors, names, where), where)
    if found.online is None:
        online = _online(tensors, found.entry, found.beside)
    else:
        online = _named(found, found.online, names, where)
    raw = {_plain_name(name): value for name, value in online.items()} if online else {}
    if not _covers(raw, tensors):
        return Averaged(found.system, tensors, None, found.num_updates)
    return Averaged(found.system, tensors, {name: raw[name].detach() for name in tensors}, found.num_updates)


def _named(
    found: _Found, tensors: _Tensors, names: nn.Module | Mapping[str, Tensor] | None, where: str
) -> Mapping[str, Any]:
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
        if not _covers({name: value}, {name: tensor}):
            raise ValueError(
                f"'{name}' of names should have the shape of its tensor in {where}, {_shape(tensor)}, got "
                f"{_shape(value)}; pass the parameters in the order of model.parameters()."
            )
    return dict(zip(known, tensors, strict=True))


def _cleaned(state: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """A plain state dict: tensors alone, without gradients, under names without ``_orig_mod.``."""
    cleaned: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            if str(name).endswith("_extra_state"):
                continue
            raise ValueError(
                f"'{name}' of the averaged weights in {where} should be a tensor, got {type(value).__name__}; load the "
                "file, take it out, and pass the mapping."
            )
        plain = _plain_name(name)
        if plain in cleaned:
            raise ValueError(
                f"'{plain}' should be in {where} once, but it is there with and without '_orig_mod.'; load the file, "
                "take one out, and pass the mapping."
            )
        cleaned[plain] = value.detach()
    return cleaned


def _online(tensors: _State, name: str, beside: _State) -> _State | None:
    """The raw weights among the other entries of a file: what covers all names and shapes, if that is one alone."""
    entries = {str(key): entry for key, entry in beside.items() if key != name and isinstance(entry, Mapping)}
    fitting = {key: entry for key, entry in entries.items() if _covers(entry, tensors)}
    for model in (re.sub("_?ema_?", "", name), "model", "state_dict"):
        if model in fitting:
            return fitting[model]
    return next(iter(fitting.values())) if len(fitting) == 1 else None


def _covers(state: _State, tensors: _State) -> bool:
    """Whether ``state`` has a tensor of the same name and shape for each of ``tensors``, which are some."""
    known = {_plain_name(name): value for name, value in state.items() if isinstance(value, Tensor)}
    return bool(tensors) and all(
        isinstance(value, Tensor) and _plain_name(name) in known and known[_plain_name(name)].shape == value.shape
        for name, value in tensors.items()
    )


def _plain_name(name: Any) -> str:
    return str(name).replace("_orig_mod.", "")


def _within(state: _State, prefix: str) -> dict[str, Any]:
    """The entries whose names start with ``prefix``, without it."""
    return {name[len(prefix) :]: value for name, value in state.items() if str(name).startswith(prefix)}


def _has_states(state: _State, *names: str) -> bool:
    return all(isinstance(state.get(name), Mapping) for name in names)


def _is_state_dict(state: Any) -> bool:
    """Whether it is a mapping from names to tensors, with extra state at most."""
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        return False
    return all(
        isinstance(name, str) and (isinstance(value, Tensor) or name.endswith("_extra_state"))
        for name, value in state.items()
    )


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _count(state: _State, name: str) -> int | None:
    value = state.get(name)
    return int(value) if isinstance(value, int) or (isinstance(value, Tensor) and value.numel() == 1) else None


def _listed(state: _State) -> str:
    """The first keys of a mapping, and how many there are."""
    keys = ", ".join(f"'{key}'" for key in list(state)[:8])
    return f"{keys}, … ({len(state)} in all)" if len(state) > 8 else keys or "of an empty mapping"
