"""The formats of other systems: a function for each, from its source code. `detection` searches a file for them.

Reading a file does not need the system that wrote it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..averaging.state import STATE_VERSION
from .files import quoted

State = Mapping[str, Any]
Tensors = State | list[Any]
Names: TypeAlias = nn.Module | Mapping[str, Tensor] | None


@dataclass(frozen=True, eq=False)
class Found:
    """An average as it is in the file, unchecked."""

    system: str  # whose format it is
    tensors: Tensors
    online: Tensors | None = None  # the raw weights, if the format stores them beside the average
    num_updates: int | None = None
    path: tuple[str, ...] = ()  # the keys that lead to it
    frozen: tuple[str, ...] = ()  # names that the average lacks, because it shares these tensors with the model
    rank: int = 0  # 0 for a layout that only an average has, 1 for a name, 2 or 3 without a sign; the lowest is taken
    note: str = ""  # helps the user choose between this average and others

    @property
    def label(self) -> str:
        return ".".join(self.path) or self.system

    def __str__(self) -> str:
        return f"{quoted(self.label)} ({'; '.join(filter(None, (self.system, self.note)))})"

    def answers_to(self, key: str) -> bool:
        return key in {self.label, self.path[-1] if self.path else "", self.system}


# Each function takes a mapping, and yields the averages that it holds in the layout of one system.


def _ignite_ema(state: State) -> Iterator[Found]:
    """The state of our handler: the averaged tensors, and which of them each ``state_dict`` name stands for.

    A name without an averaged tensor belongs to a frozen tensor that the average shared with the model.
    """
    if "ignite_ema_version" not in state or not _has_states(state, "averaged_tensors", "state_dict_names"):
        return
    if (version := state["ignite_ema_version"]) != STATE_VERSION:
        raise ValueError(
            f"'ignite_ema_version' of the state of an EMAHandler should be {STATE_VERSION}, got {quoted(version)}; "
            "read it with the ignite_ema that wrote it."
        )
    tensors, names = state["averaged_tensors"], state["state_dict_names"]
    named = {name: tensors[averaged] for name, averaged in names.items() if averaged in tensors}
    frozen = tuple(name for name in names if name not in named)
    yield Found("ignite_ema", named, None, _count(state, "num_updates"), frozen=frozen)


def _mmengine(state: State) -> Iterator[Found]:
    """``EMAHook.before_save_checkpoint`` swaps: the average is in ``state_dict``, the raw weights in the other entry.

    The other entry is the state of its ``BaseAveragedModel``. Scripts that do not swap have other names in theirs.
    """
    if _has_states(state, "state_dict", "ema_state_dict") and (raw := _wrapped(state["ema_state_dict"], "steps")):
        yield Found("mmengine", state["state_dict"], raw, path=("state_dict",))


def _timm(state: State) -> Iterator[Found]:
    """What ``CheckpointSaver`` writes, beside the model in ``state_dict``; both without wrappers."""
    if _has_states(state, "state_dict_ema"):
        yield Found("timm", state["state_dict_ema"], path=("state_dict_ema",))


def _lightning(state: State) -> Iterator[Found]:
    """``WeightAveraging.on_save_checkpoint``: the average in ``state_dict``, the raw weights beside it.

    ``StochasticWeightAveraging`` keeps its average in its own state, and copies the parameters into the model at the
    end of training; it never averages buffers.
    """
    if _has_states(state, "state_dict", "current_model_state", "averaging_state"):
        count = _count(state["averaging_state"], "n_averaged")
        yield Found("Lightning", state["state_dict"], state["current_model_state"], count, ("state_dict",))
    callbacks = state["callbacks"] if _has_states(state, "state_dict", "callbacks") else {}
    for name, callback in callbacks.items():
        if _has_states(callback, "average_model_state") and (count := _count(callback, "n_averaged")):
            path = ("callbacks", str(name), "average_model_state")
            note = "the average, with the buffers from before training, such as running_mean"
            yield Found("Lightning", callback[path[-1]], state["state_dict"], count, path, note=note)
            note = "raw weights, or the average if training has ended"
            yield Found("plain", state["state_dict"], path=("state_dict",), note=note)


def _torch(state: State) -> Iterator[Found]:
    """The state dict of ``torch.optim.swa_utils.AveragedModel``."""
    if inner := _wrapped(state, "n_averaged"):
        yield Found("torch AveragedModel", inner, None, _count(state, "n_averaged"))


def _ema_pytorch(state: State) -> Iterator[Found]:
    """The state dict of ``ema_pytorch.EMA``, with the online model or without."""
    inner = within(state, "ema_model.")
    if inner and "initted" in state and "step" in state:
        yield Found("ema-pytorch", inner, within(state, "online_model.") or None)


def _diffusers(state: State) -> Iterator[Found]:
    """The state of ``diffusers.training_utils.EMAModel``; each of its steps updates."""
    if isinstance(state.get("shadow_params"), list) and "optimization_step" in state:
        yield Found("diffusers", state["shadow_params"], None, _count(state, "optimization_step"))


def _torch_ema(state: State) -> Iterator[Found]:
    """The state of ``torch_ema.ExponentialMovingAverage``, which may also store the raw weights."""
    shadow, raw = state.get("shadow_params"), state.get("collected_params")
    if isinstance(shadow, list) and "num_updates" in state:
        online = raw if isinstance(raw, list) and len(raw) == len(shadow) else None
        yield Found("torch_ema", shadow, online, _count(state, "num_updates"))


def _mmcv(state: State) -> Iterator[Found]:
    """Buffers ``ema_<name>``, with underscores instead of dots, beside the model's own names.

    ``EMAHook`` (mmcv 1.x, ``mmcv/runner/hooks/ema.py``) and ``BaseEMAHook`` (mmdetection 2.x,
    ``mmdet/core/hook/ema.py``) swap in ``after_train_epoch``, ahead of the ``CheckpointHook``, and back in
    ``before_train_epoch``. ``IterBasedRunner`` calls neither. The file does not say which runner saved it.
    """
    buffers = {name for name in state if str(name).startswith("ema_") and "." not in name}
    own = {name: value for name, value in state.items() if name not in buffers}
    partners = {f"ema_{str(name).replace('.', '_')}": name for name in own}
    averaged = {partners[name]: state[name] for name in buffers if name in partners and isinstance(state[name], Tensor)}
    if len(averaged) == len(buffers) and covers(own, averaged):
        other, note = own | averaged, "the average if the file was saved"
        yield Found("mmcv", own, other, path=("model",), note=f"{note} at the end of an epoch")
        yield Found("mmcv", other, own, path=("ema_",), note=f"{note} within one, or by an IterBasedRunner")


def _mmagic(state: State) -> Iterator[Found]:
    """Submodules ``<name>_ema`` beside ``<name>``; mmagic wraps them (``module.``, ``steps``), mmgen does not.

    ``ExponentialMovingAverageHook`` (mmgen, ``mmgen/core/hooks/ema_hook.py``) and ``BaseGAN`` (mmagic,
    ``mmagic/models/base_models/base_gan.py``) never swap.
    """
    heads = dict.fromkeys(str(name).partition(".")[0] for name in state)
    for head in (head for head in heads if head.endswith("_ema")):
        online, wrapped = within(state, f"{head.removesuffix('_ema')}."), within(state, f"{head}.")
        twin = _wrapped(wrapped, "steps") or wrapped
        if online.keys() != twin.keys():  # DDP around a part of the model
            online = within(online, "module.")
        if twin and online.keys() == twin.keys():
            yield Found("mmagic", twin, online, path=(head,), rank=1)


FORMATS = (_ignite_ema, _mmengine, _timm, _lightning, _torch, _ema_pytorch, _diffusers, _torch_ema, _mmcv, _mmagic)


def within(state: State, prefix: str) -> dict[str, Any]:
    """The entries whose names start with ``prefix``, under their names without it."""
    return {name[len(prefix) :]: value for name, value in state.items() if str(name).startswith(prefix)}


def plain_name(name: Any) -> str:
    """The name without the component that ``torch.compile`` adds."""
    return re.sub(r"(?:(?<=\.)|^)_orig_mod\.", "", str(name))


def covers(state: State, tensors: State) -> bool:
    """True if ``state`` has a tensor of the same name and shape for each of ``tensors``, which is not empty."""
    return has_tensors(tensors) and _shapes(tensors).items() <= _shapes(state).items()


def _shapes(state: State) -> dict[str, Any]:
    return {plain_name(name): value.shape if isinstance(value, Tensor) else None for name, value in state.items()}


def has_tensors(state: State) -> bool:
    """True if there is a tensor among the values."""
    return any(isinstance(value, Tensor) for value in state.values())


def _wrapped(state: State, counter: str) -> State:
    """The state of a model in a wrapper that has only a counter besides; empty for another mapping."""
    inner = within(state, "module.")
    return inner if counter in state and len(inner) == len(state) - 1 else {}


def _has_states(state: Any, *names: str) -> bool:
    return isinstance(state, Mapping) and all(isinstance(state.get(name), Mapping) for name in names)


def _count(state: State, name: str) -> int | None:
    """A whole number of at least 0, plain or in a tensor of one element; else None."""
    value = state.get(name)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    return value if isinstance(value, int) and value >= 0 else None
