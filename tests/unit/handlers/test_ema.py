"""EMAHandler on an engine: the momentum it publishes, the events it follows, what it refuses."""

import inspect

import ignite.handlers
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers.state_param_scheduler import LambdaStateScheduler
from torch import nn

from ignite_ema import EMAHandler, schedules
from ignite_ema.schedules import Constant, LinearWarmup
from tests.helpers.models import constant
from tests.helpers.runs import averaged, trainer_for

# The signature is that of ignite.handlers.EMAHandler


@pytest.mark.parametrize("method", ["__init__", "attach"])
def test_arguments_begin_like_those_of_ignites_handler(method):
    theirs = list(inspect.signature(getattr(ignite.handlers.EMAHandler, method)).parameters.values())
    ours = list(inspect.signature(getattr(EMAHandler, method)).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_attributes_are_those_of_ignites_handler():
    model = constant()
    handler = EMAHandler(model, 0.25, handle_buffers="update")
    assert handler.model is model
    assert (handler.momentum, handler.momentum_scheduler, handler.handle_buffers) == (0.25, None, "update")
    assert EMAHandler(model, 0.25, 0.5, 10).momentum_scheduler == LinearWarmup(0.25, 0.5, 10)
    schedule = Constant(0.5)
    handler = EMAHandler(model, schedule)
    assert handler.momentum is schedule
    assert handler.momentum_scheduler is schedule


# Starting again, and the count


def test_reset_starts_again():
    model = constant()
    trainer = trainer_for(model)
    handler = EMAHandler(model, 0.5, 0.0, 5)
    handler.attach(trainer)
    trainer.run([0] * 3)
    handler.reset()
    assert (averaged(handler), handler.num_updates, trainer.state.ema_momentum) == (3.0, 0, 0.0)


def test_num_updates_is_settable_and_publishes_the_momentum():
    trainer = trainer_for(constant())
    handler = EMAHandler(constant(), 0.5, 0.0, 5)
    handler.attach(trainer)
    handler.num_updates = 2
    assert trainer.state.ema_momentum == 0.25


def test_num_updates_leaves_a_driven_momentum_alone():
    trainer = trainer_for(constant())
    handler = EMAHandler(constant(), 0.5)
    handler.attach(trainer)
    trainer.state.ema_momentum = 0.125
    handler.num_updates = 2
    assert trainer.state.ema_momentum == 0.125


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), (None, TypeError)])
def test_num_updates_refuses_what_is_no_count(value, error):
    handler = EMAHandler(constant())
    with pytest.raises(error, match="num_updates should be"):
        handler.num_updates = value
    assert handler.num_updates == 0


# Arguments


