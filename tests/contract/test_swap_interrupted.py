"""Ctrl-C at every instruction of a swap: the model has its own weights when ``except`` runs, and no mark is left."""

import _thread
import contextlib
import random
import signal
import sys
import threading
import time

import pytest
from ignite.engine import Engine
from torch import nn

from ignite_ema import EMAHandler
from ignite_ema.averaging import swap

pytestmark = pytest.mark.filterwarnings("ignore:.*was changed while:UserWarning")


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
        self.block = getattr(self, f"by_{way.replace(' ', '_')}")
        self.evaluator = Engine(lambda engine, batch: self.weight.item())
        if way == "evaluator":
            self.handler.swap_during(self.evaluator)

    def by_with(self):
        with self.handler.swapped():
            self.weight.item()

    def by_stack(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.handler.swapped())
            self.weight.item()

    def by_context_manager(self):
        with averaged_weights(self.handler):
            self.weight.item()

    def by_changes(self):
        with self.handler.swapped():
            self.model.half()

    def by_decorator(self):
        self.handler.swapped()(self.weight.item)()

    def by_evaluator(self):
        self.evaluator._internal_run_generator = self.evaluator.state.max_epochs = None  # Ignite would go on there
        self.evaluator.run([0])

    def check(self):
        assert self.model[0].weight is self.weight
        assert self.weight.item() == 1.0
        assert self.handler.ema_model[0].weight.item() == 5.0
        assert not swap.any_swapped()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def check_that_all_goes_on(self):
        with self.handler.swapped():
            assert self.weight.item() == 5.0
        self.check()
        self.block()
        self.check()
        assert self.handler.average.update(0.0)


@contextlib.contextmanager
def averaged_weights(handler):
    with handler.swapped():
        yield


WAYS = ["with", "stack", "context manager", "decorator", "evaluator"]
# A generator of the user's, suspended in its block, learns of no exception that a debugger puts into contextlib.
INJECTABLE = ["with", "changes", "decorator", "evaluator"]


class AtInstruction:
    """Calls ``action`` before the n-th instruction that functions of these files run."""

    def __init__(self, n, action, files=("ignite_ema", "contextlib", __file__)):
        self.left, self.action, self.files = n, action, files

    def __call__(self, frame, event, argument):
        if event == "call":
            if not any(name in frame.f_code.co_filename for name in self.files) or frame.f_code.co_name == "__exit__":
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self.left -= 1
        if self.left == 0:
            self.action()
        return self

    def run(self, block):
        before = sys.gettrace()
        sys.settrace(self)
        try:
            block()
        finally:
            sys.settrace(before)


def injected():
    """As a debugger, or another thread, puts an exception into this one."""
    raise KeyboardInterrupt


SOURCES = {"Ctrl-C": _thread.interrupt_main, "injected": injected}


def instructions(subject):
    counter = AtInstruction(-1, None)
    counter.run(subject.block)
    return -1 - counter.left


def interrupt(way, source, ns):
    subject = Subject(way)
    for n in ns:
        at = AtInstruction(n, SOURCES[source])
        try:
            at.run(subject.block)
            for _ in range(1000 if source == "Ctrl-C" else 0):  # not lost, but it may be a millisecond late
                time.sleep(1e-3)
        except KeyboardInterrupt:
            subject.check()
        else:
            assert source == "injected", n
        subject.check()
    subject.check_that_all_goes_on()


@pytest.mark.parametrize("way", ["with", "evaluator"])
def test_ctrl_c_at_an_instruction_of_a_swap(way):
    count = instructions(Subject(way))
    interrupt(way, "Ctrl-C", random.Random(0).sample(range(1, count), 12))


@pytest.mark.parametrize("way", INJECTABLE)
def test_an_exception_injected_at_an_instruction_of_a_swap(way):
    count = instructions(Subject(way))
    interrupt(way, "injected", random.Random(0).sample(range(1, count), 40))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "source"),
    [*((way, "Ctrl-C") for way in ("with", "context manager")), *((way, "injected") for way in INJECTABLE)],
)
def test_an_interruption_at_any_instruction_of_a_swap(way, source):
    interrupt(way, source, range(1, instructions(Subject(way)), 3 if source == "injected" else 10))


class Late(Exception):
    """What the handler of SIGALRM raises."""


def raise_late(number, frame):
    raise Late


def storm(way, swaps):
    """Swaps that are interrupted at times that nobody has chosen; gives how many of them were."""
    subject, dice, interrupted = Subject(way), random.Random(0), 0
    subject.block()
    start = time.perf_counter()
    subject.block()
    took = time.perf_counter() - start
    before = signal.signal(signal.SIGALRM, raise_late)
    for _ in range(swaps):
        try:
            signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-6, took))
            subject.block()
            for _ in range(5000):
                time.sleep(1e-3)
        except Late:
            interrupted += 1
        subject.check()
    signal.signal(signal.SIGALRM, before)
    subject.check_that_all_goes_on()
    return interrupted


def test_a_signal_handler_that_raises_at_any_time_leaves_the_weights():
    assert storm("with", 100) == 100


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_500_interruptions_lose_no_weights(way):
    assert storm(way, 500) == 500


def test_ctrl_c_in_the_block_is_not_held_back():
    subject = Subject()
    with pytest.raises(KeyboardInterrupt), subject.handler.swapped():
        signal.raise_signal(signal.SIGINT)
    subject.check()


def test_a_signal_handler_that_is_set_in_the_block_stays():
    subject, seen = Subject(), []
    with subject.handler.swapped():
        before = signal.signal(signal.SIGINT, lambda *_: seen.append("theirs"))
    signal.raise_signal(signal.SIGINT)
    assert seen == ["theirs"]
    signal.signal(signal.SIGINT, before)  # ours, which goes on to Python's
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_swap_in_another_thread_leaves_signal_handlers_alone():
    subject, seen = Subject(), []

    def swap_there():
        with subject.handler.swapped():
            seen.append((signal.getsignal(signal.SIGINT), subject.weight.item()))

    thread = threading.Thread(target=swap_there)
    thread.start()
    thread.join()
    assert seen == [(signal.default_int_handler, 5.0)]
    subject.check()


def test_a_block_that_is_entered_and_forgotten_gives_the_weights_back():
    subject = Subject()
    forgotten = subject.handler.swapped()
    forgotten.__enter__()
    assert subject.weight.item() == 5.0
    del forgotten
    subject.check()


def test_a_look_at_the_exit_does_not_end_the_block():
    subject = Subject()
    swapped = subject.handler.swapped()
    with swapped:
        assert callable(swapped.__exit__)
        assert subject.weight.item() == 5.0
    subject.check()
    with swapped:  # once more
        assert subject.weight.item() == 5.0
    subject.check()


def test_what_cannot_be_given_back_is_said(monkeypatch):
    subject = Subject()

    def fail(*_):
        raise OSError("no memory")

    message = "should get its own weights back.*OSError: no memory.*load the model"
    with pytest.raises(RuntimeError, match=message), subject.handler.swapped():
        monkeypatch.setattr(swap.kernels, "copy", fail)
    assert not swap.any_swapped()
