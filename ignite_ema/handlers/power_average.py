"""One of the averages of a :class:`~ignite_ema.PostHocEMA`: its momentum, and what is stored of it."""

import math
from pathlib import Path

import torch
from ignite.engine import Engine
from torch import Tensor, nn

from ..averaging.buffers import treatment_of
from ..averaging.collectives import is_first_rank
from ..averaging.sharding import whole
from ..checkpoints.memory import compact
from ..schedules import PowerFunction
from .ema import EMAHandler

__all__ = ["PowerOfSamples", "Stream"]


class PowerOfSamples:
    """λ of a power function where time is counted in samples: 1 - (t / t') ^ (γ + 1) from time t to t'.

    Attributes:
        now: the time.
        updated_at: that of the last update.
    """

    def __init__(self, sigma_rel: float) -> None:
        self._exponent = PowerFunction(sigma_rel).gamma + 1
        self.now = self.updated_at = 0

    def __call__(self, n: int) -> float:
        if n == 0 or self.updated_at == 0:
            return 1.0
        return -math.expm1(self._exponent * math.log1p((self.updated_at - self.now) / self.now))


class Stream(EMAHandler):
    """A handler whose momentum may depend on samples, and that knows what to store.

    Attributes:
        directory: where it is stored.
    """

    directory: Path

    def averaged_tensors(self) -> dict[str, Tensor]:
        """The tensors of the twin by path; not copies."""
        return self._average.averaged_tensors()

    def state_dict_names(self) -> dict[str, str]:
        """For each name in the twin's ``state_dict`` the path."""
        return self._average.state_dict_names()

    def parts(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
        """What is averaged, in ``dtype``, and what is not: by path, whole, on the CPU; nothing but on the first rank.

        Averaged buffers are few and stay in float32. Last come sentences about weights beyond the range of ``dtype``.
        """
        averaged: dict[str, Tensor] = {}
        copied: dict[str, Tensor] = {}
        problems: list[str] = []  # not raised here, where other ranks wait for the next tensor
        for path, held in self._average._tensors().items():
            tensor = whole(held.detach())
            is_kept = not isinstance(held, nn.Parameter) and treatment_of(self.handle_buffers, path) != "average"
            if not is_first_rank():
                continue
            if is_kept or not (tensor.is_floating_point() or tensor.is_complex()):
                copied[path] = tensor.cpu()
                continue
            if tensor.is_complex():
                held_in = tensor.dtype
            else:
                held_in = dtype if isinstance(held, nn.Parameter) else torch.promote_types(dtype, torch.float32)
            averaged[path] = tensor.to(held_in).cpu().contiguous()  # so that any part of it can be read by itself
            if _overflows(tensor, averaged[path]):
                problems.append(
                    f"'{path}' should be within ±{torch.finfo(held_in).max:g} to be stored in {held_in}, got "
                    f"{tensor.abs().max().item():g}; pass another snapshot_dtype, such as torch.bfloat16."
                )
        return compact(averaged), compact(copied), problems

    def _check_start(self, name: str, engine: Engine) -> None:
        """Leaves it to the ``PostHocEMA`` to warn; the first update copies, whatever the weights were before."""
        self._average.look_again()

    def _update(self, name: str, engine: Engine) -> None:
        before = self.num_updates
        super()._update(name, engine)
        if isinstance(self.momentum, PowerOfSamples) and self.num_updates > before:
            self.momentum.updated_at = self.momentum.now


def _overflows(tensor: Tensor, narrow: Tensor) -> bool:
    """Whether a finite value has become infinite in a narrower type."""
    if torch.finfo(narrow.dtype).max >= torch.finfo(tensor.dtype).max:
        return False
    return not bool((narrow.isfinite() | ~tensor.cpu().isfinite()).all())
