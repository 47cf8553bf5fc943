"""What a handler starts from that is given the average in a checkpoint: the weights, and the count they stand for."""

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..averaging.schedule_argument import described
from ..averaging.validation import check_count
from ..checkpoints.reading import Averaged, read_held
from .momentum import Momentum

__all__ = ["read_start"]


def read_start(
    source: str | os.PathLike[str] | Mapping[str, Any],
    key: str | None,
    names: nn.Module | Mapping[str, Tensor],
    num_updates: int | None,
    momentum: Momentum,
    known: int | None,
) -> tuple[Averaged, int]:
    """The averaged weights in a checkpoint, and the count from which ``momentum`` goes on, which it has a λ for.

    Args:
        source: the checkpoint.
        key: which of its averages.
        names: for a list without names.
        num_updates: what the user says; it counts more than what the checkpoint says.
        momentum: that of the handler.
        known: the count of the handler, for where neither says one; None where it stands for no average.

    Raises:
        TypeError, ValueError, OSError, ImportError: where the checkpoint cannot be read, or the count is unknown and
            ``momentum`` depends on it.
    """
    found, _ = read_held(source, key, names)
    count = next((one for one in (num_updates, found.num_updates, known) if one is not None), None)
    if count is None:
        raise ValueError(
            "num_updates should be the number of updates that the loaded average has behind it, which the checkpoint "
            f"does not say: {described(momentum.schedule)} would go on with a momentum of {momentum.at(0):g}; pass "
            "num_updates=, 0 to start the schedule."
        )
    check_count(count)
    momentum.at(count)
    return found, count
