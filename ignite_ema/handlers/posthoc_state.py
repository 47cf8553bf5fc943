"""The saved form of a :class:`~ignite_ema.PostHocEMA`, checked before it is loaded."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..averaging.state_loading import check_loadable
from ..averaging.validation import check_count, check_saved_mapping
from .handler_state import check_state
from .power_average import PowerAverage

__all__ = ["VERSION", "check_posthoc_state"]

VERSION = 2
_ENTRIES: dict[str, type | tuple[type, ...]] = {
    "ignite_ema_posthoc_version": int,
    "sigma_rels": list,
    "time_unit": str,
    "samples_seen": int,
    "updated_at": int,
    "run_id": str,
    "snapshot_times": list,
}


def check_posthoc_state(state: Mapping[str, Any], own: Mapping[str, Any], averages: Sequence[PowerAverage]) -> None:
    """Raises TypeError or ValueError, naming the entry, unless ``state`` fits a ``PostHocEMA``.

    Args:
        state: what is to be loaded.
        own: what the ``PostHocEMA`` would save now.
        averages: its averages.
    """
    for key in ("ignite_ema_posthoc_version", "sigma_rels", "time_unit"):
        if isinstance(state, Mapping) and key in state and repr(state[key]) != repr(own[key]):
            raise ValueError(
                f"{key!r} of the state should be {own[key]!r}, got {state[key]!r}; make the PostHocEMA as it was made "
                "when the state was saved."
            )
    streams = [f"stream_{index}" for index in range(len(averages))]
    check_saved_mapping(state, {**_ENTRIES, **dict.fromkeys(streams, Mapping)}, "a PostHocEMA")
    for key in ("samples_seen", "updated_at"):
        check_count(state[key], f"{key!r} of the state")
    if not state["run_id"] or not _are_times(state["snapshot_times"]):
        raise ValueError(
            "'run_id' and 'snapshot_times' of the state should be a name and a list of rising times, got "
            f"{state['run_id']!r} and {state['snapshot_times']!r}; load what state_dict() gave, unchanged."
        )
    for stream, average in zip(streams, averages, strict=True):
        check_state(state[stream])
        check_loadable(average.averaged_tensors(), state[stream]["averaged_tensors"])
    _check_one_time(state, {state[stream]["num_updates"] for stream in streams})


def _are_times(value: list[Any]) -> bool:
    return all(type(time) is int and time > 0 for time in value) and value == sorted(set(value))


def _check_one_time(state: Mapping[str, Any], counts: set[int]) -> None:
    """Raises ValueError unless the averages, which made ``counts`` of updates, and the snapshots fit the time."""
    at = state["updated_at"]
    due = counts if state["time_unit"] == "updates" else {min(state["samples_seen"], at)}
    if len(counts) != 1 or due != {at} or max(state["snapshot_times"], default=0) > at:
        raise ValueError(
            f"The averages of the state should be of one time, got {sorted(counts)} updates at {at}; load what "
            "state_dict() gave, unchanged."
        )
