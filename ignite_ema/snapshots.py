"""Keeps the averages from which any averaging length can be rebuilt after training; see :mod:`ignite_ema.posthoc`."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.optim import Optimizer

from . import kernels
from .attachment import Event, Handles, check_name, members_of
from .buffers import BufferRule
from .loading import check_loadable
from .ranks import is_first_rank
from .schedules import PowerFunction
from .sharding import local
from .snapshot_files import StoredSnapshot, paths_in, read, write
from .state import check_count, check_state
from .streams import PowerOfSamples, Stream

__all__ = ["PostHocEMA"]

_VERSION = 1
_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class PostHocEMA:
    """Keeps power-function averages of a few widths and stores snapshots, from which any length can be rebuilt later.

    The widths are relative to the run so far, and at each snapshot all averages are written to one file. What can be
    rebuilt, and how well, follows from the snapshots' times alone: with two widths and 64 evenly spaced snapshots,
    ``sigma_rel`` from 0.04 to 0.25 to 1.5 %; see :func:`ignite_ema.posthoc.residual`.

    Args:
        model: the online model, as for :class:`~ignite_ema.handler.EMAHandler`.
        sigma_rels: the widths of the averages, each in (0, 1/√12).
        dirname: where the snapshots go, as ``snapshot_<time>.pt``; made where it is missing.
        handle_buffers: as for ``EMAHandler``, but not "ema_train". Buffers that are not averaged are stored as they
            are.
        samples: called with the engine when an iteration starts, says how many samples its batch has. Time is counted
            in samples then, for batches whose size changes; without it in updates, at whatever interval they are made.
        snapshot_dtype: in which type the averages are stored: float32, float64, bfloat16 or float16. 16 bits halve the
            files and round each weight by up to 0.4 % (bfloat16) or 0.05 % (float16); what is rebuilt is off by about
            a third of that, times the norm of the coefficients, which is below 1 for lengths above the shortest that
            is kept, and grows below it.
        ema_models: twins of your own, one for each width, for models that cannot be deep-copied.
        dtype, device, share_frozen, skip_nonfinite: as for ``EMAHandler``.

    Attributes:
        streams: an :class:`~ignite_ema.handler.EMAHandler` for each width, with its ``ema_model`` and ``swapped()``.
        sigma_rels: what was passed, as a tuple.
        dirname: the directory.
        time_unit: "updates" or "samples".

    Raises:
        TypeError, ValueError, RuntimeError: for an argument of the wrong type or value, as for ``EMAHandler``.
        OSError: where the directory cannot be made.

    Note:
        Of a sharded model the first rank gathers each snapshot in its CPU memory and writes it. Build it on all ranks.

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
        handle_buffers: BufferRule = "copy",
        samples: Callable[[Engine], int] | None = None,
        snapshot_dtype: torch.dtype = torch.float32,
        ema_models: Sequence[nn.Module] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        share_frozen: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        self.sigma_rels = _checked_widths(sigma_rels)
        if handle_buffers == "ema_train":
            raise ValueError(
                "handle_buffers should be 'copy', 'update' or a mapping, got 'ema_train': an average that is rebuilt "
                "from snapshots has made no forward passes of its own."
            )
        if samples is not None and not callable(samples):
            raise TypeError(
                f"samples should be a function of the engine, got {samples!r}; pass one such as "
                "lambda engine: len(engine.state.batch[0])."
            )
        if snapshot_dtype not in _TYPES:
            names = ", ".join(str(one) for one in _TYPES)
            raise ValueError(f"snapshot_dtype should be one of {names}, got {snapshot_dtype!r}.")
        if ema_models is not None and len(ema_models) != len(self.sigma_rels):
            raise ValueError(
                f"ema_models should be one twin for each of {len(self.sigma_rels)} widths, got {len(ema_models)}."
            )
        if ema_models is not None and len({id(twin) for twin in ema_models}) < len(ema_models):
            raise ValueError("ema_models should be different modules, got one twice; each average needs its own.")
        self.dirname = Path(dirname)
        self.time_unit = "updates" if samples is None else "samples"
        self._samples = samples
        self._snapshot_dtype = snapshot_dtype
        self._samples_seen = 0
        twins: Sequence[nn.Module | None] = ema_models or [None] * len(self.sigma_rels)
        self.streams = tuple(
            Stream(
                model,
                PowerFunction(sigma_rel) if samples is None else PowerOfSamples(sigma_rel),
                handle_buffers=handle_buffers,
                ema_model=twin,
                dtype=dtype,
                device=device,
                share_frozen=share_frozen,
                skip_nonfinite=skip_nonfinite,
            )
            for sigma_rel, twin in zip(self.sigma_rels, twins, strict=True)
        )
        self._start_anew()
        if is_first_rank():
            self.dirname.mkdir(parents=True, exist_ok=True)

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
        rule = self.streams[0].momentum
        return rule.updated_at if isinstance(rule, PowerOfSamples) else self.num_updates

    def attach(
        self,
        engine: Engine,
        name: str = "posthoc_momentum",
        event: Event = Events.ITERATION_COMPLETED,
        snapshot_event: Event = Events.EPOCH_COMPLETED,
        *,
        optimizer: Optimizer | None = None,
    ) -> "Handles":
        """Updates the averages at ``event``, and writes a snapshot at ``snapshot_event``.

        The momentum of the i-th average is published as ``engine.state.<name>_<i>``. Attach before what saves a
        checkpoint at the same event. Dozens of snapshots are enough, evenly spaced, and one at the end.

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
        handles = Handles()
        try:
            for index, stream in enumerate(self.streams):
                handles.add(stream.attach(engine, f"{name}_{index}", event=event, optimizer=optimizer))
            # After what refuses a second time: handlers are removed by equality, and this would take the first's away.
            if self._samples is not None:
                handles.add(engine.add_event_handler(Events.ITERATION_STARTED, self._count))
            handles.add(engine.add_event_handler(Events.STARTED, self._check_directory))
            for moment in moments:
                handles.add(engine.add_event_handler(moment, self._save))
        except BaseException:
            handles.remove()
            raise
        return handles

    def save(self) -> Path | None:
        """Writes a snapshot now; returns its path, or None where there is one of this time or no update yet.

        Of a sharded model all ranks have to call it.

        Raises:
            OSError, ValueError: where it cannot be written, or a weight is beyond the range of float16.
        """
        return self._write(0, 0)

    def reset(self) -> None:
        """Starts again: the averages become the model, and time 0. A run then needs a directory without snapshots."""
        for stream in self.streams:
            stream.reset()
        self._start_anew()

    def state_dict(self) -> dict[str, Any]:
        """The complete state: each average's, time, and which snapshots there are; tensors and plain values only."""
        return {
            "ignite_ema_posthoc_version": _VERSION,
            "run": self._run,
            "sigma_rels": list(self.sigma_rels),
            "time_unit": self.time_unit,
            "samples_seen": self._samples_seen,
            "updated_at": self.time,
            "snapshots": list(self._written),
            **{f"stream_{index}": stream.state_dict() for index, stream in enumerate(self.streams)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`, before or after ``attach``.

        Raises:
            TypeError, ValueError: for a state with a missing, unexpected or wrong entry, of another model, of other
                widths, or of another unit of time; nothing has been loaded then.
        """
        self._check_state(state)
        for index, stream in enumerate(self.streams):
            stream.load_state_dict(state[f"stream_{index}"])
        self._samples_seen = state["samples_seen"]
        for rule in self._rules():
            rule.now, rule.updated_at = self._samples_seen, state["updated_at"]
        self._run = state["run"]
        self._written[:] = state["snapshots"]
        self._directory_is_checked = False

    def _check_state(self, state: Mapping[str, Any]) -> None:
        own = self.state_dict()
        if not isinstance(state, Mapping):
            raise TypeError(
                f"The state of a PostHocEMA should be a mapping from its state_dict(), got {type(state).__name__}."
            )
        for key in ("ignite_ema_posthoc_version", "sigma_rels", "time_unit"):
            if key in state and state[key] != own[key]:
                raise ValueError(
                    f"{key!r} of the state should be {own[key]!r}, got {state[key]!r}; make the PostHocEMA as it was "
                    "made when the state was saved."
                )
        for key in [*own, *state]:
            if key not in state or key not in own:
                what = "misses" if key in own else "should not have"
                raise ValueError(
                    f"The state of a PostHocEMA should be what its state_dict() gave, but it {what} {key!r}; load what "
                    "state_dict() gave, unchanged."
                )
        for key in ("samples_seen", "updated_at"):
            check_count(state[key], f"{key!r} of the state")
        is_list = isinstance(state["snapshots"], list) and all(type(time) is int for time in state["snapshots"])
        if not isinstance(state["run"], str) or not is_list:
            raise TypeError(
                "'run' and 'snapshots' of the state should be a string and a list of times, got "
                f"{state['run']!r} and {state['snapshots']!r}; load what state_dict() gave, unchanged."
            )
        for index, stream in enumerate(self.streams):
            check_state(state[f"stream_{index}"])
            check_loadable(stream.averaged_tensors(), state[f"stream_{index}"]["averaged_tensors"])

    def _start_anew(self) -> None:
        self._samples_seen = 0
        for rule in self._rules():
            rule.now = rule.updated_at = 0
        tensors = [local(tensor) for tensor in self.streams[0].averaged_tensors().values()]
        # Of what a run starts from and not by chance, so that the same run writes the same files.
        self._run = hashlib.sha256(repr(kernels.norms(tensors)).encode()).hexdigest()[:16]
        self._written: list[int] = []  # the times of the snapshots of this run
        self._directory_is_checked = False

    def _rules(self) -> "Iterable[PowerOfSamples]":
        return [stream.momentum for stream in self.streams if isinstance(stream.momentum, PowerOfSamples)]

    def _count(self, engine: Engine) -> None:
        count = self._samples(engine) if self._samples is not None else 0
        if type(count) is not int or count < 1:
            raise ValueError(
                f"samples should return the number of samples in the batch, an integer of at least 1, got {count!r}."
            )
        self._samples_seen += count
        for rule in self._rules():
            rule.now = self._samples_seen

    def _check_directory(self, engine: Engine | None = None) -> None:
        """Once for each run, and after a state was loaded: the directory has its past and nothing else."""
        if self._directory_is_checked:
            return
        if is_first_rank():
            self._clear(paths_in(self.dirname))
        self._directory_is_checked = True

    def _clear(self, found: Mapping[int, Path]) -> None:
        if found and not self.time:
            raise ValueError(
                f"'{self.dirname}' should have no snapshots when a run starts, got {len(found)}, up to time "
                f"{max(found)}; choose another directory, or to go on with that run put the PostHocEMA into its "
                "checkpoint and load it."
            )
        for time, path in found.items():
            # One of the very time of the state may have been written after the checkpoint of the same event.
            is_expected = time in self._written or time >= self.time
            if not is_expected or read(path).run != self._run:
                raise ValueError(
                    f"'{path}' should be a snapshot of the run that goes on, but it is of another one; choose another "
                    "directory."
                )
        if missing := [time for time in self._written if time not in found]:
            warnings.warn(
                f"'{self.dirname}' should have the {len(self._written)} snapshots that this run has written, but "
                f"{len(missing)} are missing, the first of time {missing[0]}; put them there, or lengths that need "
                "them cannot be rebuilt.",
                stacklevel=2,
            )
        later = [path for time, path in found.items() if time > self.time]
        for path in later:
            path.replace(path.with_name(f"{path.name}.superseded"))
        if later:
            warnings.warn(
                f"{len(later)} snapshots in '{self.dirname}' are later than the state that was loaded, of time "
                f"{self.time}, and were set aside as '{later[0].name}.superseded' …; the run writes new ones.",
                stacklevel=2,
            )

    def _save(self, engine: Engine) -> None:
        self._write(engine.state.iteration, engine.state.epoch)

    def _write(self, iteration: int, epoch: int) -> Path | None:
        time = self.time
        if time == 0 or time in self._written:
            return None
        self._check_directory()
        averaged, copied = zip(*(stream.parts(self._snapshot_dtype) for stream in self.streams), strict=True)
        path = None
        if is_first_rank():
            snapshot = StoredSnapshot(
                run=self._run,
                time=time,
                time_unit=self.time_unit,
                num_updates=self.num_updates,
                iteration=iteration,
                epoch=epoch,
                sigma_rels=list(self.sigma_rels),
                averaged=list(averaged),
                copied=copied[0],
                state_dict_names=self.streams[0].state_dict_names(),
            )
            path = write(snapshot, self.dirname)
        self._written.append(time)
        return path


def _checked_widths(sigma_rels: Sequence[float]) -> tuple[float, ...]:
    if isinstance(sigma_rels, str) or not isinstance(sigma_rels, Sequence) or not sigma_rels:
        raise TypeError(f"sigma_rels should be a sequence of widths such as (0.05, 0.10), got {sigma_rels!r}.")
    widths = tuple(float(PowerFunction(sigma_rel).sigma_rel) for sigma_rel in sigma_rels)
    if len(set(widths)) < len(widths):
        raise ValueError(f"sigma_rels should be different widths, got {sigma_rels!r}.")
    return widths
