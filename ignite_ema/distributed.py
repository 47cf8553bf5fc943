"""Checkpoints of sharded training: every rank saves its shards, and any number of ranks can load them.

Ignite's ``Checkpoint`` asks every rank for its states and writes those of one rank. With :class:`ShardedSaver` it
writes those of all ranks, with :mod:`torch.distributed.checkpoint`. Reading a checkpoint runs nothing in it.
"""

import os
import shutil
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from ignite.handlers.checkpoint import BaseSaveHandler, Checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from .averaging.sharding import broadcast_buffers, is_first_rank, is_sharded, on_all_ranks, on_first_rank, whole
from .checkpoints.directories import nested, read_contents, read_into
from .checkpoints.files import ForeignObject, kind_of, sync_directory
from .handlers.ema import EMAHandler

__all__ = ["ShardedSaver", "gathered_state_dict", "load_objects", "sync_buffers"]

_T = TypeVar("_T")
KeyPath = tuple[str | int, ...]  # to a value in a nested state: keys of mappings, as strings, and places in lists


class ShardedSaver(BaseSaveHandler):
    """A save handler for Ignite's ``Checkpoint`` with which every rank saves its own part. Make it on all ranks.

    A checkpoint is a directory. It is written under a hidden name and renamed when all ranks are done; only then is the
    checkpoint that ``n_saved`` drops removed. A run that is killed while it saves still has its last checkpoint.
    Several machines must share the file system.

    The first rank's directory, file name and ``n_saved`` count for all. Ranks may save different names, as the
    stages of a pipeline do. What several ranks have under one name, such as a buffer, is saved from the first of them,
    unless it is sharded. An error on one rank is raised on all ranks.

    Args:
        dirname: the directory of the checkpoints; made if it is missing.
        asynchronous: whether training goes on as soon as the values have been copied to the CPU. They are written in
            the background, one checkpoint at a time. Call :meth:`wait` at the end of training, for the last one.
        require_empty: whether to raise if the directory holds checkpoints of another run.

    Attributes:
        dirname: the directory, the same on all ranks.
        asynchronous: what was passed.

    Raises:
        ValueError: if ``dirname`` is not empty and should be, or if there is no process group for asynchronous writing.

    Examples:
        >>> import os, tempfile, torch
        >>> from ignite.engine import Engine, Events
        >>> from ignite.handlers import Checkpoint
        >>> from ignite_ema import EMAHandler
        >>> from ignite_ema.distributed import load_objects
        >>> model = torch.nn.Linear(1, 1)
        >>> trainer = Engine(lambda engine, batch: None)
        >>> directory = tempfile.mkdtemp()
        >>> objects = {"model": model, "ema_handler": EMAHandler(model), "trainer": trainer}
        >>> checkpoint = Checkpoint(objects, ShardedSaver(directory), n_saved=1)
        >>> _ = trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
        >>> _ = trainer.run([0, 0], max_epochs=3)
        >>> os.listdir(directory)
        ['checkpoint_6.pt']
        >>> load_objects(objects, os.path.join(directory, "checkpoint_6.pt"))
    """

    def __init__(
        self, dirname: str | os.PathLike[str], *, asynchronous: bool = False, require_empty: bool = True
    ) -> None:
        if asynchronous and not dist.is_initialized():
            raise ValueError(
                "asynchronous should be False if there is no process group, got True; call "
                "torch.distributed.init_process_group first, or save with Ignite's DiskSaver."
            )
        self.dirname = on_first_rank(partial(_prepared, Path(dirname), require_empty))
        self.asynchronous = asynchronous
        self._dropped: list[str] = []
        self._running: tuple[Future[None], _Writer] | None = None
        if asynchronous:
            # A separate group, or its messages would mix with those of training. torch's async_save is no option: in
            # torch 2.6 it does not copy tensors on the CPU, and a rank that cannot copy leaves the others waiting.
            self._group = dist.new_group(backend="gloo")
            self._executor = ThreadPoolExecutor(1, "ShardedSaver")

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Saves the states of this rank; call it on all ranks.

        Args:
            checkpoint: the state of each object, by name.
            filename: the name of the new checkpoint.
            metadata: passed by Ignite, and not used.

        Raises:
            ValueError: on all ranks, if two of them have different tensors under one name.
            RuntimeError: on all ranks, if one of them could not write. The previous checkpoint still exists then.
        """
        self.wait()
        name, dropped = on_first_rank(lambda: (filename, self._dropped))
        _check_agreement(checkpoint)
        self._dropped = []
        writer = _Writer(self.dirname / name, dropped)
        with self._reported(writer):
            on_first_rank(writer.clear)
            if self.asynchronous:
                copied = on_all_ranks(lambda: _copied(checkpoint))
                self._running = self._executor.submit(_save, copied, writer, self._group), writer
            else:
                with warnings.catch_warnings():  # torch's, that there is no process group
                    warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
                    _save(checkpoint, writer)

    def remove(self, filename: str) -> None:
        """Notes that a checkpoint is no longer needed; it is removed when the next one is in place.

        Args:
            filename: the name of the checkpoint.
        """
        self._dropped.append(filename)

    def wait(self) -> None:
        """Waits for what is being written in the background; call it on all ranks.

        Raises:
            RuntimeError: on all ranks, if one of them could not write. The previous checkpoint still exists then.
        """
        if self._running is not None:
            (future, writer), self._running = self._running, None
            with self._reported(writer):
                future.result()

    @contextmanager
    def _reported(self, writer: "_Writer") -> Iterator[None]:
        """Raises on all ranks, with the reason, if a checkpoint cannot be saved; what it replaces is dropped later."""
        try:
            yield
        except (Exception, CheckpointException) as error:
            self._dropped += writer.dropped
            if is_first_rank():
                shutil.rmtree(writer.hidden, ignore_errors=True)
            raise RuntimeError(
                f"'{writer.target}' should be saved by all ranks, but {_reason(error)}; the checkpoint before it is "
                "still there: remove the cause, and save again."
            ) from error


def _save(checkpoint: Mapping[str, Any], writer: "_Writer", group: Any = None) -> None:
    # If ranks have different values under one name, as buffers may, the first rank's value is saved, not a mixture.
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    save(dict(checkpoint), storage_writer=writer, planner=planner, process_group=group)


class _Writer(FileSystemWriter):
    """Writes a checkpoint under a hidden name; the first rank renames it when all ranks have written.

    Attributes:
        target: the path of the checkpoint.
        hidden: the path where it is written.
        dropped: the names of checkpoints to remove after that.
    """

    def __init__(self, target: Path, dropped: list[str]) -> None:
        self.target, self.hidden, self.dropped = target, _hidden(target, "partial"), dropped
        super().__init__(self.hidden)

    def clear(self) -> None:
        shutil.rmtree(self.hidden, ignore_errors=True)  # left by a failed save
        self.hidden.mkdir()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if not self.hidden.is_dir():  # torch would make one here
            raise OSError(f"it does not see '{self.hidden}', which the first rank has made")
        return super().prepare_local_plan(plan)

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        sync_directory(self.hidden)
        old = _hidden(self.target, "old")
        if replaces := self.target.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.target.rename(old)  # restored if the run is killed now
        try:
            self.hidden.rename(self.target)
        except OSError:
            if replaces:
                old.rename(self.target)
            raise
        sync_directory(self.target.parent)
        for path in (old, *(self.target.with_name(name) for name in self.dropped)):
            if path != self.target and path.exists():
                _remove(path)


def _hidden(path: Path, suffix: str) -> Path:
    """The hidden name of a checkpoint: "partial" while it is written or removed, "old" while another replaces it."""
    return path.with_name(f".{path.name}.{suffix}")


def _remove(path: Path) -> None:
    """Removes a checkpoint; renames it first, so that what is half removed is not taken for a checkpoint."""
    trash = _hidden(path, "partial")
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _prepared(dirname: Path, require_empty: bool) -> Path:
    """The directory, made if it is missing, and cleaned of what a killed run has left in it."""
    names = sorted(path.name for path in dirname.iterdir()) if dirname.exists() else []
    if require_empty and (found := [name for name in names if not name.startswith(".")]):
        raise ValueError(
            f"'{dirname}' should be empty, but has '{found[0]}' among {len(found)} entries; choose another "
            "directory, or pass require_empty=False to continue in this one."
        )
    dirname.mkdir(parents=True, exist_ok=True)
    for unfinished in dirname.glob(".*.partial"):
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
    for old in dirname.glob(".*.old"):
        if (old / ".metadata").is_file():
            target = dirname / old.name.removeprefix(".").removesuffix(".old")
            if target.exists():
                _remove(old)
            else:
                old.rename(target)  # killed before the new checkpoint was moved here
    return dirname.absolute()


def _check_agreement(checkpoint: Mapping[str, Any]) -> None:
    """Raises ValueError on all ranks if two of them have different tensors under one name, which would be mixed."""
    described = {
        _text(at): f"({leaf.dtype}, {tuple(leaf.shape)}, {getattr(leaf, 'placements', 'whole')})"
        for at, leaf in _leaves(checkpoint).items()
        if isinstance(leaf, Tensor)
    }
    if difference := _difference(described):
        raise ValueError(
            f"What is saved under one name should be alike on all ranks, got {difference}; build the objects alike on "
            "all ranks, or save them under different names."
        )


def _copied(value: Any) -> Any:
    """A copy of a state on the CPU; of a DTensor, its shards are copied."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(part) for key, part in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


