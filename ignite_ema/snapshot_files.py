"""The files of a :class:`~ignite_ema.snapshots.PostHocEMA`: one for each time, with all its averages at that time."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import is_dense, load_file, whole_file
from .profiles import PowerProfile

__all__ = ["StoredSnapshot", "paths_in", "read", "read_all", "write"]

_VERSION = 1
_NAME = re.compile(r"snapshot_(\d+)\.pt")


@dataclass(frozen=True)
class StoredSnapshot:
    """What a file holds.

    Attributes:
        run: what the files of one run have in common.
        time: when the averages were taken: the number of updates, or of samples, from the start of the run.
        time_unit: "updates" or "samples".
        num_updates: the number of updates of each average.
        iteration: of the trainer, for information.
        epoch: likewise.
        sigma_rels: the relative widths of the averages.
        averaged: for each width the averaged tensors by path.
        copied: the tensors that are not averaged, by path.
        state_dict_names: for each name in the ``state_dict`` of the model the path.
    """

    run: str
    time: int
    time_unit: str
    num_updates: int
    iteration: int
    epoch: int
    sigma_rels: Sequence[float]
    averaged: Sequence[Mapping[str, Tensor]]
    copied: Mapping[str, Tensor]
    state_dict_names: Mapping[str, str]

    @property
    def profiles(self) -> list[PowerProfile]:
        """The profile of each average."""
        return [PowerProfile(sigma_rel) for sigma_rel in self.sigma_rels]


_TYPES = {
    **dict.fromkeys(("run", "time_unit"), str),
    **dict.fromkeys(("time", "num_updates", "iteration", "epoch"), int),
    **dict.fromkeys(("sigma_rels", "averaged"), list),
    **dict.fromkeys(("copied", "state_dict_names"), dict),
}


def write(snapshot: StoredSnapshot, dirname: Path) -> Path:
    """Writes a file, whole or not at all; the same snapshot gives the same bytes. Returns its path.

    Raises:
        FileExistsError, OSError: where there is one of that time already, or it cannot be written.
    """
    path = dirname / _name_of(snapshot)
    content = {field.name: getattr(snapshot, field.name) for field in fields(snapshot)}
    with whole_file(path, force=False) as temporary, temporary.open("wb") as file:  # a path would come into the bytes
        torch.save({"ignite_ema_snapshot": _VERSION, **content}, file)
    return path


def _name_of(snapshot: StoredSnapshot) -> str:
    return f"snapshot_{snapshot.time}.pt"


def paths_in(dirname: Path) -> dict[int, Path]:
    """The files in a directory by their times, in order."""
    matches = ((_NAME.fullmatch(path.name), path) for path in (dirname.iterdir() if dirname.is_dir() else ()))
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def read(path: Path) -> StoredSnapshot:
    """What a file holds, its tensors mapped to it.

    Raises:
        FileNotFoundError, ValueError: where there is none, or it is none that :func:`write` wrote.
    """
    content = load_file(path)
    if not isinstance(content, dict) or "ignite_ema_snapshot" not in content:
        raise ValueError(f"'{path}' should be a snapshot of a PostHocEMA, but it is another file; move it elsewhere.")
    if content.pop("ignite_ema_snapshot") != _VERSION:
        raise ValueError(
            f"'{path}' should be of version {_VERSION}; read it with the ignite_ema that wrote it, or newer."
        )
    if content.keys() != _TYPES.keys() or not all(type(content[key]) is kind for key, kind in _TYPES.items()):
        raise ValueError(f"'{path}' should be as a PostHocEMA wrote it, but its entries are others; restore the file.")
    snapshot = StoredSnapshot(**content)
    faults = [fault for fault in _faults(snapshot) if fault]
    if faults:
        raise ValueError(f"'{path}' should be as a PostHocEMA wrote it, but {faults[0]}; restore the file.")
    if path.name != _name_of(snapshot):
        raise ValueError(
            f"'{path}' should be named '{_name_of(snapshot)}', after its time; rename it, or move it away."
        )
    return snapshot


def _faults(snapshot: StoredSnapshot) -> list[str | None]:
    streams: list[Any] = [*snapshot.averaged, snapshot.copied]
    if not all(isinstance(stream, dict) for stream in streams):
        return ["its averages are no mappings"]
    tensors = [value for stream in streams for value in stream.values()]
    if not all(isinstance(value, Tensor) for value in tensors):
        return ["it has other things than tensors"]
    first = snapshot.averaged[0] if snapshot.averaged else {}
    both = {*first, *snapshot.copied}
    return [
        "it is of no time" if snapshot.time < 1 else None,
        "it has tensors without memory of their own"
        if not all(_has_memory(value) for value in tensors) or not all(map(is_dense, first.values()))
        else None,
        "it has no average" if not first else None,
        "its averages are not as many as their widths" if len(snapshot.averaged) != len(snapshot.sigma_rels) else None,
        "its averages differ in names or shapes" if not all(_alike(first, one) for one in snapshot.averaged) else None,
        "its widths are none" if not all(map(_is_width, snapshot.sigma_rels)) else None,
        "its names do not fit its tensors"
        if not all(isinstance(path, str) and path in both for path in snapshot.state_dict_names.values())
        else None,
    ]


def _has_memory(tensor: Tensor) -> bool:
    """Whether it is as large as it looks: a small file can pretend to be of any size."""
    return not tensor.is_meta and (not is_dense(tensor) or tensor.nbytes <= tensor.untyped_storage().nbytes())


def _is_width(value: object) -> bool:
    return type(value) is float and 0 < value < 12**-0.5


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return {k: getattr(v, "shape", None) for k, v in one.items()} == {
        k: getattr(v, "shape", None) for k, v in other.items()
    }


def read_all(dirname: Path) -> list[StoredSnapshot]:
    """What all files in a directory hold, in the order of their times.

    Raises:
        FileNotFoundError, ValueError: where there are none, one is damaged, or they are not of one run.
    """
    paths = paths_in(dirname)
    if not paths:
        raise FileNotFoundError(
            f"'{dirname}' should be a directory with the snapshots of a PostHocEMA, but there is no file such as "
            "'snapshot_1000.pt' in it; check the path."
        )
    snapshots = {path: read(path) for path in paths.values()}
    (first_path, first), *others = snapshots.items()
    for path, one in others:
        for key in ("run", "time_unit", "sigma_rels", "state_dict_names"):
            if getattr(one, key) != getattr(first, key):
                raise ValueError(
                    f"'{path}' should be of the run of '{first_path.name}', but its {key} is another; keep the "
                    "snapshots of one run alone in a directory."
                )
        if not _alike(first.averaged[0], one.averaged[0]):
            raise ValueError(
                f"'{path}' should have tensors of the names and shapes of '{first_path.name}'; check both."
            )
    return list(snapshots.values())
