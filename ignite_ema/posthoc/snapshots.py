"""The snapshot files of a :class:`~ignite_ema.PostHocEMA`: one for each time, with all its averages at that time.

Frozen parameters that the averages share with the model are stored once for the run, in a separate file.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..averaging.average import ModelAverage
from ..averaging.checks import warn_user
from ..averaging.names import tensors_of
from ..averaging.sharding import is_first_rank, whole
from ..checkpoints.files import compact, load_file, sync_directory, whole_file
from .profiles import PowerProfile, Snapshot

_VERSION = 2
_NAME = re.compile(r"snapshot_(\d+)\.pt")


@dataclass(frozen=True)
class StoredSnapshot:
    """The content of a snapshot file; its tensors are mapped to the file."""

    time: int  # of the averages: updates, or samples, since the start of the run
    time_unit: str  # "updates" or "samples"
    num_updates: int  # of each average
    iteration: int  # of the trainer, for information; so is the epoch
    epoch: int
    sigma_rels: Sequence[float]  # the relative widths of the averages
    averaged: Sequence[Mapping[str, Tensor]]  # for each width, the averaged tensors by name
    copied: Mapping[str, Tensor]  # the tensors that are not averaged, by name
    state_dict_names: Mapping[str, str]  # the name of the stored tensor for each name in the model's state_dict
    frozen_shapes: Mapping[str, Sequence[int]]  # of the frozen parameters, which are stored once for the run
    run_id: str  # identifies the run that wrote the file; a resumed run keeps it

    @property
    def snapshots(self) -> list[Snapshot]:
        """The profile and the time of each average in the file."""
        return [Snapshot(PowerProfile(sigma_rel), self.time) for sigma_rel in self.sigma_rels]


def path_of(dirname: Path, time: int) -> Path:
    """The path of the snapshot at this time."""
    return dirname / f"snapshot_{time}.pt"


def frozen_path(dirname: Path) -> Path:
    """The path of the file with the frozen parameters of the run."""
    return dirname / "snapshot_frozen.pt"


def paths_in(dirname: Path) -> dict[int, Path]:
    """The snapshot files in a directory by their times, in order."""
    matches = ((_NAME.fullmatch(path.name), path) for path in (dirname.iterdir() if dirname.is_dir() else ()))
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def is_snapshot_name(path: Path) -> bool:
    """Whether a file with this name would be taken for a snapshot, or for the frozen parameters beside it."""
    return _NAME.fullmatch(path.name) is not None or path == frozen_path(path.parent)


# Writing


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors in the CPU memory of the first rank; nothing on the others. All ranks must call this."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if is_first_rank():
            found[name] = full.cpu()
    return found


def to_store(
    average: ModelAverage, tensors: dict[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a snapshot stores of an average: averaged tensors and copied ones. Empties ``tensors``.

    Averaged parameters are stored in ``dtype``, averaged buffers at least in float32; raises ValueError if a weight is
    beyond the range of that.
    """
    treatments, own = average.treatments(), tensors_of(average.model)
    averaged, copied = {}, {}
    for name in list(tensors):
        tensor = tensors.pop(name)  # a narrow copy takes its place
        if treatments[name] != "average":
            copied[name] = tensor
            continue
        wide = dtype if isinstance(own[name], nn.Parameter) else torch.promote_types(dtype, torch.float32)
        averaged[name] = tensor.to(tensor.dtype if tensor.is_complex() else wide).contiguous()
        narrows = averaged[name].dtype != tensor.dtype
        if narrows and not bool((averaged[name].isfinite() | ~tensor.isfinite()).all()):
            raise ValueError(
                f"'{name}' should be within ±{torch.finfo(wide).max:g} to be stored in {wide}, got "
                f"{tensor.abs().max().item():g}; pass another snapshot_dtype, such as torch.bfloat16."
            )
    return compact(averaged), compact(copied)


def write(snapshot: StoredSnapshot, dirname: Path) -> Path:
    """Writes a snapshot, whole or not at all, and returns its path. The same snapshot gives the same bytes."""
    path = path_of(dirname, snapshot.time)
    if path.exists():
        raise FileExistsError(
            f"'{path}' exists already, and this PostHocEMA has not written it; give each its own directory."
        )
    _save({"ignite_ema_snapshot": _VERSION, **vars(snapshot)}, path)
    return path


