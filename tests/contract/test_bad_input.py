"""Bad input: at every public entrance one sentence that says what should be, what was got, and the way out.

Each row is what somebody does, and what it gets; nothing has changed when it is said.
"""

import contextlib
import io
import math
import re
import threading

import pytest
import torch
from ignite.engine import Engine, EventEnum, Events, EventsList
from ignite.handlers import Checkpoint
from ignite.handlers.param_scheduler import LinearCyclicalScheduler
from torch import nn
from torch.utils._pytree import tree_flatten_with_path

from ignite_ema import EMAHandler, ModelAverage, checkpoints, distributed, schedules
from ignite_ema.cli import main
from tests.helpers.models import net


class Steps(EventEnum):
    DONE = "done"


class Said(Exception):
    """What the command said on stderr when it ended with 1."""


class World:
    """What the rows act upon, and what may not have changed after them."""

    def __init__(self, folder):
        self.folder = folder
        self.model = net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.trainer, self.other, self.own_events, self.evaluator = (Engine(lambda e, b: None) for _ in range(4))
        self.own_events.register_events(*Steps)
        self.other.state.best_score = "high"
        self.handler, self.fresh, self.swapping = (EMAHandler(self.model, 0.25) for _ in range(3))
        self.scheduled = EMAHandler(self.model, schedules.EqualWeight())
        self.average = ModelAverage(self.model)
        self.handler.attach(self.trainer)
        self.handler.num_updates = 3
        self.swapping.swap_during(self.evaluator)
        self.uncopyable = net()
        self.uncopyable.lock = threading.Lock()
        with torch.no_grad():
            self.model[0].weight += 1
        self.write()

    def write(self):
        state, other = net().state_dict(), {name: one + 1 for name, one in net().state_dict().items()}
        files = {
            "average": {"model": state, "ema_model": other},
            "plain": state,
            "two": {"model": state, "ema_g": other, "ema_d": {name: one + 2 for name, one in state.items()}},
            "list": {"shadow_params": list(net().parameters()), "num_updates": 2},
        }
        for name, content in files.items():
            torch.save(content, self.folder / f"{name}.pt")
        (self.folder / "text.pt").write_text("epoch,loss\n1,0.5\n")
        saver = Checkpoint({"model": net(), "ema": net()}, distributed.ShardedSaver(self.folder / "sharded"))
        saver(Engine(lambda engine, batch: None))
        self.sharded = self.folder / "sharded" / "checkpoint_0.pt"

    def engines(self):
        return self.trainer, self.other, self.own_events, self.evaluator

    def handlers(self):
        return self.handler, self.fresh, self.swapping, self.scheduled

    def snapshot(self):
        """Weights, states, momenta, what is attached to the engines, and the files."""
        states = self.model.state_dict(), self.average.state_dict(), [one.state_dict() for one in self.handlers()]
        leaves, structure = tree_flatten_with_path(states)
        return (
            [(path, leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else leaf) for path, leaf in leaves],
            str(structure),
            [id(one) for one in self.model.parameters()],
            [one.requires_grad for one in self.model.parameters()],
            [one.training for one in (self.model, self.handler.ema_model)],
            [one.momentum for one in self.handlers()],
            [sorted(vars(engine.state).items(), key=str) for engine in self.engines()],
            [{event: len(all_) for event, all_ in engine._event_handlers.items() if all_} for engine in self.engines()],
            [len(vars(engine).get("_ignite_ema_attachments", ())) for engine in self.engines()],
            self.evaluator.run,
            len(self.optimizer._optimizer_step_post_hooks),
            {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()},
        )

    def run_with(self, value):
        """One iteration of the trainer with this value of the momentum's attribute, which is put back after it."""
        before = dict(vars(self.trainer.state))
        self.trainer.state.ema_momentum = value
        try:
            self.trainer.run([0])
        finally:
            vars(self.trainer.state).clear()
            vars(self.trainer.state).update(before)

    def inside(self, act):
        before = dict(vars(self.trainer.state))
        try:
            with self.handler.swapped():
                act()
        finally:
            vars(self.trainer.state).clear()
            vars(self.trainer.state).update(before)

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
        assert code == 1
        raise Said(err.getvalue().removesuffix("\n"))


