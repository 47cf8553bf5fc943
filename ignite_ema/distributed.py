"""Checkpoints of sharded training: every rank saves its shards, and any number of ranks can load them.

Ignite's ``Checkpoint`` asks every rank for its states and writes those of one rank. With :class:`ShardedSaver` it
writes those of all ranks, with :mod:`torch.distributed.checkpoint`. Reading a checkpoint runs nothing in it.
"""

import os
import shutil
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import Any

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
        self.dirname = on_first_rank(lambda: _prepared(Path(dirname), require_empty))
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
        leaves = on_all_ranks(lambda: _leaves(checkpoint))
        _check_agreement(
            {_text(at): leaf for at, leaf in leaves.items() if isinstance(leaf, Tensor)},
            "What is saved under one name should be alike on all ranks, got {}; build the objects alike on all ranks, "
            "or save them under different names.",
        )
        self._dropped = []
        writer = _Writer(self.dirname / name, dropped)
        with self._reported(writer):
            on_first_rank(writer.begin)
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
                with suppress(OSError):
                    _settle(writer.target)
            reason = str(error)
            if isinstance(error, CheckpointException):
                rank, (cause, _) = min(error.failures.items())
                reason = f"rank {rank} raised {type(cause).__name__}: {cause}"
            reason = reason.partition("\n")[0].removesuffix(".")
            raise RuntimeError(
                f"'{writer.target}' should be saved by all ranks, but {reason}; the checkpoint before it is still "
                "there: remove the cause, and save again."
            ) from error


def _save(checkpoint: Mapping[str, Any], writer: "_Writer", group: Any = None) -> None:
    # If ranks have different values under one name, as buffers may, the first rank's value is saved, not a mixture.
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    save(dict(checkpoint), storage_writer=writer, planner=planner, process_group=group)


class _Writer(FileSystemWriter):
    """Writes a checkpoint under a hidden name; when all are done, the first rank renames it and removes ``dropped``."""

    def __init__(self, target: Path, dropped: list[str]) -> None:
        self.target, self.hidden, self.dropped = target, _hidden(target, "partial"), dropped
        super().__init__(self.hidden)

    def begin(self) -> None:
        _settle(self.target)
        self.hidden.mkdir()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if not self.hidden.is_dir():  # torch would make one here
            raise OSError(f"it does not see '{self.hidden}', which the first rank has made")
        return super().prepare_local_plan(plan)

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        sync_directory(self.hidden)
        old = _hidden(self.target, "old")
        if self.target.exists():
            self.target.rename(old)  # comes back if the run is killed now
        self.hidden.rename(self.target)
        sync_directory(self.target.parent)
        for path in (old, *map(self.target.with_name, self.dropped)):
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


def _settle(target: Path) -> None:
    """Cleans up after a save that was killed or failed; the checkpoint that it was about to replace comes back."""
    shutil.rmtree(_hidden(target, "partial"), ignore_errors=True)
    old = _hidden(target, "old")
    if (old / ".metadata").is_file():
        if target.exists():
            _remove(old)
        else:
            old.rename(target)


def _prepared(dirname: Path, require_empty: bool) -> Path:
    """The directory, made if it is missing, and cleaned of what a killed run has left in it."""
    dirname.mkdir(parents=True, exist_ok=True)
    found = sorted(path.name for path in dirname.iterdir() if not path.name.startswith("."))
    if found and require_empty:
        raise ValueError(
            f"'{dirname}' should be empty, but has '{found[0]}' among {len(found)} entries; choose another "
            "directory, or pass require_empty=False to continue in this one."
        )
    for left in (*dirname.glob(".?*.partial"), *dirname.glob(".?*.old")):
        _settle(dirname / left.stem[1:])
    return dirname.absolute()


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
    names = on_all_ranks(lambda: [_text(at) for at in _leaves(states)])
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
    """The saved state of an object, nested and sharded like its current state.

    Names in ``others``, which only other ranks have, are left to them: each stage of a pipeline has its own names.
    """
    paths: dict[str, KeyPath] = contents.planner_data or {}
    places = {key: at[1:] for key, at in paths.items() if at[0] == name and len(at) > 1}
    if not places and {str(key) for key in current} & {at[0] for at in paths.values()}:
        places = paths  # a single object is saved without its name
    places = {key: at for key, at in places.items() if _text((name, *at)) not in others}
    try:
        targets = _targets(value, current, places, contents)
    except ValueError as error:
        raise ValueError(
            f"'{path}' should be a checkpoint of these objects, but '{name}' in it {error}; load it into the objects "
            "that were saved, or take another one."
        ) from None
    read_into(targets, path, contents)
    for key, leaf in targets.items():
        for foreign in _foreign(leaf):
            raise ValueError(
                f"'{key}' should be a plain value, but has {kind_of(foreign)}; load the other objects only, or save a "
                "state of plain values."
            )
    state: dict[str, Any] = _filled(nested(targets, places), current)
    if isinstance(value, Optimizer):  # before its first step, its own state does not show that these keys are numbers
        saved = state.get("state", {}).items()
        state["state"] = {int(key) if str(key).isdecimal() else key: entry for key, entry in saved}
    return state


