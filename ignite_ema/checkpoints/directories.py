"""Reads directories of tensors, from ``save_pretrained`` and :mod:`torch.distributed.checkpoint`."""

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from .files import load_file, load_stream, quoted, unpickled, verify


def read_directory(path: Path) -> Any:
    """What a directory holds, nested as it was saved; nothing in it runs.

    Raises:
        FileNotFoundError, ValueError: if it holds no weights or weights of several models, or is damaged.
    """
    if (path / ".metadata").is_file():
        contents = read_contents(path)
        targets: dict[str, Any] = dict.fromkeys(contents.state_dict_metadata)
        for name, entry in contents.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                targets[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        read_into(targets, path, contents)
        return nested(targets, contents.planner_data or {})
    for suffix in (".safetensors", ".bin"):  # of the files that save_pretrained writes, the better one first
        if len(indices := list(path.glob(f"*{suffix}.index.json"))) == 1:
            return _read_shards(indices[0])
        if len(files := list(path.glob(f"*{suffix}"))) == 1:
            return load_file(files[0])
    raise ValueError(
        f"{quoted(path)} should be a file, or a directory that save_pretrained or torch.distributed.checkpoint wrote, "
        "got another one; name the file or directory in it that holds the weights."
    )


def _read_shards(index: Path) -> dict[str, Any]:
    """The tensors of a model that is too large for one file."""
    try:
        places = dict(json.loads(index.read_text("utf-8"))["weight_map"])
        shards = {file: load_file(index.parent / file) for file in dict.fromkeys(places.values())}
        return {name: shards[file][name] for name, file in places.items()}
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{quoted(index)} should say which file has which tensor; restore it.") from error


# --- torch.distributed.checkpoint ---


def read_contents(path: Path) -> Metadata:
    """The table of contents of a checkpoint; raises ValueError if it is damaged."""
    try:
        with (path / ".metadata").open("rb") as file:
            contents: Metadata = unpickled(file)
        for name, entry in contents.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):  # elements in no chunk would not be read
                there = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
                if there != math.prod(entry.size) or not isinstance(entry.properties.dtype, torch.dtype):
                    raise ValueError(f"'{name}' is not whole")
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise _damaged(path, error) from error
    return contents


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{quoted(path)} should be a checkpoint of torch.distributed.checkpoint, but its table of contents, "
        f"'.metadata', is damaged: {quoted(error)}. Take another copy."
    )


def read_into(targets: dict[str, Any], path: Path, contents: Metadata) -> None:
    """Fills tensors, and replaces None with values, by their names in a checkpoint; other processes take no part.

    Raises:
        OSError, ValueError: if a file is missing, or was changed or cut short. Nothing has been filled then.
    """
    try:
        planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(targets, contents, is_coordinator=True)
        plan = planner.create_local_plan()
        for index in dict.fromkeys(item.storage_index for item in plan.items):
            place = contents.storage_data[index]
            with (path / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                verify(io.BytesIO(file.read(place.length)), f"{path / place.relative_path} ({index.fqn})")
        reader = FileSystemReader(path)
        reader.set_up_storage_reader(contents, is_coordinator=True)
        reader.read_data(plan, planner).wait()
    except (OSError, ValueError):
        raise
    except Exception as error:  # '.metadata' has no checksum
        raise _damaged(path, error) from error


class _Planner(DefaultLoadPlanner):
    """Reads values that are not tensors without running anything."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = load_stream(value)


def nested(content: Mapping[str, Any], paths: Mapping[str, tuple[Any, ...]]) -> Any:
    """Nests the values as they were when they were saved, each at the path of its name, or else under its name."""
    root: dict[Any, Any] = {}
    for name, value in content.items():
        *outer, last = paths.get(name, (name,))
        inside = root
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[last] = value
    return _with_lists(root)


def _with_lists(value: Any) -> Any:
    """The value with lists in place of dicts whose keys are whole numbers, which are places in a list."""
    if type(value) is not dict:
        return value
    inside = {key: _with_lists(part) for key, part in value.items()}
    return [inside[key] for key in sorted(inside)] if inside and all(type(key) is int for key in inside) else inside
