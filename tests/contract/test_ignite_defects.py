"""What ``ignite.handlers.EMAHandler`` gets wrong and ``ignite_ema.EMAHandler`` must not.

A test with a ``handler_class`` runs once with each of the two; ``theirs`` is what pytorch-ignite 0.5.5 gives. The
comments say what goes wrong there. What it accepts and should refuse are rows of the bad input; models that cannot be
deep-copied (15, 17) are rows of the ways out.
"""

from contextlib import nullcontext
from importlib.metadata import version

import ignite.handlers
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from torch import nn

from ignite_ema import EMAHandler, schedules
from tests.helpers.models import compiled, constant
from tests.helpers.runs import idle

# For brevity many tests move the weights before the run, which our handler warns about.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The model has other weights than when:ignite_ema.EMAWarning",
    "ignore:Attribute 'ema_momentum' (is not defined|already exists):UserWarning",
)

ITERATION = Events.ITERATION_COMPLETED
RAISES = "it raises"

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


def refused(expected, error, words):
    """The block raises this error if it is expected to raise."""
    return pytest.raises(error, match=words) if expected == RAISES else nullcontext()


def chain(*values):
    return nn.Sequential(*map(constant, values))


def weights(model):
    return [parameter.item() for parameter in model.parameters()]


def trace(engine, read, epoch_length=8, **run):
    """What ``read()`` gives after each iteration of a run."""
    seen = []
    engine.add_event_handler(ITERATION, lambda: seen.append(read()))
    engine.run(range(epoch_length), **run)
    return seen


def update_towards(handler, model, value, updates=1, momentum=None, event=ITERATION):
    """Sets the weights to ``value`` and lets the handler see it ``updates`` times; the average of the first then."""
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    trainer = idle()
    handler.attach(trainer, event=event)
    if momentum is not None:
        trainer.state.ema_momentum = momentum
    trainer.run(range(updates))
    return weights(handler.ema_model)[0]


# 1. The warm-up drives engine.state.ema_momentum, whatever name was asked for.
@compare(ours=([0.0, 0.25, 0.5, 0.5], [0.25] * 4), theirs=([0.5] * 4, [0.0, 0.25, 0.5, 0.5]))
def test_warm_up_ramps_under_any_name_and_does_not_drive_another_handler(handler_class, expected):
    trainer = idle()
    handler_class(constant(), momentum=0.25).attach(trainer)
    handler_class(constant(), momentum=0.5, momentum_warmup=0.0, warmup_iters=3).attach(trainer, "generator_momentum")
    seen = trace(trainer, lambda: (trainer.state.generator_momentum, trainer.state.ema_momentum), 4)
    assert [*zip(*seen, strict=True)] == [pytest.approx(momenta) for momenta in expected]


# 2, 3. Buffers are aliased (ema_b.data = model_b.data) instead of copied: all by "copy", the others by "update".
@pytest.fixture
def normalised():
    """A model with a float and an integer buffer, and a trainer that runs batches of ones and twos through it."""
    model = nn.BatchNorm1d(1, momentum=1.0)
    return model, Engine(lambda engine, batch: model(torch.tensor([[1.0], [2.0]])))


@compare(ours=[0, 0, 0, 0, 5, 5, 5, 5], theirs=[0, 0, 0, 0, 5, 6, 7, 8])
@pytest.mark.parametrize("handle_buffers", ["copy", "update"])
def test_buffers_change_at_the_event_only(handler_class, expected, handle_buffers, normalised):
    model, trainer = normalised
    handler = handler_class(model, handle_buffers=handle_buffers)
    handler.attach(trainer, event=ITERATION(every=5))
    assert trace(trainer, lambda: handler.ema_model.num_batches_tracked.item()) == expected


@compare(ours=(1.5, True), theirs=(777.0, False))
def test_loading_into_the_twin_and_training_it_leave_the_online_buffers_alone(handler_class, expected, normalised):
    model, trainer = normalised
    handler = handler_class(model)
    handler.attach(trainer)
    trainer.run(range(1))
    variance = model.running_var.clone()
    handler.ema_model.load_state_dict({**handler.ema_model.state_dict(), "running_mean": torch.tensor([777.0])})
    online = model.running_mean.item()
    handler.ema_model.train()(torch.tensor([[0.0], [100.0]]))
    assert (online, torch.equal(model.running_var, variance)) == expected


# 4. The count of a warm-up is in no state dict.
@compare(ours=[0.40, 0.45, 0.50, 0.50], theirs=[0.0, 0.05, 0.10, 0.15])
def test_resume_in_the_middle_of_a_warm_up_goes_on(handler_class, expected):
    def setup():
        handler = handler_class(constant(), momentum=0.5, momentum_warmup=0.0, warmup_iters=11)
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


