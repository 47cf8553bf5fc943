"""Each way out that a message names is walked: the message is provoked, and then what it says is done, literally.

The table is ``ways_out.txt``. Our own warnings are errors in tests: a way out that ends in another warning fails.
"""
# ruff: noqa: F401, the rows use these names

import copy
import re
import threading
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events, State
from ignite.handlers import Checkpoint
from ignite.handlers.param_scheduler import LinearCyclicalScheduler
from ignite.handlers.state_param_scheduler import LambdaStateScheduler
from torch import nn
from torch.ao.quantization import MinMaxObserver
from torch.distributed._composable import replicate
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from ignite_ema import EMAHandler, ModelAverage, PostHocEMA, schedules
from tests.contract.test_surgery import OTHERS, Program, base
from tests.helpers.bits import contents
from tests.helpers.models import Quantised, constant, linear, made_inside, module, net, sgd
from tests.helpers.runs import Steps, evaluator_of
from tests.unit.averaging.test_twin import LoRA


@contextmanager
def said(words):
    """The block raises an error, or warns, with these words in this order."""
    messages = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except Exception as error:
            messages.append(str(error))
    messages += [str(one.message) for one in caught]
    pattern = ".*".join(map(re.escape, words.split(" ... ")))
    assert any(re.search(pattern, message) for message in messages), messages


def works(made):
    """Whether an update moves all that trains from 0 by a quarter towards 4."""
    average = getattr(made, "average", made)
    trained = {name: one for name, one in average.model.named_parameters() if one.requires_grad}
    twins = dict(average.module.named_parameters())
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.fill_(4.0)
            twins[name].fill_(0.0)
    return average.update(0.25) and all(twins[name].eq(1).all() for name in trained)


def starts(average, source, *, due=None, **options):
    """Whether ``average`` has the tensors of ``due`` after ``source`` is loaded."""
    average.load_averaged(source, **options)
    found, due = getattr(average, "average", average).module.state_dict(), source if due is None else due
    return all(torch.equal(found[name], one) for name, one in due.items())


def moves(type_, momentum, **options):
    """Whether 100 small updates bring an average from 1 to where it should be on its way to 2."""
    model = module(w=nn.Parameter(torch.ones(1000, dtype=type_)))
    average = ModelAverage(model, **options)
    nn.init.constant_(model.w, 2.0)
    for _ in range(100):
        average.update(momentum)
    return average.module.w.double().mean().item() - 1 == pytest.approx(100 * momentum, rel=0.1)


def starts_in_part(average, source, part):
    """Whether it has what fits of ``source``, and says what it has started from the model."""
    with said("'2.weight'"):
        average.load_averaged(source, strict=False)
    average = getattr(average, "average", average)
    own, online = average.module.state_dict(), average.model.state_dict()
    return all(torch.equal(one, part.get(name, online[name])) for name, one in own.items() if name != "2.bias")


def compile_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


def computes(model, ema_model=None, *, is_tied=False):
    """Whether the twin, or of a tied one the model inside swapped(), computes with the averaged weights."""
    with said("'forward' of the model") if is_tied else nullcontext():
        average = ModelAverage(model, ema_model=ema_model)
    due = net().eval()(torch.ones(4, 3))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with average.swapped() if is_tied else nullcontext():
        return torch.equal((model.eval() if is_tied else average.module)(torch.ones(4, 3)), due)


class Run:
    """A trainer that adds 1 to a weight of 0 at each iteration, an evaluator that returns it, and a handler."""

    def __init__(self, momentum=0.5, **options):
        self.model = constant(0.0)
        self.optimizer, self.evaluator = sgd(self.model), evaluator_of(self.model)
        self.trainer, self.ema_handler = Engine(self.step), EMAHandler(self.model, momentum, **options)
        self.attach = self.ema_handler.attach

    def step(self, engine, batch):
        self.model.weight.grad = torch.full((1, 1), -2.0)
        self.optimizer.step()

    def trains(self, due=1.25):
        """Whether the average is this after a run of two iterations."""
        self.trainer.run([0] * 2)
        return self.ema_handler.ema_model.weight.item() == due

    def evaluates(self):
        """Whether the evaluator sees the average, and the model has its own weight again."""
        self.ema_handler.ema_model.weight.fill_(5.0)
        return self.evaluator.run([0]).output == 5.0 and self.model.weight.item() == 0.0

    def resume(self, *names):
        """Loads these from the checkpoint of a run of two iterations."""
        before = Run()
        before.attach(before.trainer)
        before.trains()
        state = {name: getattr(before, name).state_dict() for name in names}
        Checkpoint.load_objects({name: getattr(self, name) for name in names}, state)
        self.trainer.load_state_dict({"iteration": 2, "epoch_length": 2, "max_epochs": 2})

    def inside(self, act):
        with self.ema_handler.swapped():
            act()


