"""Keeps the averages from which any averaging length can be rebuilt after training; see :mod:`ignite_ema.posthoc`."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim import Optimizer

from ..averaging import kernels
from ..averaging.buffers import BufferRule
from ..averaging.collectives import is_first_rank, on_first_rank
from ..averaging.sharding import is_sharded, local
from ..averaging.state_loading import check_loadable
from ..averaging.validation import check_count
from ..posthoc.snapshot_files import History, StoredSnapshot, is_history, paths_in, read, write
from ..schedules import PowerFunction
from .attachment import Event, Handles, attachments, check_name, members_of
from .handler_state import check_state
from .power_average import PowerOfSamples, Stream

__all__ = ["PostHocEMA"]

_T = TypeVar("_T")

_VERSION = 1
_NOT_MINE = ""  # the digest where another rank has written
_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
        dtype, device, share_frozen, skip_nonfinite, stochastic_rounding: as for ``EMAHandler``.

    Attributes:
        streams: an :class:`~ignite_ema.EMAHandler` for each width, with its ``ema_model`` and ``swapped()``.
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

    _loaded_time: int | None  # that of the state that was loaded last

    def __init__(
        self,
        model: nn.Module,
        sigma_rels: Sequence[float] = (0.05, 0.10),
        *,
        dirname: str | os.PathLike[str],
        handle_buffers: BufferRule = "update",
        samples: Callable[[Engine], int] | None = None,
        snapshot_dtype: torch.dtype = torch.float32,
        ema_models: Sequence[nn.Module] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        share_frozen: bool = False,
        skip_nonfinite: bool = False,
        stochastic_rounding: bool = False,
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
        self._starts_late = False  # whether it is meant to start in the middle of a run
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
                stochastic_rounding=stochastic_rounding,
            )
            for sigma_rel, twin in zip(self.sigma_rels, twins, strict=True)
        )
        for stream in self.streams:
            stream.directory = self.dirname.resolve()
        if not any(isinstance(tensor, nn.Parameter) for tensor in self.streams[0].ema_model.parameters()):
            raise ValueError("model should have parameters, got none; there is nothing to average.")
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
        self._check_others(engine, name)
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
            handles.add(engine.add_event_handler(Events.COMPLETED, self._save_last))
        except BaseException:
            handles.remove()
            raise
        return handles

    def _check_others(self, engine: Engine, name: str) -> None:
        others = [other for other in attachments(engine) if other.owner not in self.streams]
        if any(other.name.rpartition("_")[0] == name and isinstance(other.owner, Stream) for other in others):
            raise ValueError(
                f"name should be another than {name!r}, which another PostHocEMA of this engine uses; give each one of "
                "its own, such as name='generator_momentum'."
            )
        place = self.dirname.resolve()
        if any(isinstance(other.owner, Stream) and other.owner.directory == place for other in others):
            raise ValueError(
                f"dirname should be another than '{self.dirname}', which another PostHocEMA of this engine writes to; "
                "give each one a directory of its own."
            )

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
        self._starts_late = True

    def state_dict(self) -> dict[str, Any]:
        """The complete state: each average's, time, and which snapshots there are; tensors and plain values only."""
        return {
            "ignite_ema_posthoc_version": _VERSION,
            "sigma_rels": list(self.sigma_rels),
            "time_unit": self.time_unit,
            "samples_seen": self._samples_seen,
            "updated_at": self.time,
            "history": [list(one) for one in self._history],
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
        self._history[:] = [list(one) for one in state["history"]]
        self._loaded_time = self.time
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
        if not is_history(state["history"]):
            raise TypeError(
                f"'history' of the state should be a list of [time, digest] from time 0 on, got {state['history']!r}; "
                "load what state_dict() gave, unchanged."
            )
        for index, stream in enumerate(self.streams):
            check_state(state[f"stream_{index}"])
            check_loadable(stream.averaged_tensors(), state[f"stream_{index}"]["averaged_tensors"])
        counts = {state[f"stream_{index}"]["num_updates"] for index in range(len(self.streams))}
        last = counts if self.time_unit == "updates" else {min(state["samples_seen"], state["updated_at"])}
        if len(counts) != 1 or {state["updated_at"]} != last or state["history"][-1][0] > state["updated_at"]:
            raise ValueError(
                f"The averages of the state should be of one time, got {sorted(counts)} updates at "
                f"{state['updated_at']}; load what state_dict() gave, unchanged."
            )

    def _start_anew(self) -> None:
        self._samples_seen = 0
        for rule in self._rules():
            rule.now = rule.updated_at = 0
        tensors = [local(tensor) for tensor in self.streams[0].averaged_tensors().values()]
        start = self._on_first_rank(lambda: _digest(kernels.norms(tensors)))
        self._history: list[list[Any]] = [[0, start or _NOT_MINE]]
        self._loaded_time = None
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
        is_new = not self.time and self._loaded_time is None and not self._starts_late
        if is_new and engine is not None and engine.state.iteration > 0:
            warnings.warn(
                f"The trainer resumes at iteration {engine.state.iteration}, but its PostHocEMA was not restored, and "
                'the averages start anew; put it into the checkpoint ("posthoc_ema": posthoc_ema) and load it with '
                "Checkpoint.load_objects, or call reset() if they are meant to start here.",
                stacklevel=2,
            )
        place = self._on_first_rank(lambda: self._clear(paths_in(self.dirname)))
        self._directory_is_checked = True
        if place and self.time == self._loaded_time:
            self._write(*place)

    def _clear(self, found: Mapping[int, Path]) -> tuple[int, int] | None:
        """Sets aside what is later than the loaded state; gives iteration and epoch of one of the very time of it.

        Such a one was written after the checkpoint of the same event. It may be of a later attempt that went another
        way; the averages from which it is made anew are here.
        """
        now, place = self._loaded_time, None
        if found and now is None and len(self._history) == 1:
            raise ValueError(
                f"'{self.dirname}' should have no snapshots when a run starts, got {len(found)}, up to time "
                f"{max(found)}; choose another directory or move them away, or to go on with that run put the "
                "PostHocEMA into its checkpoint and load it."
            )
        known = dict(self._history)
        later: dict[int, Path] = {}
        for time, path in found.items():
            stored = read(path)
            history = [list(one) for one in stored.history]
            place = (stored.iteration, stored.epoch) if time == now and time not in known else place
            if time in known:
                is_ours = _same(history[-1:], [[time, known[time]]])
            else:
                is_ours = now is not None and time >= now and _same(history[: len(known)], self._history)
                later[time] = path
            if not is_ours:
                raise ValueError(
                    f"'{path}' should be a snapshot of the run that goes on, but it is of another one; choose another "
                    "directory."
                )
        if missing := [time for time in known if time and time not in found]:
            warnings.warn(
                f"'{self.dirname}' should have the {len(known) - 1} snapshots that this run has written, but lacks "
                f"{len(missing)}, the first of time {missing[0]}; put them there, or lengths that need them cannot be "
                "rebuilt.",
                stacklevel=2,
            )
        for path in later.values():
            path.replace(path.with_name(f"{path.name}.superseded"))
        if lost := [path.name for time, path in later.items() if time != now]:
            warnings.warn(
                f"'{self.dirname}' had snapshots that are later than the state that was loaded, of time {now}: "
                f"{len(lost)}, from '{lost[0]}' on; they are set aside as '….superseded', and written anew.",
                stacklevel=2,
            )
        return place

    def _save(self, engine: Engine) -> None:
        self._write(engine.state.iteration, engine.state.epoch)

    def _save_last(self, engine: Engine) -> None:
        if not engine.should_terminate:  # else it may go on, and should write then what it would have written
            self._save(engine)

    def _write(self, iteration: int, epoch: int) -> Path | None:
        time = self.time
        if not time:
            return None
        self._check_directory()
        if time == self._history[-1][0]:
            return None
        if len(counts := {stream.num_updates for stream in self.streams}) > 1:
            raise RuntimeError(
                f"The averages should be of one time, got {sorted(counts)} updates; leave the counts of single streams "
                "alone, and reset() or load the PostHocEMA as a whole."
            )
        averaged, copied, problems = zip(*(one.parts(self._snapshot_dtype) for one in self.streams), strict=True)

        def write_it() -> tuple[Path, list[Any]]:
            for problem in chain.from_iterable(problems):
                raise ValueError(problem)
            norms = [[_norm(tensor) for tensor in stream.values()] for stream in averaged]
            entry = [time, _digest([self._history[-1], time, norms])]
            snapshot = StoredSnapshot(
                time=time,
                time_unit=self.time_unit,
                num_updates=self.num_updates,
                iteration=iteration,
                epoch=epoch,
                sigma_rels=list(self.sigma_rels),
                averaged=list(averaged),
                copied=copied[0],
                state_dict_names=self.streams[0].state_dict_names(),
                history=[*self._history, entry],
            )
            return write(snapshot, self.dirname), entry

        path, entry = self._on_first_rank(write_it) or (None, [time, _NOT_MINE])
        self._history.append(entry)
        return path if is_first_rank() else None

    def _on_first_rank(self, action: Callable[[], _T]) -> _T | None:
        """Does what concerns files once. Where the model is sharded, all ranks are there, and learn what goes wrong."""
        if any(map(is_sharded, self.model.parameters())):
            return on_first_rank(action)
        return action() if is_first_rank() else None


def _same(one: History, other: History) -> bool:
    """Whether two parts of histories are of one run, as far as both are known."""
    times = [time for time, _ in one] == [time for time, _ in other]
    return times and all(_NOT_MINE in (a, b) or a == b for (_, a), (_, b) in zip(one, other, strict=True))


def _norm(tensor: Tensor) -> float:
    """In float64: two runs in 16 bits may be closer than 16 bits can tell."""
    return float(torch.linalg.vector_norm(tensor.to(torch.promote_types(tensor.dtype, torch.float64))))


def _digest(value: object) -> str:
    """A few characters that are other ones for another value; not by chance, so that a run writes the same twice."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _checked_widths(sigma_rels: Sequence[float]) -> tuple[float, ...]:
    if isinstance(sigma_rels, str) or not isinstance(sigma_rels, Sequence) or not sigma_rels:
        raise TypeError(f"sigma_rels should be a sequence of widths such as (0.05, 0.10), got {sigma_rels!r}.")
    widths = tuple(float(PowerFunction(sigma_rel).sigma_rel) for sigma_rel in sigma_rels)
    if len(set(widths)) < len(widths):
        raise ValueError(f"sigma_rels should be different widths, got {sigma_rels!r}.")
    return widths