# Loading


def load_objects(to_load: Mapping[str, Any], checkpoint: str | os.PathLike[str]) -> None:
    """Loads objects that :class:`ShardedSaver` has saved, on any number of ranks; call it on all ranks.

    Everything is read and verified before anything is changed. This takes memory for a second copy of the states.

    Args:
        to_load: all or some of the objects that were saved, under the same names. An optimizer need not have stepped.
        checkpoint: the directory; the first rank's counts for all.

    Raises:
        FileNotFoundError: on all ranks, if ``checkpoint`` is not a checkpoint.
        OSError, ValueError: on all ranks, if the checkpoint is damaged, or was not saved from these objects. Nothing
            has been loaded then.
        RuntimeError: on all ranks, if the model of a handler holds averaged weights (``swapped``).
    """
    path = on_first_rank(lambda: _found(Path(checkpoint)))
    states = on_all_ranks(lambda: _current(to_load))
    names = [_text(at) for at in _leaves(states)]
    others = set().union(*_gathered(names)).difference(names)
    contents = on_all_ranks(lambda: read_contents(path))
    loaded = on_all_ranks(
        lambda: {name: _read(name, value, states[name], others, path, contents) for name, value in to_load.items()}
    )
    on_all_ranks(lambda: Checkpoint.load_objects(dict(to_load), loaded))


