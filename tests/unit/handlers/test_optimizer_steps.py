"""attach(optimizer=...): an event updates only if the optimizer has stepped since the last update."""

from contextlib import nullcontext
from itertools import pairwise
from unittest.mock import Mock

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn
from torch.distributed.optim import PostLocalSGDOptimizer

from ignite_ema import EMAHandler, EMAWarning
from ignite_ema.schedules import EqualWeight
from tests.helpers.bits import contents
from tests.helpers.models import compiled, linear, sgd
from tests.helpers.runs import idle

EVENT = Events.ITERATION_COMPLETED


def attached(step, wrap=lambda optimizer: optimizer, event=EVENT):
    """A handler, and a trainer of which ``step(engine, optimizer)`` is the step."""
    model = linear()
    optimizer, handler = wrap(sgd(model)), EMAHandler(model, 0.8)
    trainer = Engine(lambda engine, batch: step(engine, optimizer))
    trainer.register_events("often")
    handler.attach(trainer, event=event, optimizer=optimizer)
    return handler, trainer


@pytest.mark.parametrize(
    ("event", "due"),
    [
        # iterations 2, 4, 6, 7 and 8 of 9 step
        (EVENT, [0, 1, 1, 2, 2, 3, 4, 5, 5]),
        (EVENT(every=3), [0, 0, 1, 1, 1, 2, 2, 2, 3]),
        (EVENT(every=3) | EVENT(every=4), [0, 0, 1, 2, 2, 3, 3, 4, 4]),
        (Events.ITERATION_STARTED, [0, 0, 1, 1, 2, 2, 3, 4, 5]),
    ],
    ids=["each iteration", "every third", "two members", "at the start"],
)
def test_an_event_updates_where_there_was_a_step_since_the_last_update(event, due):
    steps_at, counts = (2, 4, 6, 7, 8), []
    handler, trainer = attached(lambda engine, one: engine.state.iteration in steps_at and one.step(), event=event)
    trainer.add_event_handler(EVENT, lambda: counts.append(handler.num_updates))
    trainer.run([0] * 9)
    assert counts == due


