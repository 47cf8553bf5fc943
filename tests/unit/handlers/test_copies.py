"""A copy of a handler is detached from every engine; attaching and removing leaves nothing behind."""

import copy
import gc
import multiprocessing
import pickle
import tracemalloc
from itertools import pairwise
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from ignite_ema import EMAHandler, ModelAverage, schedules

each_way = pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda handler: pickle.loads(pickle.dumps(handler))], ids=["deepcopy", "pickle"]
)


def step(engine, batch):
    """Trains nothing."""


def attached(*arguments, **options):
    handler, trainer = EMAHandler(nn.Linear(2, 1), *arguments), Engine(step)
    handler.attach(trainer, **options)
    return handler, trainer


@each_way
def test_a_copy_of_an_attached_handler_does_not_touch_its_engine(copied):
    handler, trainer = attached(0.5)
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
def test_a_copy_goes_on_in_a_training_of_its_own(copied):
    handler, trainer = attached(schedules.LinearWarmup(0.1, 0.9, 5))
    trainer.run([0] * 2)
    handler.ema_model.weight.fill_(3.0)
    other, engine = copied(handler), Engine(step)
    assert (other.num_updates, other.initial_share) == (2, handler.initial_share)
    other.attach(engine)
    assert engine.state.ema_momentum == schedules.LinearWarmup(0.1, 0.9, 5)(2)
    other.model.weight.data.fill_(8.0)
    engine.run([0])
    assert other.num_updates == 3
    assert (other.ema_model.weight == 3 + 0.5 * 5).all()
    assert (handler.ema_model.weight == 3).all()
    assert handler.model.weight.ne(8).all()


@each_way
def test_a_step_that_waits_for_its_update_is_copied(copied):
    model = nn.Linear(2, 1)
    handler, trainer, optimizer = EMAHandler(model, 0.5), Engine(step), torch.optim.SGD(model.parameters(), 0.1)
    handler.attach(trainer, optimizer=optimizer)
    optimizer.step()
    other, engine = copied(handler), Engine(step)
    other.attach(engine, optimizer=torch.optim.SGD(other.model.parameters(), 0.1))
    engine.run([0])
    assert (other.num_updates, handler.num_updates) == (1, 0)


def _count_in_worker(handler, queue):
    handler.attach(trainer := Engine(step))
    trainer.run([0] * 2)
    is_shared = any(one.is_shared() for one in handler.ema_model.parameters())
    queue.put((handler.num_updates, handler.initial_share, is_shared))


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


@pytest.mark.slow
def test_an_attached_handler_goes_to_a_spawned_worker():
    handler, trainer = attached(0.5)
    trainer.run([0])
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    worker = context.Process(target=_count_in_worker, args=(handler, queue))
    worker.start()
    assert queue.get() == (3, 0.125, False)
    worker.join()
    assert handler.num_updates == 1


def test_a_module_that_holds_its_handler_can_be_copied():
    model = nn.Linear(2, 1)
    model.handler, trainer = EMAHandler(model, 0.5), Engine(step)
    model.handler.attach(trainer)
    copied = copy.deepcopy(model)
    assert copied.handler.model is copied
    copied.handler.momentum = 0.25
    assert trainer.state.ema_momentum == 0.5


def growth(action, count=20, rounds=4):
    """Bytes that stay per call: the least of some rounds, as a dictionary grows now and then."""
    sizes = []
    tracemalloc.start()
    for _ in range(rounds):
        for _ in range(count):
            action()
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    return min(after - before for before, after in pairwise(sizes)) / count


@pytest.mark.parametrize("buffers", ["copy", "ema_train"])
def test_attaching_swapping_and_removing_leave_nothing_behind(buffers):
    model = nn.Linear(2, 1)
    handler, trainer, evaluator = EMAHandler(model, 0.5, handle_buffers=buffers), Engine(step), Engine(step)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    event = Events.ITERATION_COMPLETED(every=2) | Events.EPOCH_COMPLETED

    def cycle():
        handler.attach(trainer, event=event, optimizer=optimizer).remove()
        handler.swap_during(evaluator).remove()

    assert growth(cycle) < 4
    assert not any(trainer._event_handlers.values())
    assert not optimizer._optimizer_step_post_hooks
    assert len(handler._attachments._references) <= 1
    assert not hasattr(trainer.state, "ema_momentum")
    assert "run" not in vars(evaluator)


def test_engines_that_come_and_go_leave_nothing_in_a_handler_that_stays():
    handler = EMAHandler(nn.Linear(2, 1), 0.5)
    assert growth(lambda: handler.attach(Engine(step)) and None) < 4
