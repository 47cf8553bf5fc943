"""A model and its averaged twin, without an engine: for Ignite see :mod:`ignite_ema.handler`."""

import numbers
import warnings
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from . import kernels
from .buffers import BufferRule, check_patterns, check_rule, treatment_of
from .pairing import Pairing
from .structure import Mismatch, Structure, tensors_of
from .twin import check_own_twin, freeze, make_twin, refuse_lazy, stripped

__all__ = ["ModelAverage", "checked_momentum"]


class ModelAverage:
    """A model and its averaged twin: ``average = (1 - momentum) * average + momentum * model`` at each update.

    Args:
        model: the online model. ``DistributedDataParallel`` and compiled modules are looked through; the twin of a
            ``DataParallel`` is a ``DataParallel``.
        handle_buffers: what an update does with buffers, persistent or not. "copy": they equal the model's. "update":
            floating-point (and complex) buffers are averaged, all others copied. "ema_train": they are left alone and
            the twin stays in train mode. A mapping from patterns of names (:mod:`fnmatch`) to "copy", "update" or
            "keep": the first match decides, no match means "copy".
        ema_model: a twin of your own, of the structure of ``model``, for models that cannot be deep-copied. It is
            filled from the model here, put into eval (or train) mode and needs no gradients from here on.
        dtype: holds the average of floating-point tensors, for instance ``torch.float32`` for a bfloat16 model; None
            means the type of each tensor.
        device: where the twin is held; None means where the model's tensors are.

    Attributes:
        model: the online model, without wrappers.
        module: the averaged twin.
        handle_buffers: what was passed.

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
        >>> average.module.weight.item()
        5.0
    """

    def __init__(
        self,
        model: nn.Module,
        handle_buffers: BufferRule = "copy",
        *,
        ema_model: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(
                "model should be an instance of nn.Module or its subclasses, but got "
                f"model: {type(model).__name__}; pass the module itself."
            )
        refuse_lazy("model", model)
        self.model = stripped(model)
        check_rule(handle_buffers)
        self.handle_buffers = handle_buffers = (
            dict(handle_buffers) if isinstance(handle_buffers, Mapping) else handle_buffers
        )
        self._dtype = dtype
        self._warned = False
        if ema_model is None:
            self.module = make_twin(self.model, dtype, None if device is None else torch.device(device))
        else:
            check_own_twin(ema_model, dtype, device)
            self.module = ema_model
        try:
            structure = Structure(self.model, self.module)
            check_patterns(handle_buffers, [pair.path for pair in structure.pairs if pair.kind == "_buffers"])
            self._pairing = Pairing(structure, partial(treatment_of, handle_buffers))
        except Mismatch as mismatch:
            raise RuntimeError(
                f"ema_model should have the structure of the model, but {mismatch}; build it as the model is built."
            ) from None
        self.module.train(handle_buffers == "ema_train")
        freeze(self.module)
        if ema_model is not None:
            self.reset()
        self._norms_when_made = kernels.norms(self._parameters())

    def update(self, momentum: float) -> None:
        """Moves the twin towards the model by ``momentum``, and its buffers as ``handle_buffers`` says.

        Args:
            momentum: λ in [0, 1], the weight of the model's weights. 0 leaves the averaged tensors as they are, 1
                copies.

        Raises:
            ValueError: for a momentum outside [0, 1].
            RuntimeError: when the structure of the model has changed, or a shape; nothing has been updated then.
        """
        if type(momentum) is not float or not 0 <= momentum <= 1:
            momentum = checked_momentum(momentum, "momentum")
        if self.handle_buffers == "ema_train" and not self.module.training:
            self.module.train()  # an evaluator has put it into eval mode
        gradients = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # what torch.no_grad() does, at a fifth of its cost
        try:
            tensors = self._pairing.read()
            if momentum < self._pairing.resolution:
                self._warn_of_rounding(momentum)
            for kernel, averaged, online in self._pairing.groups:
                kernel(tensors[averaged], tensors[online], momentum)
        except Mismatch as mismatch:
            raise _changed(mismatch) from None
        finally:
            torch._C._set_grad_enabled(gradients)

    @torch.no_grad()
    def reset(self) -> None:
        """Makes the twin equal to the model, buffers included, whatever ``handle_buffers`` says."""
        try:
            self._pairing.read()
            pairs = [pair.tensors() for pair in self._pairing.pairs]
        except Mismatch as mismatch:
            raise _changed(mismatch) from None
        if pairs:
            online, averaged = zip(*pairs, strict=True)
            kernels.copy(averaged, online)

    @torch.no_grad()
    def is_stale(self) -> bool:
        """Whether the twin is as it was made while the model's weights are no longer: :meth:`reset` was forgotten."""
        if kernels.norms(self._parameters()) != self._norms_when_made:
            return False
        pairs = (pair.tensors() for pair in self._pairing.pairs if pair.kind == "_parameters")
        return any(not torch.equal(online.to(averaged.device, averaged.dtype), averaged) for online, averaged in pairs)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the twin by path, each tied tensor once, non-persistent buffers too; not copies."""
        return {path: tensor.detach() for path, tensor in tensors_of(self.module).items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Fills the twin with what :meth:`state_dict` gave.

        Raises:
            ValueError: for a missing or unexpected path, another shape, or a type that the twin cannot hold without
                loss; nothing has been loaded then.
        """
        own = self.state_dict()
        for path in [*own, *state]:
            if path not in state or path not in own:
                what = "misses" if path in own else "should not have"
                raise ValueError(f"The averaged tensors should be those of this model, but the state {what} '{path}'.")
        for path, tensor in own.items():
            _check_loadable(path, tensor, state[path])
        if own:
            kernels.copy(list(own.values()), [state[path] for path in own])

    def _parameters(self) -> list[Tensor]:
        return [tensor for tensor in tensors_of(self.module).values() if isinstance(tensor, nn.Parameter)]

    def _warn_of_rounding(self, momentum: float) -> None:
        if momentum == 0 or self._warned or self._dtype is not None:
            return
        self._warned = True
        needed = self._pairing.resolution / 2 / momentum
        wider = torch.float32 if self._pairing.resolution > torch.finfo(torch.float32).eps else torch.float64
        warnings.warn(
            f"A momentum of {momentum:g} is too small for the type that holds the average: a weight moves only where "
            f"it differs from its average by about {needed:.0%} of its size, and is rounded back otherwise; pass "
            f"dtype={wider} to hold the average in {str(wider).removeprefix('torch.')} (or an ema_model of that type).",
            stacklevel=3,
        )


def _changed(mismatch: Mismatch) -> RuntimeError:
    return RuntimeError(
        f"The model should keep the structure that it had when its average was made, but {mismatch}; make the change "
        "before the average, or make a new average and load the old weights into it."
    )


def _check_loadable(path: str, held: Tensor, loaded: object) -> None:
    if not isinstance(loaded, Tensor):
        raise ValueError(f"'{path}' of the averaged tensors should be a tensor, got {type(loaded).__name__}.")
    if loaded.shape != held.shape:
        raise ValueError(
            f"'{path}' of the averaged tensors should have shape {tuple(held.shape)}, got {tuple(loaded.shape)}: the "
            "state is of another model."
        )
    if loaded.layout != held.layout or loaded.is_meta:
        raise ValueError(
            f"'{path}' of the averaged tensors should be {held.layout} and have values, got {loaded.layout} on "
            f"{loaded.device}; save it the way it is held."
        )
    if not _fits(loaded, held):
        raise ValueError(
            f"'{path}' of the averaged tensors should fit into {held.dtype}, got {loaded.dtype}; hold the average in "
            "that type with dtype=."
        )


def _fits(loaded: Tensor, held: Tensor) -> bool:
    if loaded.dtype == held.dtype:
        return True
    if loaded.is_floating_point() != held.is_floating_point() or loaded.is_complex() != held.is_complex():
        return False
    if loaded.element_size() == 1 or held.element_size() == 1:  # torch promotes no 8-bit floats
        return loaded.is_floating_point() and loaded.element_size() < held.element_size()
    return torch.promote_types(loaded.dtype, held.dtype) == held.dtype


def checked_momentum(value: object, what: str) -> float:
    """``value`` as a momentum; raises with ``what``, the name of where it was read from."""
    if type(value) is float and 0 <= value <= 1:
        return value
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what} should be a momentum, a number in [0, 1], got {value!r}; set it to one.")
    momentum = float(value)
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"{what} should be a momentum in [0, 1], got {value!r}; it is the weight of the new weights, 1 - decay."
        )
    return momentum
