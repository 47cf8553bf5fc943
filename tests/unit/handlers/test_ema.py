"""EMAHandler on an engine: the momentum it publishes, the events it follows, what it refuses."""

import gc
import inspect
import weakref

import ignite.handlers
import pytest
import torch
from ignite.engine import Engine, EventEnum, Events
from ignite.handlers.state_param_scheduler import LambdaStateScheduler
from torch import nn

from ignite_ema import EMAHandler, schedules
from ignite_ema.schedules import Constant, LinearWarmup


def scalar_model(value=0.0):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def trainer_for(model, *others):
    """A trainer whose k-th iteration adds 1 to the weight of every model."""

    def step(engine, batch):
        for each in (model, *others):
            each.weight.data.add_(1)

    return Engine(step)


def averaged(handler):
    return handler.ema_model.weight.item()


def momenta(trainer, *names):
    """Collects what the attributes show after each iteration's handlers."""
    seen = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: seen.append(tuple(getattr(engine.state, name) for name in names))
    )
    return seen


# The signature is that of ignite.handlers.EMAHandler


@pytest.mark.parametrize("method", ["__init__", "attach"])
def test_arguments_begin_like_those_of_ignites_handler(method):
    theirs = list(inspect.signature(getattr(ignite.handlers.EMAHandler, method)).parameters.values())
    ours = list(inspect.signature(getattr(EMAHandler, method)).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_attributes_are_those_of_ignites_handler():
    model = scalar_model()
    handler = EMAHandler(model, 0.25, handle_buffers="update")
    assert handler.model is model
    assert (handler.momentum, handler.momentum_scheduler, handler.handle_buffers) == (0.25, None, "update")
    assert EMAHandler(model, 0.25, 0.5, 10).momentum_scheduler == LinearWarmup(0.25, 0.5, 10)
    schedule = Constant(0.5)
    handler = EMAHandler(model, schedule)
    assert handler.momentum is schedule
    assert handler.momentum_scheduler is schedule


# The momentum


def test_average_is_that_of_ignites_handler():
    ours, theirs = scalar_model(), scalar_model()
    trainer = trainer_for(ours, theirs)
    handler, reference = EMAHandler(ours, 0.25, 0.5, 3), ignite.handlers.EMAHandler(theirs, 0.25, 0.5, 3)
    handler.attach(trainer, "ours")
    reference.attach(trainer, "ema_momentum")
    seen = momenta(trainer, "ours", "ema_momentum")
    trainer.run([0] * 6)
    assert averaged(handler) == pytest.approx(reference.ema_model.weight.item(), rel=1e-6)
    assert all(ours == theirs for ours, theirs in seen)


@pytest.mark.parametrize(("warmup", "expected"), [(0.0, [0, 0.25, 0.5, 0.5]), (1.0, [1, 0.75, 0.5, 0.5])])
def test_warm_up_is_published_as_it_is_used(warmup, expected):
    model = scalar_model()
    trainer = trainer_for(model)
    handler = EMAHandler(model, 0.5, warmup, 3)
    handler.attach(trainer)
    assert trainer.state.ema_momentum == warmup
    seen = momenta(trainer, "ema_momentum")
    trainer.run([0] * 4)
    assert [m for (m,) in seen] == expected
    reference = 0.0
    for weight, momentum in zip(range(1, 5), expected, strict=True):
        reference += momentum * (weight - reference)
    assert averaged(handler) == pytest.approx(reference, rel=1e-6)
    assert handler.num_updates == 4


def test_count_advances_with_updates_not_iterations():
    model = scalar_model()
    trainer = trainer_for(model)
    handler = EMAHandler(model, lambda n: 1 / (n + 1))
    handler.attach(trainer, event=Events.ITERATION_COMPLETED(every=3))
    trainer.run([0] * 9)
    assert handler.num_updates == 3
    assert averaged(handler) == pytest.approx((3 + 6 + 9) / 3)


def test_plain_momentum_is_read_from_the_engine():
    model = scalar_model()
    trainer = trainer_for(model)
    handler = EMAHandler(model, 0.25)
    handler.attach(trainer)
    trainer.state.ema_momentum = 1.0
    trainer.run([0] * 2)
    assert averaged(handler) == 2.0


def test_a_state_param_scheduler_drives_a_plain_momentum():
    model = scalar_model()
    trainer = trainer_for(model)
    scheduler = LambdaStateScheduler(lambda event_index: 1 / event_index, param_name="ema_momentum", create_new=True)
    scheduler.attach(trainer, Events.ITERATION_COMPLETED)
    handler = EMAHandler(model, 0.25)
    handler.attach(trainer, warn_if_exists=False)
    trainer.run([0] * 4)
    assert averaged(handler) == pytest.approx((1 + 2 + 3 + 4) / 4)


@pytest.mark.parametrize(
    ("value", "error"),
    [(-0.1, ValueError), (1.1, ValueError), (float("nan"), ValueError), (None, TypeError), ("x", TypeError)],
)
def test_a_driven_momentum_outside_0_to_1_raises_and_names_the_attribute(value, error):
    model = scalar_model(3.0)
    trainer = Engine(lambda engine, batch: None)
    handler = EMAHandler(model, 0.25)
    handler.attach(trainer, "generator_momentum")
    trainer.state.generator_momentum = value
    with pytest.raises(error, match=r"engine\.state\.generator_momentum should be a momentum"):
        trainer.run([0])
    assert averaged(handler) == 3.0
    assert handler.num_updates == 0


@pytest.mark.parametrize("value", [torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64), 1, 0])
def test_a_driven_momentum_may_be_any_number(value):
    model = scalar_model()
    trainer = trainer_for(model)
    handler = EMAHandler(model, 0.25)
    handler.attach(trainer)
    trainer.state.ema_momentum = value
    trainer.run([0])
    assert averaged(handler) == float(value)


