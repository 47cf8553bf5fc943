"""Reading the files of :mod:`torch.distributed.checkpoint` without running what they hold."""

import io
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan

from ..checkpoints.directories import DirectoryReader
from ..checkpoints.files import load_stream

__all__ = ["Planner", "Reader"]


class Reader(DirectoryReader):
    """Reads a checkpoint; ``digest`` is that of its table of contents."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.digest = sha256((path / ".metadata").read_bytes()).hexdigest()


class Planner(DefaultLoadPlanner):
    """Loads values that are no tensors without running anything."""

    def create_local_plan(self) -> LoadPlan:
        entries = self.metadata.state_dict_metadata if self.metadata is not None else {}
        for name, value in self.state_dict.items():  # a number may have become a tensor, as a learning rate does
            if isinstance(value, Tensor) and value.ndim and isinstance(entries.get(name), BytesStorageMetadata):
                raise ValueError(f"'{name}' should be a tensor in the checkpoint as it is here, and is another value")
        return super().create_local_plan()

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        stream = io.BytesIO()
        torch.save(load_stream(value), stream)
        stream.seek(0)
        super().load_bytes(read_item, stream)
