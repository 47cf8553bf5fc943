"""What ``ignite.handlers.EMAHandler`` gets wrong and ``ignite_ema.EMAHandler`` must not.

A test with a ``handler_class`` runs once with each of the two; ``theirs`` is what pytorch-ignite 0.5.5 gives. The other
tests are about things that only one of them does. The comments say what goes wrong there.
"""

from importlib.metadata import version

import ignite.handlers
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from torch import nn
from torch.distributed.fsdp import fully_shard

from ignite_ema import EMAHandler, schedules
from tests.helpers.models import constant

# For brevity many tests move the weights before the run, which our handler warns about.
pytestmark = pytest.mark.filterwarnings("ignore:The model has other weights than when:UserWarning")

ITERATION = Events.ITERATION_COMPLETED

of_ignite_0_5_5 = pytest.mark.skipif(version("pytorch-ignite") != "0.5.5", reason="a defect of pytorch-ignite 0.5.5")


def compare(ours, theirs):
    """Parametrises a test with both handlers and what it should see of each."""
    return pytest.mark.parametrize(
        ("handler_class", "expected"),
        [
            pytest.param(EMAHandler, ours, id="ignite_ema"),
            pytest.param(ignite.handlers.EMAHandler, theirs, id="ignite", marks=of_ignite_0_5_5),
        ],
    )


def chain(*values):
    return nn.Sequential(*map(constant, values))


def normalised():
    """A model with a float and an integer buffer, and a trainer that runs batches of ones and twos through it."""
    model = nn.BatchNorm1d(1)
    return model, Engine(lambda engine, batch: model(torch.tensor([[1.0], [2.0]])))


def idle():
    return Engine(lambda engine, batch: None)


def weights(model):
    return [parameter.item() for parameter in model.parameters()]


def trace(engine, read, epoch_length=8, **run):
    """What ``read()`` gives after each iteration of a run."""
    seen = []
    engine.add_event_handler(ITERATION, lambda: seen.append(read()))
    engine.run(range(epoch_length), **run)
    return seen


def update_towards(handler, model, value, updates=1, momentum=None):
    """Sets the weights to ``value`` and lets the handler see it ``updates`` times."""
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    trainer = idle()
    handler.attach(trainer)
    if momentum is not None:
        trainer.state.ema_momentum = momentum
    trainer.run(range(updates))


# The warm-up drives engine.state.ema_momentum, whatever name was asked for.


@compare(ours=[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5], theirs=[0.5] * 8)
@pytest.mark.filterwarnings("ignore:Attribute 'ema_momentum' is not defined:UserWarning")
def test_warm_up_ramps_under_any_name(handler_class, expected):
    trainer = idle()
    handler = handler_class(constant(0.0), momentum=0.5, momentum_warmup=0.0, warmup_iters=6)
    handler.attach(trainer, "generator_momentum")
    assert trace(trainer, lambda: trainer.state.generator_momentum) == pytest.approx(expected)


@compare(ours=[0.25] * 4, theirs=[0.0, 0.25, 0.5, 0.5])
def test_warm_up_does_not_drive_another_handler(handler_class, expected):
    trainer = idle()
    handler_class(constant(0.0), momentum=0.25).attach(trainer)
    ramping = handler_class(constant(0.0), momentum=0.5, momentum_warmup=0.0, warmup_iters=3)
    ramping.attach(trainer, "generator_momentum")
    assert trace(trainer, lambda: trainer.state.ema_momentum, 4) == pytest.approx(expected)


# Buffers are aliased (ema_b.data = model_b.data) instead of copied: all of them by "copy", the others by "update".


@compare(ours=[0, 0, 0, 0, 5, 5, 5, 5], theirs=[0, 0, 0, 0, 5, 6, 7, 8])
@pytest.mark.parametrize("handle_buffers", ["copy", "update"])
def test_buffers_change_at_the_event_only(handler_class, expected, handle_buffers):
    model, trainer = normalised()
    handler = handler_class(model, handle_buffers=handle_buffers)
    handler.attach(trainer, event=ITERATION(every=5))
    assert trace(trainer, lambda: handler.ema_model.num_batches_tracked.item()) == expected