def _current(to_load: Mapping[str, Any]) -> dict[str, Any]:
    """The states of the objects, before anything is loaded."""
    for name, value in to_load.items():
        if isinstance(value, EMAHandler) and value.average.is_swapped():
            raise RuntimeError(
                f"'{name}' should not be loaded while the model holds averaged weights; load it outside of swapped()."
            )
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)  # Ignite's Checkpoint unwraps these
    inner = {name: value.module if isinstance(value, wrappers) else value for name, value in to_load.items()}
    return {name: value.state_dict() for name, value in inner.items()}


def _found(path: Path) -> Path:
    if not path.exists() and _hidden(path, "old").exists():
        path = _hidden(path, "old")  # a run was killed between two renames
    if not (path / ".metadata").is_file():
        raise FileNotFoundError(
            f"'{path}' should be a directory that ShardedSaver wrote, but there is no '.metadata' in it; name one of "
            "its checkpoints."
        )
    return path.absolute()


def _read(name: str, value: Any, current: Any, others: set[str], path: Path, contents: Metadata) -> dict[str, Any]:
    """The saved state of an object, nested and sharded like its current state."""
    places = _places(name, current, others, contents)
    try:
        made = _targets(value, current, {at: contents.state_dict_metadata[key] for key, at in places.items()})
    except ValueError as error:
        raise ValueError(
            f"'{path}' should be a checkpoint of these objects, but '{name}' in it {error}; load it into the objects "
            "that were saved, or take another one."
        ) from None
    targets = {key: made[at] for key, at in places.items()}
    read_into(targets, path, contents)
    for key, leaf in targets.items():
        if (foreign := _foreign(leaf)) is not None:
            raise ValueError(
                f"'{key}' should be a plain value, but has {kind_of(foreign)}; load the other objects only, or save a "
                "state of plain values."
            )
    state: dict[str, Any] = _filled(nested(targets, places), current)
    if isinstance(value, Optimizer):  # before its first step, its own state does not show that these keys are numbers
        saved = state.get("state", {}).items()
        state["state"] = {int(key) if str(key).isdecimal() else key: entry for key, entry in saved}
    return state


