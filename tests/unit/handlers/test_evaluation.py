"""swap_during(): an evaluator runs on the averaged weights, and the model has its own after every way out."""

import copy
import gc
import random
import weakref

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from ignite_ema import EMAHandler, EMAWarning
from tests.helpers.bits import bits, contents, places
from tests.helpers.models import move
from tests.helpers.runs import evaluator_of, scalar_handler
from tests.helpers.worlds import run_world


def forget_what_failed(engine):
    """Without this Ignite 0.5.5 does nothing in the run after one that raised."""
    engine._internal_run_generator = engine.state.max_epochs = None


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
    for event in Events:
        if event not in (Events.EXCEPTION_RAISED, Events.INTERRUPT, Events.TERMINATE, Events.TERMINATE_SINGLE_EPOCH):
            evaluator.add_event_handler(event, lambda: seen.append(model.weight.item()))
    state = evaluator.run([0, 0, 0], max_epochs=2, epoch_length=2)
    assert set(seen) == {5.0}
    assert state is evaluator.state
    assert (state.iteration, state.epoch) == (4, 2)


def test_the_handle_removes_once_and_only_its_own(kit):
    _, handler, evaluator = kit
    with handler.swap_during(evaluator) as handle:
        with pytest.raises(RuntimeError, match="during the runs of an evaluator once"):
            handler.swap_during(evaluator)
        assert evaluator.run([0]).output == 5.0
    assert "run" not in vars(evaluator)
    assert not evaluator.has_event_handler(handle._check_start)
    second = handler.swap_during(evaluator)
    handle.remove()  # no longer its own
    assert evaluator.run([0]).output == 5.0
    second.remove()
    second.remove()
    assert evaluator.run([0]).output == 1.0


def test_the_handle_may_be_removed_during_the_run(kit):
    model, handler, evaluator = kit
    seen = []
    handle = handler.swap_during(evaluator)
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(model.weight.item()))
    evaluator.add_event_handler(Events.ITERATION_STARTED(once=2), handle.remove)
    evaluator.run([0, 0, 0])
    assert model.weight.item() == 1.0
    evaluator.run([0])
    assert seen == [5.0] * 3 + [1.0]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first made first", "last made first"])
def test_two_handlers_swap_two_models_and_are_removed_in_any_order(order):
    models, handlers = zip(*[scalar_handler(online, online + 0.5) for online in (1.0, 2.0)], strict=True)
    evaluator = Engine(lambda engine, batch: [model.weight.item() for model in models])
    handles = [handler.swap_during(evaluator) for handler in handlers]
    due = [1.5, 2.5]
    assert evaluator.run([0]).output == due
    for index in order:
        handles[index].remove()
        due[index] -= 0.5
        assert evaluator.run([0]).output == due
    assert [model.weight.item() for model in models] == [1.0, 2.0]
    assert handlers[0].swap_during(evaluator).is_attached
    assert evaluator.run([0]).output == [1.5, 2.0]


def test_two_handlers_of_one_model_raise_at_the_run_and_change_nothing(kit):
    model, handler, evaluator = kit
    handler.swap_during(evaluator)
    handle = EMAHandler(model, 0.25).swap_during(evaluator)
    with pytest.raises(RuntimeError, match="should be swapped while the model holds its own weights"):
        evaluator.run([0])
    assert model.weight.item() == 1.0
    handle.remove()
    assert evaluator.run([0]).output == 5.0


@pytest.mark.parametrize("when", ["before", "afterwards"])
def test_a_run_that_is_wrapped_is_called_and_stays(when, kit):
    _, handler, evaluator = kit
    calls, handle = [], None

    def wrap(inner):
        def run(*args, **kwargs):
            calls.append("theirs")
            return inner(*args, **kwargs)

        return run

    if when == "before":
        evaluator.run = theirs = wrap(evaluator.run)
        handle = handler.swap_during(evaluator)
    else:
        handle = handler.swap_during(evaluator)
        evaluator.run = theirs = wrap(evaluator.run)
    assert evaluator.run([0]).output == 5.0
    handle.remove()
    assert evaluator.run is theirs
    assert evaluator.run([0]).output == 1.0
    assert calls == ["theirs"] * 2
    with handler.swap_during(evaluator):
        assert evaluator.run([0]).output == 5.0
    assert evaluator.run is theirs