@compare(ours=1.5, theirs=777.0)
def test_loading_into_the_twin_leaves_the_online_buffers_alone(handler_class, expected):
    model = nn.BatchNorm1d(1, momentum=1.0)
    trainer = Engine(lambda engine, batch: model(torch.tensor([[1.0], [2.0]])))
    handler = handler_class(model)
    handler.attach(trainer)
    trainer.run(range(1))
    state = handler.ema_model.state_dict()
    handler.ema_model.load_state_dict({**state, "running_mean": torch.full_like(state["running_mean"], 777.0)})
    assert model.running_mean.item() == expected


@compare(ours=True, theirs=False)
def test_forward_of_the_twin_in_train_mode_leaves_the_online_statistics_alone(handler_class, expected):
    model, trainer = normalised()
    handler = handler_class(model)
    handler.attach(trainer)
    trainer.run(range(1))
    before = model.running_var.clone()
    handler.ema_model.train()(torch.tensor([[0.0], [100.0]]))
    assert torch.equal(model.running_var, before) is expected


# The count of a warm-up is in no state dict.


@compare(ours=[0.40, 0.45, 0.50, 0.50], theirs=[0.0, 0.05, 0.10, 0.15])
def test_resume_in_the_middle_of_a_warm_up_goes_on(handler_class, expected):
    def setup():
        handler = handler_class(constant(0.0), momentum=0.5, momentum_warmup=0.0, warmup_iters=11)
        trainer = idle()
        handler.attach(trainer)
        averaged = handler if hasattr(handler, "state_dict") else handler.ema_model
        return trainer, {"trainer": trainer, "ema": averaged}

    trainer, to_save = setup()
    trainer.run(range(4), max_epochs=2)
    state = {name: value.state_dict() for name, value in to_save.items()}
    trainer, to_load = setup()
    Checkpoint.load_objects(to_load, state)
    seen = trace(trainer, lambda: trainer.state.ema_momentum, epoch_length=4, max_epochs=3)
    assert seen == pytest.approx(expected)


# Half a warm-up is no warm-up, and nothing is checked.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum_warmup": 0.1}, "given together or not at all, got 0.1 and None"),
        ({"warmup_iters": 10}, "given together or not at all, got None and 10"),
        (
            {"momentum_warmup": 0.1, "warmup_iters": -5},
            "warmup_iters of LinearWarmup should be .* at least 1.*, got -5",
        ),
        (
            {"momentum_warmup": 5, "warmup_iters": 3},
            r"momentum_warmup of LinearWarmup should be .* in \[0, 1\].*, got 5",
        ),
    ],
    ids=["momentum_warmup alone", "warmup_iters alone", "negative warmup_iters", "momentum_warmup above 1"],
)
def test_a_warm_up_that_makes_no_sense_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        EMAHandler(constant(0.0), momentum=0.5, **arguments)


@of_ignite_0_5_5
def test_ignite_averages_with_a_momentum_of_5():
    model = constant(1.0)
    handler = ignite.handlers.EMAHandler(model, momentum=0.5, momentum_warmup=5, warmup_iters=3)
    update_towards(handler, model, 3.0)
    assert handler.ema_model.weight.item() == 11.0


# In bfloat16 1 - 0.0002 is 1, and 1 + 0.0002 · 2 too.


