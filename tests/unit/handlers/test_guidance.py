"""What a handler says where a run starts or ends with an average that is of no use: once, and at the user's line."""

import gc
import re
import warnings
from contextlib import contextmanager

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers.state_param_scheduler import LambdaStateScheduler
from torch import nn

from ignite_ema import EMAHandler, PostHocEMA, schedules


@contextmanager
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def set_up(*arguments, event=Events.ITERATION_COMPLETED, **options):
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


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30, 1000])
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


def test_an_update_at_every_fifth_iteration_is_named_as_a_reason():
    _, trainer = set_up(0.001, event=Events.ITERATION_COMPLETED(every=5))
    with pytest.warns(UserWarning, match="After 20 updates 98%.*one update in 5 iterations .* 5 times slower"):
        trainer.run([0] * 50, max_epochs=2)


def test_it_is_said_once_and_not_after_each_run():
    _, trainer = set_up(0.001)
    with pytest.warns(UserWarning, match="After 4 updates") as caught:
        trainer.run([0] * 2, max_epochs=2)
    with silence():
        trainer.run([0] * 2, max_epochs=2)
    assert len(caught) == 1


def test_half_of_it_or_less_is_not_warned_about():
    handler, trainer = set_up(0.5)
    with silence():
        trainer.run([0])
    assert handler.initial_share == 0.5


@pytest.mark.parametrize("way", ["terminate", "interrupt"])
def test_a_run_that_is_cut_short_is_not_warned_about(way):
    _, trainer = set_up(0.001)
    if not hasattr(trainer, way):
        pytest.skip("this Ignite has no interrupt")
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), getattr(trainer, way))
    with silence():
        trainer.run([0] * 10)


def test_a_run_that_fails_is_not_warned_about():
    _, trainer = set_up(0.001)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: 1 / 0)
    with silence(), pytest.raises(ZeroDivisionError):
        trainer.run([0] * 10)


def test_a_momentum_that_was_driven_to_a_copy_leaves_nothing():
    handler, trainer = set_up(0.001)
    trainer.state.ema_momentum = 1.0
    with silence():
        trainer.run([0])
    assert handler.initial_share == 0.0


def test_what_a_resumed_run_brought_is_counted_too():
    first, trainer = set_up(0.1)
    with pytest.warns(UserWarning, match="After 4 updates 66%"):
        trainer.run([0] * 4)
    second, trainer = set_up(0.1)
    second.load_state_dict(first.state_dict())
    with silence():
        trainer.run([0] * 4)
    assert second.initial_share == pytest.approx(0.9**8)


def test_an_average_that_was_brought_by_hand_is_not_a_start():
    handler, trainer = set_up(0.001)
    handler.ema_model.load_state_dict(nn.Linear(1, 1).state_dict())
    with silence():
        trainer.run([0] * 4)
    handler, trainer = set_up(0.001)
    handler.num_updates = 1000
    with silence():
        trainer.run([0] * 4)


def test_an_event_that_never_fires_is_told():
    _, trainer = set_up(0.1, event=Events.ITERATION_COMPLETED(after=100))
    with pytest.warns(UserWarning, match="The run of 8 iterations should have updated .* its event never fired"):
        trainer.run([0] * 4, max_epochs=2)
    with silence():
        trainer.run([0] * 4)


def test_updates_that_were_skipped_are_no_event_that_never_fired():
    handler, trainer = set_up(0.1, skip_nonfinite=True)
    handler.model.weight.data.fill_(torch.nan)
    handler.reset()
    with pytest.warns(UserWarning, match="holds a NaN") as caught:
        trainer.run([0] * 3)
    assert [str(one.message).partition(" and")[0] for one in caught] == ["'weight' holds a NaN or an infinity,"]


# At the start of a run


def resumed(trainer, iteration=4):
    trainer.load_state_dict({"iteration": iteration, "epoch_length": 4, "max_epochs": 3})
    return trainer