# 6. In bfloat16 1 - 0.0002 is 1, and 1 + 0.0002 · 2 too.
@compare(ours=pytest.approx(2 - (1 - 0.0002) ** 1_000, rel=1e-6), theirs=1.0)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_move_when_the_average_is_held_in_float32(handler_class, expected, dtype):
    model = constant(1.0, dtype)
    handler = handler_class(model, **({"dtype": torch.float32} if handler_class is EMAHandler else {}))
    assert update_towards(handler, model, 2.0, updates=1_000) == expected


# 7. (1 - λ) · x + λ · x is not x: the rounding of 1 - λ acts on every update.
@pytest.mark.parametrize("momentum", [2e-4, 1e-5])
@compare(ours=True, theirs=False)
def test_constant_weights_do_not_drift(handler_class, expected, momentum):
    model = constant(0.7)
    average = update_towards(handler_class(model, momentum=momentum), model, 0.7, updates=2_000)
    assert (average == model.weight.item()) is expected


# 8. Compiled modules are averaged as wrappers, with _orig_mod. in every name.
@pytest.mark.parametrize("where", ["root", "inner", "around DDP"])
@compare(ours=True, theirs=False)
def test_weights_of_a_compiled_model_load_into_the_plain_one(handler_class, expected, where, process_group):
    plain = model = chain(1.0, 2.0)
    keys = list(plain.state_dict())
    if where == "inner":
        plain[1] = compiled(plain[1])
    else:
        model = compiled(nn.parallel.DistributedDataParallel(plain) if where == "around DDP" else plain)
    handler = handler_class(model)
    assert (list(handler.ema_model.state_dict()) == keys) is expected
    assert where != "around DDP" or (handler.model is plain) is expected


# 9, 10. Tensors are paired by position, and broadcast; "update" takes every RuntimeError for an integer buffer's.
def tie(model):
    model[1].weight = model[0].weight


STRUCTURES = {
    "tied": (tie, "'1.weight' is tied to '0.weight' in the model but not in the twin", [0.5, 50.0, 0.0]),
    "inserted": (
        lambda model: model.insert(1, constant(7.0)),
        r"'2\.weight' is in the twin but not in the model|'3\.\w+' is in the model but not in the twin",
        [0.5, 3.5, 0.5],
    ),
    "reshaped": (
        lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(1))),
        r"'0.weight' has shape \(1,\) in the model and .*\(1, 1\) in the twin",
        [0.0, 0.5, 50.0],
    ),
    "a buffer reshaped": (
        lambda model: setattr(model[2], "table", torch.ones(3)),
        r"'2.table' has shape \(3,\) in the model and .*\(2,\) in the twin",
        [0.5, 0.5, 50.0],
    ),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@compare(ours=RAISES, theirs="it mixes them")
def test_a_changed_structure_raises_and_names_the_path(handler_class, expected, structure):
    change, message, wrong = STRUCTURES[structure]
    model = chain(1.0, 1.0, 100.0)
    model[2].register_buffer("table", torch.zeros(2))
    handler, trainer = handler_class(model, momentum=0.5, handle_buffers="update"), idle()
    for parameter in handler.ema_model.parameters():
        nn.init.zeros_(parameter)
    change(model)
    handler.attach(trainer)
    with refused(expected, RuntimeError, message):
        trainer.run(range(1))
    assert weights(handler.ema_model) == ([0.0] * 3 if expected == RAISES else wrong)
    if structure == "a buffer reshaped" and expected != RAISES:
        assert handler.ema_model[2].table.data_ptr() == model[2].table.data_ptr()


# 11. 0 · NaN is NaN.
@compare(ours=2.0, theirs=pytest.approx(float("nan"), nan_ok=True))
def test_momentum_1_heals_a_nan(handler_class, expected):
    model = constant()
    handler = handler_class(model)
    nn.init.constant_(handler.ema_model.weight, float("nan"))
    assert update_towards(handler, model, 2.0, momentum=1.0) == expected


