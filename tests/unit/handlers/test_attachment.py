"""attach(optimizer=): the average moves as often as the weights; skip_nonfinite: and never towards a NaN."""

import copy
import gc
import io
from itertools import pairwise

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ignite_ema import EMAHandler, ModelAverage
from ignite_ema.schedules import CopyUntil, EqualWeight, LinearWarmup
from tests.helpers.bits import contents
from tests.helpers.models import module, move

# Only when the optimizer stepped


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 1)


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


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5)


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


# skip_nonfinite


def test_reset_counts_and_warns_from_the_start():
    model = linear()
    handler = EMAHandler(model, 0.25, skip_nonfinite=True)
    trainer = Engine(lambda engine, batch: model.weight.data.fill_(torch.nan))
    handler.attach(trainer)
    for _ in range(2):
        with pytest.warns(UserWarning, match="'weight' holds a NaN"):
            trainer.run([0])
        assert handler.num_skipped == 1
        model.weight.data.fill_(0.0)
        handler.reset()
        assert handler.num_skipped == 0


FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e5m2]
SPOILERS = {"NaN": torch.nan, "inf": torch.inf, "-inf": -torch.inf}
ROLES = {
    "parameter": nn.Parameter,
    "frozen parameter": lambda t: nn.Parameter(t, requires_grad=False),
    "buffer": torch.Tensor.clone,
}


def several(dtype, role):
    """Tensors of many types, and one that will be spoilt: neither the first nor the last of its type."""
    torch.manual_seed(0)
    return module(
        first=nn.Parameter(torch.rand(3)),
        a=role(torch.rand(2, 2).to(dtype)),
        b=role(torch.rand(5).to(dtype)),
        c=role(torch.rand(()).to(dtype)),
        empty=role(torch.rand(0).to(dtype)),
        number=torch.tensor(3),
        last=nn.Parameter(torch.rand(3).bfloat16()),
    )


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("value", SPOILERS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_update_that_meets_a_nan_or_an_infinity_is_left_out_and_counted(dtype, value, role):
    model = several(dtype, ROLES[role])
    average = ModelAverage(model, "update", skip_nonfinite=True)
    before = contents(average.module)
    move(model)
    model.b.detach()[3] = SPOILERS[value]
    with pytest.warns(UserWarning, match="'b' holds a NaN or an infinity.*num_skipped counts") as caught:
        assert average.update(0.5) is False
    assert [warning.filename for warning in caught] == [__file__]
    assert average.update(0.5) is False  # warned about once
    assert average.num_skipped == 2
    assert contents(average.module) == before
    model.b.detach()[3] = 1.0
    assert average.update(0.5) is True
    assert average.num_skipped == 2
    assert contents(average.module) != before
    assert torch.isfinite(average.module.b.to(torch.complex64)).all()


@pytest.mark.parametrize("path", ["first", "a", "b", "c", "last"])
def test_the_path_is_named_whichever_tensor_it_is(path):
    model = several(torch.float32, nn.Parameter)
    average = ModelAverage(model, "update", skip_nonfinite=True)
    getattr(model, path).detach().fill_(torch.nan)
    with pytest.warns(UserWarning, match=f"'{path}' holds"):
        average.update(0.5)


def test_a_nan_of_a_type_without_infinities_is_one():
    model = module(weight=nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn)))
    average = ModelAverage(model, skip_nonfinite=True)
    model.weight.detach()[1] = torch.nan
    with pytest.warns(UserWarning, match="'weight'"):
        assert not average.update(0.5)
    model.weight.detach().fill_(448.0)
    assert average.update(1.0)


def test_an_imaginary_nan_is_one():
    model = module(weight=nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    average = ModelAverage(model, skip_nonfinite=True)
    model.weight.detach()[1] = complex(1, torch.nan)
    with pytest.warns(UserWarning, match="'weight'"):
        assert not average.update(0.5)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_it_is_left_out_at_any_momentum(momentum):
    model = linear()
    average = ModelAverage(model, skip_nonfinite=True)
    before = contents(average.module)
    model.bias.detach().fill_(torch.nan)
    with pytest.warns(UserWarning, match="'bias'"):
        assert not average.update(momentum)
    assert contents(average.module) == before


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float32, 1e30), (torch.float64, 1e300), (torch.float16, 60_000.0), (torch.bfloat16, 3e38)],
    ids=str,
)
def test_large_finite_values_are_not_left_out(dtype, value):
    model = module(a=nn.Parameter(torch.ones(50, dtype=dtype)), b=torch.ones(3, dtype=dtype))
    average = ModelAverage(model, "update", skip_nonfinite=True)
    for tensor in (model.a, model.b):
        tensor.detach().fill_(value)
    assert average.update(0.5)
    assert average.num_skipped == 0
    for tensor in (average.module.a, average.module.b):
        assert torch.allclose(tensor.double(), torch.tensor(0.5 + value / 2, dtype=torch.float64), rtol=1e-2)