def uncopyable(seed=0):
    model = net(seed)
    model.lock = threading.Lock()
    return model


def caching():
    """Keeps its last activation, which is part of a graph."""
    return after(lambda layer: setattr(layer, "last", layer(torch.ones(1, 1))), nn.Linear(1, 1))


def sparse(kind):
    return module(x=kind(torch.ones(2).to_sparse()), y=torch.ones(2), w=nn.Parameter(torch.ones(2)))


def quantised(kind=nn.Parameter):
    """A tensor that has no lerp, and one that has."""
    return module(base=kind(torch.ones(2).as_subclass(Quantised)), w=nn.Parameter(torch.ones(2)))


def nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def after(change, model):
    """The model, changed."""
    change(model)
    return model


def frozen(model, name):
    return after(lambda one: one.get_parameter(name).requires_grad_(False), model)


def observed():
    return nn.Sequential(MinMaxObserver(), nn.Linear(1, 1))


class Quiet(LoRA):
    """As loralib with merge_weights=False."""

    def train(self, mode=True):
        return nn.Module.train(self, mode)


def count(engine):
    engine.state.done = getattr(engine.state, "done", 0) + 1
    engine.fire_event(Steps.DONE)


def on_meta(make):
    with torch.device("meta"):
        return make()


def with_table(register=setattr):
    """A model with a tensor besides its parameters."""
    return after(lambda model: register(model, "table", torch.arange(3.0)), linear())


def sharing(seed=0):
    return ModelAverage(frozen(net(seed), "0.weight"), share_frozen=True)


PLAIN, DOUBLE = net(4).state_dict(), net(4).double().state_dict()
FLOAT = {name: one.float() for name, one in PLAIN.items()}
SPARSE = PLAIN | {"0.weight": PLAIN["0.weight"].to_sparse()}
OTHER_HEAD = PLAIN | {"2.weight": torch.ones(5, 4), "2.bias": torch.ones(5)}
BODY = {name: one for name, one in PLAIN.items() if not name.startswith("2")}
LACKING = {name: one for name, one in PLAIN.items() if name != "2.weight"}
STATE = EMAHandler(net(4)).state_dict()
TRAINING = {"model": PLAIN, "optimizer": {"state": {}, "param_groups": []}}


def rows():
    """The words, what provokes them, and the ways out."""
    for row in re.split(r"^(?=\S)", Path(__file__).with_name("ways_out.txt").read_text(), flags=re.MULTILINE)[2:]:
        words, wrong, *right = [line.strip() for line in row.splitlines() if line.strip()]
        yield pytest.param(wrong, words, right, id=words)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(("wrong", "words", "right"), list(rows()))
def test_what_a_message_says_to_do_works(wrong, words, right, tmp_path, process_group, monkeypatch):
    monkeypatch.setattr(State, "event_to_attr", dict(State.event_to_attr))  # to which register_events() adds for all
    torch.save(PLAIN, tmp_path / "plain.pt")
    names = {**globals(), "folder": tmp_path}
    with said(words):
        exec(wrong, {**names, "r": Run()})
    for way_out in right:
        before, _, last = way_out.rpartition("; ")
        own = {**names, "r": Run()}
        exec(before, own)
        result = eval(last, own)
        assert result is True or works(result), way_out


@pytest.mark.parametrize("share_frozen", [False, True])
@pytest.mark.parametrize("surgery", OTHERS)
def test_after_surgery_a_new_average_starts_from_the_old_one(surgery, share_frozen):
    program = Program(share_frozen)
    program.operate(surgery, 1)
    old, message = program.average, ""
    try:
        old.update(0.5)
    except RuntimeError as error:
        message = str(error)
    if "new.load_averaged(old.state_dict(), strict=False)" not in message:
        return  # it was followed
    if 'to("meta")' in surgery:
        assert "give it values first" in message
        for buffer in program.model[2].to_empty(device="cpu").buffers():  # some are in no state_dict
            buffer.zero_()
        program.model[2].load_state_dict(base()[2].state_dict())
    before = contents(old.module)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*started from the model")
        new = ModelAverage(program.model, "update", share_frozen=share_frozen)
        new.load_averaged(old.state_dict(), strict=False)
    assert contents(new.module)["0.inner.weight"] == before["0.inner.weight"]
    assert new.update(0.5)
