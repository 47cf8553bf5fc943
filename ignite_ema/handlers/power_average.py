"""One of the averages of a :class:`~ignite_ema.PostHocEMA`: its schedule, and what is stored of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from ignite.engine import Engine
from torch import Tensor, nn

from ..averaging.buffers import treatment_of
from ..averaging.collectives import is_first_rank
from ..averaging.sharding import whole
from ..checkpoints.files import compact
from ..schedules import PowerFunction
from .ema import EMAHandler

__all__ = ["Clock", "Parts", "PowerAverage", "PowerOfSamples"]


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


@dataclass
class Parts:
    """What is stored of an average: by path, whole, on the CPU; nothing but on the first rank.

    Attributes:
        averaged: the averaged tensors.
        copied: all others.
        error: what went wrong on the way, None for nothing. Not raised there, where other ranks wait for the next
            tensor.
    """

    averaged: dict[str, Tensor] = field(default_factory=dict)
    copied: dict[str, Tensor] = field(default_factory=dict)
    error: Exception | None = None


class PowerAverage(EMAHandler):
    """A handler whose momentum may depend on samples, and that knows what to store.

    Attributes:
        directory: where it is stored.
    """

    directory: Path

    def averaged_tensors(self) -> dict[str, Tensor]:
        """The tensors of the twin by path; not copies."""
        return self._average.averaged_tensors()

    def frozen_tensors(self) -> dict[str, Tensor]:
        """By name in the twin's ``state_dict``, under all its names, each frozen parameter that is the model's own."""
        own = {id(parameter) for parameter in self.model.parameters()}
        return {name: tensor for name, tensor in self._average._names() if id(tensor) in own}

    def state_dict_names(self) -> dict[str, str]:
        """For each name in the twin's ``state_dict``, in order, the path; a frozen one stands for itself."""
        paths = self._average.state_dict_names()
        frozen = self.frozen_tensors()
        return {name: paths.get(name, name) for name, _ in self._average._names() if name in paths or name in frozen}

    def parts(self, dtype: torch.dtype) -> Parts:
        """What is averaged, in ``dtype``, and what is not. Averaged buffers are few and stay in float32."""
        parts = Parts()
        for path, held in self._average._tensors().items():
            tensor = whole(held.detach())
            if not is_first_rank() or parts.error is not None:
                continue
            is_kept = not isinstance(held, nn.Parameter) and treatment_of(self.handle_buffers, path) != "average"
            try:
                if is_kept or not (tensor.is_floating_point() or tensor.is_complex()):
                    parts.copied[path] = tensor.cpu()
                else:
                    wide = dtype if isinstance(held, nn.Parameter) else torch.promote_types(dtype, torch.float32)
                    parts.averaged[path] = _narrowed(path, tensor, tensor.dtype if tensor.is_complex() else wide)
            except Exception as error:
                parts.error = error
        return Parts(compact(parts.averaged), compact(parts.copied), parts.error)

    def frozen_parts(self) -> dict[str, Tensor]:
        """The frozen tensors, whole, on the CPU, ties kept; nothing but on the first rank."""
        found: dict[int, Tensor] = {}
        frozen = self.frozen_tensors()
        for parameter in frozen.values():
            if id(parameter) not in found:
                gathered = whole(parameter.detach())
                found[id(parameter)] = gathered.cpu() if is_first_rank() else gathered.new_empty(0)
        return compact({name: found[id(one)] for name, one in frozen.items()}) if is_first_rank() else {}

    def _check_start(self, name: str, engine: Engine) -> None:
        """Leaves it to the ``PostHocEMA`` to warn; the first update copies, whatever the weights were before."""
        self._average.refresh()

    def _update(self, name: str, engine: Engine) -> None:
        before = self.num_updates
        super()._update(name, engine)
        if isinstance(self.momentum, PowerOfSamples) and self.num_updates > before:
            self.momentum.updated_at = self.momentum.now


class Clock:
    """The time of averages: the number of their updates, or of the samples in the batches.

    Args:
        samples: called with the engine, says how many samples its batch has; None where time is counted in updates.
        averages: their schedules are told the samples.

    Attributes:
        unit: "updates" or "samples".
        seen: the number of samples so far.
    """

    def __init__(self, samples: Callable[[Engine], int] | None, averages: Sequence[PowerAverage]) -> None:
        self._samples, self._averages = samples, averages
        self.unit = "updates" if samples is None else "samples"
        self._schedules = [one.momentum for one in averages if isinstance(one.momentum, PowerOfSamples)]
        self.seen = 0

    @property
    def time(self) -> int:
        """The time of the last update."""
        return self._schedules[0].updated_at if self._schedules else self._averages[0].num_updates

    def count(self, engine: Engine) -> None:
        """Adds the batch of the iteration that starts; raises ValueError for what is no number of samples."""
        count = self._samples(engine) if self._samples is not None else 0
        if type(count) is not int or count < 1:
            raise ValueError(
                f"samples should return the number of samples in the batch, an integer of at least 1, got {count!r}."
            )
        self.seen += count
        for schedule in self._schedules:
            schedule.now = self.seen

    def set(self, seen: int, updated_at: int) -> None:
        """Goes on from there."""
        self.seen = seen
        for schedule in self._schedules:
            schedule.now, schedule.updated_at = seen, updated_at


def _narrowed(path: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype``, contiguous, so that any part of it can be read by itself."""
    narrow = tensor.to(dtype).cpu().contiguous()
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and _overflows(tensor, narrow):
        raise ValueError(
            f"'{path}' should be within ±{torch.finfo(dtype).max:g} to be stored in {dtype}, got "
            f"{tensor.abs().max().item():g}; pass another snapshot_dtype, such as torch.bfloat16."
        )
    return narrow


def _overflows(tensor: Tensor, narrow: Tensor) -> bool:
    """Whether a finite value has become infinite."""
    return not bool((narrow.isfinite() | ~tensor.cpu().isfinite()).all())