@pytest.mark.parametrize("role", ["buffer", "frozen parameter"])
def test_an_infinity_that_the_average_holds_already_is_no_reason(role):
    mask = torch.tensor([0.0, -torch.inf, -torch.inf])
    model = module(weight=nn.Parameter(torch.zeros(2)), mask=ROLES[role](mask))
    average = ModelAverage(model, "update", skip_nonfinite=True)
    model.weight.detach().fill_(1.0)
    assert average.update(0.5)
    assert average.module.weight.tolist() == [0.5, 0.5]
    assert average.module.mask.tolist() == mask.tolist()
    model.mask[0] = -torch.inf
    with pytest.warns(UserWarning, match="'mask'"):
        assert not average.update(0.5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_nan_in_the_place_of_an_infinity_is_a_reason(value):
    model = module(weight=nn.Parameter(torch.zeros(2)), mask=torch.full((2,), -torch.inf))
    average = ModelAverage(model, "update", skip_nonfinite=True)
    model.mask.fill_(value)
    with pytest.warns(UserWarning, match="'mask'"):
        assert not average.update(0.5)
    assert average.module.mask.tolist() == [-torch.inf, -torch.inf]


@pytest.mark.parametrize(
    ("dtype", "held_in"), [(torch.float64, torch.float32), (torch.float32, torch.float16)], ids=str
)
def test_a_value_that_the_type_of_the_average_cannot_hold_is_a_reason(dtype, held_in):
    model = module(weight=nn.Parameter(torch.ones(2, dtype=dtype)))
    average = ModelAverage(model, dtype=held_in, skip_nonfinite=True)
    model.weight.detach()[0] = torch.finfo(held_in).max * 8
    with pytest.warns(UserWarning, match="'weight'"):
        assert not average.update(0.25)
    assert average.module.weight.tolist() == [1.0, 1.0]


def test_an_average_in_another_type_is_guarded_too():
    model = linear().bfloat16()
    average = ModelAverage(model, dtype=torch.float32, skip_nonfinite=True)
    before = contents(average.module)
    model.weight.detach()[0, 1] = torch.inf
    with pytest.warns(UserWarning, match="'weight'"):
        assert not average.update(0.5)
    assert contents(average.module) == before


@pytest.mark.parametrize("rule", ["copy", "ema_train", {"mask": "keep"}], ids=["copied", "left alone", "kept"])
def test_buffers_that_are_not_averaged_are_not_looked_at(rule):
    model = module(weight=nn.Parameter(torch.zeros(2)), mask=torch.zeros(2))
    average = ModelAverage(model, rule, skip_nonfinite=True)
    model.mask.fill_(torch.nan)
    assert average.update(0.5)
    assert average.module.mask.isnan().all() == (rule == "copy")


def test_tensors_that_are_not_averaged_stay_too_where_one_is_left_out():
    model = several(torch.float32, nn.Parameter)
    average = ModelAverage(model, skip_nonfinite=True)
    move(model)
    model.last.detach().fill_(torch.nan)
    with pytest.warns(UserWarning, match="'last'"):
        average.update(1.0)
    assert average.module.number.item() == 3


def test_without_it_a_nan_goes_in():
    model = linear()
    average = ModelAverage(model)
    model.weight.detach().fill_(torch.nan)
    assert average.update(0.5)
    assert (average.num_skipped, average.module.weight.isnan().all().item()) == (0, True)


def test_an_average_that_is_spoilt_already_can_be_healed():
    model = linear()
    average = ModelAverage(model, skip_nonfinite=True)
    average.module.weight.fill_(torch.nan)
    assert average.update(1.0)
    assert contents(average.module) == contents(model)


@pytest.mark.parametrize("what", [None, 1, "yes"], ids=str)
def test_what_is_no_truth_value_raises(what):
    with pytest.raises(TypeError, match=f"skip_nonfinite should be True or False, got {what!r}"):
        ModelAverage(linear(), skip_nonfinite=what)


def spoiling(model, *iterations):
    """A trainer that adds 1 to all weights, but in these iterations spoils one."""

    def process(engine, batch):
        for parameter in model.parameters():
            parameter.detach().nan_to_num_(nan=0.0).add_(1.0)
        if engine.state.iteration in iterations:
            model.bias.detach().fill_(torch.nan)

    return Engine(process)


@pytest.mark.filterwarnings("ignore:'bias' holds a NaN")
def test_the_count_of_updates_does_not_advance_and_the_schedule_waits():
    model = linear()
    handler = EMAHandler(model, CopyUntil(2, EqualWeight()), skip_nonfinite=True)
    trainer = spoiling(model, 1, 3, 4)
    handler.attach(trainer)
    seen = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda: seen.append((handler.num_updates, handler.num_skipped, trainer.state.ema_momentum)),
    )
    trainer.run([0] * 6)
    assert seen == [(0, 1, 1.0), (1, 1, 1.0), (1, 2, 1.0), (1, 3, 1.0), (2, 3, 1.0), (3, 3, 0.5)]


