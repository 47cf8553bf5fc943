"""The saved form of a handler is checked before anything is loaded."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from ignite_ema import EMAHandler
from tests.helpers.bits import assert_same_bits

# What load_state_dict refuses


def valid_state():
    return EMAHandler(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))).state_dict()


def replaced(**entries):
    return {**valid_state(), **entries}


def averaged(**entries):
    tensors = {**valid_state()["averaged_tensors"], **entries}
    return replaced(averaged_tensors={key: value for key, value in tensors.items() if value is not None})


BAD_STATES = [
    (lambda: None, TypeError, "should be a mapping from its state_dict.., got NoneType"),
    (dict, ValueError, "but it misses 'ignite_ema_version'"),
    (lambda: nn.Linear(2, 2).state_dict(), ValueError, "the state of a model belongs into the averaged twin"),
    (lambda: replaced(decay=0.9), ValueError, "but it should not have 'decay'"),
    (lambda: replaced(ignite_ema_version=99), ValueError, "'ignite_ema_version' of the state should be 3, got 99"),
    (lambda: replaced(num_updates=-1), ValueError, "'num_updates' of the state should be 0 or more, got -1"),
    (lambda: replaced(num_updates=1.5), TypeError, "'num_updates' of the state should be of type int, got float"),
    (lambda: replaced(num_updates=True), TypeError, "'num_updates' of the state should be of type int, got bool"),
    (lambda: replaced(current_momentum=7.0), ValueError, "'current_momentum' of the state should be a momentum"),
    (lambda: replaced(averaged_tensors=[]), TypeError, "'averaged_tensors' of the state should be of type Mapping"),
    (lambda: averaged(**{"0.weight": None}), ValueError, "but the state misses '0.weight'"),
    (lambda: averaged(**{"head.bias": torch.ones(1)}), ValueError, "but the state should not have 'head.bias'"),
    (lambda: averaged(**{"0.weight": torch.ones(1)}), ValueError, r"'0.weight' .* shape \(2, 2\), got \(1,\)"),
    (lambda: averaged(**{"0.weight": torch.ones(2, 2).double()}), ValueError, "fit into torch.float32, got torch.fl"),
    (lambda: averaged(**{"0.weight": torch.ones(2, 2).int()}), ValueError, "fit into torch.float32, got torch.int32"),
    (lambda: averaged(**{"0.weight": [1.0]}), ValueError, "'0.weight' .* should be a tensor, got list"),
]


@pytest.mark.parametrize(("state", "error", "message"), BAD_STATES)
def test_a_bad_state_raises_and_changes_nothing(state, error, message):
    handler = EMAHandler(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    handler.num_updates = 5
    before = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, handler.state_dict())
    with pytest.raises(error, match=message):
        handler.load_state_dict(state())
    assert_same_bits(handler.state_dict(), before)


def test_a_count_that_the_schedule_does_not_know_raises_and_changes_nothing():
    handler = EMAHandler(nn.Linear(1, 1), [0.5, 0.4].__getitem__)
    state = {
        **handler.state_dict(),
        "num_updates": 7,
        "averaged_tensors": {"weight": torch.ones(1, 1), "bias": torch.ones(1)},
    }
    before = handler.ema_model.weight.clone()
    with pytest.raises(IndexError):
        handler.load_state_dict(state)
    assert torch.equal(handler.ema_model.weight, before)
    assert handler.num_updates == 0


def test_a_narrower_type_loads_where_nothing_is_lost():
    model = nn.Linear(2, 2)
    state = EMAHandler(model, dtype=torch.bfloat16).state_dict()
    handler = EMAHandler(nn.Linear(2, 2), dtype=torch.float32)
    handler.load_state_dict(state)
    assert torch.equal(handler.ema_model.weight, model.weight.bfloat16().float())