def test_a_run_that_was_taken_before_raises(kit):
    _, handler, evaluator = kit
    run = evaluator.run
    handle = handler.swap_during(evaluator)
    for taken in (run, lambda data: Engine.run(evaluator, data)):
        with pytest.raises(RuntimeError, match="should be started as evaluator.run.*own weights"):
            taken([0])
        forget_what_failed(evaluator)
    assert evaluator.run([0]).output == 5.0
    with pytest.raises(RuntimeError, match="should be started as"):
        run([0])
    forget_what_failed(evaluator)
    handle.remove()
    assert run([0]).output == 1.0


def test_a_swap_that_begins_within_a_run_raises(kit):
    _, handler, evaluator = kit
    evaluator.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: handler.swap_during(evaluator))
    with pytest.raises(RuntimeError, match="this run began before"):
        evaluator.run([0] * 3)


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


def test_the_trainer_is_no_evaluator_and_an_evaluator_no_trainer(kit):
    _, handler, engine = kit
    with handler.attach(engine), pytest.raises(RuntimeError, match="evaluator should be another engine"):
        handler.swap_during(engine)
    assert "run" not in vars(engine)
    with (
        handler.swap_during(engine),
        pytest.raises(RuntimeError, match="engine should be one that trains"),
    ):
        handler.attach(engine)
    handler.attach(engine)
    engine.run([0])
    assert handler.num_updates == 1


def test_an_evaluator_is_collected_with_what_was_put_on_it():
    model, handler = scalar_handler()
    evaluator = evaluator_of(model)
    handle, reference = handler.swap_during(evaluator), weakref.ref(evaluator)
    del evaluator, handle
    gc.collect()
    assert reference() is None


def test_an_evaluator_that_runs_inside_a_swapped_one_sees_the_average_too(kit):
    model, handler, outer = kit
    inner = evaluator_of(model)
    handler.swap_during(outer)
    outer.add_event_handler(Events.ITERATION_COMPLETED, lambda: inner.run([0]))
    assert outer.run([0]).output == inner.state.output == 5.0


def test_a_copy_of_the_evaluator_is_detached_and_says_so_when_it_runs(kit):
    _, handler, evaluator = kit
    with handler.swap_during(evaluator) as handle:
        copied = copy.deepcopy(evaluator)
        assert handle.is_attached
        with pytest.warns(EMAWarning, match=r"is a copy of .* Call swap_during\(\) with the copy"):
            copied.run([0])
        assert evaluator.run([0]).output == 5.0
    assert evaluator.run([0]).output == 1.0
    with handler.swap_during(copied):
        copied.run([0])


def test_a_state_that_is_saved_while_swapped_is_warned_about_then_and_when_it_is_loaded(kit):
    _, handler, evaluator = kit
    states = []
    evaluator.add_event_handler(Events.COMPLETED, lambda: states.append(handler.state_dict()))
    with handler.swap_during(evaluator), pytest.warns(EMAWarning, match=r"is saved inside swapped\(\)"):
        evaluator.run([0])
    with pytest.warns(EMAWarning, match=r"was saved inside swapped\(\)"):
        scalar_handler()[1].load_state_dict(states[0])
    evaluator.run([0])
    scalar_handler()[1].load_state_dict(states[1])


def test_buffers_need_no_synchronising_in_one_process():
    model = nn.BatchNorm1d(1)
    handler = EMAHandler(model, 0.25)
    model.running_mean.fill_(3.0)
    evaluator = Engine(lambda engine, batch: model.running_mean.item())
    with handler.swap_during(evaluator, sync_buffers=True):
        assert evaluator.run([0]).output == 0.0
    assert model.running_mean.item() == 3.0


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


# Ways out of an evaluation


class Stop(Exception):
    """What a test raises."""


EVENTS = [
    *(Events.STARTED, Events.EPOCH_STARTED, Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED),
    *(Events.ITERATION_STARTED, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED, Events.COMPLETED),
    "process function",
]
ERRORS = [Stop, KeyboardInterrupt, SystemExit]
WAYS = {
    "terminate": lambda engine: engine.terminate(),
    "terminate without COMPLETED": lambda engine: setattr(engine, "should_terminate", "skip_completed"),
    "terminate_epoch": lambda engine: engine.terminate_epoch(),
    "interrupt": lambda engine: engine.interrupt(),
    "end": lambda engine: None,
}


