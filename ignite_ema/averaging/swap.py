"""Puts the averaged weights into the online model for a while, then restores its own weights, bit for bit.

The values change but the tensors stay, so whatever refers to them (an optimizer, a compiled module) sees the right
values before, inside and after the block. A generator does the work: its two nested ``finally`` clauses restore what
has not been restored yet, tensor by tensor, whatever interrupts them. Python closes a generator that is dropped, so the
weights come back even if ``__exit__`` never runs.
"""

from collections.abc import Callable, Generator
from contextlib import ContextDecorator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .checks import warn_user
from .memory import has_values, overlaps_itself
from .pairing import SWAPPED, Pairing, Slot, replace
from .sharding import fsdp_modules, local, reshard

Step: TypeAlias = tuple[str, Callable[[], None]]

_TRIALS = 3  # attempts to restore a tensor


def is_swapped(model: nn.Module) -> bool:
    """Whether ``model`` holds averaged weights now, from any of its averages."""
    return vars(model).get(SWAPPED) == id(model)


class Swapped(ContextDecorator):
    """Inside the block each tensor of the model has the values of its counterpart in the twin.

    It costs one copy of what is swapped while it lasts.

    Args:
        pairing: returns the current pairing of model and twin; raises RuntimeError if they must not be swapped.
        model: the online model.
        buffers_from: called with the model once the weights are swapped, to synchronize buffers between ranks.
    """

    def __init__(
        self,
        pairing: Callable[[], Pairing],
        model: nn.Module,
        buffers_from: Callable[[nn.Module], object] | None = None,
    ) -> None:
        self._pairing, self._model, self._buffers_from = pairing, model, buffers_from
        self._steps: Generator[None, None, None] | None = None

    def __repr__(self) -> str:
        return f"Swapped({'active' if self.is_active else 'not active'})"

    @property
    def is_active(self) -> bool:
        """Whether the model holds the averaged weights."""
        return self._steps is not None

    def __enter__(self) -> "Swapped":
        pairing = self._pairing()  # raises if the model is swapped already
        self._steps = steps = _swap(pairing, self._model, self._buffers_from)
        try:
            next(steps)
        except BaseException:
            self._steps = None
            steps.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._steps is None:
            return
        try:
            if kind is None:
                next(self._steps, None)  # runs to the end, which may warn of what the block has changed
        finally:
            self._steps.close()
            self._steps = None


def _finish(left: list[Step], errors: dict[str, BaseException]) -> None:
    """Does the steps that are left, the last first; what fails at each trial goes into ``errors``, by name.

    A step may be done twice. An exception on the way, such as Ctrl-C, is raised when all is done.
    """
    raised: BaseException | None = None
    failures = 0
    while left:
        name, restore = left[-1]
        try:
            restore()
            left.pop()
            failures = 0
        except BaseException as error:
            raised, failures = error, failures + 1
            if failures == _TRIALS:
                errors[name], failures = error, 0
                left.pop()
    torch.clear_autocast_cache()  # it has copies of the weights
    if raised is not None and not errors:
        raise raised


class _Saved:
    """A tensor of the model, its memory, and, unless it is shared with the twin, its values."""

    def __init__(self, slot: Slot, is_shared: bool = False) -> None:
        self.slot, self.tensor = slot, slot.online.get()
        self._home, self._requires_grad = self.tensor.detach(), self.tensor.requires_grad
        self._part = local(self._home)
        self._values = None if is_shared else self._part.clone()
        self._is_writable = self._part.layout is torch.strided and not overlaps_itself(self._part)
        self._bytes = self._part.untyped_storage().nbytes() if self._is_writable else 0
        self.version = -1  # of the tensor with the twin's values

    def fill(self) -> None:
        """Replaces the values with those of the twin."""
        averaged = local(self.slot.averaged.get()).detach()
        if self._is_writable and self._part.shape == averaged.shape:
            _write(self._part, averaged)
        else:  # a copied or kept buffer of another shape, or a tensor that cannot be written to
            replace(self.slot.online, averaged)

    def restore(self) -> None:
        if not self._is_at_home():  # cast or moved
            self.tensor.data = self._home
        if self.tensor.requires_grad != self._requires_grad and self.tensor.is_leaf:
            self.tensor.requires_grad_(self._requires_grad)
        if self._values is not None and self._is_writable:
            if not has_values(self._part):  # freed to save memory
                self._part.untyped_storage().resize_(self._bytes)
            _write(self._part, self._values)

    def was_changed(self) -> bool:
        """Whether a parameter was replaced, or no longer has the values that it was filled with."""
        place = self.slot.online
        if place.is_buffer or self._values is None:
            return False
        if place.key not in place.table or place.get() is not self.tensor:
            return True
        if _version(self.tensor) == self.version:
            return False
        online, averaged = self.slot.tensors()
        return not torch.equal(online, averaged.to(online))

    def _is_at_home(self) -> bool:
        part = local(self.tensor)
        if part.layout is not torch.strided or self._part.layout is not torch.strided:
            return part.layout is self._part.layout
        return part.dtype == self._part.dtype and part.is_set_to(self._part)


