"""An evaluation of the average ahead of its update at the same event is one update behind: told once, and only then."""

import functools
import warnings

import pytest
import torch
from ignite.engine import Engine, EventEnum, Events, create_supervised_evaluator
from torch import nn

from ignite_ema import EMAHandler

BATCH = [(torch.zeros(1, 1), torch.zeros(1, 1))]
EVENT = Events.ITERATION_COMPLETED


class Kit:
    """A trainer, a handler that is not attached yet, and ways to evaluate its average."""

    def __init__(self):
        self.model = nn.Linear(1, 1)
        self.trainer = Engine(lambda engine, batch: self.model.weight.data.add_(1))
        self.handler = EMAHandler(self.model, 0.5)
        self.evaluator = create_supervised_evaluator(self.model)

    def validate(self):
        self.evaluator.run(BATCH)

    def run_swapped(self):
        with self.handler.swapped():
            self.model(BATCH[0][0])


def by_swap_during(kit):
    kit.handler.swap_during(kit.evaluator)
    return kit.validate


def by_swapped(kit):
    return kit.run_swapped


def by_an_engine_of_the_twin(kit):
    kit.evaluator = create_supervised_evaluator(kit.handler.ema_model)
    return kit.validate


def by_an_engine_of_a_wrapped_twin(kit):
    evaluator = create_supervised_evaluator(nn.DataParallel(kit.handler.ema_model))
    return lambda engine: evaluator.run(BATCH)


def by_an_engine_that_asks_the_handler(kit):
    evaluator = Engine(lambda engine, batch: kit.handler.ema_model(batch[0]))
    return functools.partial(_run, evaluator)


def by_a_method_of_the_engine(kit):
    evaluator = create_supervised_evaluator(kit.handler.ema_model)
    return lambda: evaluator.run(data=BATCH)


def _run(evaluator, engine=None):
    evaluator.run(BATCH)


WAYS = [
    by_swap_during,
    by_swapped,
    by_an_engine_of_the_twin,
    by_an_engine_of_a_wrapped_twin,
    by_an_engine_that_asks_the_handler,
    by_a_method_of_the_engine,
]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@pytest.fixture(autouse=True)
def _no_other_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


@every_way
def test_an_evaluation_ahead_of_the_update_is_told_once(way):
    kit = Kit()
    kit.trainer.add_event_handler(EVENT, way(kit))
    kit.handler.attach(kit.trainer)
    with pytest.warns(UserWarning, match="'ema_momentum' should be updated before it is evaluated.*earlier") as caught:
        kit.trainer.run([0] * 4)
    assert [one.filename for one in caught] == [__file__]


@every_way
def test_an_evaluation_after_the_update_is_not(way):
    kit = Kit()
    kit.handler.attach(kit.trainer)
    kit.trainer.add_event_handler(EVENT, way(kit))
    kit.trainer.run([0] * 4)


@every_way
def test_an_evaluation_at_the_end_of_an_epoch_is_not(way):
    kit = Kit()
    kit.trainer.add_event_handler(Events.EPOCH_COMPLETED, way(kit))
    kit.handler.attach(kit.trainer)
    kit.trainer.run([0] * 4, max_epochs=2)


@every_way
def test_an_update_at_every_second_iteration_is_late_for_those_alone(way):
    kit = Kit()
    kit.trainer.add_event_handler(EVENT(every=3), way(kit))
    kit.handler.attach(kit.trainer, event=EVENT(every=2))
    kit.trainer.run([0] * 5)
    with pytest.warns(UserWarning, match="should be updated before it is evaluated"):
        kit.trainer.run([0] * 6)


@every_way
@pytest.mark.parametrize("event", [EVENT, Events.COMPLETED], ids=str)
def test_an_evaluation_outside_of_training_is_not(way, event):
    kit = Kit()
    evaluate = way(kit)
    kit.handler.attach(kit.trainer, event=event)
    for _ in range(2):
        evaluate(*([kit.trainer] if way is by_an_engine_of_a_wrapped_twin else []))
        kit.trainer.run([0])


@every_way
def test_an_evaluation_in_the_process_function_is_not(way):
    kit = Kit()
    evaluate = way(kit)
    trainer = Engine(lambda engine, batch: evaluate(*([0] if way is by_an_engine_of_a_wrapped_twin else [])))
    kit.handler.attach(trainer)
    trainer.run([0] * 3)


class Steps(EventEnum):
    STEP = "step"


def test_a_custom_event_that_is_fired_several_times_is_followed():
    kit = Kit()
    kit.trainer = Engine(lambda engine, batch: [engine.fire_event(Steps.STEP) for _ in range(2)])
    kit.trainer.register_events(*Steps)
    kit.trainer.add_event_handler(Steps.STEP, by_swap_during(kit))
    kit.handler.attach(kit.trainer, event=Steps.STEP)
    with pytest.warns(UserWarning, match="should be updated before it is evaluated"):
        kit.trainer.run([0] * 2)


def test_an_engine_of_the_model_itself_is_not_of_the_average():
    kit = Kit()
    kit.trainer.add_event_handler(EVENT, kit.validate)
    kit.handler.attach(kit.trainer)
    kit.trainer.run([0] * 2)


def test_an_engine_that_is_mentioned_and_does_not_run_is_not_told():
    kit = Kit()
    kit.evaluator = create_supervised_evaluator(kit.handler.ema_model)
    kit.trainer.add_event_handler(EVENT, lambda: kit.evaluator.state.metrics)
    kit.handler.attach(kit.trainer)
    kit.trainer.run([0] * 2)


def test_remove_leaves_the_evaluator_as_it_was():
    kit = Kit()
    kit.trainer.add_event_handler(EVENT, by_an_engine_of_the_twin(kit))
    with kit.handler.attach(kit.trainer), pytest.warns(UserWarning, match="should be updated before"):
        kit.trainer.run([0])
    assert not any(kit.evaluator._event_handlers.values())
