"""The snapshot files of a :class:`~ignite_ema.PostHocEMA`: one for each time, with all its averages at that time.

Frozen parameters that the averages share with the model are stored once for the run, in a file of their own.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.memory import is_dense
from ..checkpoints.safe_load import OpenFile, open_file
from ..checkpoints.saving import whole_file
from .profiles import MAX_SIGMA_REL, PowerProfile, Snapshot

__all__ = [
    "StoredSnapshot",
    "frozen_path",
    "has_frozen",
    "is_snapshot_name",
    "paths_in",
    "read",
    "read_all",
    "read_frozen",
    "write",
    "write_frozen",
]

_VERSION = 2
_NAME = re.compile(r"snapshot_(\d+)\.pt")


@dataclass(frozen=True)
class StoredSnapshot:
    """The content of a snapshot file.

    Attributes:
        time: the time at which the averages were taken: updates, or samples, since the start of the run.
        time_unit: "updates" or "samples".
        num_updates: the number of updates of each average.
        iteration: the trainer's iteration, for information.
        epoch: the trainer's epoch, for information.
        sigma_rels: the relative widths of the averages.
        averaged: for each width the averaged tensors by path.
        copied: the tensors that are not averaged, by path.
        state_dict_names: the path of each name in the ``state_dict`` of the model; a frozen parameter's is its name.
        frozen_shapes: the shapes, by name, of the frozen parameters that are stored once for the run.
        run_id: the run that wrote the file: drawn when a run starts from scratch, and kept when it resumes.
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
    frozen_shapes: Mapping[str, Sequence[int]]
    run_id: str
    _file: OpenFile | None = field(default=None, repr=False, compare=False)

    def verify(self, path: str) -> None:
        """Compares the bytes of a tensor, in all averages, with the checksums of the file.

        Raises:
            ValueError: if they have changed since the file was written.
        """
        if self._file is not None:
            found = (one[path] for one in (*self.averaged, self.copied) if path in one)
            self._file.verify((path, tensor) for tensor in found)

    @property
    def snapshots(self) -> list[Snapshot]:
        """The profile and the time of each average in the file."""
        return [Snapshot(PowerProfile(sigma_rel), self.time) for sigma_rel in self.sigma_rels]


_TYPES = {
    **dict.fromkeys(("time_unit", "run_id"), str),
    **dict.fromkeys(("time", "num_updates", "iteration", "epoch"), int),
    **dict.fromkeys(("sigma_rels", "averaged"), list),
    **dict.fromkeys(("copied", "state_dict_names", "frozen_shapes"), dict),
}


def write(snapshot: StoredSnapshot, dirname: Path) -> Path:
    """Writes a file, whole or not at all; the same snapshot gives the same bytes. Returns its path.

    Raises:
        FileExistsError, OSError: where there is one of that time already, or it cannot be written.
    """
    path = dirname / _name_of(snapshot)
    content = {one.name: getattr(snapshot, one.name) for one in fields(snapshot) if not one.name.startswith("_")}
    if path.exists():
        raise FileExistsError(
            f"'{path}' is there already, and this run has not written it; give each run a directory of its own, and "
            "let no other process write there."
        )
    _save({"ignite_ema_snapshot": _VERSION, **content}, path, force=False)
    return path


def _save(content: Mapping[str, Any], path: Path, *, force: bool) -> None:
    with whole_file(path, force=force) as temporary, temporary.open("wb") as file:  # a path would come into the bytes
        torch.save(content, file)


def frozen_path(dirname: Path) -> Path:
    """Where the frozen parameters of a run are."""
    return dirname / "snapshot_frozen.pt"


def write_frozen(tensors: Mapping[str, Tensor], run_id: str, dirname: Path) -> None:
    """Writes the frozen parameters of a run, over those of another run, of which there are no snapshots any more.

    Raises:
        ValueError, OSError: where another file has that name, or it cannot be written.
    """
    has_frozen(dirname, run_id)
    content = {"ignite_ema_frozen": _VERSION, "run_id": run_id, "tensors": dict(tensors)}
    _save(content, frozen_path(dirname), force=True)


def has_frozen(dirname: Path, run_id: str) -> bool:
    """Whether there is a file with the frozen parameters of this run; raises ValueError where it is another file."""
    return frozen_path(dirname).exists() and _open_frozen(dirname).content["run_id"] == run_id


def read_frozen(dirname: Path, run_id: str) -> dict[str, Tensor]:
    """The frozen parameters of a run by name, verified, and mapped to their file.

    Raises:
        FileNotFoundError, ValueError: where there is no such file, it is another one, damaged, or of another run.
    """
    opened = _open_frozen(dirname)
    if opened.content["run_id"] != run_id:
        raise ValueError(
            f"'{opened.path}' should be of the run of the snapshots beside it, but it is of another one; restore it."
        )
    tensors: dict[str, Tensor] = opened.content["tensors"]
    opened.verify(tensors.items())
    return tensors


