"""A model and its averaged twin, without an engine: for Ignite see :mod:`ignite_ema.handlers.ema`."""

from collections.abc import Collection, Mapping
from functools import cached_property, partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..schedules import Schedule
from . import kernels, swap
from .average_state import VERSION, check_average_state
from .buffers import BufferPolicy, check_patterns, check_policy, treatment_of
from .flat import Block, Flat, refuse_unflattable
from .module_trees import LostValues, Mismatch, Structure
from .pairing import Pairing, part_memory, sharing_memory
from .precision import Precision
from .rank_agreement import announced
from .schedule_argument import described, schedule_of, scheduled
from .sharding import local, reshard
from .state_loading import check_loadable, part_for_rank, tensors_by_path
from .stochastic_rounding import StochasticRounding
from .storage import holds_values
from .summaries import counted, module_summary, momentum_summary, one_line
from .traversal import names_of, tensors_of, unwrapped
from .twin import check_model, check_tensors, freeze, refuse_unsupported, stripped, twin_of
from .user_warnings import warn_user
from .validation import check_count, check_flags, checked_momentum, refuse_shallow_copy

__all__ = ["ModelAverage"]


class ModelAverage:
    """A model and its averaged twin: ``average = (1 - momentum) * average + momentum * model`` at each update.

    Args:
        model: the online model. ``DistributedDataParallel`` and compiled modules are looked through; the twin of a
            ``DataParallel`` is a ``DataParallel``.
        handle_buffers: what an update does with buffers, persistent or not. "copy": they equal the model's. "update":
            floating-point (and complex) buffers are averaged, all others copied. "ema_train": they are left alone and
            the twin stays in train mode. A mapping from patterns of names (:mod:`fnmatch`) to "copy", "update" or
            "keep": the first match decides, no match means "copy".
        momentum: what :meth:`update` takes where it is called without one: a float in (0, 1), or a schedule, a callable
            from the number of updates already made (0 at the first) to a momentum in [0, 1].
        ema_model: a twin of your own, of the structure of ``model``, for models that cannot be deep-copied. It is
            filled from the model here, put into eval (or train) mode and needs no gradients from here on.
        dtype: holds the average of floating-point tensors, for instance ``torch.float32`` for a bfloat16 model; None
            means the type of each tensor.
        device: where the twin is held; None means where the model's tensors are.
        share_frozen: the twin shares those parameters that do not require gradients now, and holds copies of the others
            alone. They must stay frozen; ``dtype`` and ``device`` do not concern them.
        skip_nonfinite: an update that would bring a NaN or an infinity into an averaged parameter leaves the whole
            average alone and is counted instead. One that would bring it into an averaged buffer leaves the averaged
            buffers alone: under DDP they differ between ranks, and the weights have to stay equal. Buffers that are
            copied are not looked at.
        stochastic_rounding: round parameters held in bfloat16 or float16 up as often as the fraction that is cut off
            says, so that updates too small for the type add up instead of being lost
            (:mod:`ignite_ema.averaging.stochastic_rounding`). Wider online weights are rounded to that type first. For
            where ``dtype=torch.float32``, more exact and ten times as fast on a CPU, does not fit into memory.
        flatten: lay the tensors of the model, and those of the twin, side by side in memory, so that an update, a swap
            and a finite check are one operation for each type and device. Worth it where tensors are many and small.
            It moves the model's memory now, and again where something has moved a tensor out since; make the average
            before a CUDA graph captures the model, before processes share it, and before you take views of it.

    Attributes:
        model: the online model, without wrappers.
        module: the averaged twin.
        handle_buffers: what was passed.
        momentum: what was passed; settable.
        schedule: the momentum as a schedule, None where none was passed.
        num_skipped: the number of updates that ``skip_nonfinite`` has left out.
        num_updates: the number of updates made since it was made or reset; settable.
        initial_share: how much of the average is still the weights that it started from, in [0, 1].

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value.
        RuntimeError: for a model that cannot be deep-copied, or whose twin does not match it.

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
        ModelAverage(Linear: 1 parameter in float32 on cpu; momentum EqualWeight(); 3 updates)
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
        flatten: bool = False,
    ) -> None:
        check_model(model)
        for module in (model, ema_model):
            if isinstance(module, nn.Module):
                reshard(module)
        refuse_unsupported(model, ema_model is not None)
        check_tensors("model", model)
        self.model = stripped(model)
        check_policy(handle_buffers)
        check_flags(
            share_frozen=share_frozen,
            skip_nonfinite=skip_nonfinite,
            stochastic_rounding=stochastic_rounding,
            flatten=flatten,
        )
        self.handle_buffers = dict(handle_buffers) if isinstance(handle_buffers, Mapping) else handle_buffers
        self.momentum = momentum
        self.num_skipped = self._num_updates = 0
        self._initial_share = 1.0
        self._skip_nonfinite, self._share_frozen, self._flatten = skip_nonfinite, share_frozen, flatten
        self._has_left_buffers = False
        self._rounding = StochasticRounding() if stochastic_rounding else None
        self._precision = Precision(type_was_chosen=dtype is not None)
        if flatten:
            refuse_unflattable(self.model)
        self.module = twin_of(self.model, ema_model, dtype, device, share_frozen)
        try:
            self._pairing = self._paired()
        except Mismatch as mismatch:
            raise RuntimeError(
                f"ema_model should have the structure of the model, but {mismatch}; build and shard it as the model is."
            ) from None
        self._warn_of_options_without_effect()
        self._announcement = announced(skip_nonfinite, self.model)
        self.module.train(handle_buffers == "ema_train")
        freeze(self.module)
        if ema_model is not None:
            self.reset()
        self._norms_when_made = kernels.norms(self._parameters())
        if flatten:
            self._flat.steps(self._pairing.read())

    def _warn_of_options_without_effect(self) -> None:
        if self._share_frozen and not self._pairing.structure.shared:
            warn_user(
                "share_frozen should find frozen parameters, but all require gradients and are copied; freeze before "
                "the average is made."
            )
        if self._rounding is not None and all(group.kernel != self._rounding.lerp for group in self._pairing.groups):
            warn_user(
                "stochastic_rounding should find parameters whose average is held in bfloat16 or float16, but there "
                "are none, and it does nothing; leave it out."
            )

    def _paired(self) -> Pairing:
        structure = Structure(self.model, self.module, self._share_frozen)
        check_patterns(self.handle_buffers, [pair.path for pair in structure.pairs if pair.kind == "_buffers"])
        narrow = None if self._rounding is None else self._rounding.lerp
        return Pairing(structure, partial(treatment_of, self.handle_buffers), narrow)

    @cached_property
    def _pairing(self) -> Pairing:  # of a copy, or one that was unpickled; made when the whole of it is there
        try:
            return self._paired()
        except Mismatch as mismatch:
            raise _changed(mismatch) from None

    @cached_property
    def _flat(self) -> Flat:
        return Flat(self._pairing)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the pairing and the layout, which know where tensors lie in this process, and its ranks."""
        kept = {name: value for name, value in vars(self).items() if name not in ("_pairing", "_flat")}
        return {**kept, "_announcement": None}

    def __copy__(self) -> NoReturn:
        """Raises TypeError: two averages would move one twin."""
        refuse_shallow_copy(self)

    def __repr__(self) -> str:
        return one_line(
            "ModelAverage",
            lambda: module_summary(self.module),
            lambda: momentum_summary(self._momentum),
            lambda: counted(self._num_updates, "update"),
        )

    @property
    def momentum(self) -> float | Schedule | None:
        """What :meth:`update` takes where it is called without a momentum; settable."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | Schedule | None) -> None:
        self.schedule: Schedule | None = None if value is None else schedule_of(value)
        self._momentum = value

    @property
    def initial_share(self) -> float:
        """How much of the average is still the weights that it started from, in [0, 1].

        It is the product of ``1 - momentum`` over the updates: 1 at the start and after :meth:`reset`, 0 after an
        update that copies, and 0 for an average that was loaded from elsewhere (:meth:`load_plain`).
        """
        return self._initial_share

    @property
    def num_updates(self) -> int:
        """The number of updates made since it was made or reset; settable."""
        return self._num_updates

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        check_count(value)
        self._num_updates = value

    def update(self, momentum: float | None = None) -> bool:
        """Moves the twin towards the model by ``momentum``, and its buffers as ``handle_buffers`` says.

        Args:
            momentum: λ in [0, 1], the weight of the model's weights. 0 leaves the averaged tensors as they are, 1
                copies. None: what the momentum of this average gives after :attr:`num_updates` updates.

        Returns:
            Whether the update was made: False where ``skip_nonfinite`` left it out.

        Raises:
            TypeError, ValueError: for a momentum outside [0, 1], or None where the average was made without one.
            RuntimeError: when the structure of the model has changed, or a shape, or while it holds averaged weights
                (:meth:`swapped`); nothing has been updated then.
        """
        if momentum is None:
            momentum = self._next_momentum()
        elif type(momentum) is not float or not 0 <= momentum <= 1:
            momentum = checked_momentum(momentum, "momentum")
        gradients = torch.is_grad_enabled()
        swap.begin_move()
        torch._C._set_grad_enabled(False)  # what torch.no_grad() does, at a fifth of its cost
        try:
            if not self._moves(momentum):
                return False
        except Mismatch as mismatch:
            raise _changed(mismatch) from None
        finally:
            torch._C._set_grad_enabled(gradients)
            swap.end_move()
        self._num_updates += 1
        self._initial_share *= 1.0 - momentum
        return True

    def _moves(self, momentum: float) -> bool:
        """Moves the twin, unless ``skip_nonfinite`` leaves that out."""
        pairing = self._pairing
        tensors = pairing.read()
        if swap.any_swapped():
            swap.refuse_while_swapped(pairing.structure, "updated")
        if self._announcement is not None:
            self._announcement.check()
            self._announcement = None
        layout = self._flat if self._flatten else pairing
        if self._skip_nonfinite and (path := layout.first_nonfinite(tensors)) is not None:
            self._skip(path)
            return False
        if momentum < pairing.resolution:
            self._precision.check(momentum, pairing.resolution, self._can_round)
        else:
            self._precision.has_moved = True
        if self._rounding is not None:
            self._rounding.num_updates = self._num_updates
        if self.handle_buffers == "ema_train" and not self.module.training:
            self.module.train()  # an evaluator has put it into eval mode
        for group, averaged, online in layout.steps(tensors):
            if self._skip_nonfinite and group.are_buffers and (path := pairing.nonfinite_in(group, tensors)):
                self._leave_buffers(path)
            else:
                group.kernel(averaged, online, momentum)
        if self._flatten:
            self._flat.note_writes()
        return True

    def _next_momentum(self) -> float:
        if self.schedule is None:
            raise TypeError(
                "momentum should be a number in [0, 1], got None; pass it to update(), or a float or a schedule as "
                "ModelAverage(..., momentum=...)."
            )
        return scheduled(self.schedule, self._num_updates)

    @torch.no_grad()
    def reset(self, *, buffers_only: bool = False) -> None:
        """Starts again: the twin equals the model, buffers included, whatever ``handle_buffers`` says; counts are 0.

        Args:
            buffers_only: copy the buffers alone, and leave weights and counts as they are.
        """
        with swap.moving():
            pairs = self._current("reset").pairs
            tensors = [pair.tensors() for pair in pairs if not buffers_only or pair.kind == "_buffers"]
            if tensors:
                online, averaged = zip(*tensors, strict=True)
                kernels.copy(averaged, online)
        if not buffers_only:
            self.num_updates = self.num_skipped = 0
            self._initial_share = 1.0

    def swapped(self) -> swap.Swapped:
        """Inside the block the model holds the averaged weights and buffers, in place; after it, its own again.

        On every way out the model has the bits that it had before. The twin stays what it is, so that a checkpoint of
        it that is taken inside is right. Costs one copy of the model's tensors while it lasts.

        Raises:
            RuntimeError: where the model holds averaged weights already, or its structure has changed.

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
        return swap.Swapped(self._swappable)

    def _swappable(self) -> tuple[Structure, list[Block]]:
        if not self._flatten:
            return self._current("swapped"), []
        tensors = self._read()
        swap.refuse_while_swapped(self._pairing.structure, "swapped")
        self._flat.steps(tensors)
        return self._checked("swapped", self._flat.laid_out()), self._flat.blocks

    def is_swapped(self) -> bool:
        """Whether the model holds averaged weights now, those of this average or of another of the same model."""
        return swap.is_swapped(self._pairing.structure)

    def is_as_made(self) -> bool:
        """Whether the twin holds the weights that it was made with: nothing has moved or filled it since."""
        self._check_filled()
        return kernels.norms(self._parameters()) == self._norms_when_made

    @torch.no_grad()
    def differs_from_model(self) -> bool:
        """Whether an averaged weight differs from that of the model, in the type that holds it."""
        self._read()
        pairs = (pair.tensors() for pair in self._pairing.structure.pairs if pair.kind == "_parameters")
        return any(not torch.equal(online.to(averaged.device, averaged.dtype), averaged) for online, averaged in pairs)

    def averaged_tensors(self) -> dict[str, Tensor]:
        """The tensors of the twin by path, each tied tensor once, non-persistent buffers too; not copies.

        Frozen parameters that the twin shares are the model's, and not in it.
        """
        return {path: tensor.detach() for path, tensor in self._tensors().items()}

    def state_dict_names(self) -> dict[str, str]:
        """For each name in the twin's own ``state_dict``, tied ones too, the path in :meth:`averaged_tensors`."""
        return self._names_in(self._tensors())

    def _names_in(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """For each name in the twin's own ``state_dict`` the path in ``tensors``, where it is there."""
        paths = {id(tensor): path for path, tensor in tensors.items()}
        return {name: paths[id(tensor)] for name, tensor in self._names() if id(tensor) in paths}

    def state_dict(self) -> dict[str, Any]:
        """The complete state: averaged tensors (not copies), counts and share; tensors and plain values only."""
        tensors = self._all_tensors()
        return {
            "ignite_ema_version": VERSION,
            "num_updates": self._num_updates,
            "num_skipped": self.num_skipped,
            "initial_share": self._initial_share,
            "momentum_schedule": None if self.schedule is None else described(self.schedule),
            "averaged_tensors": {path: one.detach() for path, one in self._without_shared(tensors).items()},
            "state_dict_names": self._names_in(tensors),  # of those that are shared, too: what the state lacks
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`. The momentum stays this average's own; a warning says where it differs.

        Raises:
            TypeError, ValueError: for a missing, unexpected or wrong entry, another model's tensors, or a type that
                the twin cannot hold without loss; nothing has been loaded then.
            RuntimeError: inside :meth:`swapped`.
        """
        check_average_state(state)
        if self.schedule is not None:
            scheduled(self.schedule, state["num_updates"])  # raises before anything has changed
        self.load_averaged_tensors(state["averaged_tensors"])
        self.num_updates, self.num_skipped = state["num_updates"], state["num_skipped"]
        self._initial_share = state["initial_share"]
        saved, own = state["momentum_schedule"], None if self.schedule is None else described(self.schedule)
        if saved is not None and own is not None and saved != own:
            warn_user(
                f"The average was saved with {saved} and goes on with {own}; if that is not meant, make it as it was "
                "made before."
            )

    @torch.no_grad()
    def load_averaged_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills the twin with what :meth:`averaged_tensors` gave, and leaves counts and share as they are.

        Raises:
            ValueError: for a missing or unexpected path, another shape, or a type that the twin cannot hold without
                loss; nothing has been loaded then.
            RuntimeError: inside :meth:`swapped`.
        """
        with swap.moving():
            swap.refuse_while_swapped(self._pairing.structure, "loaded")
            self._check_filled()
            own = self.averaged_tensors()
            check_loadable(own, tensors)
            self._precision.has_moved = True
            if own:
                self._part_memory(self._tensors())
                own = self.averaged_tensors()
                values = [part_for_rank(tensors[path], own[path]) for path in own]
                kernels.copy([local(tensor) for tensor in own.values()], values)

    def load_plain(self, plain: Mapping[str, Tensor]) -> None:
        """Fills the twin with a plain ``state_dict`` of its model, or the parameters of one; it starts from no weights
        of this run then, and :attr:`initial_share` is 0.

        Where there are parameters alone the buffers stay, as do buffers that are not persistent. Extra state of modules
        is not averaged, and left out.

        Raises:
            ValueError: as :meth:`load_averaged_tensors` does, and where tied tensors differ, or those that are shared.
        """
        frozen = {name: tensor for name, tensor in self._names() if tensor in self._pairing.once_shared}
        names = self.state_dict_names()
        plain = {name: plain[name] for name in plain if name in names or not name.endswith("_extra_state")}
        self.load_averaged_tensors(tensors_by_path(plain, names, self._tensors(), frozen))
        self._initial_share = 0.0

    def refresh(self) -> None:
        """Pairs everything anew, as a handler does when a run starts: a parameter may have been frozen since.

        Raises:
            RuntimeError: where the model no longer matches its twin.
        """
        try:
            self._pairing.pair_anew()
        except Mismatch as mismatch:
            raise _changed(mismatch) from None

    def _part_memory(self, averaged: Mapping[str, Tensor]) -> None:
        """Sees to it that what is written into the twin is written nowhere else."""
        try:
            others = [*tensors_of(self.model).values(), *self._pairing.once_shared]
            part_memory(sharing_memory(others, averaged))
        except Mismatch as mismatch:
            raise _changed(mismatch) from None

    def _current(self, what: str) -> Structure:
        """Model and twin as they are now, kept buffers included; raises where nothing may be done with them."""
        self._read()
        return self._checked(what)

    def _checked(self, what: str, looked_at: Collection[int] = ()) -> Structure:
        """As :meth:`_current` says, once they have been read; but for the tensors with the identities ``looked_at``."""
        structure = self._pairing.structure
        try:
            for pair in (*structure.pairs, *structure.shared):
                if id(getattr(pair.online, pair.kind)[pair.key]) not in looked_at:
                    pair.tensors()
        except Mismatch as mismatch:
            raise _changed(mismatch) from None
        swap.refuse_while_swapped(structure, what)
        return structure

    def _read(self) -> list[Tensor]:
        """What an update treats, held by its shards; raises RuntimeError where model and twin no longer match."""
        try:
            return self._pairing.read()
        except Mismatch as mismatch:
            raise _changed(mismatch) from None

    def _all_tensors(self) -> dict[str, Tensor]:
        """What the twin holds, by path, shared tensors included."""
        reshard(self.module)
        return tensors_of(self.module)

    def _tensors(self) -> dict[str, Tensor]:
        """What the twin holds and the model does not, by path."""
        return self._without_shared(self._all_tensors())

    def _without_shared(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not (shared := self._pairing.once_shared):
            return tensors
        return {path: tensor for path, tensor in tensors.items() if tensor not in shared}

    def _check_filled(self) -> None:
        """Raises RuntimeError where there is no memory for a tensor of the twin: torch would write all the same."""
        for path, tensor in self._tensors().items():
            if not holds_values(local(tensor)):
                raise _changed(LostValues(path, "twin"))

    def _names(self) -> list[tuple[str, Tensor]]:
        return names_of(unwrapped(self.module))

    def _parameters(self) -> list[Tensor]:
        return [local(tensor) for tensor in self._tensors().values() if isinstance(tensor, nn.Parameter)]

    def _leave_buffers(self, path: str) -> None:
        if not self._has_left_buffers:
            self._has_left_buffers = True
            warn_user(
                f"{path} holds a NaN or an infinity, and the averaged buffers of its type were left as they are; the "
                "parameters were averaged."
            )

    def _skip(self, path: str) -> None:
        self.num_skipped += 1
        if self.num_skipped == 1:
            warn_user(
                f"{path} holds a NaN or an infinity, and the average was left as it is; num_skipped counts from here "
                "on how often."
            )

    def _can_round(self) -> bool:
        """Whether ``stochastic_rounding`` would help, and is not in use."""
        return self._rounding is None and any(one.dtype in kernels.NARROW for one in self._parameters())


def _changed(mismatch: Mismatch) -> RuntimeError:
    return RuntimeError(
        f"The model should keep the structure that it had when its average was made, but {mismatch}; "
        f"{mismatch.way_out}."
    )
