"""A model and its averaged twin, without an engine: for Ignite see :mod:`ignite_ema.handler`."""

import warnings
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from . import kernels
from .buffers import BufferRule, check_patterns, check_rule, treatment_of
from .pairing import Pairing
from .structure import Mismatch
from .twin import check_own_twin, make_twin, refuse_lazy, stripped

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
        self.handle_buffers = handle_buffers
        self._dtype = dtype
        self._warned = False
        if ema_model is None:
            self.module = make_twin(self.model, dtype, None if device is None else torch.device(device))
        else:
            check_own_twin(ema_model, dtype, device)
            self.module = ema_model
        try:
            self._pairing = Pairing(self.model, self.module, partial(treatment_of, handle_buffers))
        except Mismatch as mismatch:
            raise RuntimeError(
                f"ema_model should have the structure of the model, but {mismatch}; build it as the model is built."
            ) from None
        check_patterns(handle_buffers, [pair.path for pair in self._pairing.pairs if pair.kind == "_buffers"])
        self.module.train(handle_buffers == "ema_train").requires_grad_(False)
        if ema_model is not None:
            self.reset()
        self._norms_when_made = kernels.norms(list(self.module.parameters()))

    def update(self, momentum: float) -> None:
        """Moves the twin towards the model by ``momentum``, and its buffers as ``handle_buffers`` says.

        Args:
            momentum: λ in [0, 1], the weight of the model's weights. 0 leaves the averaged tensors as they are, 1
                copies.

        Raises:
            ValueError: for a momentum outside [0, 1].
            RuntimeError: when the structure of the model has changed, or a shape; nothing has been updated then.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum should be in [0, 1], got {momentum!r}: it is the weight of the new weights.")
        if self.handle_buffers == "ema_train" and not self.module.training:
            self.module.train()  # an evaluator has put it into eval mode
        with torch.set_grad_enabled(False):  # as torch.no_grad() does, at half its cost
            tensors = self._read()
            if momentum < self._pairing.resolution:
                self._warn_of_rounding(momentum)
            for kernel, averaged, online in self._pairing.groups:
                kernel(tensors[averaged], tensors[online], momentum)

    @torch.no_grad()
    def reset(self) -> None:
        """Makes the twin equal to the model, buffers included, whatever ``handle_buffers`` says."""
        self._read()
        try:
            pairs = [pair.tensors() for pair in self._pairing.pairs]
        except Mismatch as mismatch:
            raise _changed(mismatch) from None
        if pairs:
            online, averaged = zip(*pairs, strict=True)
            kernels.copy(averaged, online)

    @torch.no_grad()
    def is_stale(self) -> bool:
        """Whether the twin is as it was made while the model's weights are no longer: :meth:`reset` was forgotten."""
        if kernels.norms(list(self.module.parameters())) != self._norms_when_made:
            return False
        pairs = (pair.tensors() for pair in self._pairing.pairs if pair.kind == "_parameters")
        return any(not torch.equal(online.to(averaged.device, averaged.dtype), averaged) for online, averaged in pairs)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the twin by path, each tied tensor once, non-persistent buffers too; not copies."""
        return {pair.path: pair.tensors()[1].detach() for pair in self._pairing.pairs}

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

    def _read(self) -> list[Tensor]:
        try:
            return self._pairing.read()
        except Mismatch as mismatch:
            raise _changed(mismatch) from None

    def _warn_of_rounding(self, momentum: float) -> None:
        if momentum == 0 or self._warned or self._dtype is not None:
            return
        self._warned = True
        needed = self._pairing.resolution / 2 / momentum
        warnings.warn(
            f"A momentum of {momentum:g} is too small for the type that holds the average: a weight moves only where "
            f"it differs from its average by about {needed:.0%} of its size, and is rounded back otherwise; pass "
            "dtype=torch.float32 to hold the average in float32.",
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
    same_kind = loaded.is_floating_point() == held.is_floating_point() and loaded.is_complex() == held.is_complex()
    if loaded.dtype != held.dtype and not (same_kind and torch.promote_types(loaded.dtype, held.dtype) == held.dtype):
        raise ValueError(
            f"'{path}' of the averaged tensors should fit into {held.dtype}, got {loaded.dtype}; hold the average in "
            "that type with dtype=."
        )