def test_a_schedule_that_returns_no_momentum_raises():
    with pytest.raises(ValueError, match=r"momentum that the schedule returns should be a momentum in \[0, 1\].*got 2"):
        EMAHandler(scalar_model(), lambda n: 2)
    model = scalar_model()
    trainer = trainer_for(model)
    EMAHandler(model, lambda n: 0.5 + n / 4).attach(trainer)
    with pytest.raises(ValueError, match=r"momentum that the schedule returns should be .* got 1.25"):
        trainer.run([0] * 9)


def test_two_handlers_never_touch_each_others_momentum():
    generator, discriminator = scalar_model(), scalar_model()
    trainer = trainer_for(generator, discriminator)
    first, second = EMAHandler(generator, 0.5, 0.0, 5), EMAHandler(discriminator, 0.25)
    first.attach(trainer, "generator_momentum")
    second.attach(trainer, "discriminator_momentum", event=Events.ITERATION_COMPLETED(every=2))
    seen = momenta(trainer, "generator_momentum", "discriminator_momentum")
    trainer.run([0] * 4)
    assert seen == [(0.0, 0.25), (0.125, 0.25), (0.25, 0.25), (0.375, 0.25)]
    assert averaged(second) == 0.25 * 4 + 0.75 * 0.25 * 2


# Events


