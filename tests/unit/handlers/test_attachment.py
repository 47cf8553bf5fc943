"""attach(): one event, one update; the attribute on the engine; the handle that takes all of it away again."""

import gc
import weakref

import pytest
from ignite.engine import Engine, EventEnum, Events

from ignite_ema import EMAHandler
from ignite_ema.schedules import Constant
from tests.helpers.models import constant
from tests.helpers.runs import trainer_for

EVERY = Events.ITERATION_COMPLETED


def updates_of(event, iterations, *, engine=None, epoch_length=None):
    model = constant()
    trainer = engine or trainer_for(model)
    handler = EMAHandler(model, 0.5)
    handler.attach(trainer, event=event)
    trainer.run([0] * (epoch_length or iterations), max_epochs=iterations // (epoch_length or iterations))
    return handler.num_updates


@pytest.mark.parametrize(
    ("event", "epoch_length", "updates"),
    [
        (EVERY(every=2) | EVERY(every=3), 6, 4),  # 2, 3, 4, 6
        (EVERY(every=2) | EVERY(every=2), 6, 3),
        (EVERY(every=3) | Events.EPOCH_COMPLETED, 3, 2),
        (EVERY(every=2) | Events.EPOCH_COMPLETED, 3, 4),  # 2, 3, 4, 6
    ],
)
def test_members_of_an_events_list_update_once_per_iteration(event, epoch_length, updates):
    assert updates_of(event, 6, epoch_length=epoch_length) == updates


class Steps(EventEnum):
    STEP = "step"


@pytest.mark.parametrize(
    "event", [Steps.STEP, Steps.STEP | Events.EPOCH_COMPLETED, "stepped"], ids=["custom", "list", "string"]
)
def test_a_custom_event_updates_each_time_it_is_fired(event):
    fired = Steps.STEP, "stepped"
    engine = Engine(lambda engine, batch: [engine.fire_event(one) for one in fired for _ in range(3)])
    engine.register_events(*fired)
    assert updates_of(event, 4, engine=engine) == 12


def test_a_second_run_loses_no_update():
    model = constant()
    trainer, handler = trainer_for(model), EMAHandler(model, 0.5)
    # The last update of the first run is made at iteration 1 by one member, the first of the second by the other.
    first = EVERY(event_filter=lambda engine, _: not engine.second)
    second = EVERY(event_filter=lambda engine, _: engine.second)
    handler.attach(trainer, event=first | second)
    for trainer.second in (False, True):
        trainer.run([0])
    assert handler.num_updates == 2


@pytest.mark.parametrize("momenta", [(0.1, 0.5), (0.1, Constant(0.5)), (Constant(0.1), 0.5)], ids=str)
def test_a_name_of_another_handler_is_refused_and_told_whose_it_is(momenta):
    trainer = trainer_for(constant())
    first, second = (EMAHandler(constant(), momentum) for momentum in momenta)
    first.attach(trainer)
    with pytest.raises(ValueError, match=r"another than 'ema_momentum', the attribute of EMAHandler\(Linear.*0.1.*;"):
        second.attach(trainer)
    assert trainer.state.ema_momentum == 0.1
    second.attach(trainer, "second_momentum")


# What is taken away again


def test_a_handle_removed_by_an_earlier_handler_of_the_same_event_is_removed_at_once():
    model = constant()
    trainer, handler = trainer_for(model), EMAHandler(model, 0.5)
    trainer.add_event_handler(EVERY(once=2), lambda: handle.remove())
    handle = handler.attach(trainer)
    trainer.run([0] * 4)
    assert handler.num_updates == 1


@pytest.mark.parametrize(
    "event", [EVERY, EVERY(every=2) | EVERY(every=3) | Events.EPOCH_COMPLETED], ids=["event", "list"]
)
def test_a_removed_handle_undoes_attach(event):
    model = constant()
    trainer, handler = trainer_for(model), EMAHandler(model, 0.5)
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
    handler.attach(trainer)  # nobody keeps the handle
    gc.collect()
    trainer.run([0] * 6)
    assert handler.num_updates == made + 6


def test_a_removed_handle_leaves_an_attribute_that_was_there():
    trainer = trainer_for(constant())
    trainer.state.ema_momentum = 0.5
    EMAHandler(constant(), 0.5).attach(trainer, warn_if_exists=False).remove()
    assert trainer.state.ema_momentum == 0.5


def test_the_handler_holds_no_strong_reference_to_the_engine():
    model = constant()
    handler, trainer = EMAHandler(model), trainer_for(model)
    handle, alive = handler.attach(trainer), weakref.ref(trainer)
    del trainer
    gc.collect()
    assert alive() is None
    handle.remove()
    handler.state_dict()


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