def _swap(
    pairing: Pairing, model: nn.Module, buffers_from: Callable[[nn.Module], object] | None
) -> Generator[None, None, None]:
    left: list[Step] = []  # what restores the model, each step with a name
    errors: dict[str, BaseException] = {}
    parts = fsdp_modules(model)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    children = {path: dict(module._modules) for path, module in modules.items()}
    saved: list[_Saved] = []
    changed: list[str] = []
    is_complete = False
    try:
        try:
            left.append(("the modules", _restoring(list(modules.values()))))
            for module in modules.values():
                vars(module)[SWAPPED] = id(module)
            for slot in pairing.shared:
                if type(slot.online.get()) is nn.Parameter:
                    left.append((slot.name, _Saved(slot, is_shared=True).restore))
            for slot in pairing.slots:
                saved.append(_Saved(slot))
                left.append((slot.name, saved[-1].restore))
                saved[-1].fill()
            torch.clear_autocast_cache()
            if buffers_from is not None:
                buffers_from(model)
            for tensor in saved:  # not before: views of one storage share a version counter
                tensor.version = _version(tensor.tensor)
            yield
            _reshard(parts, model, pairing)
            changed = [tensor.slot.name for tensor in saved if tensor.was_changed()]
            is_complete = True
            saved.clear()  # so that each copy is freed once it has been written back
        finally:
            _reshard(parts, model, pairing)
            _finish(left, errors)
    finally:  # a second time, for what a second Ctrl-C has left
        _finish(left, errors)
        if (fault := _fault(errors, modules, children)) and not is_complete:
            warn_user(fault)  # the exception that ended the block reaches the caller
    if fault:
        raise RuntimeError(fault) from next(iter(errors.values()), None)
    if changed:
        warn_user(
            f"'{changed[0]}' was changed while the model held its averaged weights, and the change is dropped. Train "
            "and load weights outside of swapped() and of the runs of swap_during()."
        )


def _restoring(modules: list[nn.Module]) -> Callable[[], None]:
    """Returns what removes the marks of modules, and puts each of their tensors back in its place."""
    places = [
        (module, table, key, tensor)
        for module in modules
        for table in (module._parameters, module._buffers)
        for key, tensor in table.items()
    ]

    def restore() -> None:
        for module in modules:
            vars(module).pop(SWAPPED, None)
        for module, table, key, tensor in places:
            if key in table and table[key] is not tensor:
                setattr(module, key, tensor)  # not into the table: an LSTM also keeps a list of its weights

    return restore


def _reshard(parts: list[nn.Module], model: nn.Module, pairing: Pairing) -> None:
    """Reshards gathered modules, including those that an exception has left in the middle of a pass."""
    reshard(parts)
    if parts and not pairing.is_current():
        model.state_dict()  # its hooks reshard even in the middle of a pass


def _fault(
    errors: dict[str, BaseException], modules: dict[str, nn.Module], children: dict[str, dict[str, Any]]
) -> str | None:
    """What is wrong with the model after the block, or None."""
    for name, error in errors.items():
        return (
            f"The model should get its own weights back after swapped(), but '{name}' could not be written "
            f"({type(error).__name__}: {error}). Load the model from a checkpoint."
        )
    for path, module in modules.items():
        found = dict(module._modules)
        for key, child in children[path].items():
            if found.get(key) is not child:
                return (
                    "The modules of the model should stay while it holds averaged weights, but "
                    f"'{f'{path}.{key}'.lstrip('.')}' was replaced inside swapped(). All other weights are the model's "
                    "own again; replace modules outside of the block."
                )
    return None


def _write(tensor: Tensor, values: Tensor) -> None:
    if tensor.is_inference():
        with torch.inference_mode():
            tensor.copy_(values)
    else:
        tensor.copy_(values)


def _version(tensor: Tensor) -> int:
    """The number of in-place writes to the tensor."""
    part = local(tensor)
    return 0 if part.is_inference() else part._version