def _places(name: str, state: Any, others: set[str], contents: Metadata) -> dict[str, KeyPath]:
    """The names under which a checkpoint has an object's values, and their paths in the object's state.

    Names that another rank has, and this one does not, are left to it: in a pipeline, each stage has its own names.
    """
    paths = contents.planner_data or {key: (key,) for key in contents.state_dict_metadata}
    places = {key: tuple(path[1:]) for key, path in paths.items() if path[0] == name and len(path) > 1}
    if not places and {str(key) for key in state} & {path[0] for path in paths.values()}:
        places = {key: tuple(path) for key, path in paths.items()}  # a single object is saved without its name
    return {key: at for key, at in places.items() if _text((name, *at)) not in others}


@torch.no_grad()
def _targets(value: Any, current: Any, entries: Mapping[KeyPath, Any]) -> dict[KeyPath, Tensor | None]:
    """Tensors to read into, sharded like the object's own, and None for every other value.

    Raises:
        ValueError: with a clause as its message, if the checkpoint does not fit the object.
    """
    leaves = _leaves(current)
    if leaves and not entries:
        raise ValueError("is missing")
    is_optimizer = isinstance(value, Optimizer)
    parameters = [parameter for group in value.param_groups for parameter in group["params"]] if is_optimizer else []
    for at, leaf in leaves.items():
        # The state of an optimizer, or a metric's list, may have had other entries.
        if at not in entries and isinstance(leaf, Tensor) and not is_optimizer and not isinstance(at[-1], int):
            raise ValueError(f"has no '{_text(at)}'")
    targets: dict[KeyPath, Tensor | None] = {}
    for at, entry in entries.items():
        if isinstance(value, nn.Module) and at[0] not in current:
            raise ValueError(f"has '{_text(at)}', which is not in the model")
        if not isinstance(entry, TensorStorageMetadata):
            targets[at] = None
            continue
        like, size, dtype = leaves.get(at), entry.size, entry.properties.dtype
        if isinstance(like, Tensor) and like.shape != size:
            raise ValueError(f"has '{_text(at)}' of shape {tuple(size)}, which is {tuple(like.shape)} here")
        if not isinstance(like, Tensor) and is_optimizer and at[0] == "state" and str(at[1]).isdecimal():
            if int(at[1]) >= len(parameters):
                raise ValueError(f"has '{_text(at)}', and there are {len(parameters)} parameters here")
            like = parameters[int(at[1])] if size else None  # the count of steps is on the CPU
        if not isinstance(like, Tensor):
            targets[at] = torch.zeros(size, dtype=dtype)
        elif like.shape == size:
            targets[at] = torch.zeros_like(like, dtype=dtype, requires_grad=False)
        else:
            targets[at] = like.new_zeros(size, dtype=dtype)  # replicated, as in torch's optimizers
    return targets


def _foreign(value: Any) -> Any:
    """The first object in a value that could not be read, or None."""
    if isinstance(value, ForeignObject):
        return value
    parts = [*value, *value.values()] if isinstance(value, Mapping) else value
    is_container = isinstance(value, (Mapping, list, tuple, set, frozenset, deque))
    return next(filter(None.__ne__, map(_foreign, parts)), None) if is_container else None


def _leaves(state: Any, path: KeyPath = ()) -> dict[KeyPath, Any]:
    """The values of a nested state by path, flattened as torch.distributed.checkpoint does it."""
    parts: Iterable[tuple[str | int, Any]]
    if isinstance(state, Mapping):
        parts = ((str(key), part) for key, part in state.items())
    elif isinstance(state, list) and any(isinstance(part, (Tensor, Mapping, list)) for part in state):
        parts = enumerate(state)
    else:
        return {path: state}
    return {at: leaf for key, part in parts for at, leaf in _leaves(part, (*path, key)).items()}


