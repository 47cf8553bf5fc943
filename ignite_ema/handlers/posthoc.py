"""Keeps the averages from which any averaging length can be rebuilt after training; see :mod:`ignite_ema.posthoc`."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.optim import Optimizer

from ..averaging.buffers import BufferPolicy
from ..averaging.collectives import first_difference, is_first_rank, on_first_rank
from ..averaging.user_warnings import warn_user
from ..posthoc.run_directory import prepare
from ..posthoc.snapshot_files import has_frozen, write, write_frozen
from ..schedules import PowerFunction
from .attachment import Handles
from .events import Event, check_name, members_of
from .posthoc_arguments import check_options, check_others, check_parameters, checked_twins, checked_widths
from .posthoc_state import VERSION, check_posthoc_state
from .power_average import PowerAverage, PowerOfSamples, SampleClock, snapshot_of

__all__ = ["PostHocEMA"]


class PostHocEMA:
    """Keeps power-function averages of a few widths and stores snapshots, from which any length can be rebuilt later.

    The widths are relative to the run so far, and at each snapshot all averages are written to one file. What can be
    rebuilt, and how well, follows from the snapshots' times alone: with two widths and 64 evenly spaced snapshots,
    ``sigma_rel`` from 0.04 to 0.25 to 1.5 %; see :func:`ignite_ema.posthoc.residual`.

    Args:
        model: the online model, as for :class:`~ignite_ema.EMAHandler`.
        sigma_rels: the widths of the averages, each in (0, 1/√12).
        dirname: where the snapshots go, as ``snapshot_<time>.pt``; made where it is missing.
        handle_buffers: as for ``EMAHandler``, but not "ema_train", and "update" where it is left out: a long average
            goes badly with the batch-norm statistics of the last batches. What is not averaged is stored as it is.
        samples: called with the engine when an iteration starts, says how many samples its batch has. Time is counted
            in samples then, for batches whose size changes; without it in updates, at whatever interval they are made.
        snapshot_dtype: in which type the averages are stored: float32, float64, bfloat16 or float16. 16 bits halve the
            files and round each weight by up to 0.4 % (bfloat16) or 0.05 % (float16), in the mean 0.17 and 0.02 %. What
            is rebuilt is off by that, times the norm of the coefficients where it is above 1: with 64 snapshots 2.3 for
            a width of 0.04, and 17 for 0.02.
        ema_models: twins of your own, one for each width, for models that cannot be deep-copied.
        dtype, device, share_frozen, skip_nonfinite, stochastic_rounding, flatten: as for ``EMAHandler``.

    Attributes:
        streams: an :class:`~ignite_ema.EMAHandler` for each width, with its ``ema_model`` and ``swapped()``.
        sigma_rels: what was passed, as a tuple.
        dirname: the directory.
        time_unit: "updates" or "samples".

    Raises:
        TypeError, ValueError, RuntimeError: for an argument of the wrong type or value, as for ``EMAHandler``.
        OSError: where the directory cannot be made.

    Note:
        In a process group build, attach, save and reset it on all ranks. The first one writes; what goes wrong there
        is raised on all. They talk when it is built, when a run starts and at each snapshot, and not at an update. Of a
        sharded model the first rank gathers each snapshot in its CPU memory.

    Examples:
        >>> import tempfile, torch
        >>> from ignite.engine import Engine
        >>> from ignite_ema import posthoc
        >>> model = torch.nn.Linear(1, 1)
        >>> trainer = Engine(lambda engine, batch: model.weight.data.fill_(batch))
        >>> ema = PostHocEMA(model, dirname=tempfile.mkdtemp())
        >>> _ = ema.attach(trainer, snapshot_event=Events.ITERATION_COMPLETED(every=4))
        >>> _ = trainer.run([float(k) for k in range(100)])
        >>> half_life = posthoc.ExponentialProfile(0.1)  # a tenth of the run
        >>> model.weight.item(), round(posthoc.reconstruct(ema.dirname, half_life)["weight"].item())
        (99.0, 85)
    """

    _loaded_time: int | None  # that of the state that was loaded last
    _times: list[int]  # of the snapshots that the run has written

    def __init__(
        self,
        model: nn.Module,
        sigma_rels: Sequence[float] = (0.05, 0.10),
        *,
        dirname: str | os.PathLike[str],
        handle_buffers: BufferPolicy = "update",
        samples: Callable[[Engine], int] | None = None,
        snapshot_dtype: torch.dtype = torch.float32,
        ema_models: Sequence[nn.Module] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        share_frozen: bool = False,
        skip_nonfinite: bool = False,
        stochastic_rounding: bool = False,
        flatten: bool = False,
    ) -> None:
        self.sigma_rels = checked_widths(sigma_rels)
        check_options(handle_buffers, samples, snapshot_dtype)
        twins = checked_twins(ema_models, self.sigma_rels)
        self.dirname = Path(dirname)
        self.time_unit = "updates" if samples is None else "samples"
        self._starts_late = False  # whether it is meant to start in the middle of a run
        self._snapshot_dtype = snapshot_dtype
        options: dict[str, Any] = {"handle_buffers": handle_buffers, "dtype": dtype, "device": device}
        options |= {"share_frozen": share_frozen, "skip_nonfinite": skip_nonfinite}
        options["stochastic_rounding"] = stochastic_rounding
        options["flatten"] = flatten
        schedule = PowerFunction if samples is None else PowerOfSamples
        self.streams = tuple(
            PowerAverage(model, schedule(sigma_rel), ema_model=twin, **options)
            for sigma_rel, twin in zip(self.sigma_rels, twins, strict=True)
        )
        for average, sigma_rel in zip(self.streams, self.sigma_rels, strict=True):
            average.directory, average.sigma_rel = self.dirname.resolve(), sigma_rel
        check_parameters(self.streams[0].ema_model)
        self._clock = SampleClock(samples, self.streams)
        on_first_rank(lambda: self.dirname.mkdir(parents=True, exist_ok=True))
        self._start_anew()

    def __repr__(self) -> str:
        model, widths = type(self.model).__name__, " and ".join(f"{sigma_rel:g}" for sigma_rel in self.sigma_rels)
        return (
            f"PostHocEMA({model}: sigma_rel {widths}; at {self.time} {self.time_unit}; {len(self._times)} snapshots in "
            f"{str(self.dirname)!r})"
        )

    @property
    def model(self) -> nn.Module:
        """The online model, without wrappers."""
        return self.streams[0].model

    @property
    def num_updates(self) -> int:
        """The number of updates made so far."""
        return self.streams[0].num_updates

    @property
    def time(self) -> int:
        """The time of the last update: the number of updates, or of samples, since the start."""
        schedule = self.streams[0].momentum
        return schedule.updated_at if isinstance(schedule, PowerOfSamples) else self.num_updates

    def attach(
        self,
        engine: Engine,
        name: str = "posthoc_momentum",
        event: Event = Events.ITERATION_COMPLETED,
        snapshot_event: Event = Events.EPOCH_COMPLETED,
        *,
        optimizer: Optimizer | None = None,
    ) -> Handles:
        """Updates the averages at ``event``, and writes a snapshot at ``snapshot_event``, and at the end of a run.

        The momentum of the i-th average is published as ``engine.state.<name>_<i>``. Attach before what saves a
        checkpoint at the same event. Dozens of snapshots are enough, evenly spaced. A run that is terminated writes no
        last one; call :meth:`save` for it.

        Args:
            engine: the trainer.
            name: of the attributes.
            event: when to update.
            snapshot_event: when to write; where nothing has moved since the last snapshot, none is written.
            optimizer: update only where this optimizer has stepped since the last event.

        Returns:
            A handle whose ``remove()`` undoes this call.

        Raises:
            TypeError, ValueError, RuntimeError: as ``EMAHandler.attach`` does. Nothing is attached then.

        Note:
            A run raises ValueError at its start where the directory has snapshots of another one. Where it resumes, the
            snapshots that are later than the state that was loaded are set aside, as ``….pt.superseded``.
        """
        moments = members_of(snapshot_event, engine)
        check_name(name)
        check_others(engine, name, self.streams)
        handles = Handles()
        try:
            for index, average in enumerate(self.streams):
                handles.add(average.attach(engine, f"{name}_{index}", event=event, optimizer=optimizer))
            # After what refuses a second time: handlers are removed by equality, and this would take the first's away.
            if self.time_unit == "samples":
                handles.add(engine.add_event_handler(Events.ITERATION_STARTED, self._clock.count))
            handles.add(engine.add_event_handler(Events.STARTED, self._start))
            for moment in moments:
                handles.add(engine.add_event_handler(moment, self._save))
            handles.add(engine.add_event_handler(Events.COMPLETED, self._save_last))
        except BaseException:
            handles.remove()
            raise
        return handles

    def save(self) -> Path | None:
        """Writes a snapshot now; returns its path, or None where there is one of this time or no update yet.

        In a process group all ranks call it. The first one returns the path, the others None.

        Raises:
            OSError, RuntimeError, ValueError: where it cannot be written, a weight is beyond the range of float16, or
                the averages are of different times. On all ranks.
        """
        return self._write(0, 0)

    def reset(self) -> None:
        """Starts again: the averages become the model, and time 0. A run then needs a directory without snapshots."""
        for average in self.streams:
            average.reset()
        self._start_anew()
        self._starts_late = True

    def state_dict(self) -> dict[str, Any]:
        """The complete state: each average's, time, and which snapshots there are; tensors and plain values only."""
        return {
            "ignite_ema_posthoc_version": VERSION,
            "sigma_rels": list(self.sigma_rels),
            "time_unit": self.time_unit,
            "samples_seen": self._clock.seen,
            "updated_at": self.time,
            "run_id": self._run_id,
            "snapshot_times": list(self._times),
            **{f"stream_{index}": average.state_dict() for index, average in enumerate(self.streams)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`, before or after ``attach``.

        Raises:
            TypeError, ValueError: for a state with a missing, unexpected or wrong entry, of another model, of other
                widths, or of another unit of time; nothing has been loaded then.
        """
        check_posthoc_state(state, self.state_dict(), self.streams)
        for index, average in enumerate(self.streams):
            average.load_state_dict(state[f"stream_{index}"])
        self._clock.set(state["samples_seen"], state["updated_at"])
        self._run_id, self._times = state["run_id"], list(state["snapshot_times"])
        self._loaded_time = self.time
        self._directory_is_checked = False

    def _start_anew(self) -> None:
        self._clock.set(0, 0)
        self._run_id = on_first_rank(lambda: uuid4().hex)  # not of the weights: runs may start from the same ones
        self._times = []
        self._loaded_time = None
        self._directory_is_checked = False

    def _start(self, engine: Engine) -> None:
        is_new = not self.time and self._loaded_time is None and not self._starts_late
        if is_new and not self._directory_is_checked and engine.state.iteration > 0:
            warn_user(
                f"The trainer resumes at iteration {engine.state.iteration}, but its PostHocEMA was not restored, and "
                'the averages start anew; put it into the checkpoint ("posthoc_ema": posthoc_ema) and load it with '
                "Checkpoint.load_objects, or call reset() if they are meant to start here."
            )
        self._check_ranks()
        self._check_directory()

    def _check_ranks(self) -> None:
        """Raises RuntimeError on all ranks where one is at another time, or goes on from another state."""
        description = {
            "time": f"{self.time} {self.time_unit}, widths {self.sigma_rels}",
            "updates": str([average.num_updates for average in self.streams]),
            "run": f"{self._run_id} from {self._loaded_time} {self._directory_is_checked}",
            "snapshots": str(self._times),
        }
        if difference := first_difference(description):
            raise RuntimeError(
                f"A PostHocEMA should stand at one point on all ranks, got {difference}; make it alike on all, "
                "let all load the same state and make the same updates."
            )

    def _check_directory(self) -> None:
        """Once for each run, and after a state was loaded: the directory has its past and nothing else."""
        if self._directory_is_checked:
            return

        def prepared() -> tuple[tuple[int, int] | None, bool]:
            place = prepare(self.dirname, self._run_id, self._times, self._loaded_time)
            return place, has_frozen(self.dirname, self._run_id)

        place, self._frozen_is_stored = on_first_rank(prepared)
        self._directory_is_checked = True
        if place and self.time == self._loaded_time:
            self._write(*place)

    def _save(self, engine: Engine) -> None:
        self._write(engine.state.iteration, engine.state.epoch)

    def _save_last(self, engine: Engine) -> None:
        if not engine.should_terminate:  # else it may go on, and should write then what it would have written
            self._save(engine)

    def _write(self, iteration: int, epoch: int) -> Path | None:
        self._check_ranks()
        if not self.time:
            return None
        self._check_directory()
        if self.time in self._times[-1:]:
            return None
        if len(counts := {average.num_updates for average in self.streams}) > 1:
            raise RuntimeError(
                f"The averages should be of one time, got {sorted(counts)} updates; leave the counts of single streams "
                "alone, and reset() or load the PostHocEMA as a whole."
            )
        frozen = {} if self._frozen_is_stored else self.streams[0].frozen_parts()
        parts = [one.parts(self._snapshot_dtype) for one in self.streams]
        moment: dict[str, Any] = {"time": self.time, "time_unit": self.time_unit, "run_id": self._run_id}

        def write_it() -> Path:
            snapshot = snapshot_of(self.streams, parts, iteration=iteration, epoch=epoch, **moment)
            if frozen:
                write_frozen(frozen, self._run_id, self.dirname)
            return write(snapshot, self.dirname)

        path = on_first_rank(write_it)
        self._frozen_is_stored = True
        self._times.append(self.time)
        return path if is_first_rank() else None
