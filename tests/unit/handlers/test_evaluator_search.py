"""An evaluation of the average ahead of its update at the same event is one update behind: told once, and only then."""

import functools
import warnings

import pytest
import torch
from ignite.engine import Engine, EventEnum, Events, create_supervised_evaluator
from torch import nn

from ignite_ema import EMAHandler
from ignite_ema.handlers.evaluator_search import evaluators_among

BATCH = [(torch.zeros(1, 1), torch.zeros(1, 1))]
EVENT = Events.ITERATION_COMPLETED
LATE = "'ema_momentum' should be updated before it is evaluated.*earlier"


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
    return lambda: evaluator.run(data=BATCH)


def by_an_engine_that_asks_the_handler(kit):
    return functools.partial(_run, Engine(lambda engine, batch: kit.handler.ema_model(batch[0])))


def _run(evaluator):
    evaluator.run(BATCH)


WAYS = [
    *(by_swap_during, by_swapped, by_an_engine_of_the_twin),
    *(by_an_engine_of_a_wrapped_twin, by_an_engine_that_asks_the_handler),
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
    with pytest.warns(UserWarning, match=LATE) as caught:
        kit.trainer.run([0] * 4)
    assert [one.filename for one in caught] == [__file__]


def after_the_update(kit, way):
    kit.handler.attach(kit.trainer)
    kit.trainer.add_event_handler(EVENT, way(kit))


def at_the_end_of_an_epoch(kit, way):
    kit.trainer.add_event_handler(Events.EPOCH_COMPLETED, way(kit))
    kit.handler.attach(kit.trainer)


def outside_of_training(kit, way):
    evaluate = way(kit)
    kit.handler.attach(kit.trainer)
    evaluate()


def outside_of_training_ahead_of_an_update_at_its_end(kit, way):
    evaluate = way(kit)
    kit.handler.attach(kit.trainer, event=Events.COMPLETED)
    evaluate()


def in_the_process_function(kit, way):
    evaluate = way(kit)
    kit.trainer = Engine(lambda engine, batch: [evaluate()])
    kit.handler.attach(kit.trainer)


@every_way
@pytest.mark.parametrize(
    "place",
    [
        *(after_the_update, at_the_end_of_an_epoch, outside_of_training),
        *(outside_of_training_ahead_of_an_update_at_its_end, in_the_process_function),
    ],
    ids=lambda place: place.__name__,
)
def test_an_evaluation_elsewhere_is_not(place, way):
    kit = Kit()
    place(kit, way)
    kit.trainer.run([0] * 3, max_epochs=2)


@every_way
def test_an_update_at_every_second_iteration_is_late_for_those_alone(way):
    kit = Kit()
    kit.trainer.add_event_handler(EVENT(every=3), way(kit))
    kit.handler.attach(kit.trainer, event=EVENT(every=2))
    kit.trainer.run([0] * 5)
    with pytest.warns(UserWarning, match=LATE):
        kit.trainer.run([0] * 6)


class Steps(EventEnum):
    STEP = "step"


def test_a_custom_event_that_is_fired_several_times_is_followed():
    kit = Kit()
    kit.trainer = Engine(lambda engine, batch: [engine.fire_event(Steps.STEP) for _ in range(2)])
    kit.trainer.register_events(*Steps)
    kit.trainer.add_event_handler(Steps.STEP, by_swap_during(kit))
    kit.handler.attach(kit.trainer, event=Steps.STEP)
    with pytest.warns(UserWarning, match=LATE):
        kit.trainer.run([0] * 2)


def test_engines_of_the_model_itself_and_those_that_do_not_run_are_not_told():
    kit, other = Kit(), Kit()
    kit.trainer.add_event_handler(EVENT, kit.validate)
    other.evaluator = create_supervised_evaluator(other.handler.ema_model)
    other.trainer.add_event_handler(EVENT, lambda: other.evaluator.state.metrics)
    for one in (kit, other):
        one.handler.attach(one.trainer)
        one.trainer.run([0] * 2)


def test_remove_leaves_the_evaluator_as_it_was():
    kit = Kit()
    kit.trainer.add_event_handler(EVENT, by_an_engine_of_the_twin(kit))
    with kit.handler.attach(kit.trainer), pytest.warns(UserWarning, match=LATE):
        kit.trainer.run([0])
    assert not any(kit.evaluator._event_handlers.values())


def test_functions_without_a_module_are_looked_into():
    average = nn.Linear(1, 1)

    def process(engine, batch):
        return average(batch)

    def evaluate():
        evaluator.run([torch.ones(1)])

    evaluator = Engine(process)
    process.__module__ = evaluate.__module__ = None  # as exec() leaves it where no name is given
    assert evaluators_among([evaluate], lambda found: found is average) == [evaluator]
