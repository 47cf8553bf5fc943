"""Loads what ``ShardedSaver`` has saved, on any number of ranks."""

import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.handlers.checkpoint import Checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim import Optimizer

from ..averaging.collectives import (
    Group,
    first_difference,
    on_all_ranks,
    rank,
    reports_lost_ranks,
    shared_group,
)
from .safe_reader import Planner, Reader

__all__ = ["load_objects", "process_group", "replaced_path"]


def load_objects(to_load: Mapping[str, Any], checkpoint: str | os.PathLike[str]) -> None:
    """Fills objects with what :class:`ShardedSaver` has saved of them, on any number of ranks; to be called on all.

    Every rank reads what it loads twice: first to see that it is whole, before anything is changed.

    Args:
        to_load: all objects that were saved or some, under the same names, and the same on all ranks. An optimizer may
            have stepped or not.
        checkpoint: the directory; all ranks have to see the same.

    Raises:
        FileNotFoundError, ValueError: on all ranks, where for one of them the checkpoint is none, is damaged, was not
            saved from these objects, or is another one than for the others; nothing has been loaded then.
        RuntimeError: where a handler holds averaged weights (``swapped``), or a rank has ended.
    """
    group = shared_group()
    path, reader = on_all_ranks(lambda: _opened(Path(checkpoint)), group)
    _check_agreement(to_load, path, reader.digest, group)
    states = on_all_ranks(lambda: _to_fill(to_load, reader.contents, path), group)
    try:
        with process_group(group) as messages:
            filled = _as_saved(states, reader.contents.state_dict_metadata)
            load(filled, storage_reader=reader, planner=Planner(), process_group=messages)
    except CheckpointException as error:  # on all ranks
        where, (reason, _) = min(error.failures.items(), key=lambda item: item[0])
        text = str(reason).partition("\n")[0].removesuffix(".")
        raise ValueError(
            f"'{path}' should be a checkpoint of these objects, but: {text}{_on(where)}; load it into the objects that "
            "were saved, or take another one."
        ) from error
    on_all_ranks(lambda: Checkpoint.load_objects(dict(to_load), states), group)


def _opened(path: Path) -> tuple[Path, Reader]:
    if not path.exists() and replaced_path(path).exists():
        path = replaced_path(path)  # a run was killed between two renames
    if not (path / ".metadata").is_file():
        raise FileNotFoundError(
            f"'{path}' should be a directory that ShardedSaver wrote, but there is no '.metadata' in it{_on(rank())}; "
            "name one of its checkpoints."
        )
    return path, Reader(path)


def _check_agreement(to_load: Mapping[str, Any], path: Path, digest: str, group: Group | None) -> None:
    description = {"the path": f"'{path.absolute()}'", "the contents": digest[:16]}
    description |= {f"'{name}'": f"of type {type(value).__name__}" for name, value in to_load.items()}
    if difference := first_difference(description, group):
        raise ValueError(
            f"All ranks should load the same objects from the same checkpoint, got {difference}; call load_objects "
            "with the same arguments on all ranks."
        )


def _to_fill(to_load: Mapping[str, Any], contents: Metadata, path: Path) -> dict[str, Any]:
    """The states of the objects, into whose tensors the checkpoint is read."""
    if not to_load:
        raise ValueError("to_load should name the objects to be loaded, got none; pass those that were saved.")
    states = {name: _unwrapped(value).state_dict() for name, value in to_load.items()}
    for name, value in to_load.items():
        if isinstance(value, Optimizer) and not value.state:
            states[name] = {**states[name], "state": _optimizer_state(value, name, contents, path)}
        elif isinstance(states[name], Mapping) and states[name].get("saved_while_swapped") is True:
            raise RuntimeError(
                f"'{name}' should not be loaded while the model holds averaged weights; load it outside of swapped()."
            )
    return states


def _optimizer_state(optimizer: Optimizer, name: str, contents: Metadata, path: Path) -> dict[int, dict[str, Any]]:
    """Zeros for all that the checkpoint has of the state of an optimizer that has not stepped yet.

    Sharded as torch's optimizers make them: as the parameter where they have its shape, else replicated.
    """
    saved = contents.state_dict_metadata
    named = any(key.startswith(f"{name}.param_groups") for key in saved)  # a single object is saved without its name
    prefix = f"{name}.state." if named else "state."
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, entry in saved.items():
        index, _, field = key.removeprefix(prefix).partition(".")
        if key.startswith(prefix):
            if not index.isdecimal() or int(index) >= len(parameters):
                raise ValueError(
                    f"'{path}' should have the state of {len(parameters)} parameters for '{name}', but has '{key}'; "
                    "make the optimizer as it was made when it was saved."
                )
            state.setdefault(int(index), {})[field] = _zeros(parameters[int(index)], entry)
    return state


@torch.no_grad()
def _zeros(parameter: Tensor, entry: Any) -> Tensor | None:
    if not isinstance(entry, TensorStorageMetadata):
        return None
    if entry.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=entry.properties.dtype)
    if not entry.size:  # counts of steps are on the CPU, or where load_state_dict brings them
        return torch.zeros((), dtype=entry.properties.dtype)
    return parameter.new_zeros(entry.size, dtype=entry.properties.dtype)


def _as_saved(states: dict[str, Any], saved: Collection[str]) -> dict[str, Any]:
    """The states as Ignite gives them to a save handler: a single one without its name."""
    if len(states) > 1:
        return states
    ((name, state),) = states.items()
    named = [key for key in saved for first in state if f"{key}.".startswith(f"{name}.{first}.")]
    return states if named else state


def replaced_path(path: Path) -> Path:
    """Where a checkpoint is while another one takes its place."""
    return path.with_name(f".{path.name}.old")


def _unwrapped(value: Any) -> Any:
    """As Ignite's ``Checkpoint`` unwraps it."""
    return value.module if isinstance(value, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else value


def _on(where: int) -> str:
    """Names a rank where there are several."""
    return f" (on rank {where})" if dist.is_initialized() and dist.get_world_size() > 1 else ""


@contextmanager
def process_group(group: Group | None) -> Iterator[dist.ProcessGroup | None]:
    """What torch's own functions take; silences their remark that there is none, where that is meant."""
    is_alone = group is None  # else the filters stay as they are: they are those of all threads
    with warnings.catch_warnings() if is_alone else nullcontext(), reports_lost_ranks(group):
        if is_alone:
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield None if group is None else group.get()