# what somebody does, the kind of error, and its text
ROWS = [
    # EMAHandler
    (
        "the model is no module",
        lambda w: EMAHandler("net"),
        ValueError,
        "model should be an instance of nn.Module or its subclasses, but got model: str; pass the module itself.",
    ),
    (
        "a list of parameters",
        lambda w: EMAHandler(list(w.model.parameters())),
        ValueError,
        "model should be an instance of nn.Module or its subclasses, but got model: list; pass the module itself.",
    ),
    (
        "a momentum of 0",
        lambda w: EMAHandler(w.model, 0.0),
        ValueError,
        "Invalid momentum: 0.0; it should be in (0, 1), as the weight of the new weights (1 - decay).",
    ),
    (
        "a momentum of 1",
        lambda w: EMAHandler(w.model, 1),
        ValueError,
        "Invalid momentum: 1; it should be in (0, 1), as the weight of the new weights (1 - decay).",
    ),
    (
        "a momentum that is negative",
        lambda w: EMAHandler(w.model, -0.1),
        ValueError,
        "Invalid momentum: -0.1; it should be in (0, 1), as the weight of the new weights (1 - decay).",
    ),
    (
        "a momentum that is not a number",
        lambda w: EMAHandler(w.model, math.nan),
        ValueError,
        "Invalid momentum: nan; it should be in (0, 1), as the weight of the new weights (1 - decay).",
    ),
    (
        "a momentum as text",
        lambda w: EMAHandler(w.model, "0.1"),
        TypeError,
        "momentum should be a float in (0, 1) or a schedule, got '0.1'; 0.001 is usual.",
    ),
    (
        "a momentum that is a flag",
        lambda w: EMAHandler(w.model, True),
        TypeError,
        "momentum should be a float in (0, 1) or a schedule, got True; 0.001 is usual.",
    ),
    (
        "no momentum",
        lambda w: EMAHandler(w.model, None),
        TypeError,
        "momentum should be a float in (0, 1) or a schedule, got None; 0.001 is usual.",
    ),
    (
        "the class of a schedule",
        lambda w: EMAHandler(w.model, schedules.EqualWeight),
        TypeError,
        "momentum should be a schedule, got the class EqualWeight; make one: call it.",
    ),
    (
        "a scheduler of Ignite",
        lambda w: EMAHandler(w.model, LinearCyclicalScheduler(w.optimizer, "lr", 0.1, 0.2, 4)),
        TypeError,
        "momentum should be a float or a schedule of the number of updates, got LinearCyclicalScheduler of "
        "Ignite; pass a float and attach the scheduler to the engine, where it drives engine.state.<name>.",
    ),
    (
        "a schedule that gives no momentum",
        lambda w: EMAHandler(w.model, lambda n: 1.5),
        ValueError,
        "the schedule should return a momentum in [0, 1], got 1.5 after 0 updates; it is the weight of the new "
        "weights, 1 - decay.",
    ),
    (
        "a warm-up without its length",
        lambda w: EMAHandler(w.model, 0.1, 0.5),
        ValueError,
        "momentum_warmup and warmup_iters should be given together or not at all, got 0.5 and None.",
    ),
    (
        "a length without its warm-up",
        lambda w: EMAHandler(w.model, 0.1, warmup_iters=5),
        ValueError,
        "momentum_warmup and warmup_iters should be given together or not at all, got None and 5.",
    ),
    (
        "a warm-up beside a schedule",
        lambda w: EMAHandler(w.model, schedules.Constant(0.1), 0.5, 5),
        ValueError,
        "momentum_warmup and warmup_iters should be None where momentum is a schedule, got 0.5 and 5; a schedule "
        "brings its own warm-up.",
    ),
    (
        "a warm-up of no length",
        lambda w: EMAHandler(w.model, 0.1, 0.5, 0),
        ValueError,
        "warmup_iters of LinearWarmup should be an integer of at least 1, as it counts updates, got 0.",
    ),
    (
        "a warm-up outside of 0 to 1",
        lambda w: EMAHandler(w.model, 0.1, 2.0, 5),
        ValueError,
        "momentum_warmup of LinearWarmup should be a number in [0, 1], as the weight of the new weights (1 - "
        "decay), got 2.0.",
    ),
    (
        "an unknown mode of buffers",
        lambda w: EMAHandler(w.model, handle_buffers="average"),
        ValueError,
        "handle_buffers can only be one of 'copy', 'update', 'ema_train', but got average; a mapping decides by "
        "name pattern.",
    ),
    (
        "no mode of buffers",
        lambda w: EMAHandler(w.model, handle_buffers=None),
        ValueError,
        "handle_buffers can only be one of 'copy', 'update', 'ema_train', but got None; a mapping decides by "
        "name pattern.",
    ),
    (
        "an unknown mode for a pattern",
        lambda w: EMAHandler(w.model, handle_buffers={"*": "average"}),
        ValueError,
        "handle_buffers can only map to 'copy', 'update', 'keep', but got 'average' for '*'.",
    ),
    (
        "a pattern that matches nothing",
        lambda w: EMAHandler(w.model, handle_buffers={"bn.*": "update"}),
        ValueError,
        "handle_buffers should have patterns that match a buffer, but got 'bn.*'; the buffers are "
        "'1.running_mean', '1.running_var', '1.num_batches_tracked'.",
    ),
    (
        "a twin that is no module",
        lambda w: EMAHandler(w.model, ema_model={}),
        TypeError,
        "ema_model should be an nn.Module, got dict.",
    ),
    (
        "a twin that is the model",
        lambda w: EMAHandler(w.model, ema_model=w.model),
        RuntimeError,
        "ema_model should have the structure of the model, but the root is one and the same module in the model "
        "and in the twin; build and shard it as the model is.",
    ),
    (
        "a twin of another structure",
        lambda w: EMAHandler(w.model, ema_model=nn.Linear(3, 2)),
        RuntimeError,
        "ema_model should have the structure of the model, but 'bias' is in the twin but not in the model; build "
        "and shard it as the model is.",
    ),
    (
        "a twin of another shape",
        lambda w: EMAHandler(w.model, ema_model=net(width=5)),
        RuntimeError,
        "ema_model should have the structure of the model, but '0.weight' has shape (4, 3) in the model and (5, "
        "3) in the twin; build and shard it as the model is.",
    ),
    (
        "a twin and a type",
        lambda w: EMAHandler(w.model, ema_model=net(), dtype=torch.float64),
        ValueError,
        "dtype and device should be None where ema_model brings its own, got torch.float64 and None; move the "
        "module with ema_model.to(...) first.",
    ),
    (
        "a twin and share_frozen",
        lambda w: EMAHandler(w.model, ema_model=net(), share_frozen=True),
        ValueError,
        "share_frozen should be False where ema_model brings its own parameters, got True; leave ema_model out.",
    ),
    (
        "a type as text",
        lambda w: EMAHandler(w.model, dtype="float32"),
        TypeError,
        "dtype should be a torch.dtype, such as torch.float32, got 'float32'.",
    ),
    (
        "a type that holds no average",
        lambda w: EMAHandler(w.model, dtype=torch.int8),
        ValueError,
        "dtype should be one of torch.float16, torch.bfloat16, torch.float32, torch.float64, got torch.int8.",
    ),
    (
        "a device without values",
        lambda w: EMAHandler(w.model, device="meta"),
        ValueError,
        "device should be one that holds values, got 'meta'; pass 'cpu' or an accelerator.",
    ),
    (
        "share_frozen as text",
        lambda w: EMAHandler(w.model, share_frozen="yes"),
        TypeError,
        "share_frozen should be True or False, got 'yes'.",
    ),
    (
        "skip_nonfinite as a number",
        lambda w: EMAHandler(w.model, skip_nonfinite=1),
        TypeError,
        "skip_nonfinite should be True or False, got 1.",
    ),
    (
        "stochastic_rounding as text",
        lambda w: EMAHandler(w.model, stochastic_rounding="even"),
        TypeError,
        "stochastic_rounding should be True or False, got 'even'.",
    ),
    (
        "a model without values",
        lambda w: EMAHandler(nn.Linear(3, 2, device="meta")),
        RuntimeError,
        "model should be initialised before it is averaged, got one whose 'weight' has no values; materialise it "
        "first.",
    ),
    (
        "a lazy model",
        lambda w: EMAHandler(nn.LazyLinear(2)),
        RuntimeError,
        "model should be initialised before it is averaged, got one whose 'weight' has no shape; run it on one "
        "batch first.",
    ),
    (
        "a model that cannot be copied",
        lambda w: EMAHandler(w.uncopyable),
        RuntimeError,
        "model should be one that copy.deepcopy can copy, got Sequential where 'lock' (lock) is in the way: "
        "cannot pickle '_thread.lock' object; build the twin yourself, the way the model is built, and pass it "
        "as ema_model=.",
    ),
    # attach
    (
        "attached to no engine",
        lambda w: w.fresh.attach(w.model),
        TypeError,
        "engine should be an ignite Engine, the trainer, got Sequential.",
    ),
    (
        "attached to an evaluator's run",
        lambda w: w.swapping.attach(w.evaluator),
        RuntimeError,
        "engine should be one that trains, but swap_during() was called with it and its runs are on the averaged "
        "weights; train with another engine.",
    ),
    (
        "attached twice",
        lambda w: w.handler.attach(w.trainer, "again"),
        RuntimeError,
        "An EMAHandler should be attached to an engine once, but this one is already, as 'ema_momentum'; "
        "remove() the handle of that attachment first, or use an EventsList.",
    ),
    (
        "the optimizer for a name",
        lambda w: w.fresh.attach(w.other, w.optimizer),
        TypeError,
        "name should be a string such as 'ema_momentum', got SGD; an optimizer goes to optimizer=.",
    ),
    (
        "an empty name",
        lambda w: w.fresh.attach(w.other, ""),
        TypeError,
        "name should be a string such as 'ema_momentum', got ''; an optimizer goes to optimizer=.",
    ),
    (
        "a name of the engine's",
        lambda w: w.fresh.attach(w.other, "iteration"),
        ValueError,
        "name should not be an attribute of the engine's own, got 'iteration'; choose another one.",
    ),
    (
        "a name with a value that is no momentum",
        lambda w: w.fresh.attach(w.other, "best_score", warn_if_exists=False),
        TypeError,
        "engine.state.best_score should be a momentum, a number in [0, 1], got 'high'; 0.001 is usual.",
    ),
    (
        "a name that a schedule writes",
        lambda w: w.scheduled.attach(w.trainer),
        ValueError,
        "name should be another than 'ema_momentum', the attribute of EMAHandler(Sequential: 34 parameters in float32 "
        "on cpu; momentum 0.25; 3 updates; attached to an Engine as 'ema_momentum'); two handlers of one name would "
        "drive each other's momentum, so choose a name such as 'generator_momentum'.",
    ),
    (
        "an event of no engine",
        lambda w: w.fresh.attach(w.other, event="iteration_completed"),
        ValueError,
        "event should be one that the engine fires when weights have moved, got 'iteration_completed'; pass one "
        "such as Events.ITERATION_COMPLETED, or register an event of your own with engine.register_events first.",
    ),
    (
        "an event that is a number",
        lambda w: w.fresh.attach(w.other, event=5),
        ValueError,
        "event should be one that the engine fires when weights have moved, got 5; pass one such as "
        "Events.ITERATION_COMPLETED, or register an event of your own with engine.register_events first.",
    ),
    (
        "no events",
        lambda w: w.fresh.attach(w.other, event=EventsList()),
        ValueError,
        "event should contain at least one event, got an empty EventsList.",
    ),
    (
        "the event of an exception",
        lambda w: w.fresh.attach(w.other, event=Events.EXCEPTION_RAISED),
        ValueError,
        "event should be one that the engine fires when weights have moved, got Events.EXCEPTION_RAISED; pass "
        "one such as Events.ITERATION_COMPLETED, or register an event of your own with engine.register_events "
        "first.",
    ),
    (
        "an event of another engine",
        lambda w: w.fresh.attach(w.other, event=Steps.DONE),
        ValueError,
        "event should be one that the engine fires when weights have moved, got Events.DONE; pass one such as "
        "Events.ITERATION_COMPLETED, or register an event of your own with engine.register_events first.",
    ),
    (
        "a filtered event without a counter",
        lambda w: w.fresh.attach(w.own_events, event=Steps.DONE(every=2)),
        ValueError,
        "event should have a counter to be filtered, got Events.DONE(filter=<function "
        "CallableEventWithFilter.every_event_filter.<locals>.wrapper at 0x0>); name an attribute of engine.state "
        "that you count up with engine.register_events(..., event_to_attr={...}).",
    ),
    (
        "parameters for an optimizer",
        lambda w: w.fresh.attach(w.other, optimizer=w.model.parameters()),
        TypeError,
        "optimizer should be a torch.optim.Optimizer, got generator; pass the one that trains.",
    ),
    # setters
    (
        "momentum set beyond 1",
        lambda w: setattr(w.handler, "momentum", 2),
        ValueError,
        "Invalid momentum: 2; it should be in (0, 1), as the weight of the new weights (1 - decay).",
    ),
    (
        "momentum set to a schedule",
        lambda w: setattr(w.handler, "momentum", schedules.Constant(0.1)),
        TypeError,
        "momentum should be set from one float to another, got Constant(momentum=0.1) in place of 0.25; make a "
        "new handler for another schedule.",
    ),
    (
        "a schedule set to a float",
        lambda w: setattr(w.scheduled, "momentum", 0.1),
        TypeError,
        "momentum should be set from one float to another, got 0.1 in place of EqualWeight(); make a new handler "
        "for another schedule.",
    ),
    (
        "a count that is negative",
        lambda w: setattr(w.handler, "num_updates", -1),
        ValueError,
        "num_updates should be 0 or more, got -1: it counts updates.",
    ),
    (
        "a count that is a float",
        lambda w: setattr(w.handler, "num_updates", 2.0),
        TypeError,
        "num_updates should be an integer, got 2.0: it counts updates.",
    ),
    (
        "a count that is a tensor",
        lambda w: setattr(w.handler, "num_updates", torch.tensor(2)),
        TypeError,
        "num_updates should be an integer, got tensor(2): it counts updates.",
    ),
    # the engine's attribute
    (
        "an attribute that is no momentum",
        lambda w: w.run_with(1.5),
        ValueError,
        "engine.state.ema_momentum should be a momentum in [0, 1], got 1.5; it is the weight of the new weights, "
        "1 - decay.",
    ),
    (
        "an attribute that is gone",
        lambda w: w.run_with(None),
        TypeError,
        "engine.state.ema_momentum should be a momentum, a number in [0, 1], got None; 0.001 is usual.",
    ),
    # swap
    (
        "swapping for no engine",
        lambda w: w.handler.swap_during(w.model),
        TypeError,
        "evaluator should be an ignite Engine, got Sequential.",
    ),
    (
        "swapping for the trainer",
        lambda w: w.handler.swap_during(w.trainer),
        RuntimeError,
        "evaluator should be an engine of its own, but this handler is attached to this one and updates the "
        "average there; swap during the runs of another engine.",
    ),
    (
        "swapping twice for one evaluator",
        lambda w: w.swapping.swap_during(w.evaluator),
        RuntimeError,
        "An EMAHandler should swap during the runs of an evaluator once, but this one does so already; remove() "
        "the handle of that call first.",
    ),
    (
        "swapping inside of a swap",
        lambda w: w.inside(lambda: w.handler.swapped().__enter__()),
        RuntimeError,
        "An average should be swapped while the model holds its own weights, but it holds averaged ones now; "
        "leave the block of swapped() first, or the run of the evaluator that swap_during() swaps for.",
    ),
    (
        "updating inside of a swap",
        lambda w: w.inside(lambda: w.trainer.run([0])),
        RuntimeError,
        "An average should be updated while the model holds its own weights, but it holds averaged ones now; "
        "leave the block of swapped() first, or the run of the evaluator that swap_during() swaps for.",
    ),
    (
        "resetting inside of a swap",
        lambda w: w.inside(lambda: w.handler.reset()),
        RuntimeError,
        "An average should be reset while the model holds its own weights, but it holds averaged ones now; leave "
        "the block of swapped() first, or the run of the evaluator that swap_during() swaps for.",
    ),
    (
        "loading inside of a swap",
        lambda w: w.inside(lambda: w.handler.load_state_dict(w.handler.state_dict())),
        RuntimeError,
        "An average should be loaded while the model holds its own weights, but it holds averaged ones now; "
        "leave the block of swapped() first, or the run of the evaluator that swap_during() swaps for.",
    ),
    # load_state_dict
    (
        "a path for a state",
        lambda w: w.handler.load_state_dict("checkpoint.pt"),
        TypeError,
        "The state of an EMAHandler should be a mapping from its state_dict(), got str.",
    ),
    (
        "the state of a model for that of a handler",
        lambda w: w.handler.load_state_dict(w.model.state_dict()),
        ValueError,
        "The state of an EMAHandler should be what its state_dict() gave, but it misses 'ignite_ema_version'; "
        "the state of a model belongs into the averaged twin.",
    ),
    (
        "a state of another model",
        lambda w: w.handler.load_state_dict(EMAHandler(net(width=5)).state_dict()),
        ValueError,
        "'0.weight' of the averaged tensors should have shape (4, 3), got (5, 3): the state is of another model.",
    ),
    (
        "a state of a wider type",
        lambda w: w.handler.load_state_dict(EMAHandler(net().double()).state_dict()),
        ValueError,
        "'0.weight' of the averaged tensors should fit into torch.float32, got torch.float64; hold the average "
        "in that type with dtype=.",
    ),
    (
        "a state of a newer version",
        lambda w: w.handler.load_state_dict(w.handler.state_dict() | {"ignite_ema_version": 9}),
        ValueError,
        "'ignite_ema_version' of the state should be 3, got 9; load it with the ignite_ema that wrote it.",
    ),
    # load_averaged
    (
        "averaged weights from nowhere",
        lambda w: w.handler.load_averaged(w.folder / "nowhere.pt"),
        FileNotFoundError,
        "'FOLDER/nowhere.pt' should be a file, but there is none; check the path.",
    ),
    (
        "averaged weights from a folder",
        lambda w: w.handler.load_averaged(w.folder),
        ValueError,
        "'FOLDER' should be a file, got a directory; name the file in it that holds the weights.",
    ),
    (
        "averaged weights of two",
        lambda w: w.handler.load_averaged(w.folder / "two.pt"),
        ValueError,
        "'FOLDER/two.pt' should hold one average, got several; choose one by its key (--key): 'ema_g' (Ignite), "
        "'ema_d' (Ignite).",
    ),
    (
        "averaged weights of an unknown key",
        lambda w: w.handler.load_averaged(w.folder / "two.pt", key="ema_x"),
        ValueError,
        "key should be one of 'ema_g' (Ignite), 'ema_d' (Ignite) in 'FOLDER/two.pt', got 'ema_x'.",
    ),
    (
        "averaged weights of another model",
        lambda w: w.handler.load_averaged({"ema_model": nn.Linear(3, 2).state_dict()}),
        ValueError,
        "The averaged tensors should be those of this model, but it has no 'weight'; they may be of another "
        "model, for which key= chooses where a file has several, or have a prefix too much.",
    ),
    (
        "averaged weights of another width",
        lambda w: w.handler.load_averaged({"ema_model": net(width=5).state_dict()}),
        ValueError,
        "'0.weight' of the averaged tensors should have shape (4, 3), got (5, 3): the state is of another model.",
    ),
    (
        "averaged weights for a schedule of unknown count",
        lambda w: w.scheduled.load_averaged(w.folder / "average.pt"),
        ValueError,
        "num_updates should be the number of updates that the loaded average has behind it, which the checkpoint "
        "does not say: EqualWeight() would go on with a momentum of 1; pass num_updates=, 0 to start the "
        "schedule.",
    ),
    (
        "averaged weights with a bad count",
        lambda w: w.handler.load_averaged(w.folder / "average.pt", num_updates=-3),
        ValueError,
        "num_updates should be 0 or more, got -3: it counts updates.",
    ),
    (
        "a module for averaged weights",
        lambda w: w.handler.load_averaged(w.model),
        TypeError,
        "source should be, or hold, a mapping such as a state dict, got Sequential; pass the state_dict() of a "
        "module or an average.",
    ),
    (
        "names of another number",
        lambda w: w.handler.load_averaged(w.folder / "list.pt", names={"x": torch.zeros(1)}),
        ValueError,
        "names should be of 6 tensors, as many as torch_ema has in 'FOLDER/list.pt', got 1; pass "
        "dict(model.named_parameters()) of the model that was averaged, without buffers.",
    ),
    # ModelAverage
    (
        "ModelAverage of no module",
        lambda w: ModelAverage(3),
        ValueError,
        "model should be an instance of nn.Module or its subclasses, but got model: int; pass the module itself.",
    ),
    (
        "ModelAverage of an unknown mode",
        lambda w: ModelAverage(w.model, "mean"),
        ValueError,
        "handle_buffers can only be one of 'copy', 'update', 'ema_train', but got mean; a mapping decides by "
        "name pattern.",
    ),
    (
        "an update beyond 1",
        lambda w: w.average.update(1.1),
        ValueError,
        "momentum should be a momentum in [0, 1], got 1.1; it is the weight of the new weights, 1 - decay.",
    ),
    (
        "an update that is not a number",
        lambda w: w.average.update(math.nan),
        ValueError,
        "momentum should be a momentum in [0, 1], got nan; it is the weight of the new weights, 1 - decay.",
    ),
    (
        "an update of nothing",
        lambda w: w.average.update(None),
        TypeError,
        "momentum should be a number in [0, 1], got None; pass it to update(), or a float or a schedule as "
        "ModelAverage(..., momentum=...).",
    ),
    (
        "an update after a layer was added",
        lambda w: w.with_layer(lambda: w.average.update(0.5)),
        RuntimeError,
        "The model should keep the structure that it had when its average was made, but '3' is in the model but "
        "not in the twin; make the change before the average, or make a new average and load the old weights "
        "into it.",
    ),
    (
        "a swap after a layer was added",
        lambda w: w.with_layer(lambda: w.average.swapped().__enter__()),
        RuntimeError,
        "The model should keep the structure that it had when its average was made, but '3' is in the model but "
        "not in the twin; make the change before the average, or make a new average and load the old weights "
        "into it.",
    ),
    (
        "a state without a tensor",
        lambda w: w.average.load_averaged_tensors({"0.weight": torch.zeros(4, 3)}),
        ValueError,
        "The averaged tensors should be those of this model, but the state misses '0.bias'; build the model, and "
        "freeze and share its parameters, as they were then.",
    ),
    (
        "plain weights with a prefix",
        lambda w: w.average.load_plain({f"net.{n}": t for n, t in w.model.state_dict().items()}),
        ValueError,
        "The averaged tensors should be those of this model, but it has no 'net.0.weight'; they may be of "
        "another model, for which key= chooses where a file has several, or have a prefix too much.",
    ),
    # schedules
    (
        "Constant",
        lambda w: schedules.Constant(1.5),
        ValueError,
        "momentum of Constant should be a number in [0, 1], as the weight of the new weights (1 - decay), got 1.5.",
    ),
    (
        "LinearWarmup",
        lambda w: schedules.LinearWarmup(0.1, 0.5, 2.5),
        ValueError,
        "warmup_iters of LinearWarmup should be an integer of at least 1, as it counts updates, got 2.5.",
    ),
    (
        "ExponentialWarmup",
        lambda w: schedules.ExponentialWarmup(0.1, gamma=0),
        ValueError,
        "gamma of ExponentialWarmup should be a number above 0, got 0.",
    ),
    (
        "RatioWarmup",
        lambda w: schedules.RatioWarmup(0.1, warm_up=-3),
        ValueError,
        "warm_up of RatioWarmup should be an integer of at least 1, as it counts updates, got -3.",
    ),
    (
        "Annealing",
        lambda w: schedules.Annealing("0.1"),
        ValueError,
        "momentum of Annealing should be a number in [0, 1], as the weight of the new weights (1 - decay), got '0.1'.",
    ),
    (
        "InverseGamma",
        lambda w: schedules.InverseGamma(min_momentum=0.5, max_momentum=0.1),
        ValueError,
        "min_momentum of InverseGamma should be at most max_momentum, got 0.5 and 0.1.",
    ),
    (
        "InverseGamma's power",
        lambda w: schedules.InverseGamma(power=math.inf),
        ValueError,
        "power of InverseGamma should be a number above 0, got inf.",
    ),
    (
        "Cosine",
        lambda w: schedules.Cosine(0.1, 0.0, total=0),
        ValueError,
        "total of Cosine should be an integer of at least 1, as it counts updates, got 0.",
    ),
    (
        "HalfLife",
        lambda w: schedules.HalfLife(-1),
        ValueError,
        "half_life of HalfLife should be a number above 0, got -1.",
    ),
    (
        "HalfLife's ramp-up",
        lambda w: schedules.HalfLife(10, rampup_ratio=0),
        ValueError,
        "rampup_ratio of HalfLife should be a number above 0, got 0.",
    ),
    (
        "PowerFunction",
        lambda w: schedules.PowerFunction(0.5),
        ValueError,
        "sigma_rel of PowerFunction should be a number in (0, 1/√12 = 0.2887), got 0.5.",
    ),
    (
        "CopyUntil",
        lambda w: schedules.CopyUntil(0, schedules.EqualWeight()),
        ValueError,
        "n of CopyUntil should be an integer of at least 1, as it counts updates, got 0.",
    ),
    (
        "CopyUntil without a schedule",
        lambda w: schedules.CopyUntil(3, 0.1),
        ValueError,
        "schedule of CopyUntil should be a callable from the number of updates to a momentum, got 0.1.",
    ),
    (
        "Rescaled",
        lambda w: schedules.Rescaled(schedules.EqualWeight(), -2),
        ValueError,
        "factor of Rescaled should be a number above 0, got -2.",
    ),
    # checkpoints
    (
        "a file of nowhere",
        lambda w: checkpoints.load_file(w.folder / "nowhere.pt"),
        FileNotFoundError,
        "'FOLDER/nowhere.pt' should be a file, but there is none; check the path.",
    ),
    (
        "a file of text",
        lambda w: checkpoints.load_file(w.folder / "text.pt"),
        ValueError,
        "'FOLDER/text.pt' should be a file that torch.save or safetensors wrote, but it is text; name the file that "
        "holds the weights.",
    ),
    (
        "reading a number",
        lambda w: checkpoints.read(3),
        TypeError,
        "source should be, or hold, a mapping such as a state dict, got int; pass the state_dict() of a module "
        "or an average.",
    ),
    (
        "reading a list",
        lambda w: checkpoints.read([torch.zeros(1)]),
        TypeError,
        "source should be, or hold, a mapping such as a state dict, got list; pass the state_dict() of a module "
        "or an average.",
    ),
    (
        "reading nothing",
        lambda w: checkpoints.read({}),
        ValueError,
        "source should hold averaged weights or a state dict, but is empty; take another checkpoint.",
    ),
    (
        "reading logs",
        lambda w: checkpoints.read({"epoch": 1, "loss": 0.5}),
        ValueError,
        "source should hold averaged weights or a state dict, but has the keys 'epoch', 'loss', none of which is "
        "known; known are the files of ignite_ema, mmengine, timm, Lightning, torch AveragedModel, ema-pytorch, "
        "diffusers, torch_ema, mmcv, mmagic and Ignite. Load it and pass the part that is a state dict.",
    ),
    (
        "reading a list without names",
        lambda w: checkpoints.read(w.folder / "list.pt"),
        ValueError,
        "'FOLDER/list.pt' holds a list of 6 tensors without names, as torch_ema saves them; pass the model, or "
        "its dict(model.named_parameters()), as names (on the command line: --names FILE, a file of that "
        "mapping).",
    ),
    (
        "plain weights for an average",
        lambda w: checkpoints.averaged_state_dict(w.folder / "plain.pt"),
        ValueError,
        "'FOLDER/plain.pt' should hold an average, but it has plain weights alone; use them as they are, or take "
        "another checkpoint.",
    ),
    (
        "writing without a suffix",
        lambda w: checkpoints.save_file(w.model.state_dict(), w.folder / "out"),
        ValueError,
        "'FOLDER/out' should end in .pt, .pth or .safetensors; choose one of them.",
    ),
    (
        "writing over a file",
        lambda w: checkpoints.save_file(w.model.state_dict(), w.folder / "plain.pt"),
        FileExistsError,
        "'FOLDER/plain.pt' exists already; choose another name, or overwrite it with force (--force).",
    ),
    (
        "writing a nested state",
        lambda w: checkpoints.save_file({"model": w.model.state_dict()}, w.folder / "out.pt"),
        TypeError,
        "'model' should be a tensor, got OrderedDict; take it out.",
    ),
    # the command
    (
        "inspect of nowhere",
        lambda w: w.command("inspect", w.folder / "nowhere.pt"),
        Said,
        "ignite-ema: 'FOLDER/nowhere.pt' should be a file, but there is none; check the path.",
    ),
    (
        "inspect of an unknown key",
        lambda w: w.command("inspect", w.folder / "two.pt", "--key", "x"),
        Said,
        "ignite-ema: key should be one of 'ema_g' (Ignite), 'ema_d' (Ignite) in 'FOLDER/two.pt', got 'x'.",
    ),
    (
        "inspect of a list",
        lambda w: w.command("inspect", w.folder / "list.pt"),
        Said,
        "ignite-ema: 'FOLDER/list.pt' holds a list of 6 tensors without names, as torch_ema saves them; pass the "
        "model, or its dict(model.named_parameters()), as names (on the command line: --names FILE, a file of "
        "that mapping).",
    ),
    (
        "inspect of text",
        lambda w: w.command("inspect", w.folder / "text.pt"),
        Said,
        "ignite-ema: 'FOLDER/text.pt' should be a file that torch.save or safetensors wrote, but it is text; name the "
        "file that holds the weights.",
    ),
    (
        "export over a file",
        lambda w: w.command("export", w.folder / "average.pt", w.folder / "plain.pt"),
        Said,
        "ignite-ema: 'FOLDER/plain.pt' exists already; choose another name, or overwrite it with force (--force).",
    ),
    (
        "export over itself",
        lambda w: w.command("export", w.folder / "average.pt", w.folder / "average.pt", "--force"),
        Said,
        "ignite-ema: OUT should be another file than FILE, got 'FOLDER/average.pt' for both; name a new one.",
    ),
    (
        "export to another suffix",
        lambda w: w.command("export", w.folder / "average.pt", w.folder / "out.onnx"),
        Said,
        "ignite-ema: 'FOLDER/out.onnx' should end in .pt, .pth or .safetensors; choose one of them.",
    ),
    # distributed
    (
        "writing in the background alone",
        lambda w: distributed.ShardedSaver(w.folder / "saved", asynchronous=True),
        ValueError,
        "asynchronous should be False where there is no process group, got True; call "
        "torch.distributed.init_process_group first, or save with Ignite's DiskSaver.",
    ),
    (
        "a folder of other files",
        lambda w: distributed.ShardedSaver(w.folder),
        ValueError,
        "'FOLDER' should be empty, but has 'average.pt' among 6 entries; choose another directory, or pass "
        "require_empty=False to go on in this one.",
    ),
    (
        "loading from nowhere",
        lambda w: distributed.load_objects({"ema_handler": w.handler}, w.folder / "nowhere"),
        FileNotFoundError,
        "'FOLDER/nowhere' should be a directory that ShardedSaver wrote, but there is no '.metadata' in it; name "
        "one of its checkpoints.",
    ),
    (
        "loading from a file",
        lambda w: distributed.load_objects({"ema_handler": w.handler}, w.folder / "average.pt"),
        FileNotFoundError,
        "'FOLDER/average.pt' should be a directory that ShardedSaver wrote, but there is no '.metadata' in it; "
        "name one of its checkpoints.",
    ),
]

