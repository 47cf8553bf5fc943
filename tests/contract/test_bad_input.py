"""Bad input: every public entrance says in a sentence or two what should be, what was got, and the way out.

The table is ``bad_input.txt``. Nothing has changed when the error is raised.
"""
# ruff: noqa: F401, the rows use these names

import contextlib
import io
import math
import re
import threading
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from ignite.handlers.param_scheduler import LinearCyclicalScheduler
from torch import nn
from torch.utils._pytree import tree_flatten_with_path

from ignite_ema import EMAHandler, ModelAverage, PostHocEMA, checkpoints, distributed, schedules
from ignite_ema import posthoc as lengths
from ignite_ema.cli import main
from tests.helpers.models import Tied, frozen, made_inside, module, net
from tests.helpers.runs import Steps, idle
from tests.unit.averaging.test_twin import LoRA

ROW = re.compile(r"^(?:(\S.*)|  (.+) -> (\w+): (.+))$", re.MULTILINE)


def rows():
    """What is done, the error, and the words of its message."""
    for header, value, error, words in ROW.findall(Path(__file__).with_name("bad_input.txt").read_text()):
        if header:
            before, _, after = re.split(r"\b(_)\b", header, maxsplit=1)
        else:
            yield before + value + after, error, words


ROWS = list(rows())


class Said(Exception):
    """What the command said on stderr when it ended with 1."""


class World:
    """What the rows act upon, and what may not have changed after them."""

    def __init__(self, folder):
        self.folder = folder
        self.model, self.tied_model = net(), Tied()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.trainer, self.other, self.evaluator = (idle() for _ in range(3))
        self.other.state.best_score = "high"
        self.handler, self.fresh, self.swapping = (EMAHandler(self.model, 0.25) for _ in range(3))
        self.scheduled = EMAHandler(self.model, schedules.EqualWeight())
        self.listed = EMAHandler(self.model, [0.5, 0.4].__getitem__)
        self.average, self.tied = ModelAverage(self.model), ModelAverage(self.tied_model)
        base = frozen_first()
        self.sharing, self.sharing_plain = ModelAverage(base, share_frozen=True), base.state_dict()
        self.handler.attach(self.trainer)
        self.handler.num_updates = 3
        self.swapping.swap_during(self.evaluator)
        self.uncopyable = net()
        self.uncopyable.lock = threading.Lock()
        self.posthoc, self.posthoc_engine = PostHocEMA(self.model, dirname=folder / "snapshots"), idle()
        engine = self.posthoc_engine
        self.posthoc.attach(engine, snapshot_event=Events.ITERATION_COMPLETED(once=5))
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=8), engine.terminate)
        engine.run([0] * 9)
        with torch.no_grad():
            self.model[0].weight += 1
        self.write()
        self.trainer.logger.disabled = True  # it would print each traceback
        self.state, self.posthoc_state = self.handler.state_dict(), self.posthoc.state_dict()
        self.tensors = self.state["averaged_tensors"]
        self.plain, self.tied_plain = self.model.state_dict(), self.tied_model.state_dict()
        self.names = {**vars(math), **vars(lengths), **vars(schedules), **globals()}
        self.names |= {name: getattr(self, name) for name in dir(self) if not name.startswith("_")}

    def write(self):
        state, other = net().state_dict(), {name: one + 1 for name, one in net().state_dict().items()}
        files = {
            "average": {"model": state, "ema_model": other},
            "plain": state,
            "two": {"model": state, "ema_g": other, "ema_d": {name: one + 2 for name, one in state.items()}},
            "list": {"shadow_params": list(net().parameters()), "num_updates": 2},
        }
        for name, content in (files | {"number": 3}).items():
            torch.save(content, self.folder / f"{name}.pt")
        (self.folder / "folder.pt").mkdir()
        (self.folder / "text.pt").write_text("epoch,loss\n1,0.5\n")

    def snapshot(self):
        """Weights, states, momenta, what is attached to the engines, and the files."""
        handlers = self.handler, self.fresh, self.swapping, self.scheduled, self.listed
        stateful = self.model, self.tied_model, self.average, self.tied, self.sharing, self.posthoc, *handlers
        engines = self.trainer, self.other, self.evaluator, self.posthoc_engine
        leaves, structure = tree_flatten_with_path([one.state_dict() for one in stateful])
        return (
            [(path, leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else leaf) for path, leaf in leaves],
            str(structure),
            [id(one) for one in self.model.parameters()],
            [one.requires_grad for one in self.model.parameters()],
            [one.training for one in (self.model, self.handler.ema_model)],
            [one.momentum for one in handlers],
            [sorted(vars(engine.state).items(), key=str) for engine in engines],
            [{event: len(all_) for event, all_ in engine._event_handlers.items() if all_} for engine in engines],
            [len(vars(engine).get("_ignite_ema_attachments", ())) for engine in engines],
            self.evaluator.run,
            len(self.optimizer._optimizer_step_post_hooks),
            {path: path.is_file() and path.read_bytes() for path in self.folder.rglob("*")},
        )

    @contextlib.contextmanager
    def engine_state_kept(self):
        before = dict(vars(self.trainer.state))
        try:
            yield
        finally:
            vars(self.trainer.state).clear()
            vars(self.trainer.state).update(before)

    def run_with(self, value):
        """One iteration of the trainer with this value of the momentum's attribute, which is put back after it."""
        with self.engine_state_kept():
            self.trainer.state.ema_momentum = value
            self.trainer.run([0])

    def inside(self, act):
        with self.engine_state_kept(), self.handler.swapped():
            act()

    def with_layer(self, act):
        self.model.add_module("3", nn.Linear(2, 2))
        try:
            act()
        finally:
            del self.model[3]

    def command(self, *arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
        assert (code, out.getvalue(), err.getvalue().count("\n")) == (1, "", 1)
        raise Said(err.getvalue().removesuffix("\n"))


def without(mapping, *keys):
    return {key: entry for key, entry in mapping.items() if key not in keys}


def frozen_first(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))


def partly(model):
    """A twin that has a parameter of the model."""
    twin = net()
    twin[0].weight = model[0].weight
    return twin


def zero_3():
    model = nn.Linear(1, 1)
    model.weight.ds_id = 0
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(("act", "error", "words"), ROWS, ids=[act for act, *_ in ROWS])
def test_bad_input_says_what_is_wrong_and_changes_nothing(act, error, words, world):
    before = world.snapshot()
    with pytest.raises(Exception, match=".*".join(map(re.escape, words.split(" ... ")))) as caught:
        exec(act, dict(world.names))
    assert type(caught.value).__name__ == error
    assert str(caught.value).count(". ") <= 2, "a sentence or two"
    assert world.snapshot() == before, "nothing should have changed"


def test_there_are_many_rows_and_none_twice():
    acts = [act for act, *_ in ROWS]
    assert len(acts) == len(set(acts)) > 200