SPOILT = {1: torch.inf, 3: torch.nan, 4: -torch.inf, 7: torch.inf}


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("fused", [False, True])  # a fused one is stepped always, and skips by itself
def test_a_step_that_a_grad_scaler_skips_moves_neither_weights_nor_average(kind, fused, unscales):
    model = linear()
    optimizer, handler = kind(model.parameters(), lr=0.1, fused=fused), EMAHandler(model, 0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weights, counts = [contents(model)], [0]

    def process(engine, batch):
        scaler.scale(model(torch.rand(4, 3)).square().mean()).backward()
        model.weight.grad[0, 0] += SPOILT.get(engine.state.iteration, 0.0)
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    trainer = Engine(process)
    handler.attach(trainer, optimizer=optimizer)
    trainer.add_event_handler(EVENT, lambda: weights.append(contents(model)))
    trainer.add_event_handler(EVENT, lambda: counts.append(handler.num_updates))
    trainer.run([0] * 8)
    moved = [before != after for before, after in pairwise(weights)]
    assert moved == [iteration not in SPOILT for iteration in range(1, 9)]
    assert [after - before for before, after in pairwise(counts)] == moved


class Accelerated(torch.optim.Optimizer):
    """As Accelerate's: of the class, but not made as an optimizer; ``step`` counts if it steps the optimizer inside."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


def post_local(optimizer):
    """torch's, which has the optimizer as ``optim``."""
    return PostLocalSGDOptimizer(optimizer, Mock())


class SAM(torch.optim.Optimizer):
    """As in public: two methods instead of ``step``, of which the second steps the optimizer inside."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.base_optimizer = optimizer

    def second_step(self):
        self.base_optimizer.step()


def test_sam_is_looked_through_although_it_takes_hooks():
    handler, trainer = attached(lambda engine, optimizer: optimizer.second_step(), SAM)
    trainer.run([0] * 3)
    assert handler.num_updates == 3


@pytest.mark.parametrize(
    "wrap", [Accelerated, post_local, lambda one: Accelerated(post_local(one))], ids=["optimizer", "optim", "both"]
)
def test_a_wrapper_of_the_optimizer_is_looked_through(wrap):
    handler, trainer = attached(lambda engine, optimizer: engine.state.iteration % 2 or optimizer.step(), wrap)
    trainer.run([0] * 6)
    assert handler.num_updates == 3


@pytest.mark.parametrize("renewed_at", [6, 20])
def test_an_optimizer_that_is_made_anew_in_mid_run_and_never_steps_again_is_said(renewed_at):
    def step(engine, optimizer):
        if engine.state.iteration < renewed_at and engine.state.iteration % 3 == 0:
            optimizer.step()

    _, trainer = attached(step)
    is_said = pytest.warns(EMAWarning, match="the last 17 events passed without a step")
    with is_said if renewed_at == 6 else nullcontext():
        trainer.run([0] * 20)


@pytest.mark.parametrize(
    ("event", "steps_at", "is_said"),
    [
        (Events.EPOCH_COMPLETED, lambda engine: engine.state.epoch < 3, True),
        ("often", lambda engine: engine.state.iteration % 2, False),
    ],
)
def test_whether_an_optimizer_has_stopped_is_counted_in_events(event, steps_at, is_said):
    def step(engine, optimizer):
        for _ in range(20):
            engine.fire_event("often")
        if steps_at(engine):
            optimizer.step()

    _, trainer = attached(step, event=event)
    with pytest.warns(EMAWarning, match="the last 8 events passed") if is_said else nullcontext():
        trainer.run([0] * 30, max_epochs=10)


def test_remove_takes_the_hook_off_the_optimizer():
    model, trainer = linear(), idle()
    optimizer, handler = sgd(model), EMAHandler(model, 0.25)
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: optimizer.step())
    with handler.attach(trainer, optimizer=optimizer):
        assert len(optimizer._optimizer_step_post_hooks) == 1
        trainer.run([0])
    assert not optimizer._optimizer_step_post_hooks
    trainer.run([0])
    assert handler.num_updates == 1


def test_each_of_two_attachments_waits_for_its_own_optimizer():
    model, first, second = linear(), idle(), idle()
    weights, biases = (torch.optim.SGD([parameter], lr=0.5) for parameter in model.parameters())
    handler = EMAHandler(model, 0.25)
    handler.attach(first, optimizer=weights)
    handler.attach(second, optimizer=biases)
    weights.step()
    with pytest.warns(EMAWarning, match="'ema_momentum' should have stepped in this run, but the last 2 events passed"):
        second.run([0] * 2)
    assert handler.num_updates == 0
    first.run([0])
    assert handler.num_updates == 1


def test_an_attachment_in_place_of_a_removed_one_waits_for_its_own_optimizer():
    model, engines = linear(), [idle(), idle(), idle()]
    first, second, third = (torch.optim.SGD(model.parameters(), lr=0.5) for _ in engines)
    handler = EMAHandler(model, 0.25)
    handle = handler.attach(engines[0], optimizer=first)
    handler.attach(engines[1], optimizer=second)
    handle.remove()
    handler.attach(engines[2], optimizer=third)
    second.step()
    with pytest.warns(EMAWarning, match="should have stepped in this run"):
        engines[2].run([0])
    assert handler.num_updates == 0


def test_the_optimizer_of_another_model_is_warned_about_and_that_of_a_part_is_not():
    with pytest.warns(EMAWarning, match="parameters of the model that is averaged, but has none of them"):
        EMAHandler(linear(), 0.25).attach(idle(), optimizer=sgd(linear()))
    model = nn.Sequential(linear(), linear())
    EMAHandler(compiled(model), 0.25).attach(idle(), optimizer=torch.optim.SGD([*linear().parameters(), model[1].bias]))


class Accumulation:
    """A training that steps at every third iteration and updates at every second, and may be resumed anywhere."""

    def __init__(self):
        self.model = linear()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.handler = EMAHandler(self.model, EqualWeight())
        self.trainer = Engine(self.step)
        self.handler.attach(self.trainer, event=EVENT(every=2), optimizer=self.optimizer)

    def step(self, engine, batch):
        torch.manual_seed(engine.state.iteration)
        self.model(torch.rand(4, 3)).square().mean().backward()
        if engine.state.iteration % 3 == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def run(self, last=12):
        self.trainer.add_event_handler(EVENT(once=last), self.trainer.terminate)
        self.trainer.run(max_epochs=1, epoch_length=100)
        return contents(self.model), contents(self.handler.ema_model), self.handler.num_updates


@pytest.mark.filterwarnings("ignore:The optimizer of 'ema_momentum' should have stepped")  # a kill has no warning
@pytest.mark.parametrize("stop", [3, 6, 9])
def test_a_run_that_resumes_between_a_step_and_its_update_ends_with_the_same_bits(stop, tmp_path):
    due = Accumulation().run()
    assert due[2] == 4
    killed = Accumulation()
    checkpoint = Checkpoint(vars(killed), DiskSaver(str(tmp_path)))
    killed.trainer.add_event_handler(EVENT(once=stop), checkpoint)
    killed.run(stop)
    resumed = Accumulation()
    Checkpoint.load_objects(vars(resumed), tmp_path / checkpoint.last_checkpoint)
    assert resumed.run() == due