BAD_ARGUMENTS = [
    ({"momentum": 0}, ValueError, "Invalid momentum: 0"),
    ({"momentum": 1.0}, ValueError, r"Invalid momentum: 1.0; it should be in \(0, 1\)"),
    ({"momentum": -1}, ValueError, "Invalid momentum: -1"),
    ({"momentum": float("nan")}, ValueError, "Invalid momentum: nan"),
    ({"momentum": "0.1"}, TypeError, "momentum should be a float in .* or a schedule, got '0.1'"),
    (
        {"momentum": LambdaStateScheduler(lambda n: 0.1, "x")},
        TypeError,
        "got LambdaStateScheduler of Ignite; pass a flo",
    ),
    ({"device": "meta"}, ValueError, "device should be one that holds values, got 'meta'"),
    ({"momentum": True}, TypeError, "momentum should be a float .* got True"),
    ({"momentum_warmup": 0.1}, ValueError, "should be given together or not at all, got 0.1 and None"),
    ({"warmup_iters": 10}, ValueError, "should be given together or not at all, got None and 10"),
    ({"momentum_warmup": 0.1, "warmup_iters": 0}, ValueError, "warmup_iters .* integer of at least 1.* got 0"),
    ({"momentum_warmup": 0.1, "warmup_iters": -5}, ValueError, "warmup_iters .* integer of at least 1.* got -5"),
    ({"momentum_warmup": 0.1, "warmup_iters": 2.5}, ValueError, "warmup_iters .* should be an integer .* got 2.5"),
    ({"momentum_warmup": 5, "warmup_iters": 10}, ValueError, r"momentum_warmup .* in \[0, 1\], .* got 5"),
    ({"momentum": Constant(0.1), "warmup_iters": 10}, ValueError, "should be None where momentum is a schedule"),
    ({"model": "net"}, ValueError, "model should be an instance of nn.Module or its subclasses, but got model: str"),
    ({"handle_buffers": "x"}, ValueError, "handle_buffers can only be one of 'copy', 'update', 'ema_train', but got x"),
    ({"handle_buffers": None}, ValueError, "handle_buffers can only be one of .* but got None"),
    ({"handle_buffers": {"b": "ema_train"}}, ValueError, "can only map to 'copy', 'update', 'keep', but got 'ema_tr"),
    ({"handle_buffers": {"b": "keep"}}, ValueError, "patterns that match a buffer, but got 'b'; the buffers are none"),
    ({"dtype": "float32"}, TypeError, "dtype should be a torch.dtype, such as torch.float32, got 'float32'"),
    ({"dtype": torch.int32}, ValueError, "dtype should be one of torch.float16, .* got torch.int32"),
    ({"ema_model": "net"}, TypeError, "ema_model should be an nn.Module, got str"),
    ({"ema_model": nn.Linear(1, 1), "dtype": torch.float64}, ValueError, "dtype and device should be None"),
    ({"ema_model": nn.Linear(1, 1)}, RuntimeError, "ema_model should have the structure .* 'bias' is in the twin but"),
    (
        {"ema_model": nn.Linear(2, 1, bias=False)},
        RuntimeError,
        r"'weight' has shape \(1, 1\) in the model and \(1, 2\)",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS, ids=range(len(BAD_ARGUMENTS)))
def test_a_bad_argument_raises(arguments, error, message):
    with pytest.raises(error, match=message):
        EMAHandler(**{"model": constant(), **arguments})


def test_a_twin_that_is_the_model_raises():
    model = constant()
    with pytest.raises(RuntimeError, match="the root is one and the same module in the model and in the twin"):
        EMAHandler(model, ema_model=model)


def test_a_decay_passed_as_momentum_is_warned_about():
    with pytest.warns(UserWarning, match=r"if it was meant as a decay, pass 1 - 0.999 = 0.001"):
        EMAHandler(constant(), 0.999)


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.Constant(0.999),
        schedules.CopyUntil(1, schedules.Constant(0.9998)),
        schedules.RatioWarmup(0.999),
        schedules.Annealing(0.999),
        schedules.ExponentialWarmup(0.9998),
        schedules.InverseGamma(min_momentum=0.9999),
        schedules.Cosine(0.996, 1.0, 100),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_a_decay_in_a_schedule_is_warned_about(schedule):
    with pytest.warns(UserWarning, match="the last momentum of the schedule is the weight of the new weights.*decay"):
        EMAHandler(nn.Linear(1, 1), schedule)


@pytest.mark.parametrize(
    "schedule", [schedules.EqualWeight(), schedules.Rescaled(schedules.Constant(0.1), 30), lambda n: 0.9]
)
def test_a_schedule_that_is_no_decay_is_not_warned_about(schedule):
    EMAHandler(nn.Linear(1, 1), schedule)


def test_a_class_in_the_place_of_a_schedule_is_refused():
    with pytest.raises(TypeError, match="should be a schedule, got the class EqualWeight; make one"):
        EMAHandler(nn.Linear(1, 1), schedules.EqualWeight)


def test_a_teacher_that_was_evaluated_is_in_train_mode_at_the_next_iteration():
    model = nn.Linear(1, 1)
    handler = EMAHandler(model, handle_buffers="ema_train")
    modes = []
    trainer = Engine(lambda engine, batch: modes.append(handler.ema_model.training))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: handler.ema_model.eval())
    handle = handler.attach(trainer, event=Events.EPOCH_COMPLETED)
    trainer.run([0] * 3)
    assert modes == [True] * 3
    handle.remove()
    trainer.run([0] * 2)
    assert modes == [True] * 4 + [False]
