"""The Ignite handler: attaches a :class:`~ignite_ema.ModelAverage` to an engine."""

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from ignite.engine import Engine, Events
from torch import nn

from ..averaging.average import ModelAverage
from ..averaging.buffers import BufferPolicy
from ..averaging.checks import (
    check_count,
    checked_momentum,
    counted,
    described,
    module_summary,
    one_line,
    warn_first_rank,
)
from ..averaging.names import unwrapped
from ..averaging.state import AVERAGE_STATE, check_average_state
from ..averaging.swap import Swapped
from ..checkpoints.formats import Names
from ..checkpoints.reading import Source, read_part
from ..schedules import Schedule
from .attachment import Attachment, EngineHandler, Event, check_attachable
from .evaluation import EvaluationSwap
from .guidance import Guidance
from .momentum import Momentum

_STATE: dict[str, type | tuple[type, ...]] = {
    **AVERAGE_STATE,
    "current_momentum": (float, type(None)),
    "optimizer_stepped": list,
    "saved_while_swapped": bool,
}
_SAVED_WHILE_SWAPPED = (
    "The EMA handler {0} saved inside swapped() or swap_during(). Its own state is right, but a model that {0} saved "
    "beside it has averaged weights, too. Save what you resume from at an event of the trainer."
)


class EMAHandler(EngineHandler):
    """Keeps an exponential moving average of a model's weights while an Ignite engine trains it.

    ``average = (1 - λ) * average + λ * weights``: λ, the momentum, weighs the *new* weights; it is 1 - decay. Schedules
    count updates, not iterations. With a schedule the handler writes λ to ``engine.state.<name>`` at each event. With a
    plain float it reads λ from there, so that you, or an Ignite ``StateParamScheduler``, can drive it.

    Args:
        model: the online model, alone or inside ``DistributedDataParallel``, ``DataParallel`` or ``torch.compile``.
        momentum: λ, a float in (0, 1], or a schedule: a callable from the number of updates already made (0 at the
            first update) to λ in [0, 1], such as those of :mod:`ignite_ema.schedules`.
        momentum_warmup: λ of the first update, in [0, 1].
        warmup_iters: the number of updates over which λ goes linearly from ``momentum_warmup`` to ``momentum``.
        handle_buffers: "copy", "update", "statistics", "ema_train", or a mapping from name patterns to "copy", "update"
            or "keep": what an update does with buffers; see :class:`~ignite_ema.ModelAverage`.
        ema_model: your own twin, with the structure of ``model``, for models that cannot be deep-copied.
        dtype: the type of the average of floating-point tensors. None: the type of each tensor.
        device: where the twin lives. None: where the model's tensors are.
        share_frozen: share the parameters that do not require gradients with the model instead of copying them.
        skip_nonfinite: leave the average alone if an update would bring a NaN or an infinity into it.
        stochastic_rounding: let small updates move an average in bfloat16 or float16.

    Attributes:
        model: the online model, without wrappers.
        ema_model: the averaged twin, in eval mode; in train mode under "ema_train".
        handle_buffers: what was passed.
        average: the :class:`~ignite_ema.ModelAverage` that the handler drives.

    Raises:
        TypeError, ValueError, RuntimeError: for a wrong argument, or a model that cannot be averaged.

    Examples:
        >>> import torch
        >>> from ignite.engine import Engine, Events
        >>> model = torch.nn.Linear(1, 1)
        >>> handler = EMAHandler(model, momentum=0.5)
        >>> trainer = Engine(lambda engine, batch: model.weight.data.fill_(batch))
        >>> _ = handler.attach(trainer, event=Events.ITERATION_COMPLETED(every=2))
        >>> _ = handler.ema_model.weight.data.fill_(0.0)
        >>> _ = trainer.run([1.0, 2.0, 3.0, 4.0])
        >>> handler.num_updates, handler.ema_model.weight.item()  # 0 -> 1 -> 2.5
        (2, 2.5)
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float | Schedule = 0.0002,
        momentum_warmup: float | None = None,
        warmup_iters: int | None = None,
        handle_buffers: BufferPolicy = "copy",
        *,
        ema_model: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        share_frozen: bool = False,
        skip_nonfinite: bool = False,
        stochastic_rounding: bool = False,
        **unknown: NoReturn,
    ) -> None:
        for name, value in dict[str, Any](unknown).items():
            is_decay = name == "decay" and isinstance(value, float)
            way_out = f"; a momentum is 1 - decay: pass momentum={1 - value:g}" if is_decay else ""
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}{way_out}.")
        self._momentum = Momentum(momentum, momentum_warmup, warmup_iters)
        self.average = ModelAverage(
            model,
            handle_buffers,
            momentum=self._momentum.schedule or momentum,
            ema_model=ema_model,
            dtype=dtype,
            device=device,
            share_frozen=share_frozen,
            skip_nonfinite=skip_nonfinite,
            stochastic_rounding=stochastic_rounding,
        )
        super().__init__(self.average)
        self.ema_model, self.handle_buffers = self.average.module, self.average.handle_buffers
        self._guidance = Guidance(self.average, self._momentum)

    def __repr__(self) -> str:
        return one_line(
            type(self).__name__,
            lambda: module_summary(self.ema_model),
            lambda: f"momentum {described(self._momentum.schedule or self._plain_momentum())}",
            lambda: counted(self.num_updates, "update"),
            lambda: " and ".join(f"attached to an Engine as {one.names_in_words}" for one in self._attachments),
        )

    @property
    def momentum_scheduler(self) -> Schedule | None:
        """The schedule in force, None for a plain float."""
        return self._momentum.schedule

    @property
    def momentum(self) -> float | Schedule:
        """What was passed; a plain float can be set to another float."""
        return self._momentum.passed

    @momentum.setter
    def momentum(self, value: float) -> None:
        if self._momentum.schedule is not None or callable(value):
            raise TypeError(
                f"momentum should be set from one float to another, got {value!r} in place of "
                f"{self._momentum.passed!r}. Make a new handler for another schedule."
            )
        self.average.momentum = value  # raises before anything has changed
        self._momentum.set(value)
        self._publish(self._momentum.value)

    @property
    def num_updates(self) -> int:
        """The number of updates made so far; settable."""
        return self.average.num_updates

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        check_count(value)
        self._momentum.at(value)  # raises before anything has changed
        self.average.num_updates = value
        self._go_on()

    @property
    def num_skipped(self) -> int:
        """The number of updates that ``skip_nonfinite`` has skipped; ``num_updates`` does not count them."""
        return self.average.num_skipped

    @property
    def initial_share(self) -> float:
        """How much of the average is still the weights that it started from; see :class:`~ignite_ema.ModelAverage`."""
        return self.average.initial_share

    def attach(
        self,
        engine: Engine,
        name: str = "ema_momentum",
        warn_if_exists: bool = True,
        event: Event = Events.ITERATION_COMPLETED,
        *,
        optimizer: Any = None,
    ) -> Attachment:
        """Updates the average at ``event`` and publishes the momentum as ``engine.state.<name>``.

        Ignite calls handlers in the order of their registration: attach before whatever evaluates or saves the average
        at the same event, and after whatever steps. ``remove()`` on the returned object undoes this call.

        Args:
            engine: the trainer; no strong reference to it is kept.
            name: the attribute. When this call returns it shows the first λ, and after each update the λ that was used.
            warn_if_exists: warn if the attribute exists. A plain momentum that was not restored goes on from its
                value, a schedule overwrites it.
            event: when to update. Members of an ``EventsList`` that fire in the same iteration update once.
            optimizer: update only if this optimizer, or the one that it wraps, has stepped since the last event: for
                gradients that accumulate over several iterations, and a ``GradScaler`` that skips steps.

        Raises:
            TypeError, ValueError, RuntimeError: if an argument is wrong, the attribute exists and is not a momentum, or
                this handler is attached to the engine already.
        """
        check_attachable(self, engine, [name], event)
        first = self._momentum.first(engine.state, name, self.num_updates, warn_if_exists)
        attachment = Attachment(self, engine, (name,), event, optimizer)
        setattr(engine.state, name, first)
        if self.handle_buffers == "ema_train":  # an evaluator may have left it in eval mode
            attachment.call_at(engine, Events.ITERATION_STARTED, lambda _: self.ema_model.train())
        return attachment

    def swapped(self) -> Swapped:
        """Inside the block the model holds the averaged weights; see :meth:`ignite_ema.ModelAverage.swapped`."""
        self._note_reading(by_step=True)
        return self.average.swapped()

    def swap_during(self, evaluator: Engine, sync_buffers: bool = False) -> EvaluationSwap:
        """Evaluates the averaged weights: each ``evaluator.run()`` is inside :meth:`swapped`, until ``remove()``.

        Args:
            evaluator: an engine that evaluates ``model`` and does not train it.
            sync_buffers: evaluate with the first rank's buffers on all ranks, which have to run the evaluator together.
                The model gets its own buffers back with its weights.

        Raises:
            TypeError, RuntimeError: if ``evaluator`` is not an engine, or this handler is attached to it already.
        """
        return EvaluationSwap(self, evaluator, sync_buffers)

    def reset(self, *, buffers_only: bool = False) -> None:
        """Starts over: the average becomes a copy of the model, and the count becomes 0.

        Args:
            buffers_only: copy only the buffers, and leave weights and count as they are.
        """
        self.average.reset(buffers_only=buffers_only)
        if not buffers_only:
            self._go_on()
            self._guidance.start_here()

    def state_dict(self) -> dict[str, Any]:
        """The complete state: averaged tensors (not copies), count and momentum; tensors and plain values only."""
        self._note_reading()
        is_swapped = self.average.is_swapped()
        if is_swapped:
            self._tell_once("saved while swapped", _SAVED_WHILE_SWAPPED.format("is"))
        return {
            **self.average.state_dict(),
            "current_momentum": self._plain_momentum() if self._momentum.schedule is None else None,
            "optimizer_stepped": sorted(self._stepped),
            "saved_while_swapped": is_swapped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a :meth:`state_dict`, before or after ``attach``.

        A schedule resumes at the saved count, a plain momentum at its value when it was saved. If the saved handler had
        another momentum, this handler keeps its own and warns.

        Raises:
            TypeError, ValueError: if an entry is wrong or of another model; nothing is loaded then.
        """
        check_average_state(state, _STATE, "an EMAHandler")
        if not all(isinstance(name, str) for name in state["optimizer_stepped"]):
            raise TypeError(
                f"'optimizer_stepped' of the state should be a list of names, got {state['optimizer_stepped']!r}; load "
                "what state_dict() gave, unchanged."
            )
        saved = state["current_momentum"]
        if saved is not None:
            checked_momentum(saved, "'current_momentum' of the state")
        self.average.load_state_dict({key: state[key] for key in AVERAGE_STATE})
        self._stepped = set(state["optimizer_stepped"])
        if state["momentum_schedule"] == described(self.average.schedule) and saved is not None:
            self._momentum.restore(saved)
            self._publish(saved)
        self._go_on()
        if state["saved_while_swapped"]:
            warn_first_rank(_SAVED_WHILE_SWAPPED.format("was"))

    def load_averaged(
        self,
        source: Source,
        key: str | None = None,
        names: Names = None,
        num_updates: int | None = None,
        strict: bool = True,
    ) -> None:
        """Starts from the averaged weights in a checkpoint of this or another system; the model does not change.

        Args:
            source: a file or a directory, or what was loaded from one; :func:`ignite_ema.checkpoints.read` lists the
                systems. Also a handler's state, or the ``state_dict`` of a model whose weights are an average.
            key: which average, if there are several.
            names: names for checkpoints that store a list of tensors. None: those of the model's parameters.
            num_updates: how many updates the weights count for, which a schedule has to know. None: as many as the
                checkpoint says.
            strict: whether all tensors have to fit. False: takes every tensor whose name and shape fit, and starts the
                others from the model, with a warning.

        Raises:
            TypeError, ValueError, OSError, ImportError: if the checkpoint cannot be read, is of another model, or lacks
                the count that a schedule needs; nothing is loaded then.
            RuntimeError: inside :meth:`swapped`.
        """
        if isinstance(source, Mapping) and "averaged_tensors" in source:
            tensors, count, entry = source, source.get("num_updates"), ""
        else:
            found, _ = read_part(source, key, unwrapped(self.ema_model) if names is None else names)
            tensors, count = found.tensors, found.num_updates
            entry = found.entry if found.system == "plain" and key is None else ""
        count = count if num_updates is None else num_updates
        first = self._momentum.at(0)
        if count is None and self._momentum.counts and not self._guidance.start_is_known and first < 1:
            raise ValueError(
                "num_updates should be the number of updates that the loaded average counts for, which the checkpoint "
                f"does not say: {described(self._momentum.schedule)} would go on with a momentum of "
                f"{first:g}. Pass num_updates=, 0 to start the schedule."
            )
        self.average.load_averaged(tensors, num_updates=count, strict=strict)
        self._go_on()
        if entry:
            warn_first_rank(
                f"The checkpoint has no average, and this one starts from the weights in {entry!r}. If these are "
                f"averaged weights, pass key={entry!r}."
            )

    def _plain_momentum(self) -> float:
        """The current value of a plain momentum, which an engine may have driven."""
        for attachment in self._attachments:
            value = getattr(attachment.engine().state, attachment.names[0], None)
            return checked_momentum(value, f"engine.state.{attachment.names[0]}")
        return self._momentum.value

    def _go_on(self) -> None:
        """Notes that the average starts where it should, and shows the schedule's next λ."""
        self._guidance.start_is_known = True
        if self._momentum.schedule is not None:
            self._publish(self._momentum.at(self.num_updates))

    def _on_event(self, engine: Engine, attachment: Attachment) -> None:
        self.average.update(self._momentum.take(engine.state, attachment.names[0], self.average.num_updates))
        self._guidance.start_is_known = True

    def _on_run_start(self, engine: Engine, attachment: Attachment) -> None:
        self._guidance.check_start(attachment.names[0], attachment.first_iteration)

    def _on_run_end(self, engine: Engine, attachment: Attachment) -> None:
        if attachment.updates:
            self._guidance.check_end(attachment.names[0])
