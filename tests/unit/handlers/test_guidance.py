"""What a handler says if a run starts, or ends, with an average that is of no use: once, and only if it is true."""

import gc
import math
import warnings
from contextlib import contextmanager

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import TerminateOnNan
from torch import nn

from ignite_ema import EMAHandler, EMAWarning, schedules
from tests.helpers.models import Quantised, constant
from tests.helpers.runs import scalar_handler

EVENT = Events.ITERATION_COMPLETED


@contextmanager
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def set_up(*arguments, model=None, **options):
    model = model or nn.Linear(1, 1)
    trainer = Engine(lambda engine, batch: None)
    handler = EMAHandler(model, *arguments, **options)
    handler.attach(trainer)
    return handler, trainer


def at(iteration, action):
    return lambda handler, trainer: trainer.add_event_handler(EVENT(once=iteration), lambda: action(trainer))


def test_a_run_that_ends_with_most_of_its_start_is_told_once():
    handler, trainer = set_up()
    said = r"After 440 updates 92% of .*'ema_momentum'.* at a momentum of 0\.0002.*schedules\.Debiased\(0\.0002\)"
    with pytest.warns(EMAWarning, match=said):
        trainer.run([0] * 44, max_epochs=10)
    assert handler.initial_share == pytest.approx(0.9998**440)
    with silence():
        trainer.run([0] * 2)


@pytest.mark.parametrize(("share", "warns"), [(0.21, True), (0.19, False)])
def test_a_fifth_of_the_start_is_the_threshold_also_if_the_run_is_terminated(share, warns):
    handler, trainer = set_up(1 - share ** (1 / 3))
    at(3, Engine.terminate)(handler, trainer)
    with pytest.warns(EMAWarning, match="After 3 updates 21%") if warns else silence():
        trainer.run([0] * 5)


