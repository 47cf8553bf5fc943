"""A copy of a handler is detached from every engine; attaching and removing leaves nothing behind."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
from torch import nn

from ignite_ema import EMAHandler, ModelAverage, schedules
from tests.helpers.runs import idle

each_way = pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda handler: pickle.loads(pickle.dumps(handler))], ids=["deepcopy", "pickle"]
)


@each_way
def test_a_copy_of_an_attached_handler_does_not_touch_its_engine(copied):
    handler, trainer = EMAHandler(nn.Linear(2, 1), 0.5), idle()
    handler.attach(trainer)
    trainer.state.ema_momentum = 0.25
    trainer.run([0] * 2)
    other = copied(handler)
    assert repr(other) == "EMAHandler(Linear: 3 parameters in float32 on cpu; momentum 0.25; 2 updates)"
    assert other.state_dict()["current_momentum"] == 0.25
    other.momentum = 0.125
    other.reset()
    other.num_updates = 7
    assert (trainer.state.ema_momentum, handler.momentum, handler.num_updates) == (0.25, 0.5, 2)
    trainer.run([0])
    assert (handler.num_updates, other.num_updates) == (3, 7)


@each_way
@pytest.mark.parametrize("option", ["share_frozen", "stochastic_rounding"])
def test_a_copy_goes_on_in_a_training_of_its_own(copied, option):
    model, trainer = nn.Linear(2, 1).bfloat16(), idle()
    model.bias.requires_grad_(False)
    handler = EMAHandler(model, schedules.LinearWarmup(0.1, 0.9, 5), **{option: True})
    handler.attach(trainer)
    trainer.run([0] * 2)
    handler.ema_model.weight.fill_(3.0)
    other, engine = copied(handler), idle()
    other.attach(engine)
    other.model.weight.data.fill_(8.0)
    engine.run([0])
    assert (other.num_updates, handler.num_updates) == (3, 2)
    assert (other.ema_model.bias is other.model.bias) == (option == "share_frozen")
    assert (other.ema_model.weight == 3 + 0.5 * 5).all()
    assert (handler.ema_model.weight == 3).all()


@pytest.mark.parametrize("kind", [EMAHandler, ModelAverage])
def test_what_comes_from_another_process_in_shared_memory_owns_its_twin(kind):
    thing = kind(nn.Linear(2, 1))
    come = pickle.loads(ForkingPickler.dumps(thing))
    average = getattr(come, "average", come)
    assert average.model.weight.is_shared()
    assert not average.module.weight.is_shared()
    average.model.weight.data.fill_(8.0)
    average.update(1.0)
    assert average.module.weight.eq(8).all()
    assert getattr(thing, "average", thing).module.weight.ne(8).all()
