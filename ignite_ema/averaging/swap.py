"""The online model holds its averaged weights for a while, and then its own again, bit for bit.

What may come at any time must not lose them: Ctrl-C, a handler of another signal that raises, an exception that another
thread or a debugger injects. Three things see to it:

- A signal that arrives while a swap begins or ends waits until that is done (:mod:`ignite_ema.averaging.signals`).
- Each step of giving the weights back can be done again, and is until it is done.
- What a ``with`` statement calls at its end is watched. It goes when the statement is over. Where it has not run by
  then, the weights are given back at that moment, before the code of any ``except`` clause.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager, suppress
from functools import partial
from types import MethodType, TracebackType

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from . import kernels
from .backup import ModuleBackup, TensorBackup
from .flat import Block
from .module_trees import Structure
from .sharding import local, reshard
from .signals import DeferringHandler, defers_signals, deliver_signals, uninterrupted, unwrap_handlers, wrap_handlers
from .storage import overlaps_itself
from .traversal import modules_of
from .user_warnings import warn_user

__all__ = ["Swapped", "any_swapped", "begin_move", "end_move", "is_swapped", "moving", "refuse_while_swapped"]

_swapped: "set[_OwnState]" = set()  # what is swapped now, of all averages: models may have parts in common
_moving: list[int] = []  # the threads that move an average now
_PART = 2**21  # elements


def begin_move() -> None:
    """Says that this thread moves an average: no swap begins in another one until :func:`end_move`.

    Who moves one looks for swaps after saying so, and who swaps waits for movers after saying so.
    """
    _moving.append(threading.get_ident())


def end_move() -> None:
    """Ends what :func:`begin_move` has begun."""
    _moving.remove(threading.get_ident())


@contextmanager
def moving() -> Iterator[None]:
    """:func:`begin_move` and :func:`end_move` around a block."""
    begin_move()
    try:
        yield
    finally:
        end_move()


def _wait_for_others() -> None:
    while any(thread != threading.get_ident() for thread in _moving):
        time.sleep(1e-4)


def any_swapped() -> bool:
    """Whether any model holds averaged weights now."""
    return bool(_swapped)


def is_swapped(structure: Structure, *, but_by: "_OwnState | None" = None) -> bool:
    """Whether a part of the model holds averaged weights now, those of this average or of another."""
    others = [held for held in list(_swapped) if held is not but_by]
    if not others:
        return False
    parts = _parts(structure)
    return any(not held.parts.isdisjoint(parts) for held in others)


def refuse_while_swapped(structure: Structure, what: str, *, but_by: "_OwnState | None" = None) -> None:
    """Raises RuntimeError where :func:`is_swapped`."""
    if is_swapped(structure, but_by=but_by):
        raise RuntimeError(
            f"An average should be {what} while the model holds its own weights, but it holds averaged ones now; leave "
            "the block of swapped() first, or the run of the evaluator that swap_during() swaps for."
        )


def _parts(structure: Structure) -> set[int]:
    """The identities of the modules and tensors of the model; good for as long as something holds these."""
    owners = [pair.online for pair in structure.pairs]
    tensors = [getattr(pair.online, pair.kind)[pair.key] for pair in structure.pairs]
    return set(map(id, [structure.roots[0], *owners, *tensors]))


class _OwnState:
    """What a swapped model has of its own, to be given back: modules, tensors and values.

    Args:
        structure: the model and its twin.
        blocks: what of them is laid out side by side.
        wrapped: the handlers of signals that are wrapped for as long.

    Attributes:
        parts: the identities of what is swapped.
        is_filled: whether values of the twin may be in the model.
        abandoned: calls back where the block is never left, but forgotten.
    """

    def __init__(self, structure: Structure, blocks: list[Block], wrapped: list[tuple[int, DeferringHandler]]) -> None:
        self._structure = structure
        self._blocks = blocks
        self.wrapped = wrapped
        self.abandoned: object = None
        self.modules = [ModuleBackup.of(module) for module in modules_of(structure.roots[0])]
        slots = [pair.slots() for pair in structure.pairs]
        self._pairs = [(local(ours[key]), local(theirs[name])) for (ours, key), (theirs, name) in slots]
        self.tensors = [TensorBackup.of(p, part) for p, (part, _) in zip(structure.pairs, self._pairs, strict=True)]
        self.shared = [TensorBackup.of(pair, local(pair.slots()[0][0][pair.key])) for pair in structure.shared]
        self.parts = _parts(structure).union(id(one.module) for one in self.modules)
        self.is_filled = False
        self._values: list[tuple[Tensor, Tensor]] = []
        self._versions: list[tuple[TensorBackup, int]] = []

    def fill_from_twin(self) -> None:
        """Saves the values and replaces them by those of the twin."""
        self.is_filled = True
        laid_out = {id(one) for block in self._blocks for one in block.online}
        apart = [pair for pair in self._pairs if id(pair[0]) not in laid_out]
        written = [(online, averaged) for online, averaged in apart if not overlaps_itself(online)]
        for block in self._blocks:  # in parts that the allocator keeps and gives again, instead of asking the system
            written += zip(
                torch.split(block.online_memory, _PART), torch.split(block.averaged_memory, _PART), strict=True
            )
        self._values = [(online, online.detach().clone()) for online, _ in written]
        for online, averaged in apart:
            if overlaps_itself(online):  # it cannot be written to
                online.data = averaged.detach().to(online.device, online.dtype, copy=True)
        _fill(written)
        self._note_writes()
        watched = [one for one in (*self.tensors, *self.shared) if isinstance(one.tensor, nn.Parameter)]
        self._versions = [(one, one.version()) for one in watched]

    def _note_writes(self) -> None:
        """Lets autograd know of what it cannot see: writes into the memory of tensors that are laid out."""
        for block in self._blocks:
            increment_version(block.online)

    def changed(self) -> tuple[list[TensorBackup], list[TensorBackup]]:
        """The parameters that were written into since: those of which that is dropped, and those where it stays."""
        changed = [one for one, version in self._versions if one.version() != version]
        shared = set(map(id, self.shared))
        return [one for one in changed if id(one) not in shared], [one for one in changed if id(one) in shared]

    def give_back(self) -> None:
        """All at once, which is quickest; can be done again after it was cut short anywhere."""
        for step in self._steps():
            step()
        _fill(self._values)
        self._note_writes()

    def give_back_piecewise(self) -> None:
        """Step by step, those that fail again, for as long as that gets further.

        Raises:
            RuntimeError: where nothing that is left can be done.
        """
        left: list[Callable[[], None]] = [
            *self._steps(),
            *(partial(_fill, [pair]) for pair in self._values),
            self._note_writes,
        ]
        while left:
            failed = [(step, error) for step in left if (error := _error_in(step)) is not None]
            if len(failed) == len(left):
                error = failed[0][1]
                raise RuntimeError(
                    f"The model should get its own weights back after swapped(), but a part of them could not be "
                    f"written ({type(error).__name__}: {error}); load the model from a checkpoint."
                ) from error
            left = [step for step, _ in failed]

    def _steps(self) -> list[Callable[[], None]]:
        resharded = partial(reshard, self._structure.roots[0])  # or weights that were gathered in the block would stay
        tensors = [one.put_back for one in (*self.tensors, *self.shared)]
        return [resharded, *(one.put_back for one in self.modules), *tensors]


def _error_in(step: Callable[[], None]) -> Exception | None:
    """Does ``step``, again where something that is no Exception cuts it short: Ctrl-C, which is on its way already."""
    while True:
        with suppress(KeyboardInterrupt, SystemExit, GeneratorExit):
            try:
                step()
            except Exception as error:
                return error
            return None


def _fill(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copies the second of each pair into the first."""
    if pairs:
        online, values = zip(*pairs, strict=True)
        with torch.inference_mode(any(tensor.is_inference() for tensor in online)), torch.no_grad():
            kernels.copy(online, values)
    torch.clear_autocast_cache()  # it holds what autocast has made of the weights before