def updates_of(event, iterations, *, engine=None, epoch_length=None):
    model = scalar_model()
    trainer = engine or trainer_for(model)
    handler = EMAHandler(model, 0.5)
    handler.attach(trainer, event=event)
    trainer.run([0] * (epoch_length or iterations), max_epochs=iterations // (epoch_length or iterations))
    return handler.num_updates


def test_members_of_an_events_list_update_once_per_iteration():
    every = Events.ITERATION_COMPLETED
    assert updates_of(every(every=2) | every(every=3), 6) == 4  # 2, 3, 4, 6
    assert updates_of(every(every=2) | every(every=2), 6) == 3
    assert updates_of(every(every=3) | Events.EPOCH_COMPLETED, 6, epoch_length=3) == 2
    assert updates_of(every(every=2) | Events.EPOCH_COMPLETED, 6, epoch_length=3) == 4  # 2, 3, 4, 6


class Steps(EventEnum):
    STEP = "step"


@pytest.mark.parametrize("event", [Steps.STEP, Steps.STEP | Events.EPOCH_COMPLETED])
def test_a_custom_event_updates_each_time_it_is_fired(event):
    engine = Engine(lambda engine, batch: [engine.fire_event(Steps.STEP) for _ in range(3)])
    engine.register_events(*Steps)
    assert updates_of(event, 4, engine=engine) == 12


def test_a_second_run_loses_no_update():
    model = scalar_model()
    trainer = trainer_for(model)
    handler = EMAHandler(model, 0.5)
    # The last update of the first run is made at iteration 1 by one member, the first of the second by the other.
    first = Events.ITERATION_COMPLETED(event_filter=lambda engine, _: not engine.second)
    second = Events.ITERATION_COMPLETED(event_filter=lambda engine, _: engine.second)
    handler.attach(trainer, event=first | second)
    for trainer.second in (False, True):
        trainer.run([0])
    assert handler.num_updates == 2


def test_a_string_is_an_event():
    trainer = Engine(lambda engine, batch: engine.fire_event("stepped"))
    trainer.register_events("stepped")
    assert updates_of("stepped", 3, engine=trainer) == 3


BAD_EVENTS = [
    ("no_such_event", "event should be one that the engine fires .* got 'no_such_event'"),
    (Steps.STEP, "register an event of your own with engine.register_events first"),
    (Events.ITERATION_COMPLETED | Steps.STEP, "event should be one that the engine fires"),
    (Events.EXCEPTION_RAISED, "event should be one that the engine fires when weights have moved"),
    (Events.ITERATION_COMPLETED | Events.TERMINATE_SINGLE_EPOCH, "when weights have moved"),
    (Events.EPOCH_COMPLETED | Events.TERMINATE(every=2), "event should have a counter to be filtered"),
    (3, "event should be one that the engine fires .* got 3"),
]


@pytest.mark.parametrize(("event", "message"), BAD_EVENTS, ids=range(len(BAD_EVENTS)))
def test_a_bad_event_raises_and_leaves_nothing_behind(event, message):
    trainer = Engine(lambda engine, batch: None)
    handler = EMAHandler(scalar_model())
    before = {event: list(handlers) for event, handlers in trainer._event_handlers.items()}
    with pytest.raises(ValueError, match=message):
        handler.attach(trainer, event=event)
    assert not hasattr(trainer.state, "ema_momentum")
    assert {event: list(handlers) for event, handlers in trainer._event_handlers.items()} == before
    handler.attach(trainer)


# Attaching


def test_an_existing_attribute_is_warned_about_and_used():
    model = scalar_model()
    trainer = trainer_for(model)
    trainer.state.ema_momentum = 1.0
    handler = EMAHandler(model, 0.25)
    with pytest.warns(UserWarning, match="Attribute 'ema_momentum' already exists in Engine.state"):
        handler.attach(trainer)
    trainer.run([0])
    assert averaged(handler) == 1.0


def test_an_existing_attribute_is_not_warned_about_on_request():
    trainer = trainer_for(scalar_model())
    trainer.state.ema_momentum = 0.5
    EMAHandler(scalar_model(), 0.25).attach(trainer, warn_if_exists=False)
    assert trainer.state.ema_momentum == 0.5


def test_a_schedule_overwrites_an_existing_attribute():
    trainer = trainer_for(scalar_model())
    trainer.state.ema_momentum = "anything"
    EMAHandler(scalar_model(), 0.25, 0.5, 3).attach(trainer, warn_if_exists=False)
    assert trainer.state.ema_momentum == 0.5


def test_an_existing_attribute_that_is_no_momentum_raises():
    trainer = trainer_for(scalar_model())
    trainer.state.alpha = {"a": 1}
    with pytest.raises(TypeError, match=r"engine\.state\.alpha should be a momentum"):
        EMAHandler(scalar_model()).attach(trainer, "alpha", warn_if_exists=False)


@pytest.mark.parametrize("name", ["iteration", "epoch", "metrics", "output", "times", "get_event_attrib_value"])
def test_a_name_of_the_engines_own_raises(name):
    trainer = trainer_for(scalar_model())
    with pytest.raises(ValueError, match=f"name should not be an attribute of the engine's own, got '{name}'"):
        EMAHandler(scalar_model()).attach(trainer, name)


@pytest.mark.parametrize("name", ["", 3, None])
def test_a_name_that_is_no_name_raises(name):
    with pytest.raises(TypeError, match="name should be a string"):
        EMAHandler(scalar_model()).attach(trainer_for(scalar_model()), name)


def test_attaching_twice_to_one_engine_raises():
    model = scalar_model()
    trainer, other = trainer_for(model), trainer_for(model)
    handler = EMAHandler(model)
    handler.attach(trainer, "first")
    with pytest.raises(RuntimeError, match="attached to an engine once, but this one is already, as 'first'"):
        handler.attach(trainer, "second")
    assert not hasattr(trainer.state, "second")
    handler.attach(other, "second")


def test_a_name_whose_momentum_another_handlers_schedule_writes_raises():
    trainer = trainer_for(scalar_model())
    EMAHandler(scalar_model(), 0.5, 0.1, 5).attach(trainer)
    with pytest.raises(ValueError, match="name should be another than 'ema_momentum'"):
        EMAHandler(scalar_model()).attach(trainer)
    other = trainer_for(scalar_model())
    EMAHandler(scalar_model()).attach(other)
    with pytest.raises(ValueError, match="name should be another than 'ema_momentum'"):
        EMAHandler(scalar_model(), Constant(0.1)).attach(other)


def test_something_else_than_an_engine_raises():
    with pytest.raises(TypeError, match="engine should be an ignite Engine, the trainer, got Linear"):
        EMAHandler(scalar_model()).attach(scalar_model())


def test_a_plain_momentum_is_settable_before_and_after_attach():
    model = scalar_model()
    trainer = trainer_for(model)
    handler = EMAHandler(model, 0.5)
    handler.momentum = 0.25
    handler.attach(trainer)
    assert (handler.momentum, trainer.state.ema_momentum) == (0.25, 0.25)
    handler.momentum = 0.125
    assert trainer.state.ema_momentum == 0.125
    with pytest.raises(ValueError, match="Invalid momentum: 2"):
        handler.momentum = 2
    with pytest.raises(TypeError, match="momentum should be set from one float to another, got Constant"):
        handler.momentum = Constant(0.5)
    assert (handler.momentum, trainer.state.ema_momentum) == (0.125, 0.125)


def test_a_schedule_is_not_settable():
    handler = EMAHandler(scalar_model(), 0.5, 0.1, 10)
    with pytest.raises(TypeError, match="got 0.25 in place of 0.5; make a new handler for another schedule"):
        handler.momentum = 0.25


def test_a_handle_removed_by_an_earlier_handler_of_the_same_event_is_removed_at_once():
    model = scalar_model()
    trainer = trainer_for(model)
    handler = EMAHandler(model, 0.5)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: handle.remove())
    handle = handler.attach(trainer)
    trainer.run([0] * 4)
    assert handler.num_updates == 1