def test_with_a_handler_it_is_warned_about_once():
    model = linear()
    handler = EMAHandler(model, 0.5, skip_nonfinite=True)
    trainer = spoiling(model, 2, 3)
    handler.attach(trainer)
    with pytest.warns(UserWarning, match="'bias' holds a NaN") as caught:
        trainer.run([0] * 4)
    assert len(caught) == 1
    assert (handler.num_updates, handler.num_skipped) == (2, 2)
    assert all(parameter.isfinite().all() for parameter in handler.ema_model.parameters())


@pytest.mark.filterwarnings("ignore:'bias' holds a NaN")
def test_an_update_that_was_left_out_for_a_step_waits_for_the_next_step():
    model = linear()
    optimizer = sgd(model)
    handler = EMAHandler(model, 0.5, skip_nonfinite=True)

    def process(engine, batch):
        model.bias.detach().fill_(torch.nan if engine.state.iteration == 1 else 1.0)
        if engine.state.iteration in (1, 3):
            optimizer.step()

    trainer = Engine(process)
    handler.attach(trainer, optimizer=optimizer)
    counts = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: counts.append((handler.num_updates, handler.num_skipped))
    )
    trainer.run([0] * 4)
    assert counts == [(0, 1), (0, 1), (1, 1), (1, 1)]


@pytest.mark.filterwarnings("ignore:'bias' holds a NaN")
def test_the_number_of_those_left_out_is_saved_and_resumed():
    model = linear()
    handler = EMAHandler(model, 0.5, skip_nonfinite=True)
    trainer = spoiling(model, 1, 2)
    handler.attach(trainer)
    trainer.run([0] * 3)
    file = io.BytesIO()
    torch.save(handler.state_dict(), file)
    file.seek(0)
    resumed = EMAHandler(linear(1), 0.5, skip_nonfinite=True)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert (resumed.num_updates, resumed.num_skipped) == (1, 2)


class Synchronisations(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("aten._local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal", "aten.nonzero")
        self.count += str(func).startswith(names)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [1, 50])
def test_the_check_waits_for_the_device_once_per_type_and_not_per_tensor(count):
    def many(dtype):
        return nn.ParameterList(torch.rand(2).to(dtype) for _ in range(count))

    model = nn.ModuleList([many(torch.float32), many(torch.bfloat16), nn.BatchNorm1d(3)])
    average = ModelAverage(model, "copy", skip_nonfinite=True)
    average.update(0.5)
    with Synchronisations() as synchronisations:
        average.update(0.5)
    assert synchronisations.count == 2
    plain = ModelAverage(model)
    plain.update(0.5)
    with Synchronisations() as synchronisations:
        plain.update(0.5)
    assert synchronisations.count == 0


def test_a_model_without_tensors_is_never_left_out():
    average = ModelAverage(nn.ReLU(), skip_nonfinite=True)
    assert average.update(0.5)
