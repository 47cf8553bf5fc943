"""A model and its averaged twin, without an engine: for Ignite see :mod:`ignite_ema.handlers.ema`."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..schedules import Constant, Schedule
from . import kernels
from .buffers import BufferPolicy, Treatment, check_patterns, check_policy, treatment_of
from .checks import (
    check_count,
    check_flags,
    checked_momentum,
    counted,
    described,
    final_momentum,
    listed,
    module_summary,
    one_line,
    percentage,
    schedule_of,
    scheduled,
    warn_first_rank,
    warn_user,
)
from .memory import give_own_memory
from .names import parameters_and_buffers, parameters_of, places_of
from .pairing import Group, Mismatch, Pairing
from .sharding import local
from .state import STATE_VERSION, check_average_state, fill, fitting_tensors
from .stochastic_rounding import StochasticRounding
from .swap import Swapped, is_swapped
from .twin import check_model, settle, stripped, twin_of


class ModelAverage:
    """A model and its averaged twin: ``average = (1 - momentum) * average + momentum * model`` at each update.

    Args:
        model: the online model. ``DistributedDataParallel`` and compiled modules are unwrapped; the twin of a
            ``DataParallel`` is a ``DataParallel``.
        handle_buffers: what an update does with buffers, persistent or not. "copy": they equal the model's, whatever
            their shape has become. "update": floating-point and complex buffers are averaged, all others are copied.
            "statistics": the running means and variances of normalization layers are averaged, all others are copied.
            "ema_train": they are left alone and the twin stays in train mode. A mapping from name patterns
            (:mod:`fnmatch`) to "copy", "update" or "keep": the first match decides, no match means "copy".
        momentum: what :meth:`update` uses if it is called without a momentum: a float in (0, 1], or a schedule, a
            callable from the number of updates already made (0 at the first) to a momentum in [0, 1].
        ema_model: your own twin, with the structure of ``model``, for models that cannot be deep-copied. It is filled
            from the model here, and put into eval (or train) mode; its gradients are turned off.
        dtype: the type of the average of floating-point tensors, for instance ``torch.float32`` for a bfloat16 model.
            None: the type of each tensor.
        device: where the twin lives. None: where the model's tensors are.
        share_frozen: the twin shares the parameters that do not require gradients, and copies only the others.
            They must stay frozen; ``dtype`` and ``device`` do not apply to them. What you do to them in the twin, you
            do to the model.
        skip_nonfinite: an update that would bring a NaN or an infinity into an averaged parameter leaves the whole
            average alone and is counted in :attr:`num_skipped` instead. One that would bring it into an averaged buffer
            leaves the averaged buffers of its type alone. Copied buffers are not checked. Pass the same on all ranks.
        stochastic_rounding: round averages in bfloat16 or float16 up with the frequency of the discarded fraction, so
            that updates too small for the type add up. ``dtype=torch.float32`` is more exact, and ten times as fast on
            a CPU: prefer it if it fits into memory.

    Attributes:
        model: the online model, without wrappers.
        module: the averaged twin.
        handle_buffers: what was passed.
        schedule: the momentum as a schedule, None if none was passed.
        num_skipped: the number of updates that ``skip_nonfinite`` has skipped.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value.
        RuntimeError: for a model that cannot be deep-copied, whose ``eval()`` changes its weights, or whose twin does
            not match it.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> average = ModelAverage(model)
        >>> _ = torch.nn.init.constant_(model.weight, 4.0)
        >>> average.reset()
        >>> _ = torch.nn.init.constant_(model.weight, 8.0)
        >>> average.update(0.25)
        True
        >>> average.module.weight.item(), average.initial_share
        (5.0, 0.75)

        With a schedule, ``update()`` follows it:

        >>> from ignite_ema.schedules import EqualWeight
        >>> mean = ModelAverage(model, momentum=EqualWeight())
        >>> for value in (1.0, 2.0, 6.0):
        ...     _ = torch.nn.init.constant_(model.weight, value), mean.update()
        >>> mean.module.weight.item()
        3.0
        >>> mean
        ModelAverage(Linear: 1 parameter in float32 on cpu; momentum EqualWeight(); 3 updates; 0% initial weights)
    """

    def __init__(
        self,
        model: nn.Module,
        handle_buffers: BufferPolicy = "copy",
        *,
        momentum: float | Schedule | None = None,
        ema_model: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        share_frozen: bool = False,
        skip_nonfinite: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        check_model(model, ema_model is not None)
        check_policy(handle_buffers)
        check_flags(share_frozen=share_frozen, skip_nonfinite=skip_nonfinite, stochastic_rounding=stochastic_rounding)
        self.momentum = momentum
        self.model = stripped(model)
        self.handle_buffers = dict(handle_buffers) if isinstance(handle_buffers, Mapping) else handle_buffers
        self.num_skipped = self._num_updates = 0
        self._initial_share = 1.0
        self._share_frozen, self._skip_nonfinite = share_frozen, skip_nonfinite
        self._rounding = StochasticRounding() if stochastic_rounding else None
        self._told: set[str] = set() if dtype is None else {"narrow"}  # warnings not to be given again
        trains = handle_buffers == "ema_train"
        self.module = twin_of(self.model, ema_model, dtype, device, share_frozen, trains)
        try:
            self._pairing: Pairing | None = self._paired()
        except Mismatch as mismatch:
            raise RuntimeError(
                f"ema_model should have the structure of the model, but {mismatch}. Build and shard it as the model is."
            ) from None
        buffers = [slot.name for slot in self._pairing.slots if slot.online.is_buffer]
        check_patterns(self.handle_buffers, buffers)
        settle(self.module, ema_model is not None, trains)
        if ema_model is not None:
            self.reset()
        self._warn_of_options_without_effect(self._pairing)

    def _warn_of_options_without_effect(self, pairing: Pairing) -> None:
        if self._share_frozen and not pairing.shared:
            warn_user(
                "share_frozen should find frozen parameters, but all require gradients and are copied. Freeze them "
                "before the average is made."
            )
        if self._rounding is not None and all(group.kernel != self._rounding.lerp for group in pairing.groups):
            warn_user(
                "stochastic_rounding should find parameters whose average is bfloat16 or float16, but there are none, "
                "and it does nothing. Leave it out."
            )
        averaged = [slot for group in pairing.groups if group.averages and group.are_buffers for slot in group.slots]
        unset = [slot.name for slot in averaged if not kernels.has_begun(slot.tensors()[1])]
        if unset:
            warn_user(
                f"There is no finite value yet in {listed(unset)}, as in the range of a new observer; it is copied "
                'until there is one. If it is not a statistic to average, pass handle_buffers="statistics" or "copy".'
            )

    def _paired(self, before: Pairing | None = None) -> Pairing:
        return Pairing(
            self.model,
            self.module,
            partial(treatment_of, self.handle_buffers),
            share_frozen=self._share_frozen,
            narrow=None if self._rounding is None else self._rounding.lerp,
            before=before,
        )

    def _current(self) -> Pairing:
        """The pairing of model and twin as they are now; raises RuntimeError if they no longer match."""
        pairing = self._pairing
        if pairing is not None and pairing.is_current():
            return pairing
        try:
            self._pairing = self._paired(pairing)
        except Mismatch as mismatch:
            raise RuntimeError(
                f"The model should keep the structure that it had when its average was made, but {mismatch}. Make a "
                "new average, and start it from this one: new.load_averaged(old.state_dict(), strict=False)."
            ) from None
        return self._pairing

    def _unswapped(self, what: str) -> Pairing:
        """Like :meth:`_current`; also raises RuntimeError if a part of the model holds averaged weights."""
        pairing = self._current()
        if pairing.has_swapped_part() and any(map(is_swapped, self.model.modules())):
            raise RuntimeError(
                f"An average should be {what} while the model holds its own weights, but it holds averaged weights "
                "now. Leave the block of swapped() first, or the run of the evaluator that swap_during() was called "
                "with."
            )
        return pairing

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the pairing, which has addresses in this process."""
        return {**vars(self), "_pairing": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies tensors that came from another process in shared memory into private memory."""
        vars(self).update(state)
        # A model that holds this average is still empty while it is copied or unpickled.
        shared = {id(parameter) for parameter in (parameters_of(self.model) if vars(self.model) else ())}
        own = [local(tensor) for tensor in parameters_and_buffers(self.module) if id(tensor) not in shared]
        give_own_memory(tensor for tensor in own if tensor.device.type == "cpu" and tensor.is_shared())  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        return one_line(
            "ModelAverage",
            lambda: module_summary(self.module),
            lambda: "" if self._momentum is None else f"momentum {described(self._momentum)}",
            lambda: counted(self._num_updates, "update"),
            lambda: "" if math.isnan(self._initial_share) else f"{percentage(self._initial_share)} initial weights",
        )

    @property
    def momentum(self) -> float | Schedule | None:
        """What :meth:`update` uses if it is called without a momentum; settable."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | Schedule | None) -> None:
        self.schedule: Schedule | None = None if value is None else schedule_of(value)
        self._momentum = value

    @property
    def initial_share(self) -> float:
        """How much of the average is still the weights that it started from, in [0, 1].

        It is the product of ``1 - momentum`` over the updates: 1 at the start and after :meth:`reset`, 0 after an
        update that copies, 0 after :meth:`load_averaged`, and NaN, for unknown, if that took only a part.
        """
        return self._initial_share

    @property
    def num_updates(self) -> int:
        """The number of updates since construction or the last reset; settable."""
        return self._num_updates

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        check_count(value)
        if value not in (0, self._num_updates):
            self._initial_share = math.nan
        self._num_updates = value

    def update(self, momentum: float | None = None) -> bool:
        """Moves the twin toward the model by ``momentum``, and updates its buffers as ``handle_buffers`` says.

        Args:
            momentum: λ in [0, 1], the weight of the model's weights. 0 leaves the averaged tensors as they are, 1
                copies. None: this average's own momentum after :attr:`num_updates` updates.

        Returns:
            Whether the update was made: False if ``skip_nonfinite`` skipped it.

        Raises:
            TypeError, ValueError: for a momentum outside [0, 1], or None if the average was made without a momentum.
            RuntimeError: if the structure of the model or a shape has changed, or while it holds averaged weights
                (:meth:`swapped`); nothing has been updated then.
        """
        if momentum is None:
            momentum = self._next_momentum()
        elif type(momentum) is not float or not 0 <= momentum <= 1:
            momentum = checked_momentum(momentum, "momentum")
        pairing = self._unswapped("updated")
        groups = pairing.groups
        if self._skip_nonfinite:
            if (name := pairing.first_nonfinite()) is not None:
                self.num_skipped += 1
                self._tell_once(
                    "skipped",
                    f"{name} holds a NaN or an infinity, and the average was left as it was. num_skipped counts how "
                    "often this happens.",
                )
                return False
            groups = [group for group in groups if not group.are_buffers or self._has_finite(group)]
        if momentum < pairing.resolution:
            self._warn_if_stalled(momentum, pairing)
        else:
            self._told.add("moved")
        if self._rounding is not None:
            self._rounding.num_updates = self._num_updates
        if self.handle_buffers == "ema_train" and not self.module.training:
            self.module.train()  # an evaluator has put it into eval mode
        for group in groups:
            group.kernel(group.averaged, group.online, momentum)
        self._num_updates += 1
        self._initial_share *= 1.0 - momentum
        return True

    def first_nonfinite(self) -> str | None:
        """The name of the first parameter whose NaN or infinity an update would bring in, or None.

        Always None for a sharded model: its ranks would have to ask together, as with ``skip_nonfinite=True``.
        """
        pairing = self._current()
        return None if pairing.sharded else pairing.first_nonfinite()

    def _next_momentum(self) -> float:
        if self.schedule is None:
            raise TypeError(
                "momentum should be a number in [0, 1], got None. Pass it to update(), or a float or a schedule as "
                "ModelAverage(..., momentum=...)."
            )
        return scheduled(self.schedule, self._num_updates)

    def _has_finite(self, group: Group) -> bool:
        name = group.first_nonfinite()
        if name is not None:
            self._tell_once(
                "buffers",
                f"{name} holds a NaN or an infinity, and the averaged buffers of its type were left as they are; the "
                "parameters were averaged.",
            )
        return name is None

    def _warn_if_stalled(self, momentum: float, pairing: Pairing) -> None:
        """Warns once if the type of the average rounds an update away."""
        resolution = pairing.resolution
        if "narrow" in self._told or momentum == 0:
            return
        if "moved" in self._told and resolution <= torch.finfo(torch.float32).eps:
            return  # the end of a schedule that goes to 0; 16 bits stall long before
        if self.schedule is not None and final_momentum(self.schedule) >= resolution:
            return  # the beginning of a warm-up
        dtypes = {group.averaged[0].dtype for group in pairing.groups if not group.are_buffers}
        can_round = self._rounding is None and not dtypes.isdisjoint(kernels.NARROW)
        needed = resolution / 2 / momentum
        far = f"{needed:.0%} of" if needed < 2 else f"{needed:.0f} times"
        wider = "float32" if resolution > torch.finfo(torch.float32).eps else "float64"
        self._tell_once(
            "narrow",
            f"A momentum of {momentum:g} is too small for the type of the average: a weight moves only if it differs "
            f"from its average by about {far} its size, and is rounded back otherwise. Pass dtype=torch.{wider} to "
            f"average in {wider} (or an ema_model of that type)"
            f"{', or stochastic_rounding=True' if can_round else ''}.",
        )

    def _tell_once(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warn_user(message)

    def reset(self, *, buffers_only: bool = False) -> None:
        """Starts over: the twin equals the model, buffers included, whatever ``handle_buffers`` says; counts are 0.

        Args:
            buffers_only: copy only the buffers, and leave weights and counts as they are.
        """
        pairing = self._unswapped("reset")
        slots = [slot for slot in pairing.slots if slot.online.is_buffer or not buffers_only]
        fill(pairing, {slot.name: slot.online.get() for slot in slots})
        if not buffers_only:
            self.num_updates = self.num_skipped = 0
            self._initial_share = 1.0

    def swapped(self, buffers_from: Callable[[nn.Module], object] | None = None) -> Swapped:
        """Inside the block the model holds the averaged weights and buffers, in place; after it, its own again.

        However the block ends, the model gets back the bits that it had before. The twin does not change, so a
        checkpoint of it taken inside is right. Costs one copy of the model's tensors while it lasts. Tensors that you
        take from the model inside, such as a ``state_dict()``, have the online values again after the block.

        Args:
            buffers_from: called with the model once it holds the averaged weights; may change its buffers for the
                block.

        Raises:
            RuntimeError: if the model holds averaged weights already, or its structure has changed.

        Examples:
            >>> model = torch.nn.Linear(1, 1)
            >>> average = ModelAverage(model)
            >>> _ = model.weight.data.fill_(7.0), average.module.weight.fill_(5.0)
            >>> with average.swapped():
            ...     model.weight.item()
            5.0
            >>> model.weight.item()
            7.0
        """
        return Swapped(partial(self._unswapped, "swapped"), self.model, buffers_from)

    def is_swapped(self) -> bool:
        """Whether the model holds averaged weights now, those of this average or of another of the same model."""
        return is_swapped(self.model)

    def averaged_tensors(self) -> dict[str, Tensor]:
        """The tensors of the twin that its state has, by name, each tied tensor once; not copies.

        Frozen parameters that the twin shares belong to the model and are left out, as are non-persistent buffers that
        are not averaged.
        """
        return self._saved()[0]

    def shared_tensors(self) -> dict[str, Tensor]:
        """The frozen parameters that the twin shares with the model, by name; not copies."""
        return {slot.name: slot.online.get().detach() for slot in self._current().shared}

    def treatments(self) -> dict[str, Treatment]:
        """What an update does with each of :meth:`averaged_tensors`: "average", "copy" or "keep"."""
        return {slot.name: slot.treatment for slot in self._current().slots if slot.is_saved}

    def state_dict(self) -> dict[str, Any]:
        """The complete state: averaged tensors (not copies), counts and share; tensors and plain values only."""
        tensors, names = self._saved()
        return {
            "ignite_ema_version": STATE_VERSION,
            "num_updates": self._num_updates,
            "num_skipped": self.num_skipped,
            "initial_share": self._initial_share,
            "momentum_schedule": None if self.schedule is None else described(self.schedule),
            "averaged_tensors": tensors,
            "state_dict_names": names,
        }

    def _saved(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The averaged tensors by name, and the first name for each name that the twin's ``state_dict()`` has."""
        try:
            pairing = self._current()
            slots = pairing.slots
        except RuntimeError:  # the structure of one of the two has changed: what the twin still has
            if self._pairing is None:
                raise
            pairing, there = self._pairing, places_of(self.module)
            slots = [one for one in pairing.slots if one.name in there and there[one.name].table is one.averaged.table]
        saved = {slot.name: slot.averaged.get().detach() for slot in slots if slot.is_saved}
        return saved, dict(pairing.saved_names)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a :meth:`state_dict`. The momentum stays this average's own; a warning says if it differs.

        Raises:
            TypeError, ValueError: for a missing, unexpected or wrong entry, another model's tensors, or a type that
                the twin cannot hold without loss; nothing has been loaded then.
            RuntimeError: inside :meth:`swapped`.
        """
        pairing = self._unswapped("loaded")
        check_average_state(state)
        if self.schedule is not None:
            scheduled(self.schedule, state["num_updates"])  # raises before anything has changed
        fill(pairing, fitting_tensors(pairing, state, complete=True)[0])
        self._told.add("moved")
        self._num_updates, self.num_skipped = state["num_updates"], state["num_skipped"]
        self._initial_share = state["initial_share"]
        saved, own = state["momentum_schedule"], None if self.schedule is None else described(self.schedule)
        if saved is not None and own is not None and saved != own:
            warn_first_rank(
                f"The average was saved with {saved} and goes on with {own}. If that is not intended, make it with the "
                "momentum that it had."
            )

    def load_averaged(self, source: Mapping[str, Any], *, num_updates: int | None = None, strict: bool = True) -> None:
        """Starts from other averaged weights; the model does not change.

        Args:
            source: a :meth:`state_dict` of an average, or the plain ``state_dict`` of a model, or only its parameters:
                the buffers stay then.
            num_updates: how many updates the weights count for. None: as many as a state says, else the count stays.
            strict: whether all tensors have to be present and fit. False: takes every tensor whose name and shape fit,
                starts the others from the model, and warns with their names; :attr:`initial_share` is NaN then.

        Raises:
            TypeError, ValueError: if tensors are missing, unexpected or do not fit, or if the first update would
                overwrite them; nothing has been loaded then.
            RuntimeError: inside :meth:`swapped`.
        """
        pairing = self._unswapped("loaded")
        if not isinstance(source, Mapping):
            raise TypeError(
                f"source should be a state_dict, got {type(source).__name__}. EMAHandler.load_averaged() reads files."
            )
        if num_updates is None:
            stated = source.get("num_updates") if "averaged_tensors" in source else None
            num_updates = self._num_updates if stated is None else stated
        check_count(num_updates)
        schedule = None if isinstance(self.schedule, Constant) else self.schedule
        if schedule is not None and scheduled(schedule, num_updates) == 1 and num_updates == 0:
            raise ValueError(
                f"num_updates should say how many updates the loaded weights count for, got 0, after which "
                f"{described(schedule)} copies the model over them. Pass the number of updates that they average, "
                "such as num_updates=1000."
            )
        values, missing, unequal = fitting_tensors(pairing, source, strict=strict)
        rest = {slot.name: slot.online.get() for slot in missing}
        fill(pairing, {**values, **rest})
        self._told.add("moved")
        self._num_updates, self._initial_share = num_updates, math.nan if rest or unequal else 0.0
        if rest or unequal:
            warn_user(
                f"{listed([*rest, *unequal])} started from the model, since the loaded weights have nothing that fits, "
                f"or the parameter is frozen and shared; {counted(len(values), 'tensor')} were loaded."
            )
