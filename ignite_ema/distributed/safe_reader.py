"""Reading the files of :mod:`torch.distributed.checkpoint` without running or believing what they hold.

A checkpoint is a table of contents, ``.metadata``, and files with chunks of tensors. The table is a pickle: it is read
as data, with a record for each object, and translated afterwards. What it says is checked before anything is
loaded: all files lie in the directory, and each tensor is covered by its chunks exactly once.
"""

import io
import math
import zipfile
from collections.abc import Iterable, Mapping
from functools import partial
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

from ..checkpoints.torch_files import DTYPES, MOST_DIMENSIONS
from ..checkpoints.unpickling import Name, Record, Unpickler, kind_of

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


_METADATA = "torch.distributed.checkpoint.metadata"
_OF_METADATA = (BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties)
_BUILDERS = {
    f"{kind.__module__}.{kind.__name__}": partial(Record, kind.__name__)
    for kind in (torch.Size, _StorageInfo, TensorStorageMetadata, *_OF_METADATA)
}
# What a table has besides, of which nothing is needed.
_IGNORED = {
    "collections.OrderedDict",
    "torch.serialization._get_layout",
    *(f"{_METADATA}.{kind}" for kind in ("StorageMeta", "_MEM_FORMAT_ENCODING")),
    *(
        f"pathlib.{kind}"
        for kind in ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
    ),
}
_ALLOWED = {*_BUILDERS, *DTYPES, *_IGNORED}


class _Unreadable(ValueError):
    """What is wrong with a table of contents."""


class _TableUnpickler(Unpickler):
    """Refuses a table with anything else than tables have; what it is read into would be harmless all the same."""

    def _push_name(self, module: str, name: str) -> None:
        if f"{module}.{name}" not in _ALLOWED:
            raise _Unreadable(f"it asks for {f'{module}.{name}'!r}, which no table has")
        super()._push_name(module, name)


def _contents(written: bytes) -> Metadata:
    try:
        unpickler = _TableUnpickler(_BUILDERS, lambda identity: None, len(written), len(written))
        fields = _state(unpickler.load(io.BytesIO(written)), "Metadata")
        entries, places = fields["state_dict_metadata"], fields["storage_data"]
        _check_count(entries.values(), len(places))
        return Metadata(
            {_name(name): _entry(entry) for name, entry in entries.items()},
            storage_data={_index(index): _place(place) for index, place in places.items()},
            storage_meta=StorageMeta(),
        )
    except Exception as error:  # damaged pickles raise whatever they come upon
        reason = str(error) if isinstance(error, _Unreadable) else "it is damaged"
        raise DamagedError(f"its table of contents cannot be read ({reason})") from error


_TENSOR = "TensorStorageMetadata"


def _is_tensor(entry: Any) -> bool:
    return not (isinstance(entry, Record) and entry.kind == "BytesStorageMetadata")


def _check_count(entries: Iterable[Any], count: int) -> None:
    """Each chunk has a place of its own; a small pickle can have the same chunks in many entries."""
    if sum(len(_state(entry, _TENSOR)["chunks"]) for entry in entries if _is_tensor(entry)) > count:
        raise _Unreadable("it has more chunks than places for them")


def _state(value: Any, kind: str) -> Any:
    """What a record of this kind was filled with."""
    if not isinstance(value, Record) or value.kind != kind:
        raise _Unreadable(f"there should be a {kind}, got {kind_of(value)}")
    return value.state


def _entry(value: Any) -> BytesStorageMetadata | TensorStorageMetadata:
    if not _is_tensor(value):
        return BytesStorageMetadata()
    fields = _state(value, _TENSOR)
    dtype = _state(fields["properties"], "TensorProperties")[0]
    if not isinstance(dtype, Name) or dtype.text not in DTYPES:
        raise _Unreadable("a type of number is none")
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(DTYPES[dtype.text]),
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
        raise _Unreadable("its values are transformed")
    return _StorageInfo(_name(fields["relative_path"]), _count(fields["offset"]), _count(fields["length"]))


def _size(value: Any) -> torch.Size:
    if not isinstance(value, Record) or value.kind != "Size":
        raise _Unreadable("a size is none")
    (sizes,) = value.arguments
    if len(sizes) > MOST_DIMENSIONS:
        raise _Unreadable("a size has too many dimensions")
    return torch.Size(map(_count, sizes))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise _Unreadable("a number is out of range")
    return value


def _name(value: Any) -> str:
    if type(value) is not str:
        raise _Unreadable("a name is none")
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