class Evaluation:
    """An evaluation on averaged weights that is left on one way, at one point; checks the weights as it goes."""

    def __init__(self, dice):
        self.way = dice.choice([*ERRORS, *WAYS, "interrupt"])
        # Ignite refuses to terminate an epoch that has not begun, and has nothing left to interrupt at the end
        events = EVENTS[4:6] if self.way == "terminate_epoch" else EVENTS[:-2] + EVENTS[-1:]
        self.event = dice.choice(EVENTS if self.way != "interrupt" and self.way != "terminate_epoch" else events)
        self.left = dice.randrange(1, 5)  # at which of these events
        self.listener = dice.choice([None, None, "swallows", "raises"])
        self.in_train_mode = dice.random() < 0.5
        self.is_nested = dice.random() < 0.3
        torch.manual_seed(dice.randrange(1000))
        self.model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.handler = EMAHandler(self.model, 0.25, handle_buffers=dice.choice(["copy", "update", "ema_train"]))
        move(self.model)
        self.handler.average.update(0.25)
        move(self.model)
        self.evaluator = Engine(self.evaluate)
        self.evaluator.interrupt_resume_enabled = self.way == "interrupt" or dice.random() < 0.5
        self.met = self.heard = self.completed = 0
        self.iterations, self.are_averaged = [], []
        steps = [self.listen, lambda: self.handler.swap_during(self.evaluator)]
        for one in dice.sample(steps, 2):
            one()

    def listen(self):
        if self.event != "process function":
            self.evaluator.add_event_handler(self.event, self.meet)
        if self.listener is not None:
            self.evaluator.add_event_handler(Events.EXCEPTION_RAISED, self.hear)
        self.evaluator.add_event_handler(Events.COMPLETED, self.complete)

    def evaluate(self, engine, batch):
        if self.event == "process function":
            self.meet(engine)
        weights = [self.model[0].weight, self.model[0].bias, self.model[1].weight, self.model[1].bias]
        self.are_averaged.append(list(map(bits, weights)) == list(map(bits, self.handler.ema_model.parameters())))
        self.iterations.append(engine.state.iteration)
        return self.model.train(self.in_train_mode)(batch)

    def meet(self, engine):
        self.met += 1
        if self.met == min(self.left, 1 if self.event in (Events.STARTED, Events.COMPLETED) else 2):
            if self.way in WAYS:
                WAYS[self.way](engine)
            else:
                raise self.way("this one")

    def hear(self, engine, error):
        self.heard += 1
        if self.listener == "raises":
            raise error

    def complete(self):
        self.completed += 1

    def run(self, *args):
        if not self.is_nested:
            self.evaluator.run(*args)
            return
        trainer = Engine(lambda engine, batch: None)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: self.evaluator.run(*args))
        trainer.run([0, 0])
        assert trainer.state.iteration == 2

    def go(self):
        """Runs on the way; returns the kind of exception that has reached the caller."""
        try:
            self.run(torch.rand(4, 2, 3), 2)
        except tuple(ERRORS) as error:
            return type(error)
        return None


@pytest.mark.parametrize("seed", range(60))
def test_60_ways_out_of_a_swapped_evaluation(seed):
    case = Evaluation(random.Random(seed))
    before, held_in, average = contents(case.model), places(case.model), contents(case.handler.ema_model)
    reaches = case.way in ERRORS and case.listener != "swallows"
    assert case.go() is (case.way if reaches else None)
    assert bool(case.heard) == (case.way in ERRORS and case.listener is not None)
    assert contents(case.model) == before
    assert places(case.model) == held_in
    if case.way == "interrupt":
        assert not case.completed
        move(case.model)  # trained on in between
        before = contents(case.model)
        case.run(torch.rand(4, 2, 3))
        assert case.completed
        assert contents(case.model) == before
        assert case.iterations == list(range(1, 9))
    case.way, case.iterations = "end", []
    forget_what_failed(case.evaluator)
    case.run(torch.rand(4, 2, 3))  # nothing is left over
    assert case.iterations == list(range(1, 5))
    assert contents(case.model) == before
    assert all(case.are_averaged)
    assert contents(case.handler.ema_model) == average
    assert not case.handler.average.is_swapped()


def test_an_evaluation_that_is_interrupted_at_each_batch_goes_on_with_the_average_of_then(kit):
    model, handler, evaluator = kit
    handler.swap_during(evaluator)
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, evaluator.interrupt)
    seen, completed = [], []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.output))
    evaluator.add_event_handler(Events.COMPLETED, lambda: completed.append(True))
    while not completed:
        evaluator.run(range(3))
        handler.average.update(0.5)  # not refused: the model has its own weights
    assert model.weight.item() == 1.0
    assert seen == [5.0, 3.0, 2.0]
