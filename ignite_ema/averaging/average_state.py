"""The saved form of an average: what its ``state_dict`` holds, checked before it is loaded."""

from collections.abc import Mapping

from .validation import check_count, check_saved_mapping, shown_integer

__all__ = ["AVERAGE_STATE", "VERSION", "check_average_state"]

VERSION = 3
AVERAGE_STATE: dict[str, type | tuple[type, ...]] = {
    "ignite_ema_version": int,
    "num_updates": int,
    "num_skipped": int,
    "initial_share": float,
    "momentum_schedule": (str, type(None)),
    "averaged_tensors": Mapping,
    "state_dict_names": Mapping,
}


def check_average_state(
    state: object, kinds: Mapping[str, type | tuple[type, ...]] = AVERAGE_STATE, what: str = "a ModelAverage"
) -> None:
    """Raises TypeError or ValueError, naming the entry, unless ``state`` is of the form that an average saves.

    Args:
        state: what was saved.
        kinds: the entries and their types, more than those of an average where ``what`` saves more.
        what: whose state it is.
    """
    entries = state if isinstance(state, Mapping) else {}
    for key, value in entries.items():
        if isinstance(value, Mapping) and "ignite_ema_version" in value:
            raise ValueError(
                f"The state of {what} should be what its state_dict() gave, got a mapping that has one under {key!r}; "
                "load that entry."
            )
    if entries and "ignite_ema_version" not in entries:
        raise ValueError(
            f"The state of {what} should be what its state_dict() gave, but it misses 'ignite_ema_version'; the state "
            "of a model belongs into the averaged twin."
        )
    if entries:
        _check_version(entries["ignite_ema_version"])
    check_saved_mapping(state, kinds, what)
    for key in ("num_updates", "num_skipped"):
        check_count(entries[key], f"{key!r} of the state")
    if not 0 <= entries["initial_share"] <= 1:
        raise ValueError(
            f"'initial_share' of the state should be in [0, 1], got {entries['initial_share']}; load what state_dict() "
            "gave, unchanged."
        )


def _check_version(version: object) -> None:
    if type(version) is not int or version != VERSION:
        got = shown_integer(version) if isinstance(version, int) else f"one of type {type(version).__name__}"
        raise ValueError(
            f"'ignite_ema_version' of the state should be {VERSION}, got {got}; load it with the ignite_ema that wrote "
            "it."
        )
