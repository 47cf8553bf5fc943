"""Whether a run may write its snapshots to a directory: there is its own past, and nothing else."""

import os
from collections.abc import Collection, Mapping
from itertools import chain, count
from pathlib import Path

from ..averaging.user_warnings import warn_user
from ..checkpoints.saving import clean_leftovers, sync_directory
from .snapshot_files import StoredSnapshot, paths_in, read

__all__ = ["prepare"]


def prepare(dirname: Path, run_id: str, times: Collection[int], loaded_time: int | None) -> tuple[int, int] | None:
    """Lets a run begin or go on in a directory, and cleans up what killed writers have left there.

    Snapshots that are later than the state from which the run goes on are set aside: they are of an attempt that may
    have gone another way.

    Args:
        dirname: the directory.
        run_id: of the run.
        times: of the snapshots that it has written, as far as it knows.
        loaded_time: of the state from which it goes on; None for a run that starts from scratch, or is not resumed.

    Returns:
        Iteration and epoch of a snapshot of the very time of the state, which was written after it; it is set aside,
        too, and to be written anew.

    Raises:
        ValueError: where there are snapshots of another run, or any when a run starts. Nothing has been moved then.
    """
    clean_leftovers(dirname)
    found = paths_in(dirname)
    if found and not times and loaded_time is None:
        raise ValueError(
            f"'{dirname}' should have no snapshots when a run starts, got {len(found)}, up to time {max(found)}; to go "
            "on with their run load the PostHocEMA from its checkpoint, to start again a run that was killed before "
            f"its first checkpoint delete '{dirname}/snapshot_*.pt', and for another run choose another directory."
        )
    stored = {time: read(path) for time, path in found.items()}
    for time, path in found.items():
        is_written = time in times or (loaded_time is not None and time >= loaded_time)
        if stored[time].run_id != run_id or not is_written:
            raise ValueError(
                f"'{path}' should be a snapshot of the run that goes on, but it is of another one; choose another "
                "directory."
            )
    _warn_of_missing(dirname, found, times)
    later = {time: path for time, path in found.items() if time not in times}
    _set_aside(dirname, later, loaded_time)
    return _place(stored[loaded_time]) if loaded_time in later else None


def _place(snapshot: StoredSnapshot) -> tuple[int, int]:
    return snapshot.iteration, snapshot.epoch


def _warn_of_missing(dirname: Path, found: Collection[int], times: Collection[int]) -> None:
    if missing := [time for time in times if time not in found]:
        warn_user(
            f"'{dirname}' should have the {len(times)} snapshots that this run has written, but lacks {len(missing)}, "
            f"the first of time {missing[0]}; put them there, or lengths that need them cannot be rebuilt."
        )


def _free_name(path: Path) -> Path:
    """Where to set a snapshot aside, so that one of an earlier attempt stays."""
    first = path.with_name(f"{path.name}.superseded")
    others = (first.with_name(f"{first.name}.{number}") for number in count(2))
    return next(name for name in chain([first], others) if not os.path.lexists(name))


def _set_aside(dirname: Path, later: Mapping[int, Path], loaded_time: int | None) -> None:
    for path in later.values():
        path.rename(_free_name(path))
    if later:
        sync_directory(dirname)
    if lost := [path.name for time, path in later.items() if time != loaded_time]:
        warn_user(
            f"'{dirname}' had snapshots that are later than the state that was loaded, of time {loaded_time}: "
            f"{len(lost)}, from '{lost[0]}' on; they are set aside as '….superseded', and written anew."
        )
