"""The files of a :class:`~ignite_ema.PostHocEMA`: one for each time, with all its averages at that time."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..checkpoints.memory import has_memory, is_dense
from ..checkpoints.safe_load import load_file
from ..checkpoints.saving import whole_file
from .profiles import MAX_SIGMA_REL, PowerProfile, Snapshot

__all__ = ["History", "StoredSnapshot", "is_history", "is_snapshot_name", "paths_in", "read", "read_all", "write"]

History: TypeAlias = Sequence[Sequence[Any]]

_VERSION = 1
_NAME = re.compile(r"snapshot_(\d+)\.pt")


@dataclass(frozen=True)
class StoredSnapshot:
    """What a file holds.

    Attributes:
        time: when the averages were taken: the number of updates, or of samples, from the start of the run.
        time_unit: "updates" or "samples".
        num_updates: the number of updates of each average.
        iteration: of the trainer, for information.
        epoch: likewise.
        sigma_rels: the relative widths of the averages.
        averaged: for each width the averaged tensors by path.
        copied: the tensors that are not averaged, by path.
        state_dict_names: for each name in the ``state_dict`` of the model the path.
        history: for each snapshot of the run so far, this one included, its time and a digest of what it follows from
            and what it holds: [time, digest]. The first is the start of the run.
    """

    time: int
    time_unit: str
    num_updates: int
    iteration: int
    epoch: int
    sigma_rels: Sequence[float]
    averaged: Sequence[Mapping[str, Tensor]]
    copied: Mapping[str, Tensor]
    state_dict_names: Mapping[str, str]
    history: History

    @property
    def snapshots(self) -> list[Snapshot]:
        """The profile and the time of each average."""
        return [Snapshot(PowerProfile(sigma_rel), self.time) for sigma_rel in self.sigma_rels]


_TYPES = {
    "time_unit": str,
    **dict.fromkeys(("time", "num_updates", "iteration", "epoch"), int),
    **dict.fromkeys(("sigma_rels", "averaged", "history"), list),
    **dict.fromkeys(("copied", "state_dict_names"), dict),
}


def write(snapshot: StoredSnapshot, dirname: Path) -> Path:
    """Writes a file, whole or not at all; the same snapshot gives the same bytes. Returns its path.

    Raises:
        FileExistsError, OSError: where there is one of that time already, or it cannot be written.
    """
    path = dirname / _name_of(snapshot)
    content = {field.name: getattr(snapshot, field.name) for field in fields(snapshot)}
    if path.exists():
        raise FileExistsError(
            f"'{path}' is there already, and this run has not written it; give each run a directory of its own, and "
            "let no other process write there."
        )
    with whole_file(path, force=False) as temporary, temporary.open("wb") as file:  # a path would come into the bytes
        torch.save({"ignite_ema_snapshot": _VERSION, **content}, file)
    return path


def _name_of(snapshot: StoredSnapshot) -> str:
    return f"snapshot_{snapshot.time}.pt"


def is_snapshot_name(path: Path) -> bool:
    """Whether a file of this name would be taken for a snapshot."""
    return _NAME.fullmatch(path.name) is not None


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
        raise ValueError(
            f"'{path}' should be as a PostHocEMA wrote it, but {faults[0]}; restore it, or move it away: the others "
            "can do without it, with a larger residual."
        )
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
        "its history is none" if not is_history(snapshot.history) or snapshot.history[-1][0] != snapshot.time else None,
        "it has tensors without memory of their own"
        if not all(_is_held(value) for value in tensors) or not all(map(is_dense, first.values()))
        else None,
        "it has no average" if not first else None,
        "its averages are not as many as their widths" if len(snapshot.averaged) != len(snapshot.sigma_rels) else None,
        "its averages differ in names or shapes" if not all(_alike(first, one) for one in snapshot.averaged) else None,
        "its widths are none" if not all(map(_is_width, snapshot.sigma_rels)) else None,
        "its names do not fit its tensors"
        if not all(isinstance(path, str) and path in both for path in snapshot.state_dict_names.values())
        else None,
    ]


def is_history(value: object) -> bool:
    """Whether it is a list of [time, digest] in the order of the times, from 0 on."""
    if not isinstance(value, list) or not all(isinstance(one, list) and len(one) == 2 for one in value):
        return False
    times = [time for time, _ in value]
    are_typed = all(type(time) is int and isinstance(digest, str) for time, digest in value)
    return are_typed and times == sorted(set(times)) and times[:1] == [0]


def _is_held(tensor: Tensor) -> bool:
    return not tensor.is_meta and (not is_dense(tensor) or has_memory(tensor))


def _is_width(value: object) -> bool:
    return type(value) is float and 0 < value < MAX_SIGMA_REL


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
    *others, (last_path, last) = snapshots.items()
    for path, one in others:
        if list(one.history[-1]) not in last.history:
            raise ValueError(
                f"'{path}' should be of the run of '{last_path.name}', but it is of another one; keep the snapshots of "
                "one run alone in a directory."
            )
        for key in ("time_unit", "sigma_rels", "state_dict_names"):
            if getattr(one, key) != getattr(last, key):
                raise ValueError(f"'{path}' should have the {key} of '{last_path.name}', but has others; check both.")
        if not _alike(last.averaged[0], one.averaged[0]):
            raise ValueError(f"'{path}' should have tensors of the names and shapes of '{last_path.name}'; check both.")
    return list(snapshots.values())
