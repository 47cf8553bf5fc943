"""The Ignite handler: attaches a :class:`~ignite_ema.ModelAverage` to an engine."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from weakref import ref

import torch
from ignite.engine import Engine, Events
from ignite.engine.events import RemovableEventHandle
from ignite.handlers.param_scheduler import BaseParamScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from ..averaging.average import ModelAverage
from ..averaging.buffers import BufferRule
from ..averaging.module_trees import unwrapped
from ..averaging.validation import check_count, checked_momentum
from ..checkpoints.reading import read
from ..schedules import Constant, Schedule
from .attachment import Attachment, Event, attachments, check_name, members_of
from .evaluation import EvaluationSwap, swaps
from .handler_state import VERSION, check_state, described
from .momentum import schedule_of, scheduled
from .optimizer_steps import StepWatch, check_optimizer

__all__ = ["EMAHandler"]


class EMAHandler:
    r"""Keeps an exponential moving average of a model's weights while an Ignite engine trains it.

    .. math:: \theta_{ema} \leftarrow (1 - \lambda) \cdot \theta_{ema} + \lambda \cdot \theta

    λ, the momentum, weighs the *new* weights: λ = 1 - decay. Schedules count updates, not iterations.

    Args:
        model: the online model, an ``nn.Module``, alone or inside ``DistributedDataParallel``, ``DataParallel`` or
            ``torch.compile``.
        momentum: λ, a float in (0, 1), or a schedule: a callable from the number of updates already made (0 at the
            first update) to λ in [0, 1], such as those of :mod:`ignite_ema.schedules`.
        momentum_warmup: λ of the first update, in [0, 1]; together with ``warmup_iters``.
        warmup_iters: the number of updates over which λ goes linearly from ``momentum_warmup`` to ``momentum``.
        handle_buffers: "copy", "update", "ema_train", or a mapping from patterns of names to "copy", "update" or
            "keep"; see :class:`~ignite_ema.ModelAverage`.
        ema_model: a twin of your own, for models that cannot be deep-copied; it is filled from the model here.
        dtype: the type that holds the average, for instance ``torch.float32`` for a bfloat16 model.
        device: where the average is held.
        share_frozen: the twin shares the parameters that are frozen now and holds copies of the others alone, as suits
            LoRA on a large base.
        skip_nonfinite: leave the average alone, and count it in ``num_skipped``, where an update would bring a NaN or
            an infinity into it.
        stochastic_rounding: where the average is held in bfloat16 or float16, round so that updates too small for the
            type add up instead of being lost; takes ten times as long as ``dtype=torch.float32`` on a CPU.

    Attributes:
        model: the online model; inside ``DistributedDataParallel`` and compiled modules, the module in them.
        ema_model: the averaged twin, in eval mode (in train mode under "ema_train").
        momentum: what was passed; a plain float can be set to another.
        momentum_scheduler: the schedule in force, None for a plain float.
        handle_buffers: what was passed.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value.
        RuntimeError: for a model that cannot be deep-copied.

    Note:
        With a schedule the handler writes λ to ``engine.state.<name>`` at each event. With a plain float it reads λ
        from there, so that you, or an Ignite ``StateParamScheduler``, can drive it.

    Examples:
        >>> import torch
        >>> from ignite.engine import Engine, Events
        >>> model = torch.nn.Linear(1, 1)
        >>> handler = EMAHandler(model, momentum=0.5)
        >>> trainer = Engine(lambda engine, batch: model.weight.data.fill_(batch))
        >>> _ = handler.attach(trainer, event=Events.ITERATION_COMPLETED(every=2))
        >>> _ = handler.ema_model.weight.data.fill_(0.0)
        >>> _ = trainer.run([1.0, 2.0, 3.0, 4.0])
        >>> handler.ema_model.weight.item()  # 0 -> 1 -> 2.5
        2.5
        >>> trainer.state.ema_momentum, handler.num_updates
        (0.5, 2)
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float | Schedule = 0.0002,
        momentum_warmup: float | None = None,
        warmup_iters: int | None = None,
        handle_buffers: BufferRule = "copy",
        *,
        ema_model: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        share_frozen: bool = False,
        skip_nonfinite: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        self._set_rule(momentum, momentum_warmup, warmup_iters)
        self._average = ModelAverage(
            model,
            handle_buffers,
            ema_model=ema_model,
            dtype=dtype,
            device=device,
            share_frozen=share_frozen,
            skip_nonfinite=skip_nonfinite,
            stochastic_rounding=stochastic_rounding,
        )
        self._loaded_steps: set[str] = set()  # names of attachments to come, whose optimizer has stepped already
        self._count_is_known = False  # whether num_updates is known to be right: set, loaded, or counted from a start
        self._current_is_loaded = False
        self._attachments: list[ref[Attachment]] = []

    @property
    def momentum(self) -> float | Schedule:
        """What was passed; a plain float can be set to another."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float) -> None:
        if self.momentum_scheduler is not None or callable(value):
            raise TypeError(
                f"momentum should be set from one float to another, got {value!r} in place of {self._momentum!r}; make "
                "a new handler for another schedule."
            )
        self._set_rule(value)
        self._publish(self._current)

    def _set_rule(
        self, momentum: float | Schedule, momentum_warmup: float | None = None, warmup_iters: int | None = None
    ) -> None:
        if isinstance(momentum, type):
            raise TypeError(f"momentum should be a schedule, got the class {momentum.__name__}; make one: call it.")
        if isinstance(momentum, BaseParamScheduler):
            raise TypeError(
                f"momentum should be a float or a schedule of the number of updates, got {type(momentum).__name__} of "
                "Ignite; pass a float and attach the scheduler to the engine, where it drives engine.state.<name>."
            )
        rule = schedule_of(momentum, momentum_warmup, warmup_iters)
        self._current = scheduled(rule, 0)
        self._rule = rule
        self._momentum = momentum
        self.momentum_scheduler = None if isinstance(rule, Constant) and rule is not momentum else rule

    @property
    def model(self) -> nn.Module:
        """The online model, without wrappers."""
        return self._average.model

    @property
    def ema_model(self) -> nn.Module:
        """The averaged twin."""
        return self._average.module

    @property
    def handle_buffers(self) -> BufferRule:
        """What an update does with buffers."""
        return self._average.handle_buffers

    @property
    def num_updates(self) -> int:
        """The number of updates made so far; settable."""
        return self._average.num_updates

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        check_count(value)
        momentum = self._momentum_of(value)
        self._average.num_updates = value
        self._count_is_known = True
        if momentum is not None:
            self._publish(momentum)

    @property
    def num_skipped(self) -> int:
        """The number of updates that ``skip_nonfinite`` has left out; they are not in ``num_updates``."""
        return self._average.num_skipped

    def attach(
        self,
        engine: Engine,
        name: str = "ema_momentum",
        warn_if_exists: bool = True,
        event: Event = Events.ITERATION_COMPLETED,
        *,
        optimizer: Optimizer | None = None,
    ) -> RemovableEventHandle:
        """Updates the average at ``event`` and publishes the momentum as ``engine.state.<name>``.

        The attribute exists as soon as this returns and shows the first λ; after each update it shows the λ that was
        used. Of an ``EventsList`` those members that fire in the same iteration update once. Ignite calls handlers in
        the order of their registration: attach before what evaluates or saves the average at the same event.

        Args:
            engine: the trainer; no strong reference to it is kept.
            name: the attribute; every handler of a trainer has its own.
            warn_if_exists: warn where the attribute exists already. A plain momentum goes on from its value then, a
                schedule overwrites it.
            event: when to update.
            optimizer: update only where this optimizer has stepped since the last event: with gradients accumulated
                over several iterations, and where a ``GradScaler`` skips steps.

        Returns:
            A handle whose ``remove()`` undoes this call.

        Raises:
            TypeError, ValueError: for a name of the engine's own, a name that another handler's schedule writes, an
                existing value that is no momentum, or an event that the engine does not fire.
            RuntimeError: where this handler is attached to this engine already.
        """
        members_of(event, engine)
        check_name(name)
        check_optimizer(optimizer, self.model)
        for other in attachments(engine):
            if other.owner is self:
                raise RuntimeError(
                    f"An EMAHandler should be attached to an engine once, but this one is already, as '{other.name}'; "
                    "remove() the handle of that attachment first, or use an EventsList."
                )
            if other.name == name and (self.momentum_scheduler or other.is_scheduled):
                raise ValueError(
                    f"name should be another than '{name}', which another EMAHandler of this engine uses; where one of "
                    "two handlers has a schedule, it would drive the other."
                )
        if any(swap.owner is self for swap in swaps(engine)):
            raise RuntimeError(
                "engine should be one that trains, but swap_during() was called with it and its runs are on the "
                "averaged weights; train with another engine."
            )
        exists = hasattr(engine.state, name)
        current = getattr(engine.state, name, None)  # None also where a StateParamScheduler made it and has not run yet
        goes_on = current is not None and self.momentum_scheduler is None and not self._current_is_loaded
        if goes_on:
            checked_momentum(current, f"engine.state.{name}")
        if exists and warn_if_exists:
            warnings.warn(
                f"Attribute '{name}' already exists in Engine.state: the engine has loaded it, or something else made "
                "it, and both would use it; choose another name, or set warn_if_exists to False if that is meant.",
                category=UserWarning,
                stacklevel=2,
            )
        if not goes_on:
            momentum = self._momentum_of(self.num_updates)
            setattr(engine.state, name, self._current if momentum is None else momentum)
        attachment = Attachment(
            self,
            engine,
            name,
            self.momentum_scheduler is not None,
            not exists,
            event,
            partial(self._update, name),
            partial(self._check_start, name),
            None if optimizer is None else StepWatch(optimizer, name in self._loaded_steps),
        )
        self._loaded_steps.discard(name)
        if self.handle_buffers == "ema_train":
            attachment.call_at(engine, Events.ITERATION_STARTED, lambda engine: self.ema_model.train())
        self._attachments.append(ref(attachment))
        return attachment

    def swapped(self) -> AbstractContextManager[None]:
        """Inside the block the model holds the averaged weights and buffers, in place; after it, its own again.

        On every way out the model has the bits that it had before. :attr:`ema_model` stays what it is, so that a
        checkpoint of the average that is taken inside is right. Costs one copy of the model's tensors while it lasts.

        Raises:
            RuntimeError: where the model holds averaged weights already, and from what would update the average inside.
        """
        return self._average.swapped()

    def swap_during(self, evaluator: Engine) -> EvaluationSwap:
        """Evaluates the averaged weights: each ``evaluator.run()`` from here on is inside :meth:`swapped`.

        Args:
            evaluator: an engine that evaluates ``model``; not one that trains it.

        Returns:
            A handle whose ``remove()`` undoes this call.

        Raises:
            TypeError: unless ``evaluator`` is an engine.
            RuntimeError: where this handler does so already, or updates at an event of this engine.
        """
        return EvaluationSwap(self, evaluator)

    def reset(self, *, buffers_only: bool = False) -> None:
        """Starts again: the average becomes the model, buffers included, and the count 0.

        Args:
            buffers_only: copy the buffers alone, and leave averaged weights and count as they are.
        """
        self._average.reset(buffers_only=buffers_only)
        if not buffers_only:
            self.num_updates = 0  # publishes what the schedule starts with

    def state_dict(self) -> dict[str, Any]:
        """The complete state: averaged tensors (not copies), count and momentum; tensors and plain values only."""
        return {
            "ignite_ema_version": VERSION,
            "num_updates": self.num_updates,
            "current_momentum": self._plain_momentum() if self.momentum_scheduler is None else None,
            "momentum_schedule": described(self._rule),
            "num_skipped": self._average.num_skipped,
            "optimizer_stepped": sorted(self._loaded_steps | {a.name for a in self._attached() if _has_stepped(a)}),
            "saved_while_swapped": self._average.is_swapped(),
            "averaged_tensors": self._average.state_dict(),
            "state_dict_names": self._average.state_dict_names(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`, before or after ``attach``.

        A schedule goes on from the saved count, a plain momentum from the saved value, to which it may have been
        driven. Where the saved handler had another rule, this one's own rule counts, and a warning says so.

        Raises:
            TypeError, ValueError: for a state with a missing, unexpected or wrong entry, or of another model; names
                it, and nothing has been loaded then.
        """
        check_state(state)
        self._momentum_of(state["num_updates"])  # raises before anything has changed
        self._average.load_state_dict(state["averaged_tensors"])
        self._average.num_skipped = state["num_skipped"]
        self._load_steps(set(state["optimizer_stepped"]))
        self.num_updates = state["num_updates"]
        if state["saved_while_swapped"]:
            warnings.warn(
                "The EMA handler was saved inside swapped() or swap_during(): its own state is right, but a model "
                "that was saved beside it holds averaged weights, too; save what you resume from at an event of the "
                "trainer.",
                stacklevel=2,
            )
        if state["momentum_schedule"] != described(self._rule):
            warnings.warn(
                f"The EMA handler was saved with {state['momentum_schedule']} and goes on with "
                f"{described(self._rule)}; if that is not meant, make it as it was made before.",
                stacklevel=2,
            )
        elif state["current_momentum"] is not None:
            self._current = state["current_momentum"]
            self._current_is_loaded = True
            self._publish(self._current)

    def load_averaged(
        self,
        source: str | os.PathLike[str] | Mapping[str, Any],
        *,
        key: str | None = None,
        names: nn.Module | Mapping[str, Tensor] | None = None,
        num_updates: int | None = None,
    ) -> None:
        """Starts from the averaged weights in a checkpoint of another system, or of this one; leaves the model alone.

        Args:
            source: a file, or what was loaded from one; see :func:`ignite_ema.checkpoints.read` for the systems.
            key: which average, where there are several.
            names: the names of a list without names, None: those of the model; see there.
            num_updates: how many updates the average has behind it; None: as many as the checkpoint says. For schedules
                it has to be known.

        Raises:
            TypeError, ValueError, OSError, ImportError: where the checkpoint cannot be read, is of another model, or
                does not say the count that a schedule goes on from; nothing has been loaded then.
            RuntimeError: inside :meth:`swapped`.

        Note:
            Of a checkpoint without an average the weights themselves are taken, with a warning.
        """
        found = read(source, key=key, names=unwrapped(self.ema_model) if names is None else names)
        count = found.num_updates if num_updates is None else num_updates
        if count is None and not isinstance(self._rule, Constant) and not self._count_is_known:
            raise ValueError(
                "num_updates should be the number of updates that the loaded average has behind it, which the "
                f"checkpoint does not say: {described(self._rule)} would go on with a momentum of {self._rule(0):g}; "
                "pass num_updates=, 0 to start the schedule."
            )
        count = self.num_updates if count is None else count
        check_count(count)
        self._momentum_of(count)  # raises before anything has changed
        self._average.load_plain(found.tensors)
        self.num_updates = count
        if found.system == "plain":
            warnings.warn("The checkpoint has no average; this one starts from the weights in it.", stacklevel=2)

    def _load_steps(self, names: set[str]) -> None:
        for attachment in self._attached():
            if attachment.steps is not None:
                attachment.steps.has_stepped = attachment.name in names
                names.discard(attachment.name)
        self._loaded_steps = names

    def _update(self, name: str, engine: Engine) -> None:
        if self.momentum_scheduler is None:
            momentum = getattr(engine.state, name, None)
            if type(momentum) is not float or not 0 <= momentum <= 1:
                momentum = checked_momentum(momentum, f"engine.state.{name}")
            self._current = momentum
        else:
            momentum = scheduled(self.momentum_scheduler, self._average.num_updates)
            setattr(engine.state, name, momentum)
        self._average.update(momentum)
        self._count_is_known = True

    def _momentum_of(self, n: int) -> float | None:
        """What the schedule gives after ``n`` updates, None where the momentum is plain."""
        if self.momentum_scheduler is None:
            return None
        return scheduled(self.momentum_scheduler, n)

    def _plain_momentum(self) -> float:
        for attachment in self._attached():
            return checked_momentum(attachment.value, f"engine.state.{attachment.name}")
        return self._current

    def _publish(self, momentum: float) -> None:
        for attachment in self._attached():
            attachment.value = momentum

    def _attached(self) -> Iterator[Attachment]:
        """What is attached now, to engines that are still there."""
        for reference in self._attachments:
            attachment = reference()
            if attachment is not None and attachment.is_attached and attachment.engine() is not None:
                yield attachment

    def _check_start(self, name: str, engine: Engine) -> None:
        """Warns once where a run is resumed with a handler that was not restored, or starts from other weights."""
        self._average.look_again()
        if self._count_is_known:
            return
        self._count_is_known = True
        iteration = engine.state.iteration
        is_stale = self._average.is_stale()
        if iteration > 0 and (is_stale or not isinstance(self._rule, Constant)):
            lost = "its average starts from the weights it was made with" if is_stale else "its momentum starts again"
            warnings.warn(
                f"The trainer resumes at iteration {iteration}, but the EMA handler of '{name}' was not restored, and "
                f'{lost}; put the handler into the checkpoint ("ema_handler": handler) and load it with '
                "Checkpoint.load_objects, or call handler.reset() if the average is meant to start here.",
                stacklevel=2,
            )
        elif is_stale and self._current < 1:
            warnings.warn(
                f"The model has other weights than when the EMA handler of '{name}' was made (loaded or synchronised "
                "since), and the average starts from the old ones; call handler.reset() when the model is ready.",
                stacklevel=2,
            )


def _has_stepped(attachment: Attachment) -> bool:
    return attachment.steps is not None and attachment.steps.has_stepped