ENDS = {
    "interrupt": at(3, lambda trainer: trainer.interrupt()),
    "driven to a copy": lambda _, trainer: setattr(trainer.state, "ema_momentum", 1.0),
    "twin filled": lambda handler, _: handler.ema_model.load_state_dict(nn.Linear(1, 1).state_dict()),
    "resumed": lambda handler, _: handler.load_state_dict({**handler.state_dict(), "initial_share": 0.2}),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_average_of_use_and_a_run_that_goes_on_are_not_warned_about(end):
    handler, trainer = set_up(0.01)
    ENDS[end](handler, trainer)
    with silence():
        trainer.run([0] * 4)


def test_updates_that_were_skipped_are_neither_an_event_that_never_fired_nor_too_few():
    handler, trainer = set_up(0.1, skip_nonfinite=True)
    handler.model.weight.data.fill_(torch.nan)
    handler.reset()
    with pytest.warns(EMAWarning, match="'weight' holds a NaN") as caught:
        trainer.run([0] * 3)
    assert len(caught) == 1


def resumed(trainer):
    trainer.load_state_dict({"iteration": 4, "epoch_length": 4, "max_epochs": 3})
    return trainer


def load_others(handler):
    handler.model.load_state_dict(nn.Linear(1, 1).state_dict())


@pytest.mark.parametrize("load_first", [True, False])
def test_a_handler_that_was_not_restored_is_missed_in_the_checkpoint_once(load_first):
    handler, trainer = set_up(schedules.LinearWarmup(0.5, 0.8, 10))
    if not load_first:
        load_others(handler)
    with pytest.warns(EMAWarning, match="resumes at iteration 4.*'ema_momentum' was not restored") as caught:
        resumed(trainer).run([0] * 4)
    assert len(caught) == 1
    assert ("starts from the current weights" if load_first else "that it was made with") in str(caught[0].message)
    with silence():
        resumed(trainer).run([0] * 4)


MEANT = {
    "reset": lambda handler: handler.reset(),
    "state loaded": lambda handler: handler.load_state_dict(EMAHandler(nn.Linear(1, 1), 0.8).state_dict()),
    "average loaded": lambda handler: handler.load_averaged(nn.Linear(1, 1).state_dict()),
}


@pytest.mark.parametrize("way", MEANT)
def test_a_start_that_is_meant_is_not_warned_about(way):
    handler, trainer = set_up(0.8)
    load_others(handler)
    MEANT[way](handler)
    with silence():
        resumed(trainer).run([0] * 4)


@pytest.mark.parametrize("resets", [False, True])
def test_weights_that_come_after_the_handler_was_made_or_reset_are_warned_about_once(resets):
    """Also by a handler of STARTED, as MONAI's CheckpointLoader (issue 23)."""
    handler, trainer = set_up(0.8)
    if resets:
        handler.reset()
    trainer.add_event_handler(Events.STARTED, lambda: load_others(handler))
    with pytest.warns(EMAWarning, match=r"other weights than when .*call handler\.reset\(\)|Call handler\.reset\(\)"):
        trainer.run([0] * 4)


def test_frozen_parameters_of_a_type_without_norms_can_be_shared():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[0].weight = nn.Parameter(torch.ones(1, 1).as_subclass(Quantised), requires_grad=False)
    model[0].bias.requires_grad_(False)
    model[0].extra_repr = model[0].forward  # torchao sets a method of the module
    handler, trainer = set_up(0.8, model=model, share_frozen=True)
    trainer.run([0] * 3)
    assert handler.num_updates == 3


@pytest.mark.parametrize("schedule", [lambda n: 1 / (n + 1), 1.0], ids=["mean", "copies"])
def test_a_first_update_that_copies_needs_no_reset(schedule):
    handler, trainer = set_up(schedule)
    load_others(handler)
    with silence():
        trainer.run([0] * 4)


def test_a_run_that_goes_on_after_terminate_is_not_warned_about():
    handler, trainer = set_up(0.5, 0.1, 2)
    at(4, Engine.terminate)(handler, trainer)
    with silence():
        for _ in range(2):
            trainer.run([0] * 6, max_epochs=3)


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


def test_handles_and_the_context_of_swapped_are_shown_in_a_line():
    handler, trainer = EMAHandler(nn.Linear(1, 1), 0.5), Engine(lambda engine, batch: None)
    handle = handler.attach(trainer, event=EVENT(every=2) | Events.EPOCH_COMPLETED)
    assert repr(handle) == "Attachment(EMAHandler at iteration_completed or epoch_completed as 'ema_momentum')"
    trainer.state.ema_momentum = "x"
    assert "; <TypeError>; 0 updates;" in repr(handler)
    handle.remove()
    assert repr(handle).endswith(" as 'ema_momentum'; removed)")
    with handler.swap_during(trainer) as handle:
        assert repr(handle) == "EvaluationSwap(EMAHandler during the runs of an Engine)"
    assert repr(handle).endswith("; removed)")
    with handler.swapped() as swap:
        assert repr(swap) == "Swapped(active)"
    assert repr(swap) == "Swapped(not active)"


@pytest.mark.parametrize("arguments", [(0.001,), (0.001, 0.0, 2000), (schedules.Cosine(0.001, 0.0, 400),)])
def test_the_length_that_is_recommended_is_that_of_the_end_and_makes_the_average_useful(arguments):
    _, trainer = set_up(*arguments)
    with pytest.warns(EMAWarning, match=r"over 99% of .* pass momentum=schedules\.Debiased\(0.001\) alone"):
        trainer.run([0] * 4)
    better, trainer = set_up(schedules.Debiased(0.001))
    trainer.run([0] * 4)
    assert better.initial_share == 0


def test_a_schedule_that_would_have_copied_first_is_told_to_begin_again():
    handler, trainer = set_up(schedules.Debiased(0.0002))
    state = EMAHandler(handler.model).state_dict() | {"num_updates": 100}
    with pytest.warns(EMAWarning, match="was saved with"):
        handler.load_state_dict(state)
    with pytest.warns(EMAWarning, match=r"set handler\.num_updates = 0 before the run"):
        trainer.run([0, 0])
    handler.num_updates = 0
    trainer.run([0, 0])
    assert handler.initial_share == 0


@pytest.mark.parametrize("nan_at", [2, 4])
def test_an_average_that_a_nan_has_spoilt_says_so_at_the_end_of_the_run(nan_at):
    """Also one that TerminateOnNan came too late for: it was attached after the handler."""
    model, handler = scalar_handler()

    def step(engine, batch):
        model.weight.data.fill_(math.nan if engine.state.iteration == nan_at else 1.0)
        return model.weight.item()

    trainer = Engine(step)
    handler.attach(trainer)
    trainer.add_event_handler(EVENT, TerminateOnNan())
    with pytest.warns(EMAWarning, match="'ema_momentum' holds a NaN.*skip_nonfinite=True") as caught:
        trainer.run([0] * 4)
    assert len(caught) == 1


def test_a_mask_of_infinities_is_no_fault():
    _, trainer = set_up(1.0, model=constant(-math.inf))
    with silence():
        trainer.run([0] * 2)