def _open_frozen(dirname: Path) -> OpenFile:
    opened = open_file(frozen_path(dirname))
    content = opened.content
    is_ours = isinstance(content, dict) and content.get("ignite_ema_frozen") == _VERSION
    if not is_ours or not isinstance(content.get("run_id"), str) or not isinstance(content.get("tensors"), dict):
        raise ValueError(
            f"'{opened.path}' should be the frozen parameters of a PostHocEMA, but it is another file; move it "
            "elsewhere."
        )
    if not all(isinstance(tensor, Tensor) and not tensor.is_meta for tensor in content["tensors"].values()):
        raise ValueError(f"'{opened.path}' should hold tensors alone, but it has other things; restore it.")
    return opened


def _name_of(snapshot: StoredSnapshot) -> str:
    return f"snapshot_{snapshot.time}.pt"


def is_snapshot_name(path: Path) -> bool:
    """Whether a file of this name would be taken for a snapshot, or for the frozen parameters beside it."""
    return _NAME.fullmatch(path.name) is not None or path.name == frozen_path(path.parent).name


def paths_in(dirname: Path) -> dict[int, Path]:
    """The files in a directory by their times, in order."""
    matches = ((_NAME.fullmatch(path.name), path) for path in (dirname.iterdir() if dirname.is_dir() else ()))
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def read(path: Path) -> StoredSnapshot:
    """What a file holds, its tensors mapped to it, and not yet verified.

    Raises:
        FileNotFoundError, ValueError: where there is none, or it is none that :func:`write` wrote.
    """
    opened = open_file(path)
    content = opened.content
    if not isinstance(content, dict) or "ignite_ema_snapshot" not in content:
        raise ValueError(f"'{path}' should be a snapshot of a PostHocEMA, but it is another file; move it elsewhere.")
    version = content.pop("ignite_ema_snapshot")
    if type(version) is not int or version != _VERSION:
        raise ValueError(
            f"'{path}' should be of version {_VERSION}; read it with the ignite_ema that wrote it, or newer."
        )
    if content.keys() != _TYPES.keys() or not all(type(content[key]) is kind for key, kind in _TYPES.items()):
        raise ValueError(f"'{path}' should be as a PostHocEMA wrote it, but its entries are others; restore the file.")
    snapshot = StoredSnapshot(**content, _file=opened)
    if fault := _fault(snapshot):
        raise ValueError(
            f"'{path}' should be as a PostHocEMA wrote it, but {fault}; restore it, or move it away: the others "
            "can do without it, with a larger residual."
        )
    if path.name != _name_of(snapshot):
        raise ValueError(
            f"'{path}' should be named '{_name_of(snapshot)}', after its time; rename it, or move it away."
        )
    return snapshot


def _fault(snapshot: StoredSnapshot) -> str | None:
    """What is wrong with the content of a file, if anything is."""
    groups: list[Any] = [*snapshot.averaged, snapshot.copied]
    if not all(isinstance(group, dict) for group in groups):
        return "its averages are not mappings"
    tensors = [value for group in groups for value in group.values()]
    if not all(isinstance(value, Tensor) for value in tensors):
        return "it has other things than tensors"
    first = snapshot.averaged[0] if snapshot.averaged else {}
    known = {*first, *snapshot.copied, *snapshot.frozen_shapes}
    have_memory = all(map(is_dense, first.values())) and not any(value.is_meta for value in tensors)
    paths = snapshot.state_dict_names.values()
    rules = {
        "it is of no time": snapshot.time >= 1,
        "it is of no run": snapshot.run_id != "",
        "it has tensors without memory of their own": have_memory,
        "it has no average": len(first) > 0,
        "its averages are not as many as their widths": len(snapshot.averaged) == len(snapshot.sigma_rels),
        "its averages differ in names or shapes": all(_alike(first, one) for one in snapshot.averaged),
        "its widths are outside of (0, 1/√12)": all(map(_is_width, snapshot.sigma_rels)),
        "its names do not fit its tensors": all(isinstance(path, str) and path in known for path in paths),
        "the shapes of its frozen parameters are malformed": all(map(_is_shape, snapshot.frozen_shapes.values())),
    }
    return next((fault for fault, is_kept in rules.items() if not is_kept), None)


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _is_width(value: object) -> bool:
    return type(value) is float and 0 < value < MAX_SIGMA_REL


def _alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[path].shape == other[path].shape for path in one)


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
        if one.run_id != last.run_id:
            raise ValueError(
                f"'{path}' should be of the run of '{last_path.name}', but it is of another one; keep the snapshots of "
                "one run alone in a directory."
            )
        for key in ("time_unit", "sigma_rels", "state_dict_names", "frozen_shapes"):
            if getattr(one, key) != getattr(last, key):
                raise ValueError(f"'{path}' should have the {key} of '{last_path.name}', but has others; check both.")
        if not _alike(last.averaged[0], one.averaged[0]):
            raise ValueError(f"'{path}' should have tensors of the names and shapes of '{last_path.name}'; check both.")
    return list(snapshots.values())
