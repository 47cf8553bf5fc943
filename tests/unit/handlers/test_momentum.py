"""The momentum of a handler: driven through the engine's attribute, or by a schedule."""

import ignite.handlers
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers.state_param_scheduler import LambdaStateScheduler

from ignite_ema import EMAHandler
from tests.helpers.models import constant
from tests.helpers.runs import averaged, trainer_for


def momenta(trainer, *names):
    """Collects what the attributes show after each iteration's handlers."""
    seen = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: seen.append(tuple(getattr(engine.state, name) for name in names))
    )
    return seen


# The momentum


def test_average_is_that_of_ignites_handler():
    ours, theirs = constant(), constant()
    trainer = trainer_for(ours, theirs)
    handler, reference = EMAHandler(ours, 0.25, 0.5, 3), ignite.handlers.EMAHandler(theirs, 0.25, 0.5, 3)
    handler.attach(trainer, "ours")
    reference.attach(trainer, "ema_momentum")
    seen = momenta(trainer, "ours", "ema_momentum")
    trainer.run([0] * 6)
    assert averaged(handler) == pytest.approx(reference.ema_model.weight.item(), rel=1e-6)
    assert all(ours == theirs for ours, theirs in seen)


@pytest.mark.parametrize(("warmup", "expected"), [(0.0, [0, 0.25, 0.5, 0.5]), (1.0, [1, 0.75, 0.5, 0.5])])
def test_warm_up_is_published_as_it_is_used(warmup, expected):
    model = constant()
    trainer = trainer_for(model)
    handler = EMAHandler(model, 0.5, warmup, 3)
    handler.attach(trainer)
    assert trainer.state.ema_momentum == warmup
    seen = momenta(trainer, "ema_momentum")
    trainer.run([0] * 4)
    assert [m for (m,) in seen] == expected
    reference = 0.0
    for weight, momentum in zip(range(1, 5), expected, strict=True):
        reference += momentum * (weight - reference)
    assert averaged(handler) == pytest.approx(reference, rel=1e-6)
    assert handler.num_updates == 4


def test_count_advances_with_updates_not_iterations():
    model = constant()
    trainer = trainer_for(model)
    handler = EMAHandler(model, lambda n: 1 / (n + 1))
    handler.attach(trainer, event=Events.ITERATION_COMPLETED(every=3))
    trainer.run([0] * 9)
    assert handler.num_updates == 3
    assert averaged(handler) == pytest.approx((3 + 6 + 9) / 3)


def test_plain_momentum_is_read_from_the_engine():
    model = constant()
    trainer = trainer_for(model)
    handler = EMAHandler(model, 0.25)
    handler.attach(trainer)
    trainer.state.ema_momentum = 1.0
    trainer.run([0] * 2)
    assert averaged(handler) == 2.0


def test_a_state_param_scheduler_drives_a_plain_momentum():
    model = constant()
    trainer = trainer_for(model)
    scheduler = LambdaStateScheduler(lambda event_index: 1 / event_index, param_name="ema_momentum", create_new=True)
    scheduler.attach(trainer, Events.ITERATION_COMPLETED)
    handler = EMAHandler(model, 0.25)
    handler.attach(trainer, warn_if_exists=False)
    trainer.run([0] * 4)
    assert averaged(handler) == pytest.approx((1 + 2 + 3 + 4) / 4)


@pytest.mark.parametrize(
    ("value", "error"),
    [(-0.1, ValueError), (1.1, ValueError), (float("nan"), ValueError), (None, TypeError), ("x", TypeError)],
)
def test_a_driven_momentum_outside_0_to_1_raises_and_names_the_attribute(value, error):
    model = constant(3.0)
    trainer = Engine(lambda engine, batch: None)
    handler = EMAHandler(model, 0.25)
    handler.attach(trainer, "generator_momentum")
    trainer.state.generator_momentum = value
    with pytest.raises(error, match=r"engine\.state\.generator_momentum should be a momentum"):
        trainer.run([0])
    assert averaged(handler) == 3.0
    assert handler.num_updates == 0


@pytest.mark.parametrize("value", [torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64), 1, 0])
def test_a_driven_momentum_may_be_any_number(value):
    model = constant()
    trainer = trainer_for(model)
    handler = EMAHandler(model, 0.25)
    handler.attach(trainer)
    trainer.state.ema_momentum = value
    trainer.run([0])
    assert averaged(handler) == float(value)


def test_a_schedule_that_returns_no_momentum_raises():
    with pytest.raises(
        ValueError, match=r"^the schedule should return a momentum in \[0, 1\], got 2 after 0 updates; it"
    ):
        EMAHandler(constant(), lambda n: 2)
    model = constant()
    trainer = trainer_for(model)
    EMAHandler(model, lambda n: 0.5 + n / 4).attach(trainer)
    with pytest.raises(ValueError, match=r"^the schedule should return .* got 1.25 after 3 updates; it is"):
        trainer.run([0] * 9)


def test_two_handlers_never_touch_each_others_momentum():
    generator, discriminator = constant(), constant()
    trainer = trainer_for(generator, discriminator)
    first, second = EMAHandler(generator, 0.5, 0.0, 5), EMAHandler(discriminator, 0.25)
    first.attach(trainer, "generator_momentum")
    second.attach(trainer, "discriminator_momentum", event=Events.ITERATION_COMPLETED(every=2))
    seen = momenta(trainer, "generator_momentum", "discriminator_momentum")
    trainer.run([0] * 4)
    assert seen == [(0.0, 0.25), (0.125, 0.25), (0.25, 0.25), (0.375, 0.25)]
    assert averaged(second) == 0.25 * 4 + 0.75 * 0.25 * 2
