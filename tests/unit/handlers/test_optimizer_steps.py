"""attach(optimizer=...): an event updates only if the optimizer has stepped since the last update."""

import copy
import gc
from itertools import pairwise

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn

from ignite_ema import EMAHandler, ModelAverage
from ignite_ema.schedules import EqualWeight, LinearWarmup
from tests.helpers.bits import contents
from tests.helpers.models import linear, sgd

# Only when the optimizer stepped


def backward(model, iteration):
    torch.manual_seed(iteration)
    model(torch.rand(4, 3)).square().mean().backward()


def step(optimizer):
    optimizer.step()
    optimizer.zero_grad()


def accumulating(model, optimizer, every=4):
    """A trainer that steps at every fourth iteration."""

    def process(engine, batch):
        backward(model, engine.state.iteration)
        if engine.state.iteration % every == 0:
            step(optimizer)

    return Engine(process)


def test_with_accumulated_gradients_the_average_moves_as_often_as_the_weights():
    model, reference = linear(), linear()
    handler, average = EMAHandler(model, 0.25), ModelAverage(reference)
    optimizer, other = sgd(model), sgd(reference)
    trainer = accumulating(model, optimizer)
    handler.attach(trainer, optimizer=optimizer)
    counts = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: counts.append(handler.num_updates))
    trainer.run([0] * 13)
    for iteration in range(1, 14):
        backward(reference, iteration)
        if iteration % 4 == 0:
            step(other)
            average.update(0.25)
    assert counts == [iteration // 4 for iteration in range(1, 14)]
    assert contents(model) == contents(reference)
    assert contents(handler.ema_model) == contents(average.module)


def test_without_an_optimizer_every_event_updates():
    model = linear()
    handler = EMAHandler(model, 0.25)
    trainer = accumulating(model, sgd(model))
    handler.attach(trainer)
    trainer.run([0] * 8)
    assert handler.num_updates == 8


def test_a_schedule_counts_the_steps():
    model = linear()
    optimizer = sgd(model)
    handler = EMAHandler(model, LinearWarmup(0.5, 0.1, 5))
    trainer = accumulating(model, optimizer, 2)
    handler.attach(trainer, optimizer=optimizer)
    seen = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(trainer.state.ema_momentum))
    trainer.run([0] * 8)
    assert seen == pytest.approx([0.1, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4])


@pytest.mark.parametrize(
    ("event", "due"),
    [
        # iterations 2, 4, 6, 7 and 8 of 9 step
        (Events.ITERATION_COMPLETED, [0, 1, 1, 2, 2, 3, 4, 5, 5]),
        (Events.ITERATION_COMPLETED(every=3), [0, 0, 1, 1, 1, 2, 2, 2, 3]),
        (Events.ITERATION_COMPLETED(every=5), [0, 0, 0, 0, 1, 1, 1, 1, 1]),
        (Events.ITERATION_COMPLETED(every=3) | Events.ITERATION_COMPLETED(every=4), [0, 0, 1, 2, 2, 3, 3, 4, 4]),
        (Events.ITERATION_STARTED, [0, 0, 1, 1, 2, 2, 3, 4, 5]),
    ],
    ids=["each iteration", "every third", "every fifth", "two members", "at the start"],
)
def test_an_event_updates_where_there_was_a_step_since_the_last_update(event, due):
    model = linear()
    optimizer = sgd(model)
    handler = EMAHandler(model, 0.25)

    def process(engine, batch):
        if engine.state.iteration in (2, 4, 6, 7, 8):
            backward(model, engine.state.iteration)
            step(optimizer)

    trainer = Engine(process)
    handler.attach(trainer, event=event, optimizer=optimizer)
    counts = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: counts.append(handler.num_updates))
    trainer.run([0] * 9)
    assert counts == due


def test_two_steps_between_two_events_update_once():
    model = linear()
    optimizer = sgd(model)
    handler = EMAHandler(model, 0.25)
    trainer = Engine(lambda engine, batch: [optimizer.step() for _ in range(2)])
    handler.attach(trainer, optimizer=optimizer)
    trainer.run([0] * 3)
    assert handler.num_updates == 3


def test_a_closure_counts_as_a_step():
    model = linear()
    optimizer = torch.optim.LBFGS(model.parameters())
    handler = EMAHandler(model, 0.25)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    trainer = Engine(lambda engine, batch: optimizer.step(closure))
    handler.attach(trainer, optimizer=optimizer)
    trainer.run([0] * 2)
    assert handler.num_updates == 2


# Optimizers that a GradScaler steps in three ways: it calls step() or not; step() is always called and skips by itself.
OPTIMIZERS = {
    "normal": lambda model: torch.optim.Adam(model.parameters(), lr=0.1),
    "fused Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.1, fused=True),
    "fused AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, fused=True),
    "fused SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, fused=True),
}


