"""The momentum of a handler: driven through the engine's attribute, or by a schedule."""

from contextlib import nullcontext

import ignite.handlers
import pytest
import torch
from ignite.engine import Engine, Events

from ignite_ema import EMAHandler, EMAWarning
from ignite_ema.schedules import LinearWarmup
from tests.helpers.models import constant
from tests.helpers.runs import averaged, trainer_for

EVENT = Events.ITERATION_COMPLETED


def attached(momentum):
    model = constant()
    trainer, handler = trainer_for(model), EMAHandler(model, momentum)
    handler.attach(trainer)
    return handler, trainer


@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_warm_up_is_published_as_it_is_used_and_averages_as_ignites_handler_does(warmup):
    ours, theirs = constant(), constant()
    trainer = trainer_for(ours, theirs)
    handler, reference = EMAHandler(ours, 0.25, warmup, 3), ignite.handlers.EMAHandler(theirs, 0.25, warmup, 3)
    handler.attach(trainer, "ours")
    reference.attach(trainer, "ema_momentum")
    assert trainer.state.ours == warmup
    due, seen = [warmup, (warmup + 0.25) / 2, *[0.25] * 4], []
    trainer.add_event_handler(EVENT, lambda: seen.append((trainer.state.ours, trainer.state.ema_momentum)))
    trainer.run([0] * 6)
    assert averaged(handler) == pytest.approx(reference.ema_model.weight.item(), rel=1e-6)
    assert seen == [(momentum, momentum) for momentum in due]


@pytest.mark.parametrize("value", [torch.tensor(0.5), 1])
def test_a_driven_momentum_may_be_any_number(value):
    handler, trainer = attached(0.25)
    trainer.state.ema_momentum = value
    trainer.run([0])
    assert averaged(handler) == float(value)


def test_a_schedule_that_returns_no_momentum_in_a_run_raises():
    _, trainer = attached(lambda n: 0.5 + n / 4)
    with pytest.raises(ValueError, match="the schedule should return .* got 1.25 after 3 updates"):
        trainer.run([0] * 9)


PLAIN, SCHEDULED = 0.5, LinearWarmup(0.5, 0.25, 2)


@pytest.mark.parametrize("warns", [True, False])
@pytest.mark.parametrize(
    ("momentum", "there", "said", "used"),
    [
        (PLAIN, 0.125, r"shares it and goes on from its value 0\.125; the momentum 0\.5 .* ignored", 0.125),
        (SCHEDULED, "anything", "writes its own momentum there .* over the value 'anything'", 0.25),
    ],
    ids=["plain", "schedule"],
)
def test_a_name_that_is_taken_is_warned_about_in_ignites_words(momentum, there, said, used, warns):
    trainer, handler = Engine(lambda engine, batch: None), EMAHandler(constant(), momentum)
    trainer.state.ema_momentum = there
    words = rf"^Attribute 'ema_momentum' already exists in Engine\.state.*{said}"
    with pytest.warns(EMAWarning, match=words) if warns else nullcontext():
        handler.attach(trainer, warn_if_exists=warns)
    assert trainer.state.ema_momentum == used


@pytest.mark.parametrize(
    ("second", "used"), [(PLAIN, [0.75, 0.75, 0.1875, 0.1875]), (SCHEDULED, [0.25, 0.25, 0.1875, 0.5])], ids=str
)
def test_two_handlers_of_one_name_share_a_plain_momentum_and_a_schedule_writes_its_own(second, used):
    trainer, seen = trainer_for(constant()), []
    for momentum in (0.75, second):
        EMAHandler(constant(), momentum).attach(trainer, warn_if_exists=False)
        trainer.add_event_handler(EVENT, lambda engine: seen.append(engine.state.ema_momentum))
    trainer.add_event_handler(EVENT, lambda engine: setattr(engine.state, "ema_momentum", 0.1875))
    trainer.run([0, 0])
    assert seen == used


def test_a_plain_momentum_is_settable_before_and_after_attach():
    model = constant()
    trainer, handler = trainer_for(model), EMAHandler(model, 0.5)
    handler.momentum = 0.25
    handler.attach(trainer)
    assert (handler.momentum, trainer.state.ema_momentum) == (0.25, 0.25)
    handler.momentum = 0.125
    assert (handler.momentum, trainer.state.ema_momentum) == (0.125, 0.125)
