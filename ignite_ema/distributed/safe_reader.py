"""Reading the files of :mod:`torch.distributed.checkpoint` without running or believing what they hold.

A checkpoint is a table of contents, ``.metadata``, and files with chunks of tensors. The table is a pickle: it is read
with stand-ins for all classes, which do nothing, and translated afterwards. What it says is checked before anything is
loaded: all files lie in the directory, and each tensor is covered by its chunks exactly once.
"""

import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan

__all__ = ["DamagedError", "Planner", "Reader"]

Places = Mapping[MetadataIndex, _StorageInfo]


class DamagedError(ValueError):
    """A checkpoint is damaged, or was not written by a saver; says in which way, as a part of a sentence."""


class Reader(FileSystemReader):
    """Reads a checkpoint whose table of contents has been checked.

    Attributes:
        contents: the table of contents.
        digest: of the table of contents, and so of the checkpoint.

    Raises:
        DamagedError: where the table is none, or a file is missing, cut short or elsewhere.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        written = (path / ".metadata").read_bytes()
        self.digest = sha256(written).hexdigest()
        self.contents = _contents(written)
        _check_files(path, self.contents.storage_data)
        for name, entry in self.contents.state_dict_metadata.items():
            _check_chunks(name, entry, self.contents.storage_data)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.contents

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Reads each chunk once before any is loaded, so that a damaged one is found while nothing has changed."""
        for index in {item.storage_index: None for item in plan.items}:
            place = self.storage_data[index]
            with (Path(self.path) / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                self._check_chunk(index, io.BytesIO(file.read(place.length)))
        return plan

    def _check_chunk(self, index: MetadataIndex, stream: io.BytesIO) -> None:
        try:
            archive = zipfile.ZipFile(stream)
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("it was compressed")
            if torch.serialization.get_crc32_options() and archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
            stream.seek(0)
            value = torch.load(stream, map_location="cpu", weights_only=True)
        except Exception as error:  # of a damaged file nearly anything can come
            raise ValueError(f"'{index.fqn}' holds something else than plain values, or is damaged") from error
        entry = self.contents.state_dict_metadata[index.fqn]
        if isinstance(entry, TensorStorageMetadata):
            (sizes,) = [chunk.sizes for chunk in entry.chunks if chunk.offsets == index.offset]
            if not isinstance(value, Tensor) or value.shape != sizes or value.dtype != entry.properties.dtype:
                raise ValueError(f"'{index.fqn}' is not the tensor that the table of contents announces")


class Planner(DefaultLoadPlanner):
    """Loads values that are no tensors without running anything."""

    def create_local_plan(self) -> LoadPlan:
        entries = self.metadata.state_dict_metadata if self.metadata is not None else {}
        for name, value in self.state_dict.items():  # a number may have become a tensor, as a learning rate does
            if isinstance(value, Tensor) and value.ndim and isinstance(entries.get(name), BytesStorageMetadata):
                raise ValueError(f"'{name}' should be a tensor in the checkpoint as it is here, and is another value")
        return super().create_local_plan()

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)
        stream = io.BytesIO()
        torch.save(plain, stream)
        stream.seek(0)
        super().load_bytes(read_item, stream)


# The table of contents.


class _StandIn:
    """Takes the place of an object of a table of contents: holds what it is made of, and does nothing."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any) -> "_StandIn":
        made = super().__new__(cls)
        made.args = args
        return made

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_KNOWN = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    _FILES: {"_StorageInfo"},
    _METADATA: {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Unpickler(pickle.Unpickler):
    """Makes stand-ins for the classes of a table of contents, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if name not in _KNOWN.get(module, ()) and not (module.startswith("pathlib") and name.endswith("Path")):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not loaded")
        return type(name, (_StandIn,), {})  # a new one each time: what a pickle does to it, it does to nothing else


def _contents(written: bytes) -> Metadata:
    try:
        fields = _state(_Unpickler(io.BytesIO(written)).load(), "Metadata")
        entries = {_name(name): _entry(entry) for name, entry in fields["state_dict_metadata"].items()}
        places = {_index(index): _place(place) for index, place in fields["storage_data"].items()}
    except Exception as error:  # damaged pickles raise whatever they come upon
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else type(error).__name__
        raise DamagedError(f"its table of contents cannot be read ({reason})") from error
    return Metadata(entries, storage_data=places, storage_meta=StorageMeta())


