"""EMAHandler as that of Ignite: its signature, its attributes; a decay in the place of a momentum; train mode."""

import inspect
import sys

import ignite.handlers
import pytest
from ignite.engine import Engine, Events
from torch import nn

from ignite_ema import EMAHandler, EMAWarning, schedules
from tests.helpers.models import constant
from tests.helpers.runs import averaged, trainer_for


@pytest.mark.parametrize("method", ["__init__", "attach"])
def test_arguments_begin_like_those_of_ignites_handler(method):
    theirs = list(inspect.signature(getattr(ignite.handlers.EMAHandler, method)).parameters.values())
    ours = list(inspect.signature(getattr(EMAHandler, method)).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in ours[len(theirs) :])


def test_attributes_are_those_of_ignites_handler():
    model, schedule = constant(), schedules.Constant(0.5)
    handler = EMAHandler(model, 0.25, handle_buffers="update")
    assert handler.model is model
    assert (handler.momentum, handler.momentum_scheduler, handler.handle_buffers) == (0.25, None, "update")
    assert EMAHandler(model, 0.25, 0.5, 10).momentum_scheduler == schedules.LinearWarmup(0.25, 0.5, 10)
    handler = EMAHandler(model, schedule)
    assert handler.momentum is handler.momentum_scheduler is schedule


def test_the_count_publishes_a_scheduled_momentum_and_leaves_a_driven_one_alone():
    trainer = trainer_for(constant())
    scheduled, driven = EMAHandler(constant(), 0.5, 0.0, 5), EMAHandler(constant(), 0.5)
    scheduled.attach(trainer, "scheduled")
    driven.attach(trainer, "driven")
    trainer.state.driven = 0.125
    scheduled.num_updates = driven.num_updates = 2
    assert (trainer.state.scheduled, trainer.state.driven) == (0.25, 0.125)


CONSTANT = schedules.Constant(0.95)
DECAYS = [0.999, 0.9, schedules.CopyUntil(1, CONSTANT), schedules.Rescaled(CONSTANT, 2), schedules.Cosine(0.9, 1.0, 9)]


@pytest.mark.parametrize("momentum", DECAYS, ids=str)
def test_a_decay_is_warned_about(momentum):
    what = "pass 1 - 0.9.*= 0.*1" if isinstance(momentum, float) else "the last momentum of the schedule is .*decay"
    with pytest.warns(EMAWarning, match=what) as caught:
        EMAHandler(constant(), momentum)
    assert sys.version_info < (3, 12) or caught[0].filename == __file__


NO_DECAYS = [1.0, 0.89, schedules.Constant(1.0), schedules.EqualWeight(), schedules.Debiased(0.001), lambda n: 0.9]


@pytest.mark.parametrize("momentum", NO_DECAYS, ids=lambda momentum: type(momentum).__name__)
def test_what_is_no_decay_is_not_warned_about(momentum):
    model = constant()
    trainer, handler = trainer_for(model), EMAHandler(model, momentum)
    handler.attach(trainer)
    trainer.run([0] * 3)
    assert momentum not in (1.0, schedules.Constant(1.0)) or averaged(handler) == 3.0


def test_a_teacher_that_was_evaluated_is_in_train_mode_at_the_next_iteration():
    handler = EMAHandler(nn.Sequential(nn.BatchNorm1d(1)), handle_buffers="ema_train")
    modes = []
    trainer = Engine(lambda engine, batch: modes.append(handler.ema_model[0].training))
    handle = handler.attach(trainer, event=Events.EPOCH_COMPLETED)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: handler.ema_model.eval())
    trainer.run([0] * 3)
    assert modes == [True] * 3
    handle.remove()
    trainer.run([0] * 2)
    assert modes[3:] == [True, False]
