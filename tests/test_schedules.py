"""Every schedule against its formula, and the fields that it refuses."""

import pickle

import pytest

from ignite_ema import schedules
from ignite_ema.schedules import Constant, LinearWarmup


def linear(momentum, warmup, iters):
    """The rule of ignite.handlers.EMAHandler, by the number of updates already made."""

    def rule(n):
        current = warmup + (momentum - warmup) * n / max(1, iters - 1)
        return min(momentum, current) if momentum >= warmup else max(momentum, current)

    return rule


RULES = [
    (Constant(0.25), lambda n: 0.25),
    (LinearWarmup(0.5, 0.0, 10), linear(0.5, 0.0, 10)),
    (LinearWarmup(0.002, 0.2, 100), linear(0.002, 0.2, 100)),
    (LinearWarmup(0.3, 1.0, 1), linear(0.3, 1.0, 1)),
    (LinearWarmup(0.3, 0.3, 7), linear(0.3, 0.3, 7)),
]


@pytest.mark.parametrize(("schedule", "rule"), RULES, ids=repr)
def test_a_schedule_follows_its_formula(schedule, rule):
    for n in range(200):
        assert schedule(n) == pytest.approx(rule(n), rel=1e-15, abs=0)
        assert 0 <= schedule(n) <= 1


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in RULES], ids=repr)
def test_a_schedule_is_a_value(schedule):
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert eval(repr(schedule), vars(schedules)) == schedule
    with pytest.raises(AttributeError):
        schedule.momentum = 0.1


def test_linear_warm_up_ends_on_the_momentum_exactly():
    # 0.1 + (0.3 - 0.1) is not 0.3 in floating point
    assert LinearWarmup(0.3, 0.1, 5)(4) == 0.3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Constant(1.5), ValueError, r"momentum of Constant should be in \[0, 1\], got 1.5"),
        (lambda: Constant(float("nan")), ValueError, r"should be in \[0, 1\], got nan"),
        (lambda: Constant("0.1"), TypeError, r"should be a number in \[0, 1\], got '0.1'"),
        (lambda: Constant(True), TypeError, "got True"),
        (lambda: LinearWarmup(0.1, -0.1, 5), ValueError, "momentum_warmup of LinearWarmup should be in"),
        (lambda: LinearWarmup(0.1, 0.5, 0), ValueError, "warmup_iters of LinearWarmup should be at least 1, got 0"),
        (lambda: LinearWarmup(0.1, 0.5, 2.5), TypeError, "warmup_iters of LinearWarmup should be an integer, got 2.5"),
    ],
)
def test_a_schedule_refuses_what_is_no_rule(make, error, message):
    with pytest.raises(error, match=message):
        make()