@of_ignite_0_5_5
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ignite_leaves_low_precision_weights_where_they_are(dtype):
    model = constant(1.0, dtype)
    handler = ignite.handlers.EMAHandler(model)
    update_towards(handler, model, 2.0, updates=2_000)
    assert handler.ema_model.weight.item() == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_move_when_the_average_is_held_in_float32(dtype):
    model = constant(1.0, dtype)
    handler = EMAHandler(model, dtype=torch.float32)
    update_towards(handler, model, 2.0, updates=2_000)
    assert handler.ema_model.weight.item() == pytest.approx(2 - (1 - 0.0002) ** 2_000, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_that_cannot_move_are_warned_about_once(dtype):
    model = constant(1.0, dtype)
    with pytest.warns(UserWarning, match="too small for the type that holds the average.*dtype=torch.float32") as seen:
        update_towards(EMAHandler(model), model, 2.0, updates=3)
    assert sum("too small" in str(one.message) for one in seen) == 1


# (1 - λ) · x + λ · x is not x: the rounding of 1 - λ acts on every update.


@pytest.mark.parametrize("momentum", [2e-4, 1e-5])
@compare(ours=True, theirs=False)
def test_constant_weights_do_not_drift(handler_class, expected, momentum):
    model = constant(0.7)
    handler = handler_class(model, momentum=momentum)
    update_towards(handler, model, 0.7, updates=2_000)
    assert torch.equal(handler.ema_model.weight, model.weight) is expected


# Compiled modules are averaged as wrappers, with _orig_mod. in every name.


@pytest.mark.parametrize("nested", [False, True], ids=["root", "inner"])
@compare(ours=True, theirs=False)
def test_weights_of_a_compiled_model_load_into_the_plain_one(handler_class, expected, nested):
    plain = chain(1.0, 2.0)
    keys = list(plain.state_dict())
    if nested:
        plain[1] = torch.compile(plain[1], backend="eager")
    handler = handler_class(plain if nested else torch.compile(plain, backend="eager"))
    assert (list(handler.ema_model.state_dict()) == keys) is expected


@compare(ours=True, theirs=False)
def test_ddp_inside_compile_is_looked_through(handler_class, expected, process_group):
    model = constant(1.0)
    wrapped = torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager")
    handler = handler_class(wrapped)
    assert (list(handler.ema_model.state_dict()) == ["weight"]) is expected
    assert (handler.model is model) is expected


# Tensors are paired by position, and broadcast.


def tied_later():
    """Averages three weights, then ties the second to the first; due to average to .5, .5 and 50."""
    model = chain(1.0, 1.0, 100.0)

    def tie():
        model[1].weight = model[0].weight

    return model, tie


def inserted_later():
    model = chain(1.0, 100.0)
    return model, lambda: model.insert(1, constant(7.0))


def reshaped_later():
    model = chain(1.0)

    def reshape():
        model[0].weight = nn.Parameter(torch.zeros(1))

    return model, reshape


STRUCTURES = {
    "tied": (tied_later, "'1.weight' is tied to '0.weight' in the model but not in the twin", [0.5, 50.0, 0.0]),
    "inserted": (inserted_later, "'2' is in the model but not in the twin", [0.5, 3.5]),
    "reshaped": (reshaped_later, r"'0.weight' has shape \(1,\) in the model and \(1, 1\) in the twin", [0.0]),
}


@of_ignite_0_5_5
@pytest.mark.parametrize(("make", "_", "wrong"), STRUCTURES.values(), ids=STRUCTURES)
def test_ignite_mixes_weights_of_a_changed_structure(make, _, wrong):
    model, change = make()
    handler = ignite.handlers.EMAHandler(model, momentum=0.5)
    for parameter in handler.ema_model.parameters():
        nn.init.zeros_(parameter)
    change()
    trainer = idle()
    handler.attach(trainer)
    trainer.run(range(1))
    assert weights(handler.ema_model) == wrong


@pytest.mark.parametrize(("make", "message", "_"), STRUCTURES.values(), ids=STRUCTURES)
def test_a_changed_structure_raises_and_names_the_path(make, message, _):
    model, change = make()
    handler = EMAHandler(model, momentum=0.5)
    before = weights(handler.ema_model)
    change()
    trainer = idle()
    handler.attach(trainer)
    with pytest.raises(RuntimeError, match=message):
        trainer.run(range(1))
    assert weights(handler.ema_model) == before


# "update" takes every RuntimeError for a sign of an integer buffer, and aliases.


def with_buffer(buffer):
    model = constant(0.0)
    model.register_buffer("table", buffer)
    return model


def test_a_buffer_that_changed_its_shape_raises_and_names_the_path():
    model = with_buffer(torch.zeros(2))
    handler = EMAHandler(model, handle_buffers="update")
    model.table = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"'table' has shape \(3,\) in the model and \(2,\) in the twin"):
        update_towards(handler, model, 1.0)
    assert weights(handler.ema_model) == [0.0]


@of_ignite_0_5_5
def test_ignite_aliases_a_buffer_that_changed_its_shape():
    model = with_buffer(torch.zeros(2))
    handler = ignite.handlers.EMAHandler(model, handle_buffers="update")
    model.table = torch.ones(3)
    update_towards(handler, model, 1.0)
    assert handler.ema_model.table.data_ptr() == model.table.data_ptr()


# 0 · NaN is NaN.


@compare(ours=2.0, theirs=pytest.approx(float("nan"), nan_ok=True))
def test_momentum_1_heals_a_nan(handler_class, expected):
    model = constant(0.0)
    handler = handler_class(model)
    nn.init.constant_(handler.ema_model.weight, float("nan"))
    update_towards(handler, model, 2.0, momentum=1.0)
    assert handler.ema_model.weight.item() == expected