def _state(value: Any, kind: str) -> Any:
    """What a stand-in of this kind was filled with."""
    if not isinstance(value, _StandIn) or type(value).__name__ != kind:
        raise pickle.UnpicklingError(f"there should be a {kind}, got {type(value).__name__}")
    return value.state


def _entry(value: Any) -> BytesStorageMetadata | TensorStorageMetadata:
    if type(value).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _state(value, "TensorStorageMetadata")
    dtype = _state(fields["properties"], "TensorProperties")[0]
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a type of number is none")
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype),
        _size(fields["size"]),
        [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _index(value: Any) -> MetadataIndex:
    fields = _state(value, "MetadataIndex")
    offset, index = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _name(fields["fqn"]), None if offset is None else _size(offset), None if index is None else _count(index)
    )


def _place(value: Any) -> _StorageInfo:
    fields = _state(value, "_StorageInfo")
    if fields.get("transform_descriptors"):
        raise pickle.UnpicklingError("its values are transformed")
    return _StorageInfo(_name(fields["relative_path"]), _count(fields["offset"]), _count(fields["length"]))


def _size(value: Any) -> torch.Size:
    if not isinstance(value, _StandIn) or type(value).__name__ != "Size":
        raise pickle.UnpicklingError("a size is none")
    return torch.Size(map(_count, *value.args))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise pickle.UnpicklingError("a number is out of range")
    return value


def _name(value: Any) -> str:
    if type(value) is not str:
        raise pickle.UnpicklingError("a name is none")
    return value


def _check_files(directory: Path, places: Places) -> None:
    """Raises DamagedError where a file is not in the directory or cut short, or two chunks have the same bytes."""
    by_file: dict[str, list[tuple[int, int]]] = {}
    for place in places.values():
        by_file.setdefault(place.relative_path, []).append((place.offset, place.offset + place.length))
    for name, parts in by_file.items():
        file = directory / name
        if name in ("", ".", "..") or "\0" in name or Path(name).name != name:
            raise DamagedError(f"{name!r} is not a file of this directory")
        if not file.is_file():
            raise DamagedError(f"'{name}' is missing")
        if file.resolve().parent != directory.resolve():
            raise DamagedError(f"'{name}' is a link to another directory")
        parts.sort()
        if file.stat().st_size < max(stop for _, stop in parts):
            raise DamagedError(f"'{name}' is cut short")
        if any(stop > start for (_, stop), (start, _) in pairwise(parts)):
            raise DamagedError(f"'{name}' has the same bytes for several values")


def _check_chunks(name: str, entry: BytesStorageMetadata | TensorStorageMetadata, places: Places) -> None:
    """Raises DamagedError unless the chunks of a tensor cover it exactly once, and lie in files."""
    if isinstance(entry, BytesStorageMetadata):
        if MetadataIndex(name) not in places:
            raise DamagedError(f"'{name}' is in none of its files")
        return
    for chunk in entry.chunks:
        place = places.get(MetadataIndex(name, chunk.offsets))
        if place is None or place.length < math.prod(chunk.sizes) * entry.properties.dtype.itemsize:
            raise DamagedError(f"'{name}' is not whole in its files")
    if math.prod(entry.size) and not _is_grid(entry):
        raise DamagedError(f"'{name}' should be covered by its chunks exactly once, and is not")


def _is_grid(entry: TensorStorageMetadata) -> bool:
    """Whether the chunks are all cells of a grid over the tensor, each once; sharded tensors are saved so."""
    cells = [(chunk.offsets, chunk.sizes) for chunk in entry.chunks if math.prod(chunk.sizes)]
    if any(len(offsets) != len(entry.size) or len(sizes) != len(entry.size) for offsets, sizes in cells):
        return False
    count = 1
    for dimension, size in enumerate(entry.size):
        parts = sorted({(offsets[dimension], sizes[dimension]) for offsets, sizes in cells})
        ends = [0, *(start + length for start, length in parts)]
        if ends[:-1] != [start for start, _ in parts] or ends[-1] != size:
            return False
        count *= len(parts)
    return len(set(cells)) == len(cells) == count
