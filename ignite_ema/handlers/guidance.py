"""Warnings where a run starts or ends with an average that is of no use; each is given once."""

from ..averaging.average import ModelAverage
from ..averaging.summaries import counted
from ..averaging.user_warnings import warn_user
from .momentum import Momentum

__all__ = ["Guidance"]


class Guidance:
    """What a handler has to say about its average at the start and at the end of a run.

    Args:
        average: the average.
        momentum: that of the handler.

    Attributes:
        start_is_known: whether the average starts where it is meant to: it was restored, reset, set, or has moved.
        share_is_unknown: whether `initial_share` says nothing, for the weights have come from elsewhere.
    """

    def __init__(self, average: ModelAverage, momentum: Momentum) -> None:
        self._average, self._momentum = average, momentum
        self._was_told: set[str] = set()
        self.start_is_known = False
        self.share_is_unknown = False

    def check_start(self, name: str, iteration: int) -> None:
        """Warns where a run is resumed with a handler that was not restored, or starts from other weights."""
        if self.start_is_known:
            return
        self.start_is_known = True
        is_as_made = self._average.is_as_made()
        is_stale = is_as_made and self._average.differs_from_model()  # reset() was forgotten
        self.share_is_unknown = self.share_is_unknown or not is_as_made
        if iteration > 0 and (is_as_made or self._momentum.counts):
            weights = "the weights that it was made with" if is_stale else "the weights of now"
            lost = f"its average starts from {weights}" if is_as_made else "its momentum starts again"
            warn_user(
                f"The trainer resumes at iteration {iteration}, but the EMA handler of '{name}' was not restored, and "
                f'{lost}; put the handler into the checkpoint ("ema_handler": handler) and load it with '
                "Checkpoint.load_objects, or call handler.reset() if the average is meant to start here."
            )
        elif is_stale and self._momentum.at(0) < 1:
            warn_user(
                f"The model has other weights than when the EMA handler of '{name}' was made (loaded or synchronised "
                "since), and the average starts from the old ones; call handler.reset() when the model is ready."
            )

    def check_end(self, name: str, iterations: int, updates: int) -> None:
        """Warns where a run has completed, and the average has not moved or hardly.

        Args:
            name: the attribute of the handler.
            iterations: how many the run had.
            updates: how many of them made an update.
        """
        average = self._average
        if average.num_updates == average.num_skipped == updates == 0 < iterations and not self.share_is_unknown:
            self._tell_once(
                "no update",
                f"The run of {counted(iterations, 'iteration')} should have updated the average of '{name}', but its "
                "event never fired; attach the handler with an event that this run fires.",
            )
        if not updates or not average.num_updates or average.initial_share <= 0.5 or self.share_is_unknown:
            return
        count, interval = average.num_updates, round(iterations / updates)
        last = self._momentum.at(count - 1)
        slower = (
            f" With one update in {interval} iterations the average is {interval} times slower than with one in each."
        )
        self._tell_once(
            "initial share",
            f"After {counted(count, 'update')} {average.initial_share:.0%} of the average of '{name}' is still the "
            f"weights that it started from, at a momentum of {last:g}; for a run of this length pass "
            f"momentum={min(0.5, 10 / count):.2g}, or a schedule that comes down from 1, "
            f"schedules.InverseGamma(min_momentum={last:g}).{slower if interval > 1 else ''}",
        )

    def _tell_once(self, what: str, message: str) -> None:
        if what not in self._was_told:
            self._was_told.add(what)
            warn_user(message)