# attach() gives back nothing, and repeats itself.


@of_ignite_0_5_5
@pytest.mark.filterwarnings("ignore:Attribute 'ema_momentum' already exists:UserWarning")
def test_ignite_attached_three_times_updates_three_times():
    model = constant(1.0)
    handler, trainer = ignite.handlers.EMAHandler(model, momentum=0.5), idle()
    nn.init.constant_(model.weight, 2.0)
    assert [handler.attach(trainer) for _ in range(3)] == [None] * 3
    trainer.run(range(1))
    assert handler.ema_model.weight.item() == 1.875


def test_attaching_twice_raises_and_updates_once():
    model = constant(1.0)
    handler, trainer = EMAHandler(model, momentum=0.5), idle()
    nn.init.constant_(model.weight, 2.0)
    handler.attach(trainer)
    with pytest.raises(RuntimeError, match="attached to an engine once, but this one is already, as 'ema_momentum'"):
        handler.attach(trainer, "another_name")
    trainer.run(range(1))
    assert handler.ema_model.weight.item() == 1.5
    assert not hasattr(trainer.state, "another_name")


def test_detaching_ends_the_updates_and_takes_the_attribute_away():
    model = constant(1.0)
    handler, trainer = EMAHandler(model, momentum=0.5), idle()
    nn.init.constant_(model.weight, 2.0)
    handle = handler.attach(trainer)
    trainer.run(range(1))
    handle.remove()
    trainer.run(range(3))
    assert handler.ema_model.weight.item() == 1.5
    assert not hasattr(trainer.state, "ema_momentum")


# Members of an EventsList that fire in the same iteration update once each.


@compare(ours=2.25, theirs=2.625)
def test_coinciding_events_update_once(handler_class, expected):
    model = constant(0.0)
    handler, trainer = handler_class(model, momentum=0.5), idle()
    nn.init.constant_(model.weight, 3.0)
    handler.attach(trainer, event=ITERATION | ITERATION(every=2))
    trainer.run(range(2))
    assert handler.ema_model.weight.item() == expected


# The attribute is made before anything is checked.


@compare(ours=False, theirs=True)
def test_a_bad_event_leaves_nothing_on_the_engine(handler_class, expected):
    trainer = idle()
    with pytest.raises(ValueError, match="no_such_event"):
        handler_class(constant(0.0)).attach(trainer, event="no_such_event")
    assert hasattr(trainer.state, "ema_momentum") is expected


@pytest.mark.parametrize("name", ["iteration", "epoch", "max_epochs", "metrics"])
def test_a_name_of_the_engine_raises(name):
    with pytest.raises(ValueError, match=f"not be an attribute of the engine's own, got '{name}'; choose another"):
        EMAHandler(constant(0.0)).attach(idle(), name)


@of_ignite_0_5_5
@pytest.mark.filterwarnings("ignore:Attribute 'iteration' already exists:UserWarning")
def test_ignite_takes_the_iteration_for_the_momentum():
    model = constant(1.0)
    handler, trainer = ignite.handlers.EMAHandler(model), idle()
    handler.attach(trainer, "iteration")
    nn.init.constant_(model.weight, 10.0)
    trainer.run(range(2))
    assert handler.ema_model.weight.item() == 10.0


# Models that cannot be deep-copied: an error from deep inside, and no way out.


def test_a_sharded_model_is_told_to_bring_its_twin(process_group):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    with pytest.raises(RuntimeError, match="sharded as the model is, got None.*pass it as ema_model="):
        EMAHandler(fully_shard(chain(1.0), mesh=mesh))


def weight_normed():
    """With a forward behind it, whose weight is an activation."""
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(1, 1)))
    model(torch.ones(1, 1))
    return model


