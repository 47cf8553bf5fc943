"""The saved form of a handler; what is refused is in the rows of the bad input."""

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from ignite_ema import EMAHandler
from tests.helpers.models import constant


def test_a_narrower_type_loads_where_nothing_is_lost():
    model = nn.Linear(2, 2)
    handler = EMAHandler(nn.Linear(2, 2), dtype=torch.float32)
    handler.load_state_dict(EMAHandler(model, dtype=torch.bfloat16).state_dict())
    assert torch.equal(handler.ema_model.weight, model.weight.bfloat16().float())


@pytest.mark.parametrize("attach_first", [True, False])
def test_a_driven_momentum_is_restored_and_wins_over_an_attribute_that_is_there(attach_first):
    trainer, handler = Engine(lambda engine, batch: None), EMAHandler(constant(), 0.25)
    trainer.state.ema_momentum = 0.5
    if attach_first:
        handler.attach(trainer, warn_if_exists=False)
    handler.load_state_dict({**handler.state_dict(), "current_momentum": 0.125})
    if not attach_first:
        handler.attach(trainer, warn_if_exists=False)
    assert trainer.state.ema_momentum == 0.125
