"""attach(): one event, one update; the attribute on the engine; what is saved too early; the handle that undoes it."""

import gc
import warnings
import weakref

import pytest
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver

from ignite_ema import EMAHandler, EMAWarning
from tests.helpers.models import constant, net, sgd
from tests.helpers.runs import Steps, idle, trainer_for

EVERY = Events.ITERATION_COMPLETED


def set_up(momentum=0.5):
    model = constant()
    return trainer_for(model), EMAHandler(model, momentum)


@pytest.mark.parametrize("event", [Steps.DONE, Steps.DONE | Events.EPOCH_COMPLETED, "stepped"])
def test_a_custom_event_updates_each_time_it_is_fired(event):
    fired = Steps.DONE, "stepped"
    engine = Engine(lambda engine, batch: [engine.fire_event(one) for one in fired for _ in range(3)])
    engine.register_events(*fired)
    handler = EMAHandler(constant(), 0.5)
    handler.attach(engine, event=event)
    engine.run([0] * 4)
    assert handler.num_updates == 12


def test_a_second_run_loses_no_update():
    trainer, handler = set_up()
    # The last update of the first run is made at iteration 1 by one member, the first of the second by the other.
    first = EVERY(event_filter=lambda engine, _: not engine.second)
    second = EVERY(event_filter=lambda engine, _: engine.second)
    handler.attach(trainer, event=first | second)
    for trainer.second in (False, True):
        trainer.run([0])
    assert handler.num_updates == 2


def saver(handler, trainer, folder):
    checkpoint = Checkpoint({"ema_handler": handler, "trainer": trainer}, DiskSaver(folder, require_empty=False))
    return lambda: trainer.add_event_handler(EVERY(every=2), checkpoint)


def evaluation(handler, trainer, folder):
    evaluator = idle()
    handler.swap_during(evaluator)
    return lambda: trainer.add_event_handler(EVERY(every=2), lambda: evaluator.run([0]))


@pytest.mark.parametrize("is_early", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("reads_first", [True, False])
@pytest.mark.parametrize("reads", [saver, evaluation])
def test_what_reads_the_average_before_the_update_of_its_iteration_is_warned_about_once(
    reads, reads_first, is_early, tmp_path
):
    """Also if a custom event is fired in between, or just before."""
    trainer, handler = set_up(0.8)
    trainer.register_events("custom")
    steps = [
        lambda: handler.attach(trainer),
        lambda: trainer.add_event_handler(EVERY, lambda engine: engine.fire_event("custom")),
        reads(handler, trainer, tmp_path),
    ]
    if not reads_first:
        steps[1:] = reversed(steps[1:])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for one in reversed(steps) if is_early else steps:
            one()
        trainer.run([0] * 4)
    said = [str(one.message) for one in caught if issubclass(one.category, EMAWarning)]
    assert ["in iteration 2 before the update" in text for text in said] == [True] * is_early


def test_what_reads_in_an_iteration_without_an_update_is_not_late():
    """Between two steps of accumulated gradients, and after the member of an events list that has updated."""
    model, trainer = net(), idle()
    optimizer, handler = sgd(model), EMAHandler(model, 0.8)
    trainer.add_event_handler(EVERY, handler.state_dict)
    handler.attach(trainer, optimizer=optimizer)
    trainer.add_event_handler(EVERY(once=2), lambda: optimizer.step())
    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), lambda: handler.num_updates)
    with pytest.warns(EMAWarning, match="in iteration 3 before"):
        trainer.run([0] * 3)
    trainer, handler = set_up(0.8)
    handler.attach(trainer, event=EVERY | Events.EPOCH_COMPLETED)
    trainer.add_event_handler(EVERY, handler.state_dict)
    trainer.run([0] * 2, max_epochs=2)


def test_what_reads_after_an_update_of_its_iteration_or_inside_the_step_is_not_late():
    """An event that fires several times in an iteration, and a step that fires one and then uses the average."""
    handler, second = (EMAHandler(constant(), 0.8) for _ in range(2))

    def step(engine, batch):
        engine.fire_event("backward")
        engine.fire_event("backward")
        with handler.swapped(), second.swapped():
            pass

    trainer = Engine(step)
    trainer.register_events("backward")
    handler.attach(trainer, event="backward")
    second.attach(trainer, "second")
    trainer.add_event_handler("backward", handler.state_dict)
    trainer.run([0] * 2)


@pytest.mark.parametrize(("event", "made"), [(EVERY, 6), (EVERY(every=2) | EVERY(every=3) | Events.EPOCH_COMPLETED, 4)])
def test_a_removed_handle_undoes_attach(event, made):
    trainer, handler = set_up()
    with handler.attach(trainer, event=event) as handle:
        gc.collect()
        trainer.run([0] * 6)
        assert handler.num_updates == made
    assert not hasattr(trainer.state, "ema_momentum")
    assert not any(trainer._event_handlers.values())
    handle.remove()
    trainer.state.ema_momentum = 0.5
    handler.attach(trainer, warn_if_exists=False).remove()
    assert trainer.state.ema_momentum == 0.5  # which was there
    handler.attach(trainer, warn_if_exists=False)  # nobody keeps the handle
    gc.collect()
    trainer.run([0] * 6)
    assert handler.num_updates == made + 6


def test_the_handler_holds_no_strong_reference_to_the_engine():
    trainer, handler = set_up()
    handle, alive = handler.attach(trainer), weakref.ref(trainer)
    del trainer
    gc.collect()
    assert alive() is None
    handle.remove()
    handler.state_dict()


def test_the_attribute_stays_as_long_as_another_handler_shares_it():
    trainer, handler = set_up()
    handle = handler.attach(trainer)
    other = EMAHandler(handler.model, 0.5)
    with pytest.warns(EMAWarning, match="shares it"):
        other.attach(trainer)
    handle.remove()
    trainer.run([0, 0])
    assert other.num_updates == 2
