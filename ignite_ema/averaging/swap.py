"""The online model holds its averaged weights for a while, and then its own again, bit for bit."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import kernels
from .module_trees import Pair, Structure, overlaps_itself
from .sharding import reshard

__all__ = ["any_swapped", "is_swapped", "refuse_while_swapped", "swapped"]

# Marks of what is swapped now, of all averages: the models of two may have parts in common.
_swapped: set[int] = set()
_lock = Lock()
_ATTEMPTS = 100  # to give the weights back


def any_swapped() -> bool:
    """Whether any model holds averaged weights now."""
    return bool(_swapped)


def is_swapped(pairs: list[Pair]) -> bool:
    """Whether a tensor of the model of ``pairs`` holds averaged weights now, of this average or of another."""
    return bool(_swapped) and not _swapped.isdisjoint(_marks(pairs))


def refuse_while_swapped(pairs: list[Pair], what: str) -> None:
    """Raises RuntimeError where :func:`is_swapped`."""
    if is_swapped(pairs):
        raise RuntimeError(
            f"An average should be {what} while the model holds its own weights, but it holds averaged ones now; leave "
            "the block of swapped() first, or the run of the evaluator that swap_during() swaps for."
        )


@contextmanager
def swapped(structure: Structure) -> Iterator[None]:
    """Inside the block each tensor of the model holds the values of its counterpart in the twin.

    The values change and the tensors stay, so that whatever holds on to them (an optimizer, a compiled module) sees the
    right ones before, inside and after. On every way out the model has the tensors and the bits that it had, whatever
    was done to them inside. While it lasts it costs one copy of what is swapped.

    Raises:
        RuntimeError: where a tensor of the model is swapped already.
    """
    pairs = structure.pairs
    marks = _marks(pairs)
    held: list[_Held] = []
    saved: list[tuple[Tensor, Tensor]] = []
    with _lock:
        refuse_while_swapped(pairs, "swapped")
        _swapped.update(marks)
    try:
        tensors = [pair.tensors() for pair in pairs]
        held += [_Held.of(pair) for pair in structure.names]
        expanded = [(online, averaged) for online, averaged in tensors if overlaps_itself(online)]
        written = [(online, averaged) for online, averaged in tensors if not overlaps_itself(online)]
        saved += [(online, online.detach().clone()) for online, _ in written]
        for online, averaged in expanded:  # which cannot be written to
            online.data = averaged.detach().to(online.device, online.dtype, copy=True)
        _fill(written)
        trained = [(one, one.version()) for one in held if isinstance(one.tensor, nn.Parameter)]
        yield
        if changed := [one.pair.path for one, version in trained if one.version() != version]:
            warnings.warn(
                f"'{changed[0]}' was changed while the model held its averaged weights, and the change is dropped; "
                "train and load weights outside of swapped() and of the runs of swap_during().",
                stacklevel=4,
            )
    finally:
        interruption: BaseException | None = None
        for _ in range(_ATTEMPTS):
            try:
                reshard(structure.roots[0])  # or it would go on with weights that were gathered in the block
                for one in held:
                    one.put_back()
                _fill(saved)
                _swapped.difference_update(marks)
                break
            except BaseException as error:  # Ctrl-C, a signal: once more from the start, so that no half of it stays
                interruption = error
        _swapped.difference_update(marks)
        if interruption is not None:
            raise interruption


def _marks(pairs: list[Pair]) -> set[int]:
    slots = [pair.slots()[0] for pair in pairs]
    return {mark for owner, key in slots for mark in (id(owner), id(owner[key]))}


class _Held(NamedTuple):
    """A name of the model and what it stands for: the tensor, the part that this rank has of it, and its memory."""

    pair: Pair
    tensor: Tensor
    part: Tensor
    memory: Tensor
    requires_grad: bool
    size: int

    @classmethod
    def of(cls, pair: Pair) -> "_Held":
        owner, key = pair.slots()[0]
        part = pair.tensors()[0]
        return cls(pair, owner[key], part, part.detach(), owner[key].requires_grad, _size(part))

    def version(self) -> int:
        """Counts what was written into the tensor in place."""
        return 0 if self.part.is_inference() else self.part._version

    def put_back(self) -> None:
        """Undoes what was done to the name and the tensor, but for its values."""
        owner, key = self.pair.slots()[0]
        if key not in owner:
            owner[key] = self.tensor
        elif owner[key] is not self.tensor:
            setattr(self.pair.online, key, self.tensor)  # by way of the module, since an LSTM keeps a list of its own
        if self.memory.layout is torch.strided:
            if _size(self.memory) < self.size:  # freed to save memory
                self.memory.untyped_storage().resize_(self.size)
            if _where(self.part) != _where(self.memory):
                self.part.data = self.memory
        if self.tensor.requires_grad != self.requires_grad and self.tensor.is_leaf:
            self.tensor.requires_grad_(self.requires_grad)


def _size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else 0


def _where(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _fill(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copies the second of each pair into the first."""
    if pairs:
        online, values = zip(*pairs, strict=True)
        with torch.inference_mode(any(tensor.is_inference() for tensor in online)), torch.no_grad():
            kernels.copy(online, values)
    torch.clear_autocast_cache()  # it holds what autocast has made of the weights before
