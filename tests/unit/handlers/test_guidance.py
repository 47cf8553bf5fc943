"""What a handler says where a run starts or ends with an average that is of no use: once, and at the user's line."""

import gc
import re
import warnings
from contextlib import contextmanager

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from ignite_ema import EMAHandler, PostHocEMA, schedules

EVENT = Events.ITERATION_COMPLETED


@contextmanager
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def set_up(*arguments, event=EVENT, **options):
    model = nn.Linear(1, 1)
    trainer = Engine(lambda engine, batch: model.weight.data.add_(1))
    handler = EMAHandler(model, *arguments, **options)
    handler.attach(trainer, event=event)
    return handler, trainer


# At the end of a run


def test_a_run_that_ends_with_most_of_its_start_is_told_what_would_have_fitted():
    handler, trainer = set_up()
    with pytest.warns(UserWarning, match="After 440 updates 92% of the average of 'ema_momentum'") as caught:
        trainer.run([0] * 44, max_epochs=10)
    (warning,) = caught
    assert warning.filename == __file__
    assert handler.initial_share == pytest.approx(0.9998**440)
    assert "at a momentum of 0.0002" in str(warning.message)
    assert "iterations" not in str(warning.message)
    with silence():
        trainer.run([0] * 2)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30, 300])
def test_what_is_suggested_leaves_little_of_the_start(count):
    _, trainer = set_up(1e-5)
    with pytest.warns(UserWarning, match="still the weights that it started from") as caught:
        trainer.run([0] * count)
    text = str(caught[0].message)
    momentum = float(re.search(r"pass momentum=([\d.]+),", text)[1])
    schedule = eval(re.search(r"schedules\.\w+\(.*?\)", text)[0], {"schedules": schedules})
    for fitting in (momentum, schedule):
        handler, trainer = set_up(fitting)
        with silence():
            trainer.run([0] * count)
        assert handler.initial_share <= (0.5 if count < 3 else 0.2)


@pytest.mark.parametrize(
    ("every", "said"),
    [
        (EVENT(every=5), "After 20 updates 98%.*one update in 5 iterations .* 5 times slower"),
        (EVENT(after=200), "The run of 100 iterations should have updated .* its event never fired"),
    ],
    ids=["every fifth iteration", "never"],
)
def test_an_event_that_fires_seldom_or_never_is_named(every, said):
    _, trainer = set_up(0.001, event=every)
    with pytest.warns(UserWarning, match=said):
        trainer.run([0] * 50, max_epochs=2)
    with silence():
        trainer.run([0] * 10)


