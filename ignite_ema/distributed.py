"""Checkpoints of sharded training: every rank saves its shards, and any number of ranks loads them.

Ignite's ``Checkpoint`` asks every rank for its states and writes those of one. With :class:`ShardedSaver` it writes all
of them, by way of :mod:`torch.distributed.checkpoint`. Nothing in a checkpoint is run when it is read.
"""

import io
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
from ignite.handlers.checkpoint import BaseSaveHandler, Checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.optim import Optimizer

from .handler import EMAHandler
from .structure import is_sharded

__all__ = ["ShardedSaver", "gathered_state_dict", "load_objects"]


class ShardedSaver(BaseSaveHandler):
    """A save handler for Ignite's ``Checkpoint`` by which every rank saves what it holds.

    A checkpoint is a directory. It is written beside its place and renamed when all ranks are done, and only then is
    the one removed that ``n_saved`` drops: a run that is killed while it saves has its last checkpoint still. On
    several machines they have to see one file system.

    Args:
        dirname: where the checkpoints go; made where it is missing.
        asynchronous: go on training as soon as the values have been copied, and write in the background, one checkpoint
            at a time. Needs a process group with a CPU backend, such as ``"cpu:gloo,cuda:nccl"``, where there is one.
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
        self._running: tuple[Any, Event] | None = None
        names = sorted(path.name for path in self.dirname.iterdir()) if self.dirname.exists() else []
        if require_empty and (found := [name for name in names if not name.startswith(".")]):
            raise ValueError(
                f"'{self.dirname}' should be empty, but has '{found[0]}' among {len(found)} entries; choose another "
                "directory, or pass require_empty=False to go on in this one."
            )
        _barrier()  # before the first rank writes, all have looked
        _on_first_rank(lambda: self.dirname.mkdir(parents=True, exist_ok=True))

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Saves the states of this rank; to be called on all ranks."""
        self.wait()
        partial = self.dirname / f".{filename}.partial"
        _on_first_rank(lambda: shutil.rmtree(partial, ignore_errors=True))  # of a run that was killed
        if not self.asynchronous:
            with _single_process():
                save(dict(checkpoint), checkpoint_id=partial)
            _on_first_rank(lambda: self._publish(partial, filename))
            return
        published = Event()

        def publish(future: Any) -> None:
            try:
                if future.exception() is None and _rank() == 0:
                    self._publish(partial, filename)
            finally:
                published.set()

        future = async_save(dict(checkpoint), checkpoint_id=partial)
        self._running = future, published
        future.add_done_callback(publish)  # type: ignore[union-attr]

    def remove(self, filename: str) -> None:
        """Notes that a checkpoint is not needed any more; it goes when the next one is there."""
        self._dropped.append(filename)

    def wait(self) -> None:
        """Waits for what is being written in the background, and raises what has gone wrong with it."""
        if self._running is not None:
            future, published = self._running
            self._running = None
            future.result()
            published.wait()
            _barrier()

    def _publish(self, partial: Path, filename: str) -> None:
        target, old = self.dirname / filename, self.dirname / f".{filename}.old"
        if target.exists():
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        for name in self._dropped:
            if name != filename:
                shutil.rmtree(self.dirname / name, ignore_errors=True)
        self._dropped.clear()


def load_objects(to_load: Mapping[str, Any], checkpoint: str | os.PathLike[str]) -> None:
    """Fills objects with what :class:`ShardedSaver` has saved of them, on any number of ranks; to be called on all.

    Args:
        to_load: all objects that were saved or some, under the same names. For an optimizer the model has to be among
            them, whose parameters it trains: its state is made first, to have where to load to.
        checkpoint: the directory.

    Raises:
        FileNotFoundError, ValueError: where the checkpoint is none, is incomplete, or was not saved from these objects.
    """
    path = Path(checkpoint)
    if not (path / ".metadata").is_file():
        raise FileNotFoundError(
            f"'{path}' should be a directory that ShardedSaver wrote, but there is no '.metadata' in it; name one of "
            "its checkpoints."
        )
    reader = _Reader(path)
    try:
        saved = reader.read_metadata().state_dict_metadata.keys()
        for value in to_load.values():
            if isinstance(value, Optimizer):
                _make_state(value, to_load)
        states = {name: _unwrapped(value).state_dict() for name, value in to_load.items()}
        with _single_process():
            load(_as_saved(states, saved), storage_reader=reader, planner=_Planner())
    except pickle.UnpicklingError as error:
        raise ValueError(f"'{path}' should be a checkpoint of ShardedSaver, but {error}.") from error
    except CheckpointException as error:
        reasons = [str(reason[0]) for reason in error.failures.values()]
        raise ValueError(f"'{path}' should be a checkpoint of these objects, but: {reasons[0]}") from error
    Checkpoint.load_objects(dict(to_load), states)


def gathered_state_dict(handler: EMAHandler) -> dict[str, Tensor]:
    """The plain averaged ``state_dict``, whole, on the CPU of the first rank, and nothing on the others.

    Gathers one tensor at a time. To be called on all ranks; ``checkpoints.save_file`` writes it on the first.
    """
    state = handler.state_dict()
    is_first = _rank() == 0
    whole: dict[str, Tensor] = {}
    for path, tensor in state["averaged_tensors"].items():
        full = tensor.full_tensor() if is_sharded(tensor) else tensor
        if is_first:
            whole[path] = full.detach().cpu()
    return {name: whole[path] for name, path in state["state_dict_names"].items()} if is_first else {}


def _as_saved(states: dict[str, Any], saved: Collection[str]) -> dict[str, Any]:
    """The states as Ignite gives them to a save handler: a single one without its name."""
    if len(states) > 1:
        return states
    ((name, state),) = states.items()
    named = [key for key in saved for first in state if f"{key}.".startswith(f"{name}.{first}.")]
    return states if named else state


def _unwrapped(value: Any) -> Any:
    """As Ignite's ``Checkpoint`` unwraps it."""
    return value.module if isinstance(value, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else value


def _make_state(optimizer: Optimizer, objects: Mapping[str, Any]) -> None:
    """Lets an optimizer that has not stepped yet have its state, as a step would make it."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for value in objects.values():
        if isinstance(value, nn.Module) and any(id(parameter) in trained for parameter in value.parameters()):
            get_optimizer_state_dict(value, optimizer)
            return
    raise ValueError("to_load should have the model whose parameters its optimizer trains, but has none; add it.")


class _Planner(DefaultLoadPlanner):
    """Loads values that are no tensors without running anything."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)
        super().load_bytes(read_item, io.BytesIO(_saved(plain)))


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


class _Reader(FileSystemReader):
    """Reads the table of contents without running anything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with (Path(self.path) / ".metadata").open("rb") as stream:
            metadata = _Contents(stream).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


_KNOWN = {
    "torch": {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)} | {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}


class _Contents(pickle.Unpickler):
    """Knows the classes of a table of contents, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"its table of contents asks for {module}.{name}, which is not loaded")
        return super().find_class(module, name)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _on_first_rank(action: Callable[[], object]) -> None:
    """Calls ``action`` on the first rank, while the others wait."""
    if _rank() == 0:
        action()
    _barrier()


@contextmanager
def _single_process() -> Iterator[None]:
    """Silences torch's remark that there is no process group, which is meant then."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