@pytest.mark.parametrize("momentum", [0.5, schedules.Constant(0.5), schedules.LinearWarmup(0.5, 0.9, 10)])
def test_a_handler_made_after_the_weights_were_loaded_is_missed_in_the_checkpoint(momentum):
    model = nn.Linear(1, 1)
    model.load_state_dict(nn.Linear(1, 1).state_dict())
    handler = EMAHandler(model, momentum)
    trainer = Engine(lambda engine, batch: None)
    handler.attach(trainer)
    resumed(trainer)
    with pytest.warns(UserWarning, match="resumes at iteration 4.*'ema_momentum' was not restored.*starts from the we"):
        trainer.run([0] * 4)
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
    MEANT[way](handler)
    with silence():
        resumed(trainer).run([0] * 4)


# The attribute on the engine


def test_a_second_plain_handler_of_one_name_is_refused_and_told_whose_it_is():
    _, trainer = set_up(0.1)
    second = EMAHandler(nn.Linear(1, 1), 0.5)
    with pytest.raises(ValueError, match=r"another than 'ema_momentum', the attribute of EMAHandler\(Linear.*tum 0.1;"):
        second.attach(trainer)
    assert trainer.state.ema_momentum == 0.1
    assert repr(second).endswith("momentum 0.5; 0 updates)")
    with silence():
        second.attach(trainer, "second_momentum")


def test_a_momentum_that_is_ignored_is_told():
    trainer = Engine(lambda engine, batch: None)
    scheduler = LambdaStateScheduler(lambda event_index: 0.1, param_name="ema_momentum", create_new=True)
    scheduler.attach(trainer, Events.ITERATION_STARTED)
    trainer.state.ema_momentum = 0.1
    handler = EMAHandler(nn.Linear(1, 1), 0.5)
    with pytest.warns(
        UserWarning, match=r"goes on from its value 0.1, and the momentum of 0.5 .* is ignored"
    ) as caught:
        handler.attach(trainer)
    assert [one.filename for one in caught] == [__file__]


def test_a_value_that_a_schedule_overwrites_is_told():
    trainer = Engine(lambda engine, batch: None)
    trainer.state.ema_momentum = 0.1
    with pytest.warns(UserWarning, match="its value 0.1 is overwritten"):
        EMAHandler(nn.Linear(1, 1), schedules.EqualWeight()).attach(trainer)
    assert trainer.state.ema_momentum == 1.0


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


def test_repr_shows_the_momentum_in_force():
    handler, trainer = set_up(0.5)
    trainer.state.ema_momentum = 0.25
    assert "; momentum 0.25; 0 updates;" in repr(handler)
    handler.momentum = 0.125
    assert "; momentum 0.125; 0 updates;" in repr(handler)
    trainer.state.ema_momentum = "x"
    assert "; <TypeError>; 0 updates;" in repr(handler)


def test_handles_and_the_context_of_swapped_are_shown_in_a_line(tmp_path):
    handler, trainer = EMAHandler(nn.Linear(1, 1), 0.5), Engine(lambda engine, batch: None)
    every = Events.ITERATION_COMPLETED(every=2)
    handle = handler.attach(trainer, event=every | Events.EPOCH_COMPLETED)
    assert repr(handle) == "Attachment(EMAHandler at iteration_completed or epoch_completed as 'ema_momentum')"
    handle.remove()
    assert repr(handle).endswith(" as 'ema_momentum'; removed)")
    with handler.swap_during(trainer) as handle:
        assert repr(handle) == "EvaluationSwap(EMAHandler during the runs of an Engine)"
    assert repr(handle) == "EvaluationSwap(EMAHandler during the runs of an Engine; removed)"
    with PostHocEMA(handler.model, dirname=tmp_path / "snapshots").attach(trainer) as handle:
        one, other = (
            f"Attachment(PowerAverage at iteration_completed as 'posthoc_momentum_{index}')" for index in (0, 1)
        )
        assert repr(handle) == f"Handles({one}; {other})"
    assert repr(handle) == "Handles(removed)"
    swap = handler.swapped()
    assert repr(swap) == "Swapped(not active)"
    with swap:
        assert repr(swap) == "Swapped(active)"


def test_repr_never_raises():
    handler, trainer = set_up(0.1)
    handler._average.module = None
    trainer.state = None
    assert repr(handler).startswith("EMAHandler(<AttributeError>; <TypeError>; 0 updates")
    assert repr(EMAHandler.__new__(EMAHandler)).startswith("EMAHandler(<AttributeError>")
