"""Every schedule: one row in FORMULAS, against a formula written down independently of ours."""

import math
import pickle

import pytest

from ignite_ema import schedules
from ignite_ema.schedules import (
    Annealing,
    Constant,
    CopyUntil,
    Cosine,
    Debiased,
    EqualWeight,
    ExponentialWarmup,
    HalfLife,
    InverseGamma,
    LinearWarmup,
    PowerFunction,
    RatioWarmup,
    Rescaled,
)


def ignites_linear(momentum, warmup, iters):
    def formula(n):
        current = warmup + (momentum - warmup) * n / max(1, iters - 1)
        return min(momentum, current) if momentum >= warmup else max(momentum, current)

    return formula


# The schedule, and its decay or momentum as the system that it comes from writes it.
FORMULAS = [
    (Constant(0.25), lambda n: 0.25),
    (LinearWarmup(0.5, 0.0, 10), ignites_linear(0.5, 0.0, 10)),
    (LinearWarmup(0.002, 0.2, 100), ignites_linear(0.002, 0.2, 100)),
    (LinearWarmup(0.3, 1.0, 1), ignites_linear(0.3, 1.0, 1)),
    (ExponentialWarmup(0.01, gamma=50), lambda n: 0.99 * math.e ** (-(1 + n) / 50) + 0.01),
    (RatioWarmup(0.02), lambda n: min(0.02, (1 + n) / (100 + n))),
    (RatioWarmup(0.5, warm_up=10), lambda n: min(0.5, (1 + n) / (10 + n))),
    (Annealing(0.01), lambda n: max(0.01, 100 / (100 + n))),
    (Annealing(0.1, gamma=4), lambda n: max(0.1, 4 / (4 + n))),
    (EqualWeight(), lambda n: 1 / (n + 1)),
    (InverseGamma(), lambda n: 1 - (1 - (1 + n) ** (-2 / 3))),
    (InverseGamma(10, 0.75, 0.01, 0.5), lambda n: 1 - min(0.99, max(0.5, 1 - (1 + n / 10) ** -0.75))),
    (Cosine(0.04, 0.0, 300), lambda n: 0.02 * (math.cos(math.pi * min(n, 300) / 300) + 1)),
    (Cosine(0.0, 0.5, 7), lambda n: 0.25 * (1 - math.cos(math.pi * min(n, 7) / 7))),
    (HalfLife(100), lambda n: 1 - 0.5 ** (1 / 100)),
    (HalfLife(10_000, 0.05, 32), lambda n: 1 - 0.5 ** (32 / min(10_000, 0.05 * (n + 1) * 32))),
    (PowerFunction(0.10), lambda n: 1 - (1 - 1 / (n + 1)) ** (6.937203937601806 + 1)),
    (Debiased(0.01), lambda n: 0.01 / (1 - 0.99 ** (n + 1))),
    (Debiased(1.0), lambda n: 1.0),
    (CopyUntil(1, Constant(0.1)), lambda n: 1.0 if n == 0 else 0.1),
    (CopyUntil(5, Annealing(0.1, 4)), lambda n: 1.0 if n < 5 else max(0.1, 4 / (4 + n - 4))),
    (Rescaled(Constant(0.1), 3), lambda n: 1 - 0.9**3),
    (Rescaled(Debiased(0.01), 3), lambda n: (1 - 0.99**3) / (1 - 0.99 ** (3 * (n + 1)))),
    (Rescaled(LinearWarmup(0.5, 0.0, 10), 0.5), lambda n: 1 - math.sqrt(1 - min(0.5, 0.5 * n / 9))),
]
SCHEDULES = [schedule for schedule, _ in FORMULAS]


def test_every_schedule_has_a_row():
    classes = {name for name in schedules.__all__ if isinstance(getattr(schedules, name), type)}
    assert {type(schedule).__name__ for schedule in SCHEDULES} == classes


@pytest.mark.parametrize(("schedule", "formula"), FORMULAS, ids=map(repr, SCHEDULES))
def test_a_schedule_follows_its_formula(schedule, formula):
    for n in [*range(400), 30_000]:
        assert schedule(n) == pytest.approx(formula(n), rel=1e-10, abs=1e-16)
        assert type(schedule(n)) is float
        assert 0 <= schedule(n) <= 1


def test_a_tiny_momentum_is_rescaled_to_the_last_digit():
    assert Rescaled(Constant(1e-10), 3)(0) == pytest.approx(3e-10 - 3e-20, rel=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_schedule_is_a_value(schedule):
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert eval(repr(schedule), vars(schedules)) == schedule
    with pytest.raises(AttributeError):
        schedule.momentum = 0.1


def test_linear_warm_up_ends_on_the_momentum_exactly():
    # 0.1 + (0.3 - 0.1) is not 0.3 in floating point
    assert LinearWarmup(0.3, 0.1, 5)(4) == 0.3
