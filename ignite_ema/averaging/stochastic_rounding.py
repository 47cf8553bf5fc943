"""Averages held in 16 bits that small updates still move: stochastic rounding, with thresholds evenly spread in time.

An update moves a weight by a fraction of the distance to its neighbour in bfloat16 or float16, and rounding to the
nearest would lose it. Rounded up as often as the fraction says, the weight goes where it should (stochastic rounding,
Gupta et al. 2015, arXiv 1502.02551). What the fraction is compared with need not be random. Here it is, for each
weight, the sequence ``n * rate`` modulo 1, n the number of updates already made, from a start of its own. The rates are
relatives of the golden ratio, whose multiples are spread most evenly, so that errors cancel sooner: they are half as
large as random ones, at the price of a mean that may be ahead by up to 0.4 steps of the type while a weight is on its
way. The rates differ from weight to weight, so that no period of the weights falls in with all of them. Bits are a
function of the count and of the place of the weight in the model (sharded: in the shard), on one kind of device: a run
that is resumed goes on with the same ones.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from .kernels import Tensors, batches, gathered, leaves_gpu, split
from .offload import stage

__all__ = ["StochasticRounding"]

_GOLDEN = (math.sqrt(5) - 1) / 2
_UP = [1 / (k + 1 / (m + _GOLDEN)) for m in range(1, 6) for k in range(1, 4)]
_RATES = [*_UP, *(1 - rate for rate in _UP)]  # mirrored, as up is to down
_PER_WEIGHT = 0.7548776662466927  # 1 / ρ, ρ³ = ρ + 1: spreads the starts of neighbours evenly, too
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
        starts, rates = _sequences(averaged[0].device)
        most = min(starts.numel(), sum(average.numel() for average in averaged))
        # That int64 overflows is meant: the highest 24 bits are the fraction.
        turned = (rates * self.num_updates).bitwise_right_shift_(40).bitwise_and_(2**24 - 1).float().mul_(2.0**-24)
        thresholds = (starts[: -(-most // len(rates))] + turned).frac_().view(-1)
        for ours, theirs in batches(averaged, online, starts.numel()):
            device = ours[0].device
            before = gathered(ours, torch.float32, device)
            # Rounded to what the average can hold, so that constant weights that are wider stay what they are there.
            after = gathered(theirs, ours[0].dtype, device).float()
            moved = _moved(before, after, weight, thresholds[: before.numel()], ours[0].dtype)
            torch._foreach_copy_(ours, split(moved, ours))


def _moved(before: Tensor, after: Tensor, weight: float, thresholds: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the neighbours in ``dtype`` of what is exact, the upper one where thresholds say so; float32, flat."""
    unchanged = after == before  # infinities too, whose distance would be NaN
    distance = after.sub_(before).mul_(weight).masked_fill_(unchanged, 0)
    exact = before + distance
    power_of_two = exact.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)
    info = torch.finfo(dtype)
    # Below 2**-126 float32 cannot divide: bfloat16 weights of less than 1e-36 are rounded more coarsely.
    step = power_of_two.mul_(info.eps).clamp_(min=max(info.tiny * info.eps, 2.0**-126))
    # Where neighbours have become farther apart, the weight itself may lie between two.
    base = torch.where(exact.abs() > before.abs(), before.div(step).floor_().mul_(step), before)
    steps = before.sub_(base).add_(distance).div_(step)
    few = steps.abs() < 2**23  # beyond, they are no longer counted exactly, and may overflow; nor would they be lost
    return torch.where(few, steps.add_(thresholds).floor_().mul_(step).add_(base), exact)


@lru_cache(maxsize=8)
def _sequences(device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the sequences start, a row for each round of the rates, and the rates in units of 2**-64.

    There are as many as a batch has elements: on a CPU what its cache holds.
    """
    rows = 2**13 if device.type == "cpu" else 2**17
    with torch.inference_mode(False):
        starts = torch.arange(rows * len(_RATES), dtype=torch.float64, device="cpu").mul_(_PER_WEIGHT).frac_()
        rates = [int(rate * 2**64) for rate in _RATES]
        signed = [rate - 2**64 if rate >= 2**63 else rate for rate in rates]
        return starts.float().view(rows, -1).to(device), torch.tensor(signed, device=device)
