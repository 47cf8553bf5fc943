"""Keeps averages from which an average of any length can be rebuilt later; see :mod:`ignite_ema.posthoc`."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from ignite.engine import Engine, Events
from torch import nn

from ..averaging.average import ModelAverage
from ..averaging.buffers import BufferPolicy
from ..averaging.checks import check_saved_mapping, one_line, warn_user
from ..averaging.sharding import is_first_rank, on_first_rank
from ..averaging.state import check_average_state
from ..posthoc.snapshots import StoredSnapshot, gathered, prepare, read_frozen, to_store, write, write_frozen
from ..schedules import PowerFunction
from .attachment import Attachment, EngineHandler, Event, check_attachable
from .guidance import warn_unrestored

_VERSION = 3
_SAMPLES = "lambda engine: len(engine.state.batch[0])"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class PostHocEMA(EngineHandler):
    """Keeps power-function averages of a few widths and stores snapshots, from which any length can be rebuilt later.

    The widths are relative to the run so far, and each snapshot has all averages in one file. What can be rebuilt, and
    how well, follows from the snapshots' times alone: with two widths and 64 evenly spaced snapshots, ``sigma_rel``
    from 0.04 to 0.25 to 1.5 %; see :func:`ignite_ema.posthoc.residual`.

    Args:
        model: the online model, alone or inside ``DistributedDataParallel``, ``DataParallel`` or ``torch.compile``.
        sigma_rels: the widths of the averages, each in (0, 1/√12).
        dirname: the directory of the snapshots, ``snapshot_<time>.pt``; made if it is missing.
        handle_buffers: "statistics", "copy", "update", or a mapping from name patterns to "copy", "update" or "keep";
            see :class:`~ignite_ema.ModelAverage`. The default averages the statistics of normalization layers: a long
            average does not match those of the last batches. Buffers that are not averaged are stored as they are.
        samples: called with the engine when an iteration starts, returns the number of samples in its batch. Time is
            then counted in samples, for batches whose size changes. True: you pass the number to :meth:`update`, in a
            loop without an engine. None: time is counted in updates, however far apart.
        snapshot_dtype: the type in which the averages are stored: float32, float64, bfloat16 or float16. 16 bits halve
            the files and round each weight, on average by 0.17 % (bfloat16) or 0.02 % (float16). A rebuilt average is
            off by that, times the norm of the coefficients if it is above 1: with 64 snapshots 2.3 for a width of 0.04,
            and 17 for 0.02.
        ema_models: your own twins, one for each width, for models that cannot be deep-copied.
        dtype, device, skip_nonfinite, stochastic_rounding: as for :class:`~ignite_ema.ModelAverage`.
        share_frozen: share the parameters that do not require gradients with the model; they are stored once for a run.

    Attributes:
        model: the online model, without wrappers.
        streams: a :class:`~ignite_ema.ModelAverage` for each width.
        sigma_rels: what was passed, as a tuple.
        dirname: the directory of the snapshots; after :meth:`reset` it can be set to another one that exists.
        time_unit: "updates" or "samples".
        time: the number of updates, or of samples, from the start to the last update.

    Raises:
        TypeError, ValueError, RuntimeError: for a wrong argument, or a model that cannot be averaged.
        OSError: if the directory cannot be made.

    Note:
        In a process group, build, attach, load, save and reset it on all ranks. Only the first rank writes and returns
        paths; an error there is raised on all ranks. The ranks communicate when it is built, at the first update of a
        run and at each snapshot. The first rank gathers each snapshot of a sharded model in its CPU memory.

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
        handle_buffers: BufferPolicy = "statistics",
        samples: Callable[[Engine], int] | bool | None = None,
        snapshot_dtype: torch.dtype = torch.float32,
        ema_models: Sequence[nn.Module] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        share_frozen: bool = False,
        skip_nonfinite: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        _check_options(sigma_rels, handle_buffers, samples, snapshot_dtype, ema_models)
        twins: Sequence[nn.Module | None] = ema_models or [None] * len(sigma_rels)
        schedules = [PowerFunction(sigma_rel) for sigma_rel in sigma_rels]
        self.sigma_rels = tuple(float(schedule.sigma_rel) for schedule in schedules)
        self.time_unit = "samples" if samples else "updates"
        self.streams = tuple(
            ModelAverage(
                model,
                handle_buffers,
                momentum=None if samples else schedule,
                ema_model=twin,
                dtype=dtype,
                device=device,
                share_frozen=share_frozen,
                skip_nonfinite=skip_nonfinite,
                stochastic_rounding=stochastic_rounding,
            )
            for schedule, twin in zip(schedules, twins, strict=True)
        )
        super().__init__(self.streams[0])
        self._samples: Any = samples
        self._dtype = snapshot_dtype
        self._exponents = [schedule.gamma + 1 for schedule in schedules]
        self.dirname = Path(dirname)
        on_first_rank(lambda: self.dirname.mkdir(parents=True, exist_ok=True))
        self._start_anew()
        self._is_new = True  # neither loaded, reset nor prepared for a run since

    def _start_anew(self) -> None:
        """Begins a new run, at time 0 and without snapshots."""
        self.time = self._seen = 0  # the second counts samples
        self._run_id: str = on_first_rank(lambda: uuid4().hex)
        self._times: list[int] = []
        self._is_prepared = self._is_new = False

    def __repr__(self) -> str:
        return one_line(
            "PostHocEMA",
            lambda: f"{type(self.model).__name__}: sigma_rel {' and '.join(f'{width:g}' for width in self.sigma_rels)}",
            lambda: f"at {self.time} {self.time_unit}",
            lambda: f"{len(self._times)} snapshots in {str(self.dirname)!r}",
        )

    @property
    def num_updates(self) -> int:
        """The number of updates made so far."""
        return self._average.num_updates

    def update(self, samples: int | None = None) -> bool:
        """Updates all averages, in a loop without an engine; call :meth:`save` from time to time.

        Args:
            samples: the number of samples since the last update, if time is counted in samples.

        Returns:
            Whether the update was made: False if ``skip_nonfinite`` skipped it.

        Raises:
            TypeError, ValueError: if the number is wrong, or time is counted in updates.
        """
        if self.time_unit == "samples":
            self._count(samples, "samples should be")
        elif samples is not None:
            raise TypeError(f"samples should be left out unless PostHocEMA has samples=True, got {samples!r}.")
        return self._update()

    def attach(
        self,
        engine: Engine,
        name: str = "posthoc_momentum",
        event: Event = Events.ITERATION_COMPLETED,
        snapshot_event: Event = Events.EPOCH_COMPLETED,
        *,
        optimizer: Any = None,
    ) -> Attachment:
        """Updates the averages at ``event``, and writes a snapshot at ``snapshot_event`` and at the end of a run.

        Attach before whatever saves a checkpoint at the same event. A run that is terminated writes no last snapshot;
        call :meth:`save` then. If a run resumes, snapshots later than its state are set aside, as ``….pt.superseded``.
        ``remove()`` on the returned object undoes this call.

        Args:
            engine: the trainer.
            name: ``engine.state.<name>_<i>`` shows the momentum of the i-th average.
            event: when to update.
            snapshot_event: when to write; dozens, evenly spaced, are enough. Writes nothing without a new update.
            optimizer: update only if this optimizer, or the one that it wraps, has stepped since the last event.

        Raises:
            TypeError, ValueError, RuntimeError: if an argument is wrong, or this is attached to the engine already. The
                run raises ValueError at its start if the directory has snapshots of another run.
        """
        names = tuple(f"{name}_{index}" for index in range(len(self.streams)))
        check_attachable(self, engine, [name, *names], event, snapshot_event)
        if self._samples is True:
            raise TypeError(f"samples should be a function of the engine, got True; pass one such as {_SAMPLES}.")
        if taken := [taken for taken in names if hasattr(engine.state, taken)]:
            warn_user(
                f"Attribute '{taken[0]}' already exists in Engine.state, made by another handler or loaded with the "
                "engine, and is overwritten. Choose another name."
            )
        attachment = Attachment(self, engine, names, event, optimizer)
        if self.time_unit == "samples":
            attachment.call_at(engine, Events.ITERATION_STARTED, self._count_batch)
        attachment.call_at(engine, snapshot_event, self._save)
        self._show_momenta()
        return attachment

    def save(self) -> Path | None:
        """Writes a snapshot now; returns its path, or None if this time has one already or there is no update yet.

        Raises:
            OSError, ValueError: on all ranks, if it cannot be written, a weight is beyond the range of the snapshots'
                type, or the directory has snapshots of another run.
        """
        return self._save()

    def reset(self) -> None:
        """Starts over: averages equal the model, and time is 0. The next run needs a directory without snapshots."""
        for average in self.streams:
            average.reset()
        self._start_anew()
        self._show_momenta()

    def state_dict(self) -> dict[str, Any]:
        """The complete state: each average's, time, and the times of snapshots; tensors and plain values only."""
        self._note_reading()
        return self._plain_state() | {
            f"stream_{index}": average.state_dict() for index, average in enumerate(self.streams)
        }

    def _plain_state(self) -> dict[str, Any]:
        """The state without the averages."""
        return {
            "ignite_ema_posthoc_version": _VERSION,
            "sigma_rels": list(self.sigma_rels),
            "time_unit": self.time_unit,
            "samples_seen": self._seen,
            "updated_at": self.time,
            "run_id": self._run_id,
            "snapshot_times": list(self._times),
            "optimizer_stepped": sorted(self._stepped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a :meth:`state_dict`, before or after ``attach``.

        Raises:
            TypeError, ValueError: if an entry is wrong, or is of another model, other widths or another unit of time;
                nothing is loaded then.
        """
        own = self._plain_state()
        for key in ("ignite_ema_posthoc_version", "sigma_rels", "time_unit"):
            if isinstance(state, Mapping) and key in state and state[key] != own[key]:
                raise ValueError(
                    f"{key!r} of the state should be {own[key]!r}, got {state[key]!r}; make the PostHocEMA as it was "
                    "made when the state was saved."
                )
        streams = [f"stream_{index}" for index in range(len(self.streams))]
        kinds: dict[str, Any] = {key: type(value) for key, value in own.items()}
        check_saved_mapping(state, kinds | dict.fromkeys(streams, Mapping), "a PostHocEMA")
        forms = []
        for stream in streams:
            check_average_state(state[stream])
            shapes = {name: getattr(one, "shape", None) for name, one in state[stream]["averaged_tensors"].items()}
            forms.append((state[stream]["num_updates"], shapes))
        if any(form != forms[0] for form in forms):  # else one would be loaded before the next is refused
            raise ValueError(
                "The averages of the state should be of one model and one number of updates, got others; load what "
                "state_dict() gave, unchanged."
            )
        for stream, average in zip(streams, self.streams, strict=True):
            average.load_state_dict(state[stream])
        self._seen, self.time = state["samples_seen"], state["updated_at"]
        self._run_id, self._times = state["run_id"], list(state["snapshot_times"])
        self._is_prepared = self._is_new = False
        self._stepped = set(state["optimizer_stepped"])
        self._show_momenta()

    def _count(self, samples: object, what: str) -> None:
        if type(samples) is not int or samples < 1:
            raise ValueError(f"{what} the number of samples in the batch, an integer of at least 1, got {samples!r}.")
        self._seen += samples

    def _count_batch(self, engine: Engine) -> None:
        self._count(self._samples(engine), "samples should return")

    def _next_time(self) -> int:
        return max(self._seen, self.time + 1)  # each batch has at least one sample

    def _show_momenta(self) -> list[float]:
        """Shows each average's next λ on the engines: from time t to t' it is 1 - (t / t') ^ (γ + 1)."""
        then = self._next_time()
        step = math.log1p((self.time - then) / then) if self.time else -math.inf
        momenta = [-math.expm1(exponent * step) for exponent in self._exponents]
        self._publish(*momenta)
        return momenta

    def _update(self) -> bool:
        self._prepare()
        momenta = self._show_momenta()
        moved = [average.update(momentum) for average, momentum in zip(self.streams, momenta, strict=True)]
        if moved[0]:  # the others agree: they look at the same weights
            self.time = self._next_time()
        return moved[0]

    def _on_event(self, engine: Engine, attachment: Attachment) -> None:
        self._update()

    def _on_run_start(self, engine: Engine, attachment: Attachment) -> None:
        if self._is_new and attachment.first_iteration > 0:
            warn_unrestored("its PostHocEMA", attachment.first_iteration, "the averages start anew", "posthoc_ema")
        self._prepare()

    def _on_run_end(self, engine: Engine, attachment: Attachment) -> None:
        if not engine.should_terminate:  # so that a stopped and resumed run writes the same snapshots
            self._save(engine)

    def _prepare(self) -> None:
        """Once for each run or loaded state: makes sure that the directory has only the past of this run."""
        if self._is_prepared:
            return
        self._times = on_first_rank(lambda: prepare(self.dirname, self._run_id, self.time, self._times))
        shared = self._average.shared_tensors()
        if bool(shared) and on_first_rank(lambda: read_frozen(self.dirname, self._run_id) is None):
            frozen = gathered(shared)
            on_first_rank(lambda: write_frozen(frozen, self._run_id, self.dirname))
        self._is_prepared, self._is_new = True, False

    def _save(self, engine: Engine | None = None) -> Path | None:
        """Writes a snapshot; returns its path, on the first rank, or None if nothing has moved since the last one."""
        if not self.time:
            return None
        self._prepare()
        if self.time in self._times[-1:]:
            return None
        whole = [gathered(average.averaged_tensors()) for average in self.streams]

        def written() -> Path:
            contents = [to_store(*one, self._dtype) for one in zip(self.streams, whole, strict=True)]
            snapshot = StoredSnapshot(
                time=self.time,
                time_unit=self.time_unit,
                num_updates=self.num_updates,
                iteration=0 if engine is None else engine.state.iteration,
                epoch=0 if engine is None else engine.state.epoch,
                sigma_rels=list(self.sigma_rels),
                averaged=[averaged for averaged, _ in contents],
                copied=contents[0][1],
                state_dict_names=self._average.state_dict()["state_dict_names"],
                frozen_shapes={name: list(tensor.shape) for name, tensor in self._average.shared_tensors().items()},
                run_id=self._run_id,
            )
            return write(snapshot, self.dirname)

        path = on_first_rank(written)
        self._times.append(self.time)
        return path if is_first_rank() else None


def _check_options(sigma_rels: Any, handle_buffers: Any, samples: Any, snapshot_dtype: Any, ema_models: Any) -> None:
    if not isinstance(sigma_rels, Sequence) or not sigma_rels or len(set(sigma_rels)) < len(sigma_rels):
        raise ValueError(f"sigma_rels should be different widths such as (0.05, 0.10), got {sigma_rels!r}.")
    if handle_buffers == "ema_train":
        raise ValueError(
            "handle_buffers should be 'statistics', 'copy', 'update' or a mapping, got 'ema_train': an average that is "
            "rebuilt from snapshots has made no forward passes of its own."
        )
    if samples is not None and not isinstance(samples, bool) and not callable(samples):
        raise TypeError(f"samples should be a function of the engine, got {samples!r}; pass one such as {_SAMPLES}.")
    if snapshot_dtype not in _DTYPES:
        raise ValueError(f"snapshot_dtype should be one of {', '.join(map(str, _DTYPES))}, got {snapshot_dtype!r}.")
    if ema_models is not None and not len(set(map(id, ema_models))) == len(ema_models) == len(sigma_rels):
        raise ValueError(f"ema_models should be {len(sigma_rels)} different modules, one for each width, got others.")
