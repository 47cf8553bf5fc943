"""The snapshots of one run of a :class:`~ignite_ema.PostHocEMA`: which there are, and the next one."""

from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import torch

from ..averaging.collectives import first_difference, is_first_rank, on_first_rank
from ..averaging.user_warnings import warn_user
from ..posthoc.run_directory import prepare
from ..posthoc.snapshot_files import StoredSnapshot, has_frozen, write, write_frozen
from .power_average import Clock, Parts, PowerAverage

__all__ = ["Snapshots"]


class Snapshots:
    """The snapshots of one run, in a directory that has those of no other.

    In a process group all ranks call each method; the first one writes, and what goes wrong there is raised on all.

    Args:
        averages: what is stored.
        sigma_rels: their widths.
        clock: their time.
        directory: where; made where it is missing.
        dtype: the type in which averages are stored.

    Attributes:
        directory: where; settable between two runs.
        run_id: names the run in its files.
        times: those of its snapshots.
    """

    run_id: str
    times: list[int]
    _loaded_time: int | None  # of the state from which it goes on; None where it starts anew

    def __init__(
        self,
        averages: Sequence[PowerAverage],
        sigma_rels: Sequence[float],
        clock: Clock,
        directory: Path,
        dtype: torch.dtype,
    ) -> None:
        self._averages, self._sigma_rels, self._clock = averages, sigma_rels, clock
        self.directory, self._dtype = directory, dtype
        on_first_rank(lambda: directory.mkdir(parents=True, exist_ok=True))
        self.start_anew()

    def start_anew(self, anywhere: bool = False) -> None:
        """Another run, without snapshots; it may start ``anywhere`` in the trainer's run, not at iteration 0 alone."""
        self.run_id = on_first_rank(lambda: uuid4().hex)  # not of the weights: runs may start from the same ones
        self.times, self._loaded_time = [], None
        self._starts_anywhere = anywhere
        self._is_checked = self._frozen_is_stored = False  # until the directory was looked at

    def load(self, run_id: str, times: Sequence[int]) -> None:
        """The run of a state that was loaded, and its snapshots until then."""
        self.run_id = run_id
        self.times, self._loaded_time = list(times), self._clock.time
        self._is_checked = False

    def begin_run(self, iteration: int) -> None:
        """What is to be seen to where the trainer's run starts.

        Raises:
            RuntimeError: where the ranks differ.
            ValueError: where the directory has snapshots of another run.
        """
        is_new = not self._clock.time and self._loaded_time is None and not self._is_checked
        if is_new and not self._starts_anywhere and iteration > 0:
            warn_user(
                f"The trainer resumes at iteration {iteration}, but its PostHocEMA was not restored, and the averages "
                'start anew; put it into the checkpoint ("posthoc_ema": posthoc_ema) and load it with '
                "Checkpoint.load_objects, or call reset() if they are meant to start here."
            )
        self._check_ranks()
        self._check_directory()

    def write(self, iteration: int, epoch: int) -> Path | None:
        """Writes the next one; returns its path, on the first rank, or None where nothing has moved since the last."""
        self._check_ranks()
        if not self._clock.time:
            return None
        self._check_directory()
        if self._clock.time in self.times[-1:]:
            return None
        if len(counts := {average.num_updates for average in self._averages}) > 1:
            raise RuntimeError(
                f"The averages should be of one time, got {sorted(counts)} updates; leave the counts of single streams "
                "alone, and reset() or load the PostHocEMA as a whole."
            )
        frozen = {} if self._frozen_is_stored else self._averages[0].frozen_parts()
        parts = [average.parts(self._dtype) for average in self._averages]

        def write_it() -> Path:
            snapshot = self._snapshot(parts, iteration, epoch)
            if frozen:
                write_frozen(frozen, self.run_id, self.directory)
            return write(snapshot, self.directory)

        path = on_first_rank(write_it)
        self._frozen_is_stored = True
        self.times.append(self._clock.time)
        return path if is_first_rank() else None

    def _check_ranks(self) -> None:
        """Raises RuntimeError on all ranks where one is at another time, or goes on from another state."""
        description = {
            "time": f"{self._clock.time} {self._clock.unit}, widths {self._sigma_rels}",
            "updates": str([average.num_updates for average in self._averages]),
            "run": f"{self.run_id} from {self._loaded_time} {self._is_checked}",
            "snapshots": str(self.times),
        }
        if difference := first_difference(description):
            raise RuntimeError(
                f"A PostHocEMA should stand at one point on all ranks, got {difference}; make it alike on all, "
                "let all load the same state and make the same updates."
            )

    def _check_directory(self) -> None:
        """Once for each run, and after a state was loaded: the directory has its past and nothing else."""
        if self._is_checked:
            return

        def prepared() -> tuple[tuple[int, int] | None, bool]:
            place = prepare(self.directory, self.run_id, self.times, self._loaded_time)
            return place, has_frozen(self.directory, self.run_id)

        place, self._frozen_is_stored = on_first_rank(prepared)
        self._is_checked = True
        if place and self._clock.time == self._loaded_time:
            self.write(*place)

    def _snapshot(self, parts: Sequence[Parts], iteration: int, epoch: int) -> StoredSnapshot:
        """What is stored of the averages; raises what went wrong when it was taken."""
        for one in parts:
            if one.error is not None:
                raise one.error
        first = self._averages[0]
        return StoredSnapshot(
            time=self._clock.time,
            time_unit=self._clock.unit,
            num_updates=first.num_updates,
            iteration=iteration,
            epoch=epoch,
            sigma_rels=list(self._sigma_rels),
            averaged=[one.averaged for one in parts],
            copied=parts[0].copied,
            state_dict_names=first.state_dict_names(),
            frozen_shapes={name: list(tensor.shape) for name, tensor in first.frozen_tensors().items()},
            run_id=self.run_id,
        )
