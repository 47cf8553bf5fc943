"""Ctrl-C at any time in a swap, also pressed twice: the model has its own weights when ``except`` runs."""

import random
import signal
import time
import timeit
from unittest.mock import Mock

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from ignite_ema import EMAHandler
from ignite_ema.averaging import swap

pytestmark = pytest.mark.filterwarnings("ignore:.*was changed while")

# Files with callbacks of weak references, which run when a tensor is freed: Python ignores what is raised in them.
CALLBACKS = ("/weakref.py", "/_weakrefset.py", "/torch/_dynamo/utils.py")


@pytest.fixture(autouse=True)
def ctrl_c_raises():
    """Also where the tests run in the background, for which a shell lets Ctrl-C be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Subject:
    """A model with a buffer, swapped in one of the ways that users swap in."""

    def __init__(self, way="with"):
        self.model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, affine=False))
        self.weight = self.model[0].weight
        self.handler = EMAHandler(self.model, 0.5)
        self.weight.data.fill_(1.0)
        self.handler.ema_model[0].weight.data.fill_(5.0)
        self.inside = self.weight.item
        self.block = getattr(self, f"by_{way}")
        self.evaluator = Engine(lambda engine, batch: self.inside())
        if way == "evaluator":
            self.handler.swap_during(self.evaluator)

    def by_with(self):
        with self.handler.swapped():
            self.inside()

    def by_cast(self):
        with self.handler.swapped():
            self.model.half()
            self.inside()

    def by_decorator(self):
        self.handler.swapped()(self.inside)()

    def by_evaluator(self):
        self.evaluator._internal_run_generator = self.evaluator.state.max_epochs = None  # Ignite would go on there
        self.evaluator.run([0])

    def check(self):
        assert self.model[0].weight is self.weight
        assert self.weight.item() == 1.0
        assert self.handler.ema_model[0].weight.item() == 5.0
        assert not self.handler.average.is_swapped()


def storm(way, swaps, again):
    """Swaps interrupted at times that nobody has chosen, in the block too if ``again``; gives how many of them were."""
    subject, dice, interrupted, left = Subject(way), random.Random(0), 0, False

    def press(number, frame):
        nonlocal left
        left = False
        code = swap.Swapped.__exit__.__code__
        if frame.f_code is subject.block.__code__ or (frame.f_code, frame.f_lineno) == (code, code.co_firstlineno):
            return  # before __exit__ the weights come back only when the traceback is gone: out of scope
        while frame is not None and frame.f_code is not subject.block.__code__:
            if frame.f_code.co_filename.endswith(CALLBACKS):
                return
            frame = frame.f_back
        if frame is not None:  # in the block, not in this test
            raise KeyboardInterrupt

    def arm():
        nonlocal left
        left = True
        signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-6, took))

    def arm_and_raise():
        arm()
        raise KeyboardInterrupt

    took = min(timeit.repeat(subject.block, number=1))
    before = signal.signal(signal.SIGALRM, press)
    for _ in range(swaps):
        subject.inside = arm_and_raise if again else subject.weight.item
        try:
            if not again:
                arm()
            subject.block()
        except KeyboardInterrupt:
            interrupted += 1
            subject.check()
        while left:
            time.sleep(1e-4)
        subject.check()
    signal.signal(signal.SIGALRM, before)
    torch.set_grad_enabled(True)  # a cast of torch's own may have been interrupted within its no_grad()
    subject.inside = subject.weight.item
    subject.block()
    subject.check()
    assert subject.handler.average.update(0.0)
    return interrupted


@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_while_the_weights_are_swapped_or_given_back_leaves_them(again):
    assert storm("with", 200, again) == 200 or not again


@pytest.mark.slow
@pytest.mark.parametrize("way", ["with", "cast", "decorator", "evaluator"])
def test_thousands_of_interruptions_lose_no_weights(way):
    assert storm(way, 3000, again=False) > 300
    storm(way, 3000, again=True)


def test_a_block_that_is_entered_and_forgotten_gives_the_weights_back():
    subject = Subject()
    forgotten = subject.handler.swapped()
    forgotten.__enter__()
    assert subject.weight.item() == 5.0
    del forgotten
    subject.check()


def test_what_cannot_be_given_back_is_said(monkeypatch):
    subject = Subject()
    with pytest.raises(RuntimeError, match="could not be written.*no memory"), subject.handler.swapped():
        monkeypatch.setattr(swap, "_write", Mock(side_effect=OSError("no memory")))
    assert not subject.handler.average.is_swapped()