def test_a_schedule_may_end_with_the_run():
    model = scalar_model()
    trainer = trainer_for(model)
    handler = EMAHandler(model, [0.5, 0.4, 0.3].__getitem__)
    handler.attach(trainer)
    trainer.run([0] * 3)
    assert handler.state_dict()["num_updates"] == 3
    with pytest.raises(IndexError):
        handler.num_updates = 7
    assert handler.num_updates == 3


def test_an_engine_that_the_model_refers_to_is_collected():
    def build():
        model = scalar_model()
        trainer = trainer_for(model)
        model.register_forward_hook(lambda *_: trainer.state.iteration)
        EMAHandler(model, lambda n: 0.5 if trainer else 0.1).attach(trainer)
        return weakref.ref(trainer)

    alive = build()
    gc.collect()
    assert alive() is None


def test_ema_train_stays_in_train_mode_when_an_evaluator_has_left_it():
    model = nn.Sequential(nn.BatchNorm1d(1))
    trainer = Engine(lambda engine, batch: None)
    handler = EMAHandler(model, handle_buffers="ema_train")
    handler.attach(trainer)
    handler.ema_model.eval()
    trainer.run([0])
    assert handler.ema_model[0].training


@pytest.mark.parametrize(
    "event",
    [
        Events.ITERATION_COMPLETED,
        Events.ITERATION_COMPLETED(every=2),
        Events.ITERATION_COMPLETED(every=2) | Events.ITERATION_COMPLETED(every=3) | Events.EPOCH_COMPLETED,
    ],
    ids=["event", "filtered", "list"],
)
def test_a_removed_handle_undoes_attach(event):
    model = scalar_model()
    trainer = trainer_for(model)
    handler = EMAHandler(model, 0.5)
    with handler.attach(trainer, event=event) as handle:
        gc.collect()
        trainer.run([0] * 6)
        made = handler.num_updates
        assert made > 0
    assert not hasattr(trainer.state, "ema_momentum")
    assert not any(trainer._event_handlers.values())
    handle.remove()
    trainer.run([0] * 6)
    assert handler.num_updates == made
    handler.attach(trainer)
    trainer.run([0] * 6)
    assert handler.num_updates == made + 6


