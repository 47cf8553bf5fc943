"""Reading the files of :mod:`torch.distributed.checkpoint` without running anything that they hold."""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

__all__ = ["Planner", "Reader"]


class Planner(DefaultLoadPlanner):
    """Loads values that are no tensors without running anything."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        try:
            plain = torch.load(value, weights_only=True)
        except Exception as error:
            name = read_item.storage_index.fqn
            raise ValueError(f"'{name}' holds something else than plain values, or is damaged") from error
        stream = io.BytesIO()
        torch.save(plain, stream)
        stream.seek(0)
        super().load_bytes(read_item, stream)


class Reader(FileSystemReader):
    """Reads the table of contents without running anything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with (Path(self.path) / ".metadata").open("rb") as stream:
            try:
                metadata = _Contents(stream).load()
            except Exception as error:  # damaged pickles raise whatever they come upon
                raise pickle.UnpicklingError(f"its table of contents cannot be read: {error}") from error
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"its table of contents is a {type(metadata).__name__}")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        self._check_sizes(metadata.storage_data)
        return metadata

    def _check_sizes(self, places: Mapping[Any, Any]) -> None:
        """Raises UnpicklingError where a file is not there or cut short, before anything is loaded from the others."""
        ends: dict[Path, int] = {}
        for place in places.values():
            file = Path(self.path) / place.relative_path
            ends[file] = max(ends.get(file, 0), place.offset + place.length)
        for file, end in ends.items():
            if not file.is_file():
                raise pickle.UnpicklingError(f"'{file.name}' is missing")
            if file.stat().st_size < end:
                raise pickle.UnpicklingError(f"'{file.name}' is cut short")


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
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not loaded")
        return super().find_class(module, name)