def write_frozen(tensors: Mapping[str, Tensor], run_id: str, dirname: Path) -> None:
    """Writes the frozen parameters of a run; those of an earlier run without snapshots are overwritten."""
    content = {"ignite_ema_frozen": _VERSION, "run_id": run_id, "tensors": compact(dict(tensors))}
    _save(content, frozen_path(dirname))


def _save(content: Mapping[str, Any], path: Path) -> None:
    # Given a path instead of a file, torch.save would store the name of the file in it.
    with whole_file(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def prepare(dirname: Path, run_id: str, time: int, times: Sequence[int]) -> list[int]:
    """Prepares a directory for a run that goes on from ``time``: sets later snapshots aside.

    Returns when the run has written snapshots: at ``times``, as its state says, and whenever else there is one. Raises
    ValueError if there are snapshots of another run; nothing has been moved then.
    """
    found = paths_in(dirname)
    for path in found.values():
        if read(path).run_id != run_id:
            raise ValueError(
                f"'{dirname}' should have snapshots of this run alone, got '{path.name}' of another one; load the "
                f"PostHocEMA from its checkpoint to resume that run, delete '{dirname / 'snapshot_*.pt'}' to start "
                "again, or choose another directory."
            )
    if missing := [one for one in times if one not in found]:
        warn_user(
            f"'{dirname}' should have the {len(times)} snapshots that this run has written, but {len(missing)} are "
            f"missing, the first of time {missing[0]}; restore them, or some lengths cannot be rebuilt."
        )
    if later := [path for one, path in found.items() if one > time]:
        for path in later:
            aside, number = f"{path}.superseded", 2
            while os.path.lexists(aside):  # of an earlier attempt
                aside, number = f"{path}.superseded.{number}", number + 1
            path.rename(aside)
        sync_directory(dirname)
        warn_user(
            f"'{dirname}' had {len(later)} snapshots that are later than the loaded state, of time {time}, from "
            f"'{later[0].name}' on; they are set aside as '….superseded', and will be written again."
        )
    return sorted({*times, *(one for one in found if one <= time)})


# Reading


def read(path: Path) -> StoredSnapshot:
    """The content of a snapshot file, not verified; raises ValueError if :func:`write` did not write it."""
    content = load_file(path, verified=False)
    version = content.pop("ignite_ema_snapshot", None) if isinstance(content, dict) else None
    if version != _VERSION or content.keys() != {field.name for field in fields(StoredSnapshot)}:
        raise ValueError(
            f"'{path}' should be a snapshot of a PostHocEMA of version {_VERSION}, but it is another file, or of "
            f"version {version}; move it elsewhere, or read it with the ignite_ema that wrote it."
        )
    return StoredSnapshot(**content)


def stored(dirname: str | os.PathLike[str], step: int | None = None) -> list[StoredSnapshot]:
    """The snapshots in the directory of a ``PostHocEMA``, in the order of their times.

    Args:
        dirname: the directory.
        step: the time of the last snapshot to return; None: all are returned.

    Raises:
        FileNotFoundError, ValueError: if there is no snapshot, or none at ``step``; if a file cannot be read; if the
            snapshots are not all from one run.
    """
    snapshots = {path: read(path) for path in paths_in(Path(dirname)).values()}
    if not snapshots:
        raise FileNotFoundError(
            f"'{dirname}' should be a directory with the snapshots of a PostHocEMA, but it has no file such as "
            "'snapshot_1000.pt'; check the path."
        )
    *others, (last_path, last) = snapshots.items()
    for path, snapshot in others:
        if snapshot.run_id != last.run_id:
            raise ValueError(
                f"'{path}' should be of the run of '{last_path.name}', but it is of another one; keep the snapshots of "
                "each run in a separate directory."
            )
    times = [snapshot.time for snapshot in snapshots.values()]
    if step is not None and step not in times:
        nearest = sorted(sorted(times, key=lambda time: abs(time - float(step)))[:2])
        raise ValueError(
            f"step should be the time of a snapshot, in {last.time_unit}, got {step!r}; nearest in '{dirname}': "
            f"{' and '.join(map(str, nearest))}."
        )
    return [snapshot for snapshot in snapshots.values() if step is None or snapshot.time <= step]


def read_frozen(dirname: Path, run_id: str) -> dict[str, Tensor] | None:
    """The frozen parameters of a run by name, not verified; None if there is no file of this run."""
    content = load_file(frozen_path(dirname), verified=False) if frozen_path(dirname).exists() else {}
    tensors: dict[str, Tensor] | None = content.get("tensors") if content.get("run_id") == run_id else None
    return tensors