class _WatchedExit:
    """``__exit__``, which gives the weights back when it goes, if it has not run by then."""

    def __get__(self, swap: "Swapped | None", owner: type | None = None) -> Callable[..., None]:
        if swap is None:
            return _leave
        leave = MethodType(_leave, swap)
        if not swap.is_active:  # as a with statement does, which asks for it first and enters then
            swap._watch = weakref.ref(leave, partial(_end_unless_left, weakref.ref(swap)))
        return leave


class Swapped(ContextDecorator):
    """Inside the block each tensor of the model holds the values of its counterpart in the twin.

    The values change and the tensors stay, so that whatever holds on to them (an optimizer, a compiled module) sees the
    right ones before, inside and after. On every way out the model has the modules, the tensors and the bits that it
    had, whatever was done to them inside. While it lasts it costs one copy of what is swapped.

    Args:
        current: gives the model and its twin as they are, and what of them is laid out side by side; raises
            RuntimeError where a part of the model is swapped.
    """

    __exit__ = _WatchedExit()

    def __init__(self, current: Callable[[], tuple[Structure, list[Block]]]) -> None:
        self._current = current
        self._held: _OwnState | None = None
        self._watch: object = None

    def __repr__(self) -> str:
        return f"Swapped({'active' if self.is_active else 'not active'})"

    @property
    def is_active(self) -> bool:
        """Whether the model holds the averaged weights."""
        return self._held in _swapped

    def __enter__(self) -> None:
        if self.is_active:
            self._current()  # which raises
        wrapped: list[tuple[int, DeferringHandler]] = []
        try:
            _enter(self, wrapped)
        except BaseException:
            _end(self._held)
            unwrap_handlers(wrapped)
            raise