@torch.no_grad()
def _targets(value: Any, current: Any, places: Mapping[str, KeyPath], contents: Metadata) -> dict[str, Any]:
    """Tensors to read into, sharded like the object's own, and None for other values.

    A ValueError says, in a clause, how the checkpoint does not fit the object.
    """
    leaves, saved = _leaves(current), set(places.values())
    if leaves and not saved:
        raise ValueError("is missing")
    is_optimizer = isinstance(value, Optimizer)
    parameters = [parameter for group in value.param_groups for parameter in group["params"]] if is_optimizer else []
    for at, leaf in leaves.items():
        # The state of an optimizer, or a metric's list, may have had other entries.
        if at not in saved and isinstance(leaf, Tensor) and not is_optimizer and not isinstance(at[-1], int):
            raise ValueError(f"has no '{_text(at)}'")
    targets: dict[str, Tensor | None] = {}
    for key, at in places.items():
        entry, like = contents.state_dict_metadata[key], leaves.get(at)
        if isinstance(value, nn.Module) and at[0] not in current:
            raise ValueError(f"has '{_text(at)}', which is not in the model")
        if not isinstance(entry, TensorStorageMetadata):
            targets[key] = None
            continue
        size, dtype = entry.size, entry.properties.dtype
        if isinstance(like, Tensor) and like.shape != size:
            raise ValueError(f"has '{_text(at)}' of shape {tuple(size)}, which is {tuple(like.shape)} here")
        if not isinstance(like, Tensor) and is_optimizer and at[0] == "state" and str(at[1]).isdecimal():
            if int(at[1]) >= len(parameters):
                raise ValueError(f"has '{_text(at)}', and there are {len(parameters)} parameters here")
            like = parameters[int(at[1])] if size else None  # the count of steps is on the CPU
        if not isinstance(like, Tensor):
            targets[key] = torch.zeros(size, dtype=dtype)
        elif like.shape == size:
            targets[key] = torch.zeros_like(like, dtype=dtype, requires_grad=False)
        else:
            targets[key] = like.new_zeros(size, dtype=dtype)  # replicated, as in torch's optimizers
    return targets


def _foreign(value: Any) -> Iterator[ForeignObject]:
    """The objects in a value that could not be read."""
    if isinstance(value, ForeignObject):
        yield value
    elif isinstance(value, (Mapping, list, tuple, set, frozenset, deque)):
        for part in [*value, *value.values()] if isinstance(value, Mapping) else value:
            yield from _foreign(part)


def _leaves(state: Mapping[str, Any]) -> dict[KeyPath, Any]:
    """The values of a nested state by path, flattened as torch.distributed.checkpoint does it."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(dict(state))
    return {path: planner.state_dict[name] for name, path in planner.mappings.items()}


def _filled(saved: Any, current: Any) -> Any:
    """The saved state, with the types of the current mappings and keys, and its empty mappings, which are not saved."""
    if not isinstance(saved, dict) or not isinstance(current, dict):
        return saved
    filled = copy(current)  # a model's state keeps the versions of its modules
    filled.clear()
    for key, part in current.items():
        if str(key) in saved or part == {}:
            filled[key] = _filled(saved.pop(str(key), {}), part)
    filled.update(saved)
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
    _check_agreement(
        tensors,
        "The average should have the same tensors on all ranks, got {}; make the handler on all ranks, for the same "
        "model.",
        complete=True,
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
    _check_agreement(
        {"source (the argument)": source, **buffers},
        "sync_buffers should be called with the same source and the same buffers on all ranks, got {}; build the same "
        "module on all ranks.",
        complete=True,
    )
    if isinstance(source, bool) or source not in range(dist.get_world_size()):
        raise ValueError(f"source should be a rank from 0 to {dist.get_world_size() - 1}, got {source!r}.")
    broadcast_buffers(module, source)


# Ranks


def _gathered(value: Any) -> list[Any]:
    """The values of all ranks, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _check_agreement(values: Mapping[str, Any], message: str, *, complete: bool = False) -> None:
    """Raises ValueError on all ranks if values of one name differ or, if ``complete``, a rank lacks a name."""
    described = {}
    for name, value in values.items():
        is_tensor = isinstance(value, Tensor)
        kind = (value.dtype, tuple(value.shape), *getattr(value, "placements", ())) if is_tensor else value
        described[name] = repr(kind)
    ranks = _gathered(described)
    for name in dict.fromkeys(name for names in ranks for name in names):
        there = {rank: names.get(name, "nothing") for rank, names in enumerate(ranks) if complete or name in names}
        first, *others = there
        for rank in others:
            if there[rank] != there[first]:
                difference = f"'{name}' {there[first]} on rank {first} and {there[rank]} on rank {rank}"
                raise ValueError(message.format(difference))