@pytest.mark.parametrize("unscales", [False, True], ids=["step alone", "unscale first"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_that_a_grad_scaler_skips_moves_neither_weights_nor_average(kind, unscales):
    model = linear()
    optimizer = OPTIMIZERS[kind](model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    handler = EMAHandler(model, 0.25)
    spoilt = {1: torch.inf, 3: torch.nan, 4: -torch.inf, 7: torch.inf}
    weights, counts = [contents(model)], [0]
    reference = copy.deepcopy(model)
    average = ModelAverage(reference)

    def process(engine, batch):
        scaler.scale(model(torch.rand(4, 3)).square().mean()).backward()
        model.weight.grad[0, 0] += spoilt.get(engine.state.iteration, 0.0)
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    trainer = Engine(process)
    handler.attach(trainer, optimizer=optimizer)

    @trainer.on(Events.ITERATION_COMPLETED)
    def compare():
        weights.append(contents(model))
        counts.append(handler.num_updates)
        if weights[-1] != weights[-2]:
            reference.load_state_dict(model.state_dict())
            average.update(0.25)
        assert contents(handler.ema_model) == contents(average.module)

    trainer.run([0] * 8)
    moved = [before != after for before, after in pairwise(weights)]
    assert moved == [iteration not in spoilt for iteration in range(1, 9)]
    assert [after - before for before, after in pairwise(counts)] == moved


def test_a_disabled_grad_scaler_steps_each_time():
    model = linear()
    optimizer = OPTIMIZERS["fused Adam"](model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    handler = EMAHandler(model, 0.25)

    def process(engine, batch):
        backward(model, engine.state.iteration)
        scaler.step(optimizer)

    trainer = Engine(process)
    handler.attach(trainer, optimizer=optimizer)
    trainer.run([0] * 3)
    assert handler.num_updates == 3


def test_remove_takes_the_hook_off_the_optimizer():
    model = linear()
    optimizer = sgd(model)
    handler = EMAHandler(model, 0.25)
    trainer = accumulating(model, optimizer, 1)
    for _ in range(2):
        handle = handler.attach(trainer, optimizer=optimizer)
        assert len(optimizer._optimizer_step_post_hooks) == 1
        handle.remove()
        handle.remove()
        assert not optimizer._optimizer_step_post_hooks
    with handler.attach(trainer, optimizer=optimizer):
        trainer.run([0] * 2)
    assert not optimizer._optimizer_step_post_hooks
    trainer.run([0] * 2)
    assert handler.num_updates == 2


def test_two_handlers_of_one_optimizer_go_their_own_ways():
    model = linear()
    optimizer = sgd(model)
    handlers = EMAHandler(model, 0.25), EMAHandler(model, 0.25)
    trainer = accumulating(model, optimizer)
    handle = handlers[0].attach(trainer, "first", optimizer=optimizer)
    handlers[1].attach(trainer, "second", event=Events.ITERATION_COMPLETED(every=3), optimizer=optimizer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=4), handle.remove)
    trainer.run([0] * 9)
    assert [handler.num_updates for handler in handlers] == [1, 2]


def test_each_of_two_attachments_waits_for_its_own_optimizer():
    model = linear()
    weights, biases = (torch.optim.SGD([parameter], lr=0.5) for parameter in model.parameters())
    handler = EMAHandler(model, 0.25)

    def process(engine, batch):
        backward(model, engine.state.iteration)
        weights.step()

    first, second = Engine(process), Engine(lambda engine, batch: None)
    handler.attach(first, optimizer=weights)
    handler.attach(second, "other_momentum", optimizer=biases)
    weights.step()
    with pytest.warns(UserWarning, match="'other_momentum' should have stepped in this run, but 2 events passed"):
        second.run([0] * 2)
    assert handler.num_updates == 0
    first.run([0] * 2)
    assert handler.num_updates == 2


def test_attachments_of_one_name_wait_for_their_own_optimizers():
    model = linear()
    weights, biases = (torch.optim.SGD([parameter], lr=0.5) for parameter in model.parameters())
    handler = EMAHandler(model, 0.25)
    first, second = (Engine(lambda engine, batch: None) for _ in range(2))
    handler.attach(first, optimizer=weights)
    handler.attach(second, optimizer=biases)
    weights.step()
    with pytest.warns(UserWarning, match="should have stepped in this run"):
        second.run([0])
    first.run([0])
    assert handler.num_updates == 1


def test_a_step_does_not_wait_for_the_next_attachment():
    model, trainer = linear(), Engine(lambda engine, batch: None)
    optimizer, other = sgd(model), sgd(model)
    handler = EMAHandler(model, 0.25)
    handle = handler.attach(trainer, optimizer=optimizer)
    optimizer.step()
    handle.remove()
    handler.attach(trainer, optimizer=other)
    with pytest.warns(UserWarning, match="should have stepped in this run, but 2 events passed without a step"):
        trainer.run([0] * 2)
    assert handler.num_updates == 0


def test_a_hook_goes_with_its_engine():
    model = linear()
    optimizer = sgd(model)
    trainer = Engine(lambda engine, batch: None)
    EMAHandler(model, 0.25).attach(trainer, optimizer=optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    del trainer
    gc.collect()
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("steps", [[[1]], ["a", None], "ema_momentum", True], ids=["list", "None", "text", "bool"])
def test_a_state_with_steps_that_are_no_names_is_refused_and_changes_nothing(steps):
    handler = EMAHandler(linear(), 0.25)
    state = {**handler.state_dict(), "optimizer_stepped": steps, "num_updates": 5}
    with pytest.raises(TypeError, match="'optimizer_stepped' of the state should be"):
        handler.load_state_dict(state)
    assert handler.num_updates == 0


@pytest.mark.parametrize("what", ["optimizer", torch.optim.SGD, linear(), 0.1], ids=["text", "type", "model", "float"])
def test_something_else_than_an_optimizer_raises_before_anything_changes(what):
    handler, trainer = EMAHandler(linear(), 0.25), Engine(lambda engine, batch: None)
    with pytest.raises(TypeError, match=f"optimizer should be a torch.optim.Optimizer, got {type(what).__name__}"):
        handler.attach(trainer, optimizer=what)
    assert not hasattr(trainer.state, "ema_momentum")
    trainer.run([0])
    assert handler.num_updates == 0
    handler.attach(trainer)


def test_an_optimizer_is_left_alone_where_attach_raises():
    model = linear()
    optimizer = sgd(model)
    for arguments in ({"name": "iteration"}, {"event": "no event"}):
        with pytest.raises(ValueError, match="should"):
            EMAHandler(model, 0.25).attach(Engine(lambda engine, batch: None), optimizer=optimizer, **arguments)
    assert not optimizer._optimizer_step_post_hooks


def test_the_optimizer_of_another_model_is_warned_about():
    model, optimizer = linear(), sgd(linear())
    trainer = Engine(lambda engine, batch: None)
    with pytest.warns(UserWarning, match="parameters of the model that is averaged, but has none of them") as caught:
        EMAHandler(model, 0.25).attach(trainer, optimizer=optimizer)
    assert [warning.filename for warning in caught] == [__file__]


def test_the_optimizer_of_a_part_of_the_model_is_not_warned_about():
    model = nn.Sequential(linear(), linear())
    optimizer = torch.optim.SGD([{"params": linear().parameters()}, {"params": [model[1].bias]}], lr=0.1)
    EMAHandler(torch.compile(model, backend="eager"), 0.25).attach(Engine(lambda e, b: None), optimizer=optimizer)


class Accumulation:
    """A training that steps at every third iteration and updates at every second, and may be resumed anywhere."""

    def __init__(self):
        self.model = linear()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.handler = EMAHandler(self.model, EqualWeight())
        self.trainer = accumulating(self.model, self.optimizer, 3)
        self.handler.attach(self.trainer, event=Events.ITERATION_COMPLETED(every=2), optimizer=self.optimizer)

    def objects(self):
        gradients = Gradients(self.model)
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "handler": self.handler,
            "trainer": self.trainer,
            "gradients": gradients,
        }

    def run(self, last=12):
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=last), self.trainer.terminate)
        self.trainer.run(max_epochs=1, epoch_length=100)
        return contents(self.model), contents(self.handler.ema_model), self.handler.num_updates


class Gradients:
    """What has been accumulated, for a checkpoint in the middle of it."""

    def __init__(self, model):
        self.model = model

    def state_dict(self):
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def load_state_dict(self, state):
        for name, parameter in self.model.named_parameters():
            parameter.grad = state.get(name)


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_run_that_resumes_between_a_step_and_its_update_ends_with_the_same_bits(stop, tmp_path):
    due = Accumulation().run()
    assert due[2] == 4
    killed = Accumulation()
    checkpoint = Checkpoint(killed.objects(), DiskSaver(str(tmp_path)))
    killed.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop), checkpoint)
    killed.run(stop)
    resumed = Accumulation()
    Checkpoint.load_objects(resumed.objects(), tmp_path / checkpoint.last_checkpoint)
    assert resumed.run() == due


def test_the_state_says_whether_a_step_waits_for_its_update():
    model = linear()
    optimizer = sgd(model)
    handler, other = EMAHandler(model, 0.25), EMAHandler(model, 0.25)
    trainer = Engine(lambda engine, batch: None)
    handler.attach(trainer, optimizer=optimizer)
    other_trainer = Engine(lambda engine, batch: None)
    other.attach(other_trainer, optimizer=sgd(model))
    assert handler.state_dict()["optimizer_stepped"] == []
    optimizer.step()
    assert handler.state_dict()["optimizer_stepped"] == ["ema_momentum"]
    other.load_state_dict(handler.state_dict())
    trainer.run([0])
    other_trainer.run([0])
    assert (handler.num_updates, other.num_updates) == (1, 1)
    assert handler.state_dict()["optimizer_stepped"] == []
    trainer.run([0])
    other_trainer.run([0])
    assert (handler.num_updates, other.num_updates) == (1, 1)
