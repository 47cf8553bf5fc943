"""attach(): one event, one update; the attribute on the engine; the handle that takes all of it away again."""

import gc
import weakref

import pytest
from ignite.engine import Engine, EventEnum, Events
from torch import nn

from ignite_ema import EMAHandler
from ignite_ema.schedules import Constant
from tests.helpers.models import constant
from tests.helpers.runs import averaged, trainer_for

# Events


def updates_of(event, iterations, *, engine=None, epoch_length=None):
    model = constant()
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
    model = constant()
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
    handler = EMAHandler(constant())
    before = {event: list(handlers) for event, handlers in trainer._event_handlers.items()}
    with pytest.raises(ValueError, match=message):
        handler.attach(trainer, event=event)
    assert not hasattr(trainer.state, "ema_momentum")
    assert {event: list(handlers) for event, handlers in trainer._event_handlers.items()} == before
    handler.attach(trainer)


# Attaching


def test_an_existing_attribute_is_warned_about_and_used():
    model = constant()
    trainer = trainer_for(model)
    trainer.state.ema_momentum = 1.0
    handler = EMAHandler(model, 0.25)
    with pytest.warns(UserWarning, match="Attribute 'ema_momentum' already exists in Engine.state"):
        handler.attach(trainer)
    trainer.run([0])
    assert averaged(handler) == 1.0


def test_an_existing_attribute_is_not_warned_about_on_request():
    trainer = trainer_for(constant())
    trainer.state.ema_momentum = 0.5
    EMAHandler(constant(), 0.25).attach(trainer, warn_if_exists=False)
    assert trainer.state.ema_momentum == 0.5


def test_a_schedule_overwrites_an_existing_attribute():
    trainer = trainer_for(constant())
    trainer.state.ema_momentum = "anything"
    EMAHandler(constant(), 0.25, 0.5, 3).attach(trainer, warn_if_exists=False)
    assert trainer.state.ema_momentum == 0.5


def test_an_existing_attribute_that_is_no_momentum_raises():
    trainer = trainer_for(constant())
    trainer.state.alpha = {"a": 1}
    with pytest.raises(TypeError, match=r"engine\.state\.alpha should be a momentum"):
        EMAHandler(constant()).attach(trainer, "alpha", warn_if_exists=False)


@pytest.mark.parametrize("name", ["iteration", "epoch", "metrics", "output", "times", "get_event_attrib_value"])
def test_a_name_of_the_engines_own_raises(name):
    trainer = trainer_for(constant())
    with pytest.raises(ValueError, match=f"name should not be an attribute of the engine's own, got '{name}'"):
        EMAHandler(constant()).attach(trainer, name)


@pytest.mark.parametrize("name", ["", 3, None])
def test_a_name_that_is_no_name_raises(name):
    with pytest.raises(TypeError, match="name should be a string"):
        EMAHandler(constant()).attach(trainer_for(constant()), name)


def test_attaching_twice_to_one_engine_raises():
    model = constant()
    trainer, other = trainer_for(model), trainer_for(model)
    handler = EMAHandler(model)
    handler.attach(trainer, "first")
    with pytest.raises(RuntimeError, match="attached to an engine once, but this one is already, as 'first'"):
        handler.attach(trainer, "second")
    assert not hasattr(trainer.state, "second")
    handler.attach(other, "second")


def test_a_name_whose_momentum_another_handlers_schedule_writes_raises():
    trainer = trainer_for(constant())
    EMAHandler(constant(), 0.5, 0.1, 5).attach(trainer)
    with pytest.raises(ValueError, match="name should be another than 'ema_momentum'"):
        EMAHandler(constant()).attach(trainer)
    other = trainer_for(constant())
    EMAHandler(constant()).attach(other)
    with pytest.raises(ValueError, match="name should be another than 'ema_momentum'"):
        EMAHandler(constant(), Constant(0.1)).attach(other)


def test_something_else_than_an_engine_raises():
    with pytest.raises(TypeError, match="engine should be an ignite Engine, the trainer, got Linear"):
        EMAHandler(constant()).attach(constant())


def test_a_plain_momentum_is_settable_before_and_after_attach():
    model = constant()
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
    handler = EMAHandler(constant(), 0.5, 0.1, 10)
    with pytest.raises(TypeError, match="got 0.25 in place of 0.5; make a new handler for another schedule"):
        handler.momentum = 0.25


def test_a_handle_removed_by_an_earlier_handler_of_the_same_event_is_removed_at_once():
    model = constant()
    trainer = trainer_for(model)
    handler = EMAHandler(model, 0.5)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: handle.remove())
    handle = handler.attach(trainer)
    trainer.run([0] * 4)
    assert handler.num_updates == 1


def test_a_schedule_may_end_with_the_run():
    model = constant()
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
        model = constant()
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
    model = constant()
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
    trainer = trainer_for(constant())
    trainer.state.ema_momentum = 0.5
    EMAHandler(constant(), 0.5).attach(trainer, warn_if_exists=False).remove()
    assert trainer.state.ema_momentum == 0.5


def test_the_handle_need_not_be_kept():
    model = constant()
    trainer = trainer_for(model)
    handler = EMAHandler(model, 0.5)
    handler.attach(trainer, event=Events.ITERATION_COMPLETED(every=2))
    gc.collect()
    trainer.run([0] * 4)
    assert handler.num_updates == 2


def test_the_handler_holds_no_strong_reference_to_the_engine():
    handler = EMAHandler(constant())
    trainer = trainer_for(constant())
    handle = handler.attach(trainer)
    alive = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert alive() is None
    handle.remove()
    handler.state_dict()
