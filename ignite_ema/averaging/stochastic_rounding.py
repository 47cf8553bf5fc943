"""Lets small updates move averages in 16 bits: stochastic rounding, with thresholds evenly spread in time.

An update moves a weight by a fraction of the distance to its neighbor in bfloat16 or float16, and rounding to nearest
would lose it. If it is rounded up as often as the fraction says, the weight goes where it should (stochastic rounding,
Gupta et al. 2015, arXiv 1502.02551). The threshold for the fraction need not be random. Here, each weight has a
sequence of thresholds: ``start + n * rate`` modulo 1, with n the number of updates already made. The rates are
relatives of the golden ratio, whose multiples are spread most evenly, so that errors cancel sooner: they are half as
large as random ones, at the price of a mean that may be ahead by up to 0.4 steps of the type while a weight is moving.
The rates differ from weight to weight, so that no period in the weights coincides with all of them. On one kind of
device the bits depend only on the count and on the place of the weight in the model (sharded: in the shard), so a
resumed run continues with the same bits.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from .kernels import Tensors, batches, gathered, leaves_gpu, split, stage

_GOLDEN = (math.sqrt(5) - 1) / 2
_UP = [1 / (k + 1 / (m + _GOLDEN)) for m in range(1, 6) for k in range(1, 4)]
_RATES = [*_UP, *(1 - rate for rate in _UP)]  # and mirrored, to treat up and down alike
_PER_WEIGHT = 0.7548776662466927  # 1 / ρ, ρ³ = ρ + 1: also spreads the starts of neighbors evenly
_EXPONENT = 0x7F800000  # the bits of the exponent in a float32


class StochasticRounding:
    """The kernel, and the count that it needs.

    Attributes:
        num_updates: the number of updates already made; set it before each update.
    """

    def __init__(self) -> None:
        self.num_updates = 0

    def lerp(self, averaged: Tensors, online: Tensors, weight: float) -> None:
        """``averaged[i] = (1 - weight) * averaged[i] + weight * online[i]``, rounded to 16 bits; a kernel."""
        if weight == 1:
            torch._foreach_copy_(averaged, online)
        elif weight != 0 and leaves_gpu(averaged[0], online[0]):
            stage(self._lerp, averaged, online, weight)
        elif weight != 0:
            self._lerp(averaged, online, weight)

    def _lerp(self, averaged: Tensors, online: Tensors, weight: float) -> None:
        starts, rates = _sequences(averaged[0].device)
        most = min(starts.numel(), sum(average.numel() for average in averaged))
        # The overflow of int64 is intended: the highest 24 bits are the fraction.
        turned = (rates * self.num_updates).bitwise_right_shift_(40).bitwise_and_(2**24 - 1).float().mul_(2.0**-24)
        thresholds = (starts[: -(-most // len(rates))] + turned).frac_().view(-1)
        for ours, theirs in batches(averaged, online, starts.numel()):
            device = ours[0].device
            before = gathered(ours, torch.float32, device)
            # Rounded to the type of the average, so that the average of constant, wider weights stays constant.
            after = gathered(theirs, ours[0].dtype, device).float()
            moved = _moved(before, after, weight, thresholds[: before.numel()], ours[0].dtype)
            torch._foreach_copy_(ours, split(moved, ours))


def _moved(before: Tensor, after: Tensor, weight: float, thresholds: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds the exact result to ``dtype``: up where the thresholds say so, else down; float32, flat."""
    unchanged = after == before  # infinities, too: their distance would be NaN
    distance = after.sub_(before).mul_(weight).masked_fill_(unchanged, 0)
    exact = before + distance
    power_of_two = exact.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)
    info = torch.finfo(dtype)
    # Below 2**-126 float32 cannot divide: bfloat16 weights of less than 1e-36 are rounded more coarsely.
    step = power_of_two.mul_(info.eps).clamp_(min=max(info.tiny * info.eps, 2.0**-126))
    # Where the step has become larger than it was at ``before``, the weight itself may lie between two neighbors.
    base = torch.where(exact.abs() > before.abs(), before.div(step).floor_().mul_(step), before)
    steps = before.sub_(base).add_(distance).div_(step)
    few = steps.abs() < 2**23  # beyond, they cannot be counted exactly and may overflow, and would not be lost
    return torch.where(few, steps.add_(thresholds).floor_().mul_(step).add_(base), exact)


@lru_cache(maxsize=8)
def _sequences(device: torch.device) -> tuple[Tensor, Tensor]:
    """The starts of the sequences, in rows of one for each rate, and the rates in units of 2**-64.

    There is one start for each element of a batch: on a CPU, as many as its cache holds.
    """
    rows = 2**13 if device.type == "cpu" else 2**17
    with torch.inference_mode(False):
        starts = torch.arange(rows * len(_RATES), dtype=torch.float64, device="cpu").mul_(_PER_WEIGHT).frac_()
        rates = [int(rate * 2**64) for rate in _RATES]
        signed = [rate - 2**64 if rate >= 2**63 else rate for rate in rates]
        return starts.float().view(rows, -1).to(device), torch.tensor(signed, device=device)