def test_a_removed_handle_leaves_an_attribute_that_was_there():
    trainer = trainer_for(scalar_model())
    trainer.state.ema_momentum = 0.5
    EMAHandler(scalar_model(), 0.5).attach(trainer, warn_if_exists=False).remove()
    assert trainer.state.ema_momentum == 0.5


def test_the_handle_need_not_be_kept():
    model = scalar_model()
    trainer = trainer_for(model)
    handler = EMAHandler(model, 0.5)
    handler.attach(trainer, event=Events.ITERATION_COMPLETED(every=2))
    gc.collect()
    trainer.run([0] * 4)
    assert handler.num_updates == 2


def test_the_handler_holds_no_strong_reference_to_the_engine():
    handler = EMAHandler(scalar_model())
    trainer = trainer_for(scalar_model())
    handle = handler.attach(trainer)
    alive = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert alive() is None
    handle.remove()
    handler.state_dict()


# Starting again, and the count


def test_reset_starts_again():
    model = scalar_model()
    trainer = trainer_for(model)
    handler = EMAHandler(model, 0.5, 0.0, 5)
    handler.attach(trainer)
    trainer.run([0] * 3)
    handler.reset()
    assert (averaged(handler), handler.num_updates, trainer.state.ema_momentum) == (3.0, 0, 0.0)


def test_num_updates_is_settable_and_publishes_the_momentum():
    trainer = trainer_for(scalar_model())
    handler = EMAHandler(scalar_model(), 0.5, 0.0, 5)
    handler.attach(trainer)
    handler.num_updates = 2
    assert trainer.state.ema_momentum == 0.25


def test_num_updates_leaves_a_driven_momentum_alone():
    trainer = trainer_for(scalar_model())
    handler = EMAHandler(scalar_model(), 0.5)
    handler.attach(trainer)
    trainer.state.ema_momentum = 0.125
    handler.num_updates = 2
    assert trainer.state.ema_momentum == 0.125


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), (None, TypeError)])
def test_num_updates_refuses_what_is_no_count(value, error):
    handler = EMAHandler(scalar_model())
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
        EMAHandler(**{"model": scalar_model(), **arguments})


def test_a_twin_that_is_the_model_raises():
    model = scalar_model()
    with pytest.raises(RuntimeError, match="the root is one and the same module in the model and in the twin"):
        EMAHandler(model, ema_model=model)


def test_a_decay_passed_as_momentum_is_warned_about():
    with pytest.warns(UserWarning, match=r"if it was meant as a decay, pass 1 - 0.999 = 0.001"):
        EMAHandler(scalar_model(), 0.999)


@pytest.mark.parametrize(
    "rule",
    [
        schedules.Constant(0.999),
        schedules.CopyUntil(1, schedules.Constant(0.9998)),
        schedules.RatioWarmup(0.999),
        schedules.Annealing(0.999),
        schedules.ExponentialWarmup(0.9998),
        schedules.InverseGamma(min_momentum=0.9999),
        schedules.Cosine(0.996, 1.0, 100),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_a_decay_in_a_schedule_is_warned_about(rule):
    with pytest.warns(UserWarning, match="the last momentum of the schedule is the weight of the new weights.*decay"):
        EMAHandler(nn.Linear(1, 1), rule)


@pytest.mark.parametrize(
    "rule", [schedules.EqualWeight(), schedules.Rescaled(schedules.Constant(0.1), 30), lambda n: 0.9]
)
def test_a_schedule_that_is_no_decay_is_not_warned_about(rule):
    EMAHandler(nn.Linear(1, 1), rule)


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
