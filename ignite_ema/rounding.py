"""Averages held in 16 bits that small updates still move: stochastic rounding, with thresholds evenly spread in time.

An update moves a weight by a fraction of the distance to its neighbour in bfloat16 or float16, and rounding to the
nearest would lose it. Rounded up as often as the fraction says, the weight is right in the mean (stochastic rounding,
Gupta et al. 2015, arXiv 1502.02551). What it is compared with need not be random. Here it is the sequence
``n * golden ratio`` modulo 1, n the number of updates already made, from a start of its own for each weight: the times
at which a weight is rounded up are spread evenly, so that errors cancel sooner than random ones, and nothing but the
count decides, so that a run that is resumed goes on with the same bits.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from .kernels import Tensors, leaves_gpu, parts
from .staging import stage

__all__ = ["StochasticRounding"]

_PER_UPDATE = (math.sqrt(5) - 1) / 2
_PER_WEIGHT = 0.7548776662466927  # 1 / ρ, ρ³ = ρ + 1: spreads neighbours evenly, too, and is no multiple of the other
_EXPONENT = 0x7F800000  # its bits in a float32


class StochasticRounding:
    """The kernel, with the count that it needs.

    Attributes:
        num_updates: the number of updates already made, to be set before each.
    """

    def __init__(self) -> None:
        self.num_updates = 0

    def lerp(self, averaged: Tensors, online: Tensors, weight: float) -> None:
        """As the kernels do: ``averaged[i] = (1 - weight) * averaged[i] + weight * online[i]``; into 16 bits."""
        if weight == 1:
            torch._foreach_copy_(averaged, online)
        elif weight != 0 and leaves_gpu(averaged[0], online[0]):
            stage(self._lerp, averaged, online, weight)
        elif weight != 0:
            self._lerp(averaged, online, weight)

    def _lerp(self, averaged: Tensors, online: Tensors, weight: float) -> None:
        shift = self.num_updates * _PER_UPDATE % 1
        phases = _phases(averaged[0].device)
        for ours, theirs in _batches(averaged, online, phases.numel()):
            before = torch.cat([average.reshape(-1) for average in ours]).float()
            # Rounded to what the average can hold, so that constant weights that are wider stay what they are there.
            after = torch.cat([value.reshape(-1) for value in theirs]).to(before.device, ours[0].dtype).float()
            thresholds = (phases[: before.numel()] + shift).frac_()
            moved = _moved(before, after, weight, thresholds, ours[0].dtype)
            sizes = [average.numel() for average in ours]
            torch._foreach_copy_(ours, [p.view(a.shape) for p, a in zip(torch.split(moved, sizes), ours, strict=True)])


def _moved(before: Tensor, after: Tensor, weight: float, thresholds: Tensor, dtype: torch.dtype) -> Tensor:
    """``before`` and the steps of ``dtype`` from there towards ``after``, a whole number of them; float32, flat."""
    distance = after.sub_(before).mul_(weight)
    exact = before + distance
    smaller = torch.minimum(before.abs(), exact.abs())
    power_of_two = smaller.view(torch.int32).bitwise_and_(_EXPONENT).view(torch.float32)
    info = torch.finfo(dtype)
    # Below 2**-126 float32 cannot divide: bfloat16 weights of less than 1e-36 are rounded more coarsely.
    step = power_of_two.mul_(info.eps).clamp_(min=max(info.tiny * info.eps, 2.0**-126))
    steps = distance.div_(step)
    few = steps.abs() < 2**23  # beyond, they are no longer counted exactly, and may overflow; nor would they be lost
    return torch.where(few, steps.add_(thresholds).floor_().mul_(step).add_(before), exact)


def _batches(averaged: Tensors, online: Tensors, most: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Small tensors together and large ones in parts, up to ``most`` elements."""
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    size = 0
    for average, value in parts(averaged, online, most):
        if ours and size + average.numel() > most:
            yield ours, theirs
            ours, theirs, size = [], [], 0
        ours.append(average)
        theirs.append(value)
        size += average.numel()
    if ours:
        yield ours, theirs


@lru_cache(maxsize=8)
def _phases(device: torch.device) -> Tensor:
    """Where the thresholds start, one for each element of a batch: on a CPU as many as its cache holds."""
    size = 2**18 if device.type == "cpu" else 2**22
    with torch.inference_mode(False):
        return torch.arange(size, dtype=torch.float64).mul_(_PER_WEIGHT).frac_().float().to(device)
