"""skip_nonfinite: the average is left alone when a weight that is averaged is NaN or infinite."""

from contextlib import nullcontext

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import TerminateOnNan
from torch import nn

from ignite_ema import EMAHandler, EMAWarning, ModelAverage
from ignite_ema.schedules import CopyUntil, EqualWeight
from tests.helpers.bits import contents
from tests.helpers.files import reloaded
from tests.helpers.models import frozen, linear, module, move

FLOATS = [torch.float32, torch.bfloat16, torch.complex64, torch.float8_e5m2]
SPOILERS = {"NaN": torch.nan, "-inf": -torch.inf}
ROLES = {"parameter": nn.Parameter, "frozen parameter": frozen, "buffer": torch.Tensor.clone}


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


def spoilt(model):
    """Warns of the tensor that is spoilt, once."""
    return pytest.warns(EMAWarning, match=f"'{model}' holds a NaN or an infinity")


@pytest.mark.parametrize("value", SPOILERS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_averaged_buffers_that_meet_one_are_left_alone_and_the_parameters_are_averaged(dtype, value):
    model = several(dtype, ROLES["buffer"])
    average = ModelAverage(model, "update", skip_nonfinite=True)
    before = contents(average.module)
    move(model)
    model.b[3] = SPOILERS[value]
    with pytest.warns(EMAWarning, match="'b' holds a NaN or an infinity, and the averaged buffers of its") as caught:
        assert [average.update(1.0) for _ in range(2)] == [True, True]
    assert len(caught) == 1
    assert (average.num_skipped, average.num_updates) == (0, 2)
    after, online = contents(average.module), contents(model)
    assert {name for name in after if after[name] != online[name]} <= {"a", "b", "c"}
    assert all(after[name] == before[name] for name in ("a", "b", "c"))
    model.b[3] = 1.0
    assert average.update(1.0)
    assert contents(average.module) == contents(model)


@pytest.mark.parametrize("role", ["parameter", "frozen parameter"])
@pytest.mark.parametrize("value", SPOILERS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_update_that_meets_a_nan_or_an_infinity_is_left_out_and_counted(dtype, value, role):
    model = several(dtype, ROLES[role])
    average = ModelAverage(model, "update", skip_nonfinite=True)
    before = contents(average.module)
    move(model)
    model.b.detach()[3] = SPOILERS[value]
    with pytest.warns(EMAWarning, match="'b' holds a NaN or an infinity.*num_skipped counts") as caught:
        assert [average.update(momentum) for momentum in (0.0, 0.5, 1.0)] == [False] * 3
    assert len(caught) == 1
    assert average.num_skipped == 3
    assert contents(average.module) == before
    model.b.detach()[3] = 1.0
    assert average.update(0.5) is True
    assert average.num_skipped == 3
    assert contents(average.module) != before
    assert torch.isfinite(average.module.b.to(torch.complex64)).all()


@pytest.mark.parametrize("role", ["buffer", "frozen parameter"])
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan], ids=str)
def test_an_infinity_that_the_average_holds_already_is_no_reason_but_another_one_is(role, value):
    mask = torch.tensor([0.0, -torch.inf, -torch.inf])
    model = module(weight=nn.Parameter(torch.zeros(2)), mask=ROLES[role](mask.clone()))
    average = ModelAverage(model, "update", skip_nonfinite=True)
    model.weight.detach().fill_(1.0)
    assert average.update(0.5)
    assert average.module.weight.tolist() == [0.5, 0.5]
    assert average.module.mask.tolist() == mask.tolist()
    model.mask[0 if value == -torch.inf else 1] = value
    with spoilt("mask"):
        assert average.update(0.5) == (role == "buffer")
    assert average.module.mask.tolist() == mask.tolist()


@pytest.mark.parametrize(
    ("dtype", "held_in", "value", "goes_in"),
    [
        (torch.float64, None, 1e300, True),
        (torch.bfloat16, None, 3e38, True),
        (torch.float64, torch.float32, 1e300, False),
        (torch.bfloat16, torch.float16, 3e38, False),
        (torch.float8_e4m3fn, None, torch.nan, False),
        (torch.complex64, None, complex(1, torch.nan), False),
    ],
    ids=str,
)
def test_large_values_go_in_unless_the_type_of_the_average_cannot_hold_them(dtype, held_in, value, goes_in):
    model = module(weight=nn.Parameter(torch.ones(50).to(dtype)))
    average = ModelAverage(model, dtype=held_in, skip_nonfinite=True)
    before = contents(average.module)
    model.weight.detach()[1] = value
    with nullcontext() if goes_in else spoilt("weight"):
        assert average.update(0.5) == goes_in
    assert (contents(average.module) != before) == goes_in
    if goes_in:
        assert average.module.weight[1].item() == pytest.approx(value / 2, rel=1e-2)
    model.weight.detach().fill_(2.0)
    assert average.update(1.0)


@pytest.mark.parametrize("policy", ["copy", "ema_train", {"mask": "keep"}], ids=["copied", "left alone", "kept"])
def test_buffers_that_are_not_averaged_are_not_looked_at_and_stay_where_a_parameter_is_spoilt(policy):
    model = module(weight=nn.Parameter(torch.zeros(2)), mask=torch.zeros(2))
    average = ModelAverage(model, policy, skip_nonfinite=True)
    model.mask.fill_(torch.nan)
    assert average.update(0.5)
    assert average.module.mask.isnan().all() == (policy == "copy")
    model.weight.detach().fill_(torch.nan)
    model.mask.fill_(3.0)
    with spoilt("weight"):
        average.update(1.0)
    assert average.module.mask.ne(3.0).all()


def spoiling(model, *iterations):
    """A trainer that adds 1 to all weights, but in these iterations spoils one."""

    def process(engine, batch):
        for parameter in model.parameters():
            parameter.detach().nan_to_num_(nan=0.0).add_(1.0)
        if engine.state.iteration in iterations:
            model.bias.detach().fill_(torch.nan)

    return Engine(process)


def test_the_count_does_not_advance_the_schedule_waits_and_the_state_goes_on():
    model, resumed = linear(), EMAHandler(linear(1), CopyUntil(2, EqualWeight()), skip_nonfinite=True)
    handler = EMAHandler(model, CopyUntil(2, EqualWeight()), skip_nonfinite=True)
    trainer, seen = spoiling(model, 1, 3, 4), []
    handler.attach(trainer)

    @trainer.on(Events.ITERATION_COMPLETED)
    def look():
        seen.append((handler.num_updates, handler.num_skipped, trainer.state.ema_momentum))

    with spoilt("bias") as caught:
        trainer.run([0] * 6)
    assert len(caught) == 1
    assert seen == [(0, 1, 1.0), (1, 1, 1.0), (1, 2, 1.0), (1, 3, 1.0), (2, 3, 1.0), (3, 3, 0.5)]
    assert all(parameter.isfinite().all() for parameter in handler.ema_model.parameters())
    resumed.load_state_dict(reloaded(handler.state_dict()))
    assert (resumed.num_updates, resumed.num_skipped) == (3, 3)


def test_a_nan_that_ends_the_run_stays_out_of_the_average_and_is_warned_about():
    model = linear()
    handler = EMAHandler(model, 0.5)
    trainer = spoiling(model, 3)
    trainer.logger.disabled = True
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan(lambda _: model.bias.detach()))
    handler.attach(trainer)
    with pytest.warns(EMAWarning, match="'bias' holds a NaN .* while the run is being terminated"):
        trainer.run([0] * 5)
    assert handler.num_updates == 2
    assert handler.ema_model.bias.isfinite().all()
