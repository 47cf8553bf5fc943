"""What was saved is checked, entry by entry, before it is loaded."""

import pytest

from ignite_ema.averaging.validation import check_saved_mapping

KINDS = {"count": int, "share": (float, int), "is_swapped": bool}
GOOD = {"count": 3, "share": 0.5, "is_swapped": False}


def test_a_state_with_just_its_entries_is_accepted():
    check_saved_mapping(GOOD, KINDS, "a thing")


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (None, TypeError, r"The state of a thing should be a mapping from its state_dict\(\), got NoneType"),
        ({}, ValueError, "but it misses 'count'; load it unchanged"),
        ({**GOOD, "extra": 1}, ValueError, "but it should not have 'extra'"),
        ({**GOOD, 7: 1}, ValueError, "but it should not have 7"),
        ({**GOOD, "count": 1.5}, TypeError, "'count' of the state should be of type int, got float"),
        ({**GOOD, "count": True}, TypeError, "'count' of the state should be of type int, got bool"),
        ({**GOOD, "share": "x"}, TypeError, "'share' of the state should be of type float or int, got str"),
    ],
)
def test_what_is_missing_unexpected_or_of_another_kind_is_named(state, error, message):
    with pytest.raises(error, match=message):
        check_saved_mapping(state, KINDS, "a thing")
