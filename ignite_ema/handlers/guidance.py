"""Warnings at the start and at the end of a run whose average is useless; each is given once."""

import math

import torch
from torch import nn

from ..averaging.average import ModelAverage
from ..averaging.checks import counted, final_momentum, percentage, warn_first_rank, warn_user
from ..averaging.kernels import norms
from ..averaging.names import parameters_of, tensors_of
from ..averaging.sharding import local
from .momentum import Momentum

_TOO_MUCH = 0.2  # In trials, shares of 0.35 and 0.48 cost 9 and 21 points of accuracy.


def warn_unrestored(what: str, iteration: int, lost: str, handler: str) -> None:
    """Warns that a run resumes with a handler that was not restored."""
    warn_first_rank(
        f"The trainer resumes at iteration {iteration}, but {what} was not restored, and {lost}. Put it into the "
        f'checkpoint ("{handler}": {handler}) and load it with Checkpoint.load_objects, or call {handler}.reset() if '
        "the average is meant to start here."
    )


class Guidance:
    """Warns of an average that starts from the wrong weights, or has hardly moved by the end of a run.

    ``start_is_known`` says that the average starts where it should: it was restored or set, or has moved.
    """

    def __init__(self, average: ModelAverage, momentum: Momentum) -> None:
        self._average, self._momentum = average, momentum
        self._says_share = True  # once, at the end of a run
        self.start_here()
        self._was_reset = False

    def start_here(self) -> None:
        """Notes that the average was reset to the model: from here on, only weights loaded later cause a warning."""
        self._norms_at_start = self._norms()
        self.start_is_known, self._was_reset, self._says_broken = False, True, True

    def check_start(self, name: str, iteration: int) -> None:
        """Warns if a run resumes with a handler that was not restored, or starts from other weights."""
        if self.start_is_known:
            return
        self.start_is_known = True
        is_untouched = self._norms() == self._norms_at_start
        is_stale = is_untouched and self._differs_from_model()  # reset() was forgotten
        if not is_untouched:  # the weights came from elsewhere, so the share says nothing
            self._says_share = False
        if iteration > 0 and not self._was_reset and (is_untouched or self._momentum.counts):
            weights = "the weights that it was made with" if is_stale else "the current weights"
            lost = f"its average starts from {weights}" if is_untouched else "its momentum starts again"
            warn_unrestored(f"the EMA handler of '{name}'", iteration, lost, "ema_handler")
        elif is_stale and self._momentum.at(0) < 1:
            warn_user(  # on each rank: DistributedDataParallel gives the others the weights of the first
                f"The model has other weights than when the EMA handler of '{name}' was made or reset (loaded or "
                "synchronized since), and the average starts from the old weights. Call handler.reset() when the model "
                "is ready."
            )

    def check_end(self, name: str) -> None:
        """Warns, after a run with updates, if the average holds a NaN or is still mostly its starting weights."""
        average = self._average
        if not average.num_updates:  # all were skipped
            return
        if self._says_broken and any(map(math.isnan, self._norms())):
            self._says_broken = False
            warn_user(
                f"The average of '{name}' holds a NaN, which an update has brought in. Resume from a checkpoint before "
                "it, and pass skip_nonfinite=True."
            )
        if not average.initial_share > _TOO_MUCH or not self._says_share:  # NaN: unknown
            return
        self._says_share = False
        schedule, last = self._momentum.schedule, self._momentum.at(average.num_updates - 1)
        if self._momentum.at(0) == 1:  # it would have copied at first if no count had been loaded or set
            way_out = "set handler.num_updates = 0 before the run, and its schedule copies the model first"
        else:
            length = last if schedule is None else final_momentum(schedule) or self._momentum.at(0)
            way_out = f"pass momentum=schedules.Debiased({length or 0.0002:g}) alone, which fits a run of any length"
        warn_first_rank(
            f"After {counted(average.num_updates, 'update')} {percentage(average.initial_share)} of the average of "
            f"'{name}' is still the weights that it started from, at a momentum of {last:g}. Unless more runs follow, "
            f"{way_out}."
        )

    def _norms(self) -> list[float]:
        return norms([local(parameter).detach() for parameter in parameters_of(self._average.module)])

    def _differs_from_model(self) -> bool:
        online = tensors_of(self._average.model)
        return any(
            isinstance(online.get(name), nn.Parameter)
            and not torch.equal(local(online[name]).detach().to(local(averaged)), local(averaged))
            for name, averaged in self._average.averaged_tensors().items()
        )
