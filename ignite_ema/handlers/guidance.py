"""Warnings at the start and at the end of a run whose average is of no use; each comes once."""

import torch
from torch import Tensor

from ..averaging.average import ModelAverage
from ..averaging.checks import counted, final_momentum, percentage, warn_first_rank, warn_user
from ..averaging.kernels import norms
from ..averaging.names import tensors_of
from ..averaging.sharding import local
from .momentum import Momentum

__all__ = ["Guidance"]

_TOO_MUCH = 0.2  # In trials, shares of 0.35 and 0.48 cost 9 and 21 points of accuracy.


class Guidance:
    """Says if an average starts from the wrong weights, or ends as hardly more than its start.

    Args:
        average: the average.
        momentum: the momentum of the handler.

    Attributes:
        start_is_known: whether the average starts where it is meant to: it was restored or set, or has moved.
    """

    def __init__(self, average: ModelAverage, momentum: Momentum) -> None:
        self._average, self._momentum = average, momentum
        self._told: set[str] = set()
        self._norms_when_made = norms(self._parameters())
        self.start_is_known = self._was_reset = False

    def start_here(self) -> None:
        """Notes that the average was reset to the model: only what is loaded into the model from now on is missed."""
        self._norms_when_made = norms(self._parameters())
        self.start_is_known, self._was_reset = False, True

    def check_start(self, name: str, iteration: int) -> None:
        """Warns if a run is resumed with a handler that was not restored, or starts from other weights."""
        if self.start_is_known:
            return
        self.start_is_known = True
        is_as_made = norms(self._parameters()) == self._norms_when_made
        is_stale = is_as_made and self._differs_from_model()  # reset() was forgotten
        if not is_as_made:
            self._told.add("initial share")  # which says nothing: the weights have come from elsewhere
        if iteration > 0 and not self._was_reset and (is_as_made or self._momentum.counts):
            weights = "the weights that it was made with" if is_stale else "the current weights"
            lost = f"its average starts from {weights}" if is_as_made else "its momentum starts again"
            warn_first_rank(
                f"The trainer resumes at iteration {iteration}, but the EMA handler of '{name}' was not restored, and "
                f'{lost}. Put the handler into the checkpoint ("ema_handler": handler) and load it with '
                "Checkpoint.load_objects, or call handler.reset() if the average is meant to start here."
            )
        elif is_stale and self._momentum.at(0) < 1:
            warn_user(  # on each rank: DistributedDataParallel gives the others the weights of the first
                f"The model has other weights than when the EMA handler of '{name}' was made or reset (loaded or "
                "synchronised since), and the average starts from the old weights. Call handler.reset() when the model "
                "is ready."
            )

    def check_end(self, name: str, iterations: int, updates: int, was_terminated: bool) -> None:
        """Warns if a run has ended, and its average has not moved or hardly.

        Args:
            name: the attribute of the handler.
            iterations: how many the run had.
            updates: how many of them made an update.
            was_terminated: whether it ended before its time, so that an event may have been still to come.
        """
        average = self._average
        has_moved = average.num_updates or average.num_skipped or updates
        if not has_moved and iterations and not was_terminated:
            self.tell_once(
                "no update",
                f"The run of {counted(iterations, 'iteration')} should have updated the average of '{name}', but its "
                "event never fired. Attach the handler with an event that this run fires.",
            )
        if not updates or not average.num_updates or not average.initial_share > _TOO_MUCH:  # NaN: unknown
            return
        schedule, last = self._momentum.schedule, self._momentum.at(average.num_updates - 1)
        if self._momentum.at(0) == 1:  # it would have copied at first, but for a count that was loaded or set
            way_out = "set handler.num_updates = 0 before the run, and its schedule copies the model first"
        else:
            length = last if schedule is None else final_momentum(schedule) or self._momentum.at(0)
            way_out = f"pass momentum=schedules.Debiased({length or 0.0002:g}) alone, which fits a run of any length"
        self.tell_once(
            "initial share",
            f"After {counted(average.num_updates, 'update')} {percentage(average.initial_share)} of the average of "
            f"'{name}' is still the weights that it started from, at a momentum of {last:g}. Unless more runs follow, "
            f"{way_out}.",
        )

    def _differs_from_model(self) -> bool:
        online = tensors_of(self._average.model)
        pairs = [(online[name], one) for name, one in self._average.averaged_tensors().items() if name in online]
        return any(
            not torch.equal(local(theirs).detach().to(local(ours).device, ours.dtype), local(ours))
            for theirs, ours in pairs
            if isinstance(theirs, torch.nn.Parameter)
        )

    def _parameters(self) -> list[Tensor]:
        return [local(parameter).detach() for parameter in self._average.module.parameters()]

    def tell_once(self, what: str, message: str) -> None:
        """Warns on the first rank, unless ``what`` was told before."""
        if what not in self._told:
            self._told.add(what)
            warn_first_rank(message)