class Caching(nn.Module):
    """Keeps the last activation, which is part of a graph."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.last = None

    def forward(self, x):
        self.last = self.layer(x)
        return self.last


def caching():
    model = nn.Sequential(Caching())
    model(torch.ones(1, 1))
    return model


NO_COPIES = {"weight_norm": (weight_normed, "'0.weight'"), "cached activation": (caching, "'0.last'")}


@pytest.mark.parametrize(("make", "where"), NO_COPIES.values(), ids=NO_COPIES)
def test_a_model_that_cannot_be_copied_says_why_and_names_the_way_out(make, where):
    message = f"where {where} is the result of a computation.*pass it as ema_model="
    with pytest.raises(RuntimeError, match=message):
        EMAHandler(make())


@pytest.mark.parametrize(("make", "where"), NO_COPIES.values(), ids=NO_COPIES)
def test_a_model_that_cannot_be_copied_brings_its_twin(make, where):
    model, batch = make(), torch.ones(1, 1)
    handler = EMAHandler(model, momentum=0.5, ema_model=make())
    torch.testing.assert_close(handler.ema_model(batch), model(batch).detach())
    before = handler.ema_model(batch)
    update_towards(handler, model, 3.0)
    assert not torch.equal(handler.ema_model(batch), before)


def test_a_lazy_model_is_told_to_run_first():
    model = nn.Sequential(nn.LazyLinear(1))
    with pytest.raises(RuntimeError, match=r"got one whose '0\.weight' has no shape; run it on one batch first"):
        EMAHandler(model)
    model(torch.ones(1, 3))
    assert EMAHandler(model).ema_model[0].weight.shape == (1, 3)


# A twin made inside inference_mode consists of inference tensors, which cannot be updated outside.


def test_a_handler_made_in_inference_mode_works_outside():
    model = constant(0.0)
    with torch.inference_mode():
        handler = EMAHandler(model, momentum=0.5)
    update_towards(handler, model, 1.0)
    assert handler.ema_model.weight.item() == 0.5


@of_ignite_0_5_5
def test_ignite_crashes_after_inference_mode():
    model = constant(0.0)
    with torch.inference_mode():
        handler = ignite.handlers.EMAHandler(model, momentum=0.5)
    with pytest.raises(RuntimeError, match="in-place operation"):
        update_towards(handler, model, 1.0)


# The initial weights are part of the average, however late it starts.


@compare(ours=5.0, theirs=5 - 5 * (1 - 0.0002) ** 100)
def test_weights_loaded_after_construction_count_in_full_after_a_reset(handler_class, expected):
    model = constant(0.0)
    handler = handler_class(model)
    model.load_state_dict(constant(5.0).state_dict())
    if hasattr(handler, "reset"):
        handler.reset()
    update_towards(handler, model, 5.0, updates=100)
    assert handler.ema_model.weight.item() == pytest.approx(expected, rel=1e-4)


@compare(ours=5.0, theirs=5 * 0.0002)
def test_an_average_that_starts_late_starts_from_the_weights_of_then(handler_class, expected):
    copy_first = schedules.CopyUntil(1, schedules.Constant(0.0002))
    model = constant(0.0)
    handler = handler_class(model, momentum=copy_first if handler_class is EMAHandler else 0.0002)
    trainer = Engine(lambda engine, batch: nn.init.constant_(model.weight, 5.0))
    handler.attach(trainer, event=ITERATION(after=9))
    trainer.run(range(10))
    assert handler.ema_model.weight.item() == pytest.approx(expected, rel=1e-4)


# Twins that were aliased from outside are written through.


@compare(ours=4.0, theirs=3.0)
def test_updates_never_write_into_the_model(handler_class, expected):
    model = constant(0.0)
    handler = handler_class(model, momentum=0.5)
    handler.ema_model.load_state_dict(model.state_dict(), assign=True)
    model.load_state_dict(constant(4.0).state_dict())
    update_towards(handler, model, 4.0)
    assert model.weight.item() == expected


# Integers cannot be multiplied by a float in place, and 8-bit floats not at all.

NARROW = pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)


def narrow(dtype):
    """A model of one narrow weight of 1, and a trainer that sets it to 3."""
    model = nn.Module()
    model.codes = nn.Parameter(torch.tensor([1.0]).to(dtype), requires_grad=False)
    return model, Engine(lambda engine, batch: model.codes.copy_(torch.tensor([3.0])))


@NARROW
def test_narrow_parameters_are_updated(dtype):
    model, trainer = narrow(dtype)
    handler = EMAHandler(model, momentum=0.5)
    handler.attach(trainer)
    trainer.run(range(1))
    assert handler.ema_model.codes.float().item() == (3.0 if dtype is torch.int8 else 2.0)


@of_ignite_0_5_5
@NARROW
def test_ignite_crashes_at_narrow_parameters(dtype):
    model, trainer = narrow(dtype)
    ignite.handlers.EMAHandler(model, momentum=0.5).attach(trainer)
    with pytest.raises(RuntimeError, match=r"not implemented|can't be cast"):
        trainer.run(range(1))
