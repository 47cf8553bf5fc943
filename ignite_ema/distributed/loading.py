"""Loads what ``ShardedSaver`` has saved, on any number of ranks."""

import os
import pickle
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ignite.handlers.checkpoint import Checkpoint
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from .safe_reader import Planner, Reader

__all__ = ["load_objects", "replaced_path", "single_process"]


def load_objects(to_load: Mapping[str, Any], checkpoint: str | os.PathLike[str]) -> None:
    """Fills objects with what :class:`ShardedSaver` has saved of them, on any number of ranks; to be called on all.

    Args:
        to_load: all objects that were saved or some, under the same names. An optimizer that has not stepped yet gets
            its state from a step with a learning rate of 0, to have where to load to.
        checkpoint: the directory.

    Raises:
        FileNotFoundError, ValueError: where the checkpoint is none, is incomplete, or was not saved from these objects.
    """
    path = Path(checkpoint)
    if not path.exists() and replaced_path(path).exists():
        path = replaced_path(path)  # a run was killed between two renames
    if not (path / ".metadata").is_file():
        raise FileNotFoundError(
            f"'{path}' should be a directory that ShardedSaver wrote, but there is no '.metadata' in it; name one of "
            "its checkpoints."
        )
    reader = Reader(path)
    try:
        saved = reader.read_metadata().state_dict_metadata.keys()
        for name, value in to_load.items():
            if isinstance(value, Optimizer) and not value.state:
                _make_state(value, name, saved)
        states = {name: _unwrapped(value).state_dict() for name, value in to_load.items()}
        with single_process():
            load(_as_saved(states, saved), storage_reader=reader, planner=Planner())
    except pickle.UnpicklingError as error:
        raise ValueError(f"'{path}' should be a checkpoint of ShardedSaver, but {error}.") from error
    except CheckpointException as error:
        reasons = [str(reason[0]).removesuffix(".") for reason in error.failures.values()]
        raise ValueError(f"'{path}' should be a checkpoint of these objects, but: {reasons[0]}.") from error
    Checkpoint.load_objects(dict(to_load), states)


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


def _make_state(optimizer: Optimizer, name: str, saved: Collection[str]) -> None:
    """Lets an optimizer have its state for those parameters for which there is one in the checkpoint."""
    named = any(key.startswith(f"{name}.param_groups") for key in saved)  # a single object is saved without its name
    prefix = f"{name}.state." if named else "state."
    indices = {key.removeprefix(prefix).partition(".")[0] for key in saved if key.startswith(prefix)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters]
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.zeros_like(parameter) if str(index) in indices else None
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0
        with _without_hooks(optimizer):
            optimizer.step()
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


@contextmanager
def _without_hooks(optimizer: Optimizer) -> Iterator[None]:
    """Keeps a step inside from those who watch the optimizer's steps."""
    hooks: tuple[dict[int, Any], ...] = (
        *(optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks),
        *(torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks),
    )
    kept = [hook.copy() for hook in hooks]
    try:
        for hook in hooks:
            hook.clear()  # in place, for their handles point to these dictionaries
        yield
    finally:
        for hook, before in zip(hooks, kept, strict=True):
            hook.update(before)


@contextmanager
def single_process() -> Iterator[None]:
    """Silences torch's remark that there is no process group, which is meant then."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