# 12. attach() gives back nothing, and repeats itself.
@compare(ours=1.5, theirs=1.875)
def test_attached_three_times_it_updates_once_and_ends_with_its_handle(handler_class, expected):
    model = constant(1.0)
    handler, trainer = handler_class(model, momentum=0.5), idle()
    nn.init.constant_(model.weight, 2.0)
    handle = handler.attach(trainer)
    raises = RAISES if handler_class is EMAHandler else None
    for _ in range(2):
        with refused(raises, RuntimeError, "once, but this engine has Attachment.* as 'ema_momentum'"):
            handler.attach(trainer)
    trainer.run(range(1))
    assert handler.ema_model.weight.item() == expected
    assert (handle is None) == (handler_class is not EMAHandler)
    if handle is not None:
        handle.remove()
        trainer.run(range(3))
        assert handler.ema_model.weight.item() == 1.5


# 13. Members of an EventsList that fire in the same iteration update once each.
@compare(ours=2.25, theirs=2.625)
def test_coinciding_events_update_once(handler_class, expected):
    model = constant()
    handler = handler_class(model, momentum=0.5)
    assert update_towards(handler, model, 3.0, updates=2, event=ITERATION | ITERATION(every=2)) == expected


# 14. The attribute is made before anything is checked, and the engine's own are taken for the momentum.
@compare(ours=False, theirs=True)
def test_a_bad_event_leaves_nothing_on_the_engine(handler_class, expected):
    trainer = idle()
    with pytest.raises(ValueError, match="no_such_event"):
        handler_class(constant()).attach(trainer, event="no_such_event")
    assert hasattr(trainer.state, "ema_momentum") is expected


@compare(ours=RAISES, theirs=10.0)
@pytest.mark.filterwarnings("ignore:Attribute 'iteration' already exists:UserWarning")
def test_a_name_of_the_engine_raises(handler_class, expected):
    model = constant(1.0)
    handler, trainer = handler_class(model), idle()
    with refused(expected, ValueError, "already uses, got 'iteration'"):
        handler.attach(trainer, "iteration")
        nn.init.constant_(model.weight, 10.0)
        trainer.run(range(2))
        assert handler.ema_model.weight.item() == expected


# 16. A twin made inside inference_mode consists of inference tensors, which cannot be updated outside.
@compare(ours=0.5, theirs=RAISES)
def test_a_handler_made_in_inference_mode_works_outside(handler_class, expected):
    model = constant()
    with torch.inference_mode():
        handler = handler_class(model, momentum=0.5)
    with refused(expected, RuntimeError, "in-place operation"):
        assert update_towards(handler, model, 1.0) == expected


# 18. The initial weights are part of the average, however late it starts.
@compare(ours=5.0, theirs=5 - 5 * (1 - 0.0002) ** 100)
def test_weights_loaded_after_construction_count_in_full_after_a_reset(handler_class, expected):
    model = constant()
    handler = handler_class(model)
    model.load_state_dict(constant(5.0).state_dict())
    if hasattr(handler, "reset"):
        handler.reset()
    assert update_towards(handler, model, 5.0, updates=100) == pytest.approx(expected, rel=1e-4)


@compare(ours=5.0, theirs=5 * 0.0002)
def test_an_average_that_starts_late_starts_from_the_weights_of_then(handler_class, expected):
    model = constant()
    copy_first = schedules.CopyUntil(1, schedules.Constant(0.0002))
    handler = handler_class(model, momentum=copy_first if handler_class is EMAHandler else 0.0002)
    assert update_towards(handler, model, 5.0, updates=10, event=ITERATION(after=9)) == pytest.approx(
        expected, rel=1e-4
    )


# 19. Twins that were aliased from outside are written through.
@compare(ours=4.0, theirs=3.0)
def test_updates_never_write_into_the_model(handler_class, expected):
    model = constant()
    handler = handler_class(model, momentum=0.5)
    handler.ema_model.load_state_dict(model.state_dict(), assign=True)
    model.load_state_dict(constant(4.0).state_dict())
    update_towards(handler, model, 4.0)
    assert model.weight.item() == expected
    is_aliased = handler.ema_model.weight.data_ptr() == model.weight.data_ptr()
    assert is_aliased == (handler_class is not EMAHandler)


# 20. Integers cannot be multiplied by a float in place, and 8-bit floats not at all.
@compare(ours="averaged", theirs=RAISES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_narrow_parameters_are_updated(handler_class, expected, dtype):
    model = nn.Module()
    model.codes = nn.Parameter(torch.tensor([1.0]).to(dtype), requires_grad=False)
    handler, trainer = handler_class(model, momentum=0.5), Engine(lambda *_: model.codes.copy_(torch.tensor([3.0])))
    handler.attach(trainer)
    with refused(expected, RuntimeError, r"not implemented|can't be cast"):
        trainer.run(range(1))
        assert handler.ema_model.codes.float().item() == (3.0 if dtype is torch.int8 else 2.0)
