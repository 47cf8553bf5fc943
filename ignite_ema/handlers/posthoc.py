"""Keeps the averages from which any averaging length can be rebuilt after training; see :mod:`ignite_ema.posthoc`."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.optim import Optimizer

from ..averaging.buffers import BufferPolicy
from ..averaging.summaries import one_line
from ..schedules import PowerFunction
from .attachment import Handles
from .events import Event, check_name, members_of
from .posthoc_arguments import check_options, check_others, check_parameters, checked_twins, checked_widths
from .posthoc_state import VERSION, check_posthoc_state
from .power_average import Clock, PowerAverage, PowerOfSamples
from .snapshots import Snapshots

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
        time_unit: "updates" or "samples".

    Raises:
        TypeError, ValueError, RuntimeError: for an argument of the wrong type or value, as for ``EMAHandler``.
        OSError: where the directory cannot be made.

    Note:
        In a process group build, attach, save and reset it on all ranks. The first one writes, and alone returns paths;
        what goes wrong there is raised on all. They talk when it is built, when a run starts and at each snapshot, and
        not at an update. Of a sharded model the first rank gathers each snapshot in its CPU memory.

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
        schedule = PowerFunction if samples is None else PowerOfSamples
        self.streams = tuple(
            PowerAverage(
                model,
                schedule(sigma_rel),
                handle_buffers=handle_buffers,
                ema_model=twin,
                dtype=dtype,
                device=device,
                share_frozen=share_frozen,
                skip_nonfinite=skip_nonfinite,
                stochastic_rounding=stochastic_rounding,
                flatten=flatten,
            )
            for sigma_rel, twin in zip(self.sigma_rels, checked_twins(ema_models, self.sigma_rels), strict=True)
        )
        check_parameters(self.streams[0].ema_model)
        self._clock = Clock(samples, self.streams)
        self.time_unit = self._clock.unit
        self._snapshots = Snapshots(self.streams, self.sigma_rels, self._clock, Path(dirname), snapshot_dtype)
        self.dirname = Path(dirname)

    def __repr__(self) -> str:
        return one_line(
            "PostHocEMA",
            lambda: f"{type(self.model).__name__}: sigma_rel {' and '.join(f'{one:g}' for one in self.sigma_rels)}",
            lambda: f"at {self.time} {self.time_unit}",
            lambda: f"{len(self._snapshots.times)} snapshots in {str(self.dirname)!r}",
        )

    @property
    def dirname(self) -> Path:
        """Where the snapshots go; can be set to another directory that is there, after :meth:`reset`."""
        return self._snapshots.directory

    @dirname.setter
    def dirname(self, value: Path) -> None:
        self._snapshots.directory = value
        for average in self.streams:
            average.directory = value.resolve()

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
        return self._clock.time

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
        checkpoint at the same event. A run that is terminated writes no last snapshot; call :meth:`save` for it. Where
        one resumes, those later than the state that was loaded are set aside, as ``….pt.superseded``.

        Args:
            engine: the trainer.
            name: of the attributes.
            event: when to update.
            snapshot_event: when to write; dozens, evenly spaced, are enough. Without an update since, none is written.
            optimizer: update only where this optimizer has stepped since the last event.

        Returns:
            A handle whose ``remove()`` undoes this call.

        Raises:
            TypeError, ValueError, RuntimeError: as ``EMAHandler.attach`` does; nothing is attached then. The run raises
                ValueError at its start where the directory has snapshots of another one.
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

        Raises:
            OSError, RuntimeError, ValueError: where it cannot be written, a weight is beyond the range of float16, or
                the averages are of different times. On all ranks.
        """
        return self._snapshots.write(0, 0)

    def reset(self) -> None:
        """Starts again: the averages become the model, and time 0. A run then needs a directory without snapshots."""
        for average in self.streams:
            average.reset()
        self._clock.set(0, 0)
        self._snapshots.start_anew(anywhere=True)

    def state_dict(self) -> dict[str, Any]:
        """The complete state: each average's, time, and which snapshots there are; tensors and plain values only."""
        return {
            "ignite_ema_posthoc_version": VERSION,
            "sigma_rels": list(self.sigma_rels),
            "time_unit": self.time_unit,
            "samples_seen": self._clock.seen,
            "updated_at": self.time,
            "run_id": self._snapshots.run_id,
            "snapshot_times": list(self._snapshots.times),
            **{f"stream_{index}": average.state_dict() for index, average in enumerate(self.streams)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`, before or after ``attach``.

        Raises:
            TypeError, ValueError: for a state with a missing, unexpected or wrong entry, or of another model, widths
                or unit of time; nothing has been loaded then.
        """
        check_posthoc_state(state, self.state_dict(), self.streams)
        for index, average in enumerate(self.streams):
            average.load_state_dict(state[f"stream_{index}"])
        self._clock.set(state["samples_seen"], state["updated_at"])
        self._snapshots.load(state["run_id"], state["snapshot_times"])

    def _start(self, engine: Engine) -> None:
        self._snapshots.begin_run(engine.state.iteration)

    def _save(self, engine: Engine) -> None:
        self._snapshots.write(engine.state.iteration, engine.state.epoch)

    def _save_last(self, engine: Engine) -> None:
        if not engine.should_terminate:  # else it may go on, and should write then what it would have written
            self._save(engine)