# What these get is not what it should be yet: the pattern says what it should be like.
BY_PATTERN = [
    ("the class of a model", lambda w: EMAHandler(nn.Linear), r"model should be .*class Linear.*"),
    (
        "a schedule that gives nothing",
        lambda w: EMAHandler(w.model, lambda n: None),
        r"the schedule should return a momentum, .*, got None after 0 updates; 0.001 is usual\.",
    ),
    ("an unknown device", lambda w: EMAHandler(w.model, device="gpu"), r"device should be .*, got 'gpu'\."),
    (
        "a device that is not there",
        lambda w: EMAHandler(w.model, device="cuda:99"),
        r"device should be .*, got 'cuda:99' \(.*\); pass another\.",
    ),
    ("a device that is a number", lambda w: EMAHandler(w.model, device=1.5), r"device should be .*, got 1\.5\."),
    (
        "an attribute that is a decay in percent",
        lambda w: w.run_with("99.9%"),
        r"engine\.state\.ema_momentum should be .*, got '99\.9%'; (?!set it to one).*",
    ),
    (
        "the whole checkpoint for a state",
        lambda w: w.handler.load_state_dict({"ema_handler": w.handler.state_dict()}),
        r"The state .*'ema_handler'.*",
    ),
    (
        "writing into a folder that is not there",
        lambda w: checkpoints.save_file(w.model.state_dict(), w.folder / "no" / "out.pt"),
        r"'FOLDER/no/out\.pt' should be in a folder that exists, .*",
    ),
    (
        "writing a module",
        lambda w: checkpoints.save_file(w.model, w.folder / "out.pt"),
        r"tensors should be a mapping .*state_dict\(\).*",
    ),
    (
        "export to a folder that is not there",
        lambda w: w.command("export", w.folder / "average.pt", w.folder / "no" / "out.pt"),
        r"ignite-ema: 'FOLDER/no/out\.pt' should be in a folder that exists, .*",
    ),
    (
        "gathering a module",
        lambda w: distributed.gathered_state_dict(w.model),
        r"handler should be an EMAHandler, got Sequential.*",
    ),
]


def told(world, act):
    """What is raised, in words that do not depend on the machine."""
    with pytest.raises(Exception, match=".+") as info:
        act(world)
    text = re.sub("0x[0-9a-f]+", "0x0", str(info.value).replace(str(world.folder), "FOLDER"))
    return info.value, text


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    before = world.snapshot()
    yield world
    assert world.snapshot() == before, "nothing should have changed"


@pytest.mark.parametrize(("act", "error", "message"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_bad_input_gets_one_sentence_and_changes_nothing(act, error, message, world):
    raised, text = told(world, act)
    assert text == message
    assert isinstance(raised, error)


@pytest.mark.parametrize(("act", "message"), [row[1:] for row in BY_PATTERN], ids=[row[0] for row in BY_PATTERN])
def test_bad_input_gets_a_sentence_that_helps(act, message, world):
    raised, text = told(world, act)
    assert re.fullmatch(message, text)
    assert isinstance(raised, (TypeError, ValueError, RuntimeError, OSError, Said))


def test_there_are_many_rows_and_none_twice():
    names = [row[0] for row in (*ROWS, *BY_PATTERN)]
    assert len(names) == len(set(names)) >= 100