@defers_signals
def _enter(swap: Swapped, wrapped: list[tuple[int, DeferringHandler]]) -> None:
    swap._held = None
    wrap_handlers(wrapped)
    structure, blocks = swap._current()
    held = swap._held = _OwnState(structure, blocks, wrapped)
    held.abandoned = weakref.ref(swap, partial(_end_abandoned, held))
    _swapped.add(held)
    refuse_while_swapped(structure, "swapped", but_by=held)  # in another thread, since
    _wait_for_others()
    held.fill_from_twin()
    deliver_signals()


@defers_signals
def _leave(
    swap: Swapped, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    """``__exit__``."""
    try:
        if swap._held is not None:
            _finish(swap, swap._held, kind is None)
    finally:
        deliver_signals()


def _finish(swap: Swapped, held: _OwnState, warns: bool) -> None:
    dropped: list[TensorBackup] = []
    stays: list[TensorBackup] = []
    try:
        if warns:
            dropped, stays = held.changed()
    finally:
        _end(held)
        swap._watch = swap._held = None
    if dropped or stays:
        what = "the change is dropped" if dropped else "the change stays, for the average shares it"
        warn_user(
            f"'{(dropped or stays)[0].path}' was changed while the model held its averaged weights, and {what}; "
            "train and load weights outside of swapped() and of the runs of swap_during()."
        )


@uninterrupted
def _end_unless_left(swap: "weakref.ref[Swapped]", leave: object) -> None:
    """Where ``__exit__`` was cut short before it began."""
    if (still_there := swap()) is not None:
        _end(still_there._held)


@uninterrupted
def _end_abandoned(held: _OwnState, swap: object) -> None:
    """Where ``__exit__`` is never called."""
    _end(held)


@uninterrupted
def _end(held: _OwnState | None) -> None:
    if held is not None:
        try:
            if held in _swapped:
                _give_back(held)
        finally:
            unwrap_handlers(held.wrapped)


def _give_back(held: _OwnState) -> None:
    try:
        if held.is_filled:
            held.give_back()
    except BaseException:
        held.give_back_piecewise()
        raise
    finally:
        held.abandoned = None
        _swapped.discard(held)