def _filled(saved: Any, current: Any) -> Any:
    """The saved state, with the types of the current mappings and keys, and its empty mappings, which are not saved."""
    if not isinstance(saved, dict) or not isinstance(current, dict):
        return saved
    filled = copy(current)  # a model's state keeps the versions of its modules
    filled.clear()
    for key, part in current.items():
        if str(key) in saved or part == {}:
            filled[key] = _filled(saved.get(str(key), {}), part)
    new = saved.keys() - set(map(str, current))
    filled.update({key: part for key, part in saved.items() if key in new})
    return filled


def _text(path: KeyPath) -> str:
    return ".".join(map(str, path))


# Whole tensors on one rank, and equal buffers on all


def gathered_state_dict(handler: EMAHandler) -> dict[str, Tensor]:
    """The whole, plain averaged ``state_dict`` on the CPU of the first rank; an empty one on the others.

    It includes the frozen parameters that the average shares with the model (``share_frozen``), and gathers one tensor
    at a time. Call it on all ranks; write the result on the first with ``checkpoints.save_file``.

    Args:
        handler: the handler of the average.

    Raises:
        TypeError: if ``handler`` is not an EMAHandler.
        ValueError: on all ranks, if their averages have different tensors.
    """
    if not isinstance(handler, EMAHandler):
        raise TypeError(
            f"handler should be an EMAHandler, got {type(handler).__name__}; pass the handler of the average."
        )
    state = on_all_ranks(handler.average.state_dict)
    tensors = {**handler.average.shared_tensors(), **state["averaged_tensors"]}
    if difference := _difference({name: f"{tuple(tensor.shape)}" for name, tensor in tensors.items()}, complete=True):
        raise ValueError(
            f"The average should have the same tensors on all ranks, got {difference}; make the handler on all ranks, "
            "for the same model."
        )
    copies: dict[str, Tensor] = {}
    for name in dict.fromkeys(state["state_dict_names"].values()):
        gathered = whole(tensors[name])
        if is_first_rank():
            copies[name] = gathered.detach().to("cpu", copy=True)
    return {name: copies[first] for name, first in state["state_dict_names"].items() if copies}


def sync_buffers(module: nn.Module, source: int = 0) -> None:
    """Copies the buffers of one rank, such as batch-norm statistics, to all ranks; call it on all ranks.

    Does nothing without a process group.

    Args:
        module: the averaged twin, or a model; its parameters, and buffers that are sharded, are left alone.
        source: the rank whose buffers the others get.

    Raises:
        ValueError: on all ranks, if ``source`` is not a rank, or if the buffers of the ranks differ in names, shapes or
            types; nothing is changed then.

    Examples:
        >>> sync_buffers(nn.BatchNorm1d(2))
    """
    if not dist.is_initialized():
        return
    buffers = {name: buffer for name, buffer in module.named_buffers() if not is_sharded(buffer)}
    described = {name: f"({buffer.dtype}, {tuple(buffer.shape)})" for name, buffer in buffers.items()}
    if difference := _difference({"source": str(source), **described}, complete=True):
        raise ValueError(
            f"sync_buffers should be called with the same source and the same buffers on all ranks, got {difference}; "
            "build the same module on all ranks."
        )
    if isinstance(source, bool) or source not in range(dist.get_world_size()):
        raise ValueError(f"source should be a rank from 0 to {dist.get_world_size() - 1}, got {source!r}.")
    broadcast_buffers(module, source)


# Ranks


def _gathered(value: _T) -> list[_T]:
    """The values of all ranks, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _difference(described: dict[str, str], *, complete: bool = False) -> str | None:
    """The first name under which two ranks differ, and how; or None. ``complete``: all ranks need all names."""
    ranks = _gathered(described)
    for name in {name: None for names in ranks for name in names}:
        there = {rank: names.get(name, "nothing") for rank, names in enumerate(ranks) if complete or name in names}
        first, *others = there
        for rank in others:
            if there[rank] != there[first]:
                return f"'{name}' {there[first]} on rank {first} and {there[rank]} on rank {rank}"
    return None


def _reason(error: BaseException) -> str:
    rank = None
    if isinstance(error, CheckpointException):
        rank, (error, _) = min(error.failures.items())
    reason = str(error).partition("\n")[0].removesuffix(".")
    return reason if rank is None else f"rank {rank} could not ({type(error).__name__}: {reason})"
