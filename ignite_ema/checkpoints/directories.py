"""Reads directories of tensors: of ``save_pretrained``, and of :mod:`torch.distributed.checkpoint`."""

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from .files import load_file, load_stream, quoted, restricted_unpickler, verify

__all__ = ["DirectoryReader", "PlainPlanner", "nested", "read_directory", "read_directory_metadata"]

_SUFFIXES = (".safetensors", ".bin")  # of what save_pretrained writes, the better one first
_CHECKPOINT = "torch.distributed.checkpoint"


def read_directory(path: Path) -> Any:
    """What a directory holds, nested as it was saved; nothing in it runs.

    Raises:
        FileNotFoundError, ValueError: if it holds no weights or those of several models, or is damaged.
    """
    if (path / ".metadata").is_file():
        return _read_distributed(path)
    for suffix in _SUFFIXES:
        if index := _only(path, f"*{suffix}.index.json"):
            return _read_shards(path, index)
        if file := _only(path, f"*{suffix}"):
            return load_file(file)
    raise ValueError(
        f"{quoted(path)} should be a file, or a directory that save_pretrained or torch.distributed.checkpoint wrote, "
        "got another one; name the file or directory in it that holds the weights."
    )


def _only(path: Path, pattern: str) -> Path | None:
    found = sorted(path.glob(pattern))
    return found[0] if len(found) == 1 else None


def _read_shards(path: Path, index: Path) -> dict[str, Any]:
    """The tensors of a model that is too large for one file."""
    try:
        places = dict(json.loads(index.read_text("utf-8"))["weight_map"])
        shards = {file: load_file(path / file) for file in dict.fromkeys(places.values())}
        return {name: shards[file][name] for name, file in places.items()}
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{quoted(index)} should say which file has which tensor; restore it.") from error


# --- torch.distributed.checkpoint ---

_DTYPES = [name for name, value in vars(torch).items() if isinstance(value, torch.dtype)]
_METADATA = ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta")
_TENSORS = ("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")
_PAIRS = {
    *((f"{_CHECKPOINT}.metadata", name) for name in (*_METADATA, *_TENSORS)),
    *(("torch", name) for name in ("Size", *_DTYPES)),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}


def read_directory_metadata(path: Path) -> Metadata:
    """The table of contents of a directory that :mod:`torch.distributed.checkpoint` wrote.

    Raises:
        ValueError: if it is damaged, or a file in the directory is missing or too short.
    """
    try:
        with (path / ".metadata").open("rb") as file:
            metadata: Metadata = restricted_unpickler(_PAIRS)(file).load()
        lost = [index.fqn for index, place in metadata.storage_data.items() if not _is_there(path, place)]
        lost += [name for name, entry in metadata.state_dict_metadata.items() if not _is_whole(name, entry, metadata)]
    except Exception as error:  # a damaged pickle can lead to nearly any
        raise ValueError(
            f"{quoted(path)} should be a checkpoint of {_CHECKPOINT}, but its table of contents, '.metadata', cannot "
            "be read; it is damaged, take another copy."
        ) from error
    if lost:
        raise ValueError(
            f"{quoted(path)} should hold all that was saved, but {quoted(lost[0])} is not whole in its files, one of "
            "which is missing or cut short; take another copy."
        )
    return metadata


def _is_there(directory: Path, place: Any) -> bool:
    file = directory / place.relative_path
    return file.is_file() and bool(0 <= place.offset < place.offset + place.length <= file.stat().st_size)


def _is_whole(name: str, entry: Any, metadata: Metadata) -> bool:
    """True if an entry has a place for its bytes, or for chunks that cover its tensor."""
    if not isinstance(entry, TensorStorageMetadata):
        return MetadataIndex(name) in metadata.storage_data
    for chunk in entry.chunks:
        place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        if place.length < math.prod(chunk.sizes) * entry.properties.dtype.itemsize:
            return False
    return sum(math.prod(chunk.sizes) for chunk in entry.chunks) == math.prod(entry.size)


class DirectoryReader(FileSystemReader):
    """Reads a checkpoint whose table of contents has been checked, and verifies each chunk before any is loaded.

    Attributes:
        contents: the table of contents.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.contents = read_directory_metadata(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.contents

    def read_into(self, targets: dict[str, Any]) -> None:
        """Fills tensors, and replaces None by values, in this process alone, whether it is one of several or not."""
        planner = PlainPlanner()
        planner.set_up_planner(targets, self.contents, is_coordinator=True)
        self.set_up_storage_reader(self.contents, is_coordinator=True)
        plan = self.prepare_local_plan(planner.create_local_plan())
        (plan,) = self.prepare_global_plan(planner.create_global_plan([plan]))
        self.read_data(planner.finish_plan(plan), planner).wait()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        for index in {item.storage_index: None for item in plan.items}:
            place = self.storage_data[index]
            path = Path(self.path) / place.relative_path
            with path.open("rb") as file:
                file.seek(place.offset)
                chunk = io.BytesIO(file.read(place.length))
            verify(chunk, f"{path} ({index.fqn})")
        return plan


class PlainPlanner(DefaultLoadPlanner):
    """Reads values that are not tensors without running anything; for a state that is flat already."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = load_stream(value)


def _read_distributed(path: Path) -> Any:
    """All that a checkpoint holds."""
    reader = DirectoryReader(path)
    content: dict[str, Any] = dict.fromkeys(reader.contents.state_dict_metadata)
    for name, entry in reader.contents.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            content[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    reader.read_into(content)
    return nested(content, reader.contents.planner_data or {})


def nested(content: Mapping[str, Any], paths: Mapping[str, tuple[Any, ...]]) -> Any:
    """The values at the paths that they had when they were saved; whole numbers in a path are places in a list."""
    root: dict[Any, Any] = {}
    for name, value in content.items():
        *outer, last = paths.get(name, (name,))
        inside = root
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[last] = value
    return _with_lists(root)


def _with_lists(value: Any) -> Any:
    if type(value) is not dict:
        return value
    inside = {key: _with_lists(one) for key, one in value.items()}
    return [inside[key] for key in sorted(inside)] if inside and all(type(key) is int for key in inside) else inside
