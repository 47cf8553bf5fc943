"""The Ignite handler: attaches a :class:`~ignite_ema.ModelAverage` to an engine."""

from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.optim import Optimizer

from ..averaging.average import ModelAverage
from ..averaging.buffers import BufferPolicy
from ..averaging.summaries import counted, module_summary, momentum_summary, one_line
from ..averaging.swap import Swapped
from ..averaging.validation import refuse_shallow_copy
from ..checkpoints.formats import Names
from ..checkpoints.reading import Source
from ..schedules import Schedule
from .attach_arguments import check_attachable
from .attachment import Attachment, Attachments
from .evaluation import EvaluationSwap
from .events import Event
from .guidance import Guidance
from .handler_state import HandlerState
from .momentum import momentum_of

__all__ = ["EMAHandler"]


class EMAHandler:
    """Keeps an exponential moving average of a model's weights while an Ignite engine trains it.

    ``average = (1 - λ) * average + λ * weights``: λ, the momentum, weighs the *new* weights; it is 1 - decay. Schedules
    count updates, not iterations. With a schedule the handler writes λ to ``engine.state.<name>`` at each event. With a
    plain float it reads λ from there, so that you, or an Ignite ``StateParamScheduler``, can drive it.

    Args:
        model: the online model, alone or inside ``DistributedDataParallel``, ``DataParallel`` or ``torch.compile``.
        momentum: λ, a float in (0, 1), or a schedule: a callable from the number of updates already made (0 at the
            first update) to λ in [0, 1], such as those of :mod:`ignite_ema.schedules`.
        momentum_warmup, warmup_iters: together: λ goes linearly from the one, in [0, 1], to ``momentum`` over as many
            updates as the other says.
        handle_buffers, ema_model, dtype, device, share_frozen, skip_nonfinite, stochastic_rounding, flatten: as for
            :class:`~ignite_ema.ModelAverage`, which says what they do, and what is raised.

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
        flatten: bool = False,
    ) -> None:
        self._attachments = Attachments()
        self._momentum = momentum_of(momentum, momentum_warmup, warmup_iters, self._attachments)
        self._average = ModelAverage(
            model,
            handle_buffers,
            momentum=momentum if self._momentum.schedule is None else self._momentum.schedule,
            ema_model=ema_model,
            dtype=dtype,
            device=device,
            share_frozen=share_frozen,
            skip_nonfinite=skip_nonfinite,
            stochastic_rounding=stochastic_rounding,
            flatten=flatten,
        )
        self._guidance = Guidance(self._average, self._momentum)
        self._state = HandlerState(self._average, self._momentum, self._guidance, self._attachments)

    __copy__ = refuse_shallow_copy

    def __repr__(self) -> str:
        return one_line(
            type(self).__name__,
            lambda: module_summary(self.ema_model),
            lambda: momentum_summary(self._momentum.in_force()),
            lambda: counted(self.num_updates, "update"),
            lambda: " and ".join(f"attached to an Engine as '{one.name}'" for one in self._attachments),
        )

    @property
    def model(self) -> nn.Module:
        """The online model, without wrappers."""
        return self._average.model

    @property
    def ema_model(self) -> nn.Module:
        """The averaged twin, in eval mode; in train mode under "ema_train"."""
        return self._average.module

    @property
    def handle_buffers(self) -> BufferPolicy:
        """What was passed."""
        return self._average.handle_buffers

    @property
    def momentum_scheduler(self) -> Schedule | None:
        """The schedule in force, None for a plain float."""
        return self._momentum.schedule

    @property
    def momentum(self) -> float | Schedule:
        """What was passed; a plain float can be set to another."""
        return self._momentum.passed

    @momentum.setter
    def momentum(self, value: float) -> None:
        self._state.set_momentum(value)

    @property
    def num_updates(self) -> int:
        """The number of updates made so far; settable."""
        return self._average.num_updates

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self._state.set_count(value)

    @property
    def num_skipped(self) -> int:
        """The number of updates that ``skip_nonfinite`` has left out; they are not in ``num_updates``."""
        return self._average.num_skipped

    @property
    def initial_share(self) -> float:
        """How much of the average is still the weights that it started from; see :class:`~ignite_ema.ModelAverage`."""
        return self._average.initial_share

    def attach(
        self,
        engine: Engine,
        name: str = "ema_momentum",
        warn_if_exists: bool = True,
        event: Event = Events.ITERATION_COMPLETED,
        *,
        optimizer: Optimizer | None = None,
    ) -> Attachment:
        """Updates the average at ``event`` and publishes the momentum as ``engine.state.<name>``.

        Ignite calls handlers in the order of their registration: attach before what evaluates or saves the average at
        the same event. ``remove()`` of what is returned undoes this call.

        Args:
            engine: the trainer; no strong reference to it is kept.
            name: the attribute; every handler of a trainer has its own. As soon as this returns it shows the first λ,
                after each update the λ that was used.
            warn_if_exists: warn where it exists; a plain momentum goes on from its value, a schedule overwrites it.
            event: when to update. Those members of an ``EventsList`` that fire in the same iteration update once.
            optimizer: update only where this optimizer has stepped since the last event: with gradients accumulated
                over several iterations, and where a ``GradScaler`` skips steps.

        Raises:
            TypeError, ValueError: for a name that is taken, a value there that is no momentum, an event never fired.
            RuntimeError: where this handler is attached to this engine already.
        """
        check_attachable(self, self.model, engine, name, event, optimizer)
        is_new = self._momentum.begin(engine.state, name, self.num_updates, warn_if_exists)
        attachment = Attachment(self, engine, name, event, is_new, optimizer)
        if self.handle_buffers == "ema_train":  # an evaluator may have left it in eval mode
            attachment.call_at(engine, Events.ITERATION_STARTED, lambda _: self.ema_model.train())
        self._attachments.add(attachment)
        return attachment

    def swapped(self) -> Swapped:
        """Inside the block the model holds the averaged weights; see :meth:`ignite_ema.ModelAverage.swapped`."""
        for attachment in self._attachments:
            attachment.note_reading()
        return self._average.swapped()

    def swap_during(self, evaluator: Engine) -> EvaluationSwap:
        """Evaluates the averaged weights: each ``evaluator.run()`` is inside :meth:`swapped`, until ``remove()``.

        Args:
            evaluator: an engine that evaluates ``model``; not one that trains it.

        Raises:
            TypeError, RuntimeError: for what is no engine, or one that this handler swaps for or updates at already.
        """
        return EvaluationSwap(self, evaluator)

    def reset(self, *, buffers_only: bool = False) -> None:
        """Starts again: the average becomes the model and the count 0; ``buffers_only`` copies the buffers alone."""
        self._state.reset(buffers_only)

    def state_dict(self) -> dict[str, Any]:
        """The complete state: averaged tensors (not copies), count and momentum; tensors and plain values only."""
        return self._state.saved()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`, before or after ``attach``.

        A schedule goes on from the saved count, a plain momentum from the saved value, to which it may have been
        driven. Where the saved handler had another schedule, this one's own counts, and a warning says so.

        Raises:
            TypeError, ValueError: for a wrong entry, which it names, or another model's; nothing is loaded then.
        """
        self._state.load(state)

    def load_averaged(
        self, source: Source, *, key: str | None = None, names: Names = None, num_updates: int | None = None
    ) -> None:
        """Starts from the averaged weights in a checkpoint of another system, or of this one; leaves the model alone.

        Args:
            source: a file, or what was loaded from one; see :func:`ignite_ema.checkpoints.read` for the systems. Where
                it has no average its weights are taken, with a warning.
            key: which average, where there are several.
            names: the names of a list without names, None: those of the model; see there.
            num_updates: how many are behind it, which a schedule has to know; None: as many as the checkpoint says.

        Raises:
            TypeError, ValueError, OSError, ImportError, RuntimeError: where the checkpoint cannot be read, is of
                another model or lacks the count that a schedule needs; inside :meth:`swapped`. Nothing is loaded then.
        """
        self._state.load_averaged(source, key, names, num_updates)

    def _update(self, name: str, engine: Engine) -> None:
        self._average.update(self._momentum.take(engine.state, name, self._average.num_updates))
        self._guidance.start_is_known = True

    def _check_start(self, name: str, engine: Engine) -> None:
        self._average.refresh()
        self._guidance.check_start(name, engine.state.iteration)

    def _check_end(self, name: str, iterations: int, updates: int) -> None:
        self._guidance.check_end(name, iterations, updates)