ENDS = {
    "half of it is left": (0.5, lambda handler, trainer: trainer.add_event_handler(EVENT(once=1), trainer.terminate)),
    "terminate": (0.001, lambda handler, trainer: trainer.add_event_handler(EVENT(once=3), trainer.terminate)),
    "interrupt": (
        0.001,
        lambda handler, trainer: trainer.add_event_handler(EVENT(once=3), getattr(trainer, "interrupt", None)),
    ),
    "driven to a copy": (0.001, lambda handler, trainer: setattr(trainer.state, "ema_momentum", 1.0)),
    "twin filled": (0.001, lambda handler, _: handler.ema_model.load_state_dict(nn.Linear(1, 1).state_dict())),
    "count set": (0.001, lambda handler, _: setattr(handler, "num_updates", 1000)),
    "resumed": (
        0.1,
        lambda handler, _: handler.load_state_dict({**handler.state_dict(), "num_updates": 4, "initial_share": 0.5}),
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_average_of_use_and_a_run_that_is_cut_short_are_not_warned_about(end):
    momentum, prepare = ENDS[end]
    handler, trainer = set_up(momentum)
    if end == "interrupt" and not hasattr(trainer, "interrupt"):
        pytest.skip("this Ignite has no interrupt")
    prepare(handler, trainer)
    with silence():
        trainer.run([0] * 4)


def test_a_run_that_fails_is_not_warned_about():
    _, trainer = set_up(0.001)
    trainer.add_event_handler(EVENT(once=3), lambda: 1 / 0)
    with silence(), pytest.raises(ZeroDivisionError):
        trainer.run([0] * 10)


def test_updates_that_were_skipped_are_no_event_that_never_fired():
    handler, trainer = set_up(0.1, skip_nonfinite=True)
    handler.model.weight.data.fill_(torch.nan)
    handler.reset()
    with pytest.warns(UserWarning, match="holds a NaN") as caught:
        trainer.run([0] * 3)
    assert [str(one.message).partition(" and")[0] for one in caught] == ["'weight' holds a NaN or an infinity,"]


# At the start of a run


def resumed(trainer):
    trainer.load_state_dict({"iteration": 4, "epoch_length": 4, "max_epochs": 3})
    return trainer


@pytest.mark.parametrize("load_first", [True, False])
@pytest.mark.parametrize("momentum", [0.5, schedules.LinearWarmup(0.5, 0.9, 10)])
def test_a_handler_that_was_not_restored_is_missed_in_the_checkpoint_once(momentum, load_first):
    model, trainer = nn.Linear(1, 1), Engine(lambda engine, batch: None)
    if load_first:
        model.load_state_dict(nn.Linear(1, 1).state_dict())
    EMAHandler(model, momentum).attach(trainer, "g_momentum")
    if not load_first:
        model.load_state_dict(nn.Linear(1, 1).state_dict())
    with pytest.warns(UserWarning, match="resumes at iteration 4.*'g_momentum' was not restored") as caught:
        resumed(trainer).run([0] * 4)
    assert len(caught) == 1
    text = "starts from the we" if load_first else "starts from the weights that it was made with"
    assert text in str(caught[0].message) or (momentum != 0.5 and not load_first)
    with silence():
        resumed(trainer).run([0] * 4)


MEANT = {
    "reset": lambda handler: handler.reset(),
    "count set": lambda handler: setattr(handler, "num_updates", 0),
    "state loaded": lambda handler: handler.load_state_dict(EMAHandler(nn.Linear(1, 1), 0.5).state_dict()),
    "average loaded": lambda handler: handler.load_averaged({"ema": nn.Linear(1, 1).state_dict()}, key="ema"),
    "twin filled": lambda handler: handler.ema_model.load_state_dict(nn.Linear(1, 1).state_dict()),
}


@pytest.mark.filterwarnings("ignore:The checkpoint has no average")
@pytest.mark.parametrize("way", MEANT)
def test_a_start_that_is_meant_is_not_warned_about(way):
    handler, trainer = set_up(0.5)
    handler.model.load_state_dict(nn.Linear(1, 1).state_dict())
    MEANT[way](handler)
    with silence():
        resumed(trainer).run([0] * 4)


def test_a_run_that_goes_on_after_terminate_is_not_warned_about():
    _, trainer = set_up(0.5, 0.1, 10, event=EVENT(after=6))
    trainer.add_event_handler(EVENT(once=2), trainer.terminate)
    with silence():
        trainer.run([0] * 4, max_epochs=3)
        trainer.run([0] * 4, max_epochs=3)


def test_weights_that_were_loaded_after_the_handler_was_made_are_warned_about_unless_they_are_started_from():
    (handler, trainer), (reset, other), (_, copying) = set_up(0.25), set_up(0.25), set_up(lambda n: 1 / (n + 1))
    for one in (handler, reset):
        one.model.load_state_dict({"weight": torch.ones(1, 1), "bias": torch.ones(1)})
    with pytest.warns(UserWarning, match="The model has other weights than when .*call handler.reset") as caught:
        trainer.run([0] * 4)
    assert len(caught) == 1
    reset.reset()
    with silence():
        for one in (trainer, other, copying):
            one.run([0] * 4)


def test_another_schedule_than_the_saved_one_is_warned_about():
    other, trainer = set_up(0.25)
    with pytest.warns(UserWarning, match=r"saved with LinearWarmup\(.*\) and goes on with Constant\(momentum=0.25\)"):
        other.load_state_dict(EMAHandler(nn.Linear(1, 1), 0.25, 0.5, 10).state_dict())
    assert trainer.state.ema_momentum == 0.25


# repr


def test_repr_says_what_by_which_schedule_how_far_and_attached_to_what():
    handler, trainer = set_up(schedules.EqualWeight(), dtype=torch.float64)
    alone = "EMAHandler(Linear: 2 parameters in float64 on cpu; momentum EqualWeight(); 0 updates"
    attached = "; attached to an Engine as 'ema_momentum'"
    assert repr(handler) == f"{alone}{attached})"
    handle = handler.attach(other := Engine(lambda engine, batch: None), "second")
    assert repr(handler) == f"{alone}{attached} and attached to an Engine as 'second')"
    handle.remove()
    del trainer, other
    gc.collect()
    assert repr(handler) == f"{alone})"


def test_repr_shows_the_momentum_in_force_and_never_raises():
    handler, trainer = set_up(0.5)
    trainer.state.ema_momentum = 0.25
    assert "; momentum 0.25; 0 updates;" in repr(handler)
    trainer.state.ema_momentum = "x"
    assert "; <TypeError>; 0 updates;" in repr(handler)
    handler.average.module = None
    trainer.state = None
    assert repr(handler).startswith("EMAHandler(<AttributeError>; <TypeError>; 0 updates")
    assert repr(EMAHandler.__new__(EMAHandler)).startswith("EMAHandler(<AttributeError>")


def test_handles_and_the_context_of_swapped_are_shown_in_a_line(tmp_path):
    handler, trainer = EMAHandler(nn.Linear(1, 1), 0.5), Engine(lambda engine, batch: None)
    handle = handler.attach(trainer, event=EVENT(every=2) | Events.EPOCH_COMPLETED)
    assert repr(handle) == "Attachment(EMAHandler at iteration_completed or epoch_completed as 'ema_momentum')"
    handle.remove()
    assert repr(handle).endswith(" as 'ema_momentum'; removed)")
    with handler.swap_during(trainer) as handle:
        assert repr(handle) == "EvaluationSwap(EMAHandler during the runs of an Engine)"
    assert repr(handle) == "EvaluationSwap(EMAHandler during the runs of an Engine; removed)"
    with PostHocEMA(handler.model, dirname=tmp_path / "snapshots").attach(trainer) as handle:
        names = "'posthoc_momentum_0' and 'posthoc_momentum_1'"
        assert repr(handle) == f"Attachment(PostHocEMA at iteration_completed as {names})"
    swap = handler.swapped()
    assert repr(swap) == "Swapped(not active)"
    with swap:
        assert repr(swap) == "Swapped(active)"
