"""swap_during(): an evaluator runs on the averaged weights, and the model has its own after every way out."""

import copy
import gc
import itertools
import weakref
from contextlib import nullcontext

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from ignite_ema import EMAHandler, EMAWarning
from tests.helpers.bits import bits, contents, places
from tests.helpers.models import move
from tests.helpers.runs import evaluator_of, scalar_handler
from tests.helpers.worlds import run_world

EVENTS = [
    *(Events.STARTED, Events.EPOCH_STARTED, Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED),
    *(Events.ITERATION_STARTED, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED, Events.COMPLETED),
]


@pytest.fixture
def kit():
    """A model of weight 1, its handler with an average of 5, and an evaluator whose output is the weight."""
    model, handler = scalar_handler()
    return model, handler, evaluator_of(model)


def test_each_run_evaluates_the_averaged_weights_of_then(kit):
    model, handler, evaluator = kit
    trainer = Engine(lambda engine, batch: model.weight.data.add_(1.0))
    handler.attach(trainer)
    with handler.swap_during(evaluator):
        for online, averaged in ((2.0, 0.75 * 5 + 0.25 * 2), (3.0, 0.75 * 4.25 + 0.25 * 3)):
            trainer.run([0])
            assert evaluator.run([0]).output == averaged
            assert model.weight.item() == online
    assert evaluator.run([0]).output == 3.0


def test_every_event_of_a_run_sees_the_averaged_weights_and_the_arguments_pass_through(kit):
    model, handler, evaluator = kit
    seen = []
    handler.swap_during(evaluator)
    for event in EVENTS:
        evaluator.add_event_handler(event, lambda: seen.append(model.weight.item()))
    state = evaluator.run([0, 0, 0], max_epochs=2, epoch_length=2)
    assert set(seen) == {5.0}
    assert state is evaluator.state
    assert (state.iteration, state.epoch) == (4, 2)


def test_the_handle_removes_once_and_only_its_own(kit):
    _, handler, evaluator = kit
    with handler.swap_during(evaluator) as handle:
        with pytest.raises(RuntimeError, match="this evaluator has EvaluationSwap"):
            handler.swap_during(evaluator)
        assert evaluator.run([0]).output == 5.0
    assert "run" not in vars(evaluator)
    assert not any(evaluator._event_handlers.values())
    second = handler.swap_during(evaluator)
    handle.remove()  # no longer its own
    assert evaluator.run([0]).output == 5.0
    second.remove()
    second.remove()
    assert evaluator.run([0]).output == 1.0


def test_two_handlers_swap_two_models_and_are_removed_in_any_order():
    models, handlers = zip(*[scalar_handler(online, online + 0.5) for online in (1.0, 2.0)], strict=True)
    evaluator = Engine(lambda engine, batch: [model.weight.item() for model in models])
    handles = [handler.swap_during(evaluator) for handler in handlers]
    due = [1.5, 2.5]
    assert evaluator.run([0]).output == due
    for index, handle in enumerate(handles):
        handle.remove()
        due[index] -= 0.5
        assert evaluator.run([0]).output == due


class Evaluator(Engine):
    """An engine that brings its data and has a run of its own, as those of MONAI."""

    def run(self, global_epoch=1):
        self.global_epoch = global_epoch
        return super().run([0, 0], max_epochs=1)


def test_an_engine_with_a_run_of_its_own_is_swapped_for():
    model, handler = scalar_handler()
    evaluator = evaluator_of(model, Evaluator)
    with handler.swap_during(evaluator):
        assert evaluator.run(global_epoch=3).output == 5.0
        assert evaluator.run(4).output == 5.0
    assert evaluator.global_epoch == 4
    assert evaluator.run().output == 1.0


def test_an_evaluator_is_collected_with_what_was_put_on_it():
    model, handler = scalar_handler()
    evaluator = evaluator_of(model)
    handler.swap_during(evaluator)
    reference = weakref.ref(evaluator)
    del evaluator
    gc.collect()
    assert reference() is None


def test_a_copy_of_the_evaluator_is_detached_and_says_so_when_it_runs(kit):
    _, handler, evaluator = kit
    with handler.swap_during(evaluator) as handle:
        copied = copy.deepcopy(copy.deepcopy(evaluator))
        assert handle.is_attached
        with pytest.warns(EMAWarning, match=r"is a copy of .* Call swap_during\(\) with the copy"):
            copied.run([0])
        assert evaluator.run([0]).output == 5.0
    assert evaluator.run([0]).output == 1.0


def evaluated_with_the_first_ranks_buffers(folder):
    model, rank = nn.BatchNorm1d(1), float(torch.distributed.get_rank())
    handler = EMAHandler(model, 0.25)
    model.running_mean.fill_(rank)
    handler.ema_model.running_mean.fill_(rank + 5)
    evaluator = Engine(lambda engine, batch: model.running_mean.item())
    with handler.swap_during(evaluator, sync_buffers=True):
        seen = evaluator.run([0]).output
    return seen, model.running_mean.item(), handler.ema_model.running_mean.item()


@pytest.mark.slow
def test_buffers_of_the_first_rank_are_used_on_all_for_the_run(tmp_path):
    assert run_world(tmp_path, 2, evaluated_with_the_first_ranks_buffers) == [(5, 0, 5), (5, 1, 6)]


def leave(engine, way):
    if not isinstance(way, str):
        raise way
    getattr(engine, way)()


@pytest.mark.parametrize("is_heard", [False, True])  # Ignite raises no more once somebody listens
@pytest.mark.parametrize(
    ("way", "event"),
    [
        *itertools.product([ValueError, KeyboardInterrupt, "terminate"], EVENTS),
        *itertools.product(["terminate_epoch", "interrupt"], [Events.ITERATION_STARTED, Events.ITERATION_COMPLETED]),
    ],
    ids=str,
)
def test_the_weights_are_back_after_every_way_out(way, event, is_heard):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    handler = EMAHandler(model, 0.25, handle_buffers="update")
    move(model)
    handler.average.update(0.25)
    move(model)
    are_averaged = []

    def evaluate(engine, batch):
        pairs = zip(model.parameters(), handler.ema_model.parameters(), strict=True)
        are_averaged.append(all(bits(online) == bits(averaged) for online, averaged in pairs))
        model.train()(batch)  # which changes the statistics

    evaluator = Engine(evaluate)
    evaluator.interrupt_resume_enabled = way == "interrupt"
    handler.swap_during(evaluator)
    leaving = evaluator.add_event_handler(event, leave, way)
    if is_heard:
        evaluator.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: None)
    before, held_in, average = contents(model), places(model), contents(handler.ema_model)
    with nullcontext() if isinstance(way, str) or is_heard else pytest.raises(way):
        evaluator.run(torch.rand(4, 2, 3), 2)
    leaving.remove()
    assert contents(model) == before
    assert places(model) == held_in
    if way == "interrupt":
        move(model)  # trained on in between
        handler.average.update(0.25)
        before, average = contents(model), contents(handler.ema_model)
    else:
        evaluator._internal_run_generator = evaluator.state.max_epochs = None  # or Ignite 0.5.5 would not run again
    evaluator.run(torch.rand(4, 2, 3))
    assert contents(model) == before
    assert len(are_averaged) >= 4
    assert all(are_averaged)
    assert contents(handler.ema_model) == average
