"""Saves the shards of all ranks, through :mod:`torch.distributed.checkpoint`."""

import os
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist
from ignite.handlers.checkpoint import BaseSaveHandler
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import save

from ..averaging.collectives import (
    Group,
    LostRankError,
    first_difference,
    is_first_rank,
    new_group,
    on_all_ranks,
    on_first_rank,
    raise_first_error,
    rank,
    shared_group,
)
from ..averaging.sharding import is_sharded
from ..checkpoints.files import sync_directory
from .loading import process_group, replaced_path
from .safe_reader import Reader

__all__ = ["ShardedSaver"]


class ShardedSaver(BaseSaveHandler):
    """A save handler for Ignite's ``Checkpoint`` by which every rank saves what it holds; to be made on all ranks.

    A checkpoint is a directory. It is written beside its place and renamed when all ranks are done and its files are
    seen to be whole, and only then is the one removed that ``n_saved`` drops: a run that is killed while it saves has
    its last checkpoint still. On several machines they have to see one file system.

    Before anything is written the ranks agree, over a gloo group of their own, on the file name, on what is dropped
    and on the names, shapes and types of what is saved. What goes wrong on one rank is raised on all.

    Args:
        dirname: where the checkpoints go; made where it is missing.
        asynchronous: go on training as soon as the values have been copied, and write in the background, one checkpoint
            at a time. Call :meth:`wait` when training is over, for the last one.
        require_empty: raise where the directory holds checkpoints of another run.

    Raises:
        ValueError: where ``dirname`` is not empty and should be, there is no process group for asynchronous writing, or
            the ranks have different arguments.

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

    _being_written: ClassVar[set[Path]] = set()  # by any saver of this process

    def __init__(
        self, dirname: str | os.PathLike[str], *, asynchronous: bool = False, require_empty: bool = True
    ) -> None:
        if asynchronous and not dist.is_initialized():
            raise ValueError(
                "asynchronous should be False where there is no process group, got True; call "
                "torch.distributed.init_process_group first, or save with Ignite's DiskSaver."
            )
        self.dirname = Path(dirname)
        self.asynchronous = asynchronous
        self._dropped: list[str] = []
        self._running: tuple[Future[None], str, tuple[str, ...]] | None = None
        # Of its own, for what a thread of each rank sends would get mixed up with what others send meanwhile.
        self._group = new_group() if asynchronous else shared_group()
        self._executor = ThreadPoolExecutor(1, "ShardedSaver")  # starts its thread when it is needed
        described = {
            "dirname": f"'{self.dirname.absolute()}'",
            "asynchronous": str(asynchronous),
            "require_empty": str(require_empty),
        }
        if difference := first_difference(described, self._group):
            raise ValueError(
                f"A ShardedSaver should be made alike on all ranks, got {difference}; pass the same on all."
            )
        on_first_rank(partial(self._prepare, require_empty), self._group)

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Saves the states of this rank; to be called on all ranks.

        Raises:
            ValueError: on all ranks, where they do not save the same objects under the same name.
            RuntimeError: on all ranks, where one could not write, or has ended. The checkpoint before is still there
                whenever something is raised.
        """
        self.wait()
        dropped = tuple(self._dropped)
        _check_agreement(checkpoint, filename, dropped, self._group)
        if self.asynchronous:
            copied = self._reported(filename, lambda: on_all_ranks(lambda: _copied(checkpoint), self._group))
            self._running = self._executor.submit(self._write, copied, filename, dropped), filename, dropped
        else:
            self._reported(filename, lambda: self._write(checkpoint, filename, dropped))
            self._forget(dropped)

    def remove(self, filename: str) -> None:
        """Notes that a checkpoint is not needed any more; it goes when the next one is there."""
        self._dropped.append(filename)

    def wait(self) -> None:
        """Waits for what is being written in the background; to be called on all ranks.

        Raises:
            RuntimeError: on all ranks, where one could not write; the checkpoint before is still there then.
        """
        if self._running is not None:
            (future, filename, dropped), self._running = self._running, None
            self._reported(filename, future.result)
            self._forget(dropped)

    def _reported(self, filename: str, action: Any) -> Any:
        """Calls ``action`` on all ranks; raises RuntimeError on all where one fails, and what it has written goes."""
        result, failure = None, None
        try:
            result = action()
        except LostRankError:
            raise
        except (Exception, CheckpointException) as error:
            failure = RuntimeError(
                f"'{self.dirname / filename}' should be saved by all ranks, but {_reason(error)}; the checkpoint "
                "before it is still there: put right what is in the way, and save again."
            )
            failure.__cause__ = error
        try:
            raise_first_error(failure, self._group)
        except RuntimeError:
            if is_first_rank():
                shutil.rmtree(self._beside(filename), ignore_errors=True)
            raise
        return result

    def _write(self, checkpoint: Mapping[str, Any], filename: str, dropped: Collection[str]) -> None:
        beside = self._beside(filename)
        on_first_rank(partial(self._clear, beside), self._group)
        try:
            # The first rank saves what all have: where that differs, as buffers do, all else would give a mixture.
            planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
            with process_group(self._group) as messages:
                save(dict(checkpoint), checkpoint_id=beside, planner=planner, process_group=messages)
            on_first_rank(partial(self._publish, beside, filename, dropped), self._group)
        finally:
            self._being_written.discard(beside.absolute())

    def _forget(self, dropped: Collection[str]) -> None:
        self._dropped = [name for name in self._dropped if name not in dropped]

    def _beside(self, filename: str) -> Path:
        """Where a checkpoint is written, and where one is that is being removed; never taken for a whole one."""
        return self.dirname / f".{filename}.partial"

    def _clear(self, beside: Path) -> None:
        shutil.rmtree(beside, ignore_errors=True)  # of a save that failed
        self._being_written.add(beside.absolute())

    def _prepare(self, require_empty: bool) -> None:
        names = sorted(path.name for path in self.dirname.iterdir()) if self.dirname.exists() else []
        if require_empty and (found := [name for name in names if not name.startswith(".")]):
            raise ValueError(
                f"'{self.dirname}' should be empty, but has '{found[0]}' among {len(found)} entries; choose another "
                "directory, or pass require_empty=False to go on in this one."
            )
        self.dirname.mkdir(parents=True, exist_ok=True)
        for leftover in self.dirname.glob(".*.partial"):  # of a run that was killed
            if leftover.is_dir() and leftover.absolute() not in self._being_written:
                shutil.rmtree(leftover, ignore_errors=True)
        for old in self.dirname.glob(".*.old"):
            if (old / ".metadata").is_file() or (old.is_dir() and not any(old.iterdir())):
                self._restore_or_remove(old)

    def _restore_or_remove(self, old: Path) -> None:
        """Brings a checkpoint back whose successor has not come; any other that was left is removed."""
        filename = old.name.removeprefix(".").removesuffix(".old")
        if not (self.dirname / filename).exists() and _is_whole(old):
            old.rename(self.dirname / filename)
        else:
            self._remove(old, self._beside(filename))

    def _publish(self, beside: Path, filename: str, dropped: Collection[str]) -> None:
        Reader(beside)  # raises where not all has arrived here: on another file system, for instance
        target, old = self.dirname / filename, replaced_path(self.dirname / filename)
        sync_directory(beside)
        if replaces := target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        try:
            beside.rename(target)
        except OSError:
            if replaces:
                old.rename(target)
            raise
        sync_directory(self.dirname)
        if replaces:
            self._remove(old, beside)
        for name in dropped:
            if name != filename and (self.dirname / name).exists():
                self._remove(self.dirname / name, beside)

    def _remove(self, path: Path, beside: Path) -> None:
        shutil.rmtree(beside, ignore_errors=True)
        path.rename(beside)  # so that no half of one is taken for a whole
        shutil.rmtree(beside, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    try:
        Reader(path)
    except (OSError, ValueError):
        return False
    return True


def _reason(error: BaseException) -> str:
    where = rank()
    if isinstance(error, CheckpointException):
        where, (error, _) = min(error.failures.items(), key=lambda item: item[0])
    text = str(error).partition("\n")[0].removesuffix(".")
    return f"rank {where} could not ({type(error).__name__}: {text})"


def _copied(value: Any) -> Any:
    """A copy on the CPU, of DTensors that of their shards."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(one) for key, one in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def _check_agreement(
    checkpoint: Mapping[str, Any], filename: str, dropped: Collection[str], group: Group | None
) -> None:
    """Raises ValueError on all ranks where they would not save the same, of which a mixture would become."""
    about_files = {"the file name": f"'{filename}'", "what n_saved drops": str(sorted(dropped))}
    if difference := first_difference(about_files, group):
        raise ValueError(
            f"A checkpoint should have the same name on all ranks, got {difference}; take what is in the name, such as "
            "a score, from one rank or the mean of all."
        )
    description = on_all_ranks(lambda: _description(checkpoint, ""), group)
    if difference := first_difference(description, group):
        raise ValueError(
            f"A checkpoint should have the same objects on all ranks, got {difference}; build them, the EMA handler "
            "too, on all ranks, and save them on all."
        )


def _description(value: Any, path: str) -> dict[str, str]:
    """What is saved, by path: shapes, types and sharding of tensors; of other values only that they are there."""
    if isinstance(value, Tensor):
        held = _sharding(value) if is_sharded(value) else "whole"
        return {f"'{path}'": f"({value.dtype}, {tuple(value.shape)}, {held})"}
    found = {f"'{path}'": "(a value)"} if path else {}
    if type(value) in (list, tuple):
        value = dict(enumerate(value))
    for key, part in value.items() if isinstance(value, Mapping) else ():
        found |= _description(part, f"{path}.{key}" if path else str(key))
    return found


def _sharding(tensor: Any) -> str:
    """Equal on all ranks, where each may have a part of a larger mesh."""
    return f"sharded as {tensor.placements} over a mesh of {tuple(tensor.device_mesh.shape)}"
