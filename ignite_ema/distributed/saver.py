"""Saves the shards of all ranks, through :mod:`torch.distributed.checkpoint`."""

import os
import shutil
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch.distributed as dist
from ignite.handlers.checkpoint import BaseSaveHandler
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from ..averaging.collectives import first_said, is_first_rank, on_first_rank, rank
from .loading import replaced_path, single_process

__all__ = ["ShardedSaver"]


class ShardedSaver(BaseSaveHandler):
    """A save handler for Ignite's ``Checkpoint`` by which every rank saves what it holds.

    A checkpoint is a directory. It is written beside its place and renamed when all ranks are done, and only then is
    the one removed that ``n_saved`` drops: a run that is killed while it saves has its last checkpoint still. On
    several machines they have to see one file system.

    Args:
        dirname: where the checkpoints go; made where it is missing.
        asynchronous: go on training as soon as the values have been copied, and write in the background, one checkpoint
            at a time, over a gloo group of its own. Call :meth:`wait` when training is over, for the last one.
        require_empty: raise where the directory holds checkpoints of another run.

    Raises:
        ValueError: where ``dirname`` is not empty and should be, or there is no process group for asynchronous writing.

    Examples:
        >>> import tempfile
        >>> from ignite.engine import Engine, Events
        >>> model = nn.Linear(1, 1)
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
                "asynchronous should be False where there is no process group, got True; call "
                "torch.distributed.init_process_group first, or save with Ignite's DiskSaver."
            )
        self.dirname = Path(dirname)
        self.asynchronous = asynchronous
        self._dropped: list[str] = []
        self._running: tuple[Any, Event, str] | None = None
        self._failure: Exception | None = None
        # Of its own, for what a thread of each rank sends would get mixed up with what training sends meanwhile.
        self._group = dist.new_group(backend="gloo") if asynchronous else None
        on_first_rank(partial(self._prepare, require_empty))

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Saves the states of this rank; to be called on all ranks.

        Raises:
            ValueError: where the ranks do not save the same objects.
            RuntimeError: on all ranks, where one could not write; the checkpoint before is still there then.
        """
        self.wait()
        beside = self._beside(filename)
        _check_same_objects(checkpoint)
        on_first_rank(lambda: shutil.rmtree(beside, ignore_errors=True))  # of a save that failed
        publish = partial(self._publish, beside, filename, tuple(self._dropped))
        if not self.asynchronous:
            try:
                with single_process():
                    save(dict(checkpoint), checkpoint_id=beside, planner=_first_rank_counts())
                on_first_rank(publish)
            except (CheckpointException, OSError) as error:  # on all ranks
                self._report(filename, error)
            return
        published = Event()

        def publish_if_saved(future: Any) -> None:
            try:
                if future.exception() is None and is_first_rank():
                    publish()
            except Exception as error:  # which the future would keep to itself
                self._failure = error
            finally:
                published.set()

        future = async_save(
            dict(checkpoint), checkpoint_id=beside, planner=_first_rank_counts(), process_group=self._group
        )
        self._running = future, published, filename
        future.add_done_callback(publish_if_saved)  # type: ignore[union-attr]

    def remove(self, filename: str) -> None:
        """Notes that a checkpoint is not needed any more; it goes when the next one is there."""
        if is_first_rank():
            self._dropped.append(filename)

    def wait(self) -> None:
        """Waits for what is being written in the background; to be called on all ranks.

        Raises:
            RuntimeError: on all ranks, where one could not write; the checkpoint before is still there then.
        """
        if self._running is not None:
            (future, published, filename), self._running = self._running, None
            error = future.exception()
            published.wait()
            error, self._failure = error or self._failure, None
            self._report(filename, error)

    def _report(self, filename: str, error: BaseException | None) -> None:
        """Raises RuntimeError on all ranks where there is an error on one; what has been written so far goes."""
        if reason := first_said(None if error is None else _reason(error)):
            if is_first_rank():
                shutil.rmtree(self._beside(filename), ignore_errors=True)
            raise RuntimeError(
                f"'{self.dirname / filename}' should be saved by all ranks, but {reason}; the checkpoint before it is "
                "still there: put right what is in the way, and save again."
            ) from error

    def _beside(self, filename: str) -> Path:
        """Where a checkpoint is written."""
        return self.dirname / f".{filename}.partial"

    def _prepare(self, require_empty: bool) -> None:
        names = sorted(path.name for path in self.dirname.iterdir()) if self.dirname.exists() else []
        if require_empty and (found := [name for name in names if not name.startswith(".")]):
            raise ValueError(
                f"'{self.dirname}' should be empty, but has '{found[0]}' among {len(found)} entries; choose another "
                "directory, or pass require_empty=False to go on in this one."
            )
        self.dirname.mkdir(parents=True, exist_ok=True)
        for leftover in self.dirname.glob(".*.partial"):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        for old in self.dirname.glob(".*.old"):
            target = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
            if not target.exists():  # it was killed between two renames
                old.rename(target)

    def _publish(self, beside: Path, filename: str, dropped: Collection[str]) -> None:
        target, old = self.dirname / filename, replaced_path(self.dirname / filename)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        beside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        for name in dropped:
            if name != filename and (self.dirname / name).exists():
                (self.dirname / name).rename(beside)  # so that no half of one is taken for a whole
                shutil.rmtree(beside, ignore_errors=True)
        self._dropped = [name for name in self._dropped if name not in dropped]


def _reason(error: BaseException) -> str:
    where = rank()
    if isinstance(error, CheckpointException):
        where, (error, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"rank {where} could not ({type(error).__name__}: {str(error).removesuffix('.')})"


def _first_rank_counts() -> DefaultSavePlanner:
    """Saves from the first rank what all have; else, where they differ, as buffers do, one would get a mixture."""
    return DefaultSavePlanner(dedup_save_to_lowest_rank=True)


def _check_same_objects(checkpoint: Collection[str]) -> None:
    """Raises ValueError on all ranks where they would not save the same; else those that have more wait for ever."""
    names = on_first_rank(lambda: sorted(checkpoint))
    differs = sorted({*names} ^ {*checkpoint})
    problem = None
    if differs:
        having, lacking = (0, rank()) if differs[0] in names else (rank(), 0)
        problem = f"got '{differs[0]}' on rank {having} and not on rank {lacking}"
    if problem := first_said(problem):
        raise ValueError(
            f"A checkpoint should have the same objects on all ranks, {problem}; build them, the EMA handler too, on "
            "all ranks, and save them on all."
        )
