"""Updates and swaps in several threads at a time: one after the other or refused, never a wrong average."""

import threading

import pytest
from torch import nn

from ignite_ema import ModelAverage
from ignite_ema.averaging import swap


@pytest.fixture
def pair():
    """A model of ones, and an average of fives."""
    model = nn.Sequential(*[nn.Linear(30, 30, bias=False) for _ in range(20)])
    average = ModelAverage(model)
    for online, averaged in zip(model.parameters(), average.module.parameters(), strict=True):
        online.data.fill_(1.0)
        averaged.fill_(5.0)
    return model, average


def values(module):
    return {value for weight in module.parameters() for value in weight.unique().tolist()}


def run_all(*actions):
    threads = [threading.Thread(target=action) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_updates_and_swaps_see_the_models_own_weights_or_are_refused(pair):
    model, average = pair
    updates, refused, swaps, wrong = [], [], [], []

    def update():
        while len(swaps) < 60:
            try:
                average.update(0.0)
                average.update(1e-3)
                updates.append(1)
            except RuntimeError as error:
                refused.append(str(error))
            if not all(1.0 <= value <= 5.0 for value in values(average.module)) or len(values(average.module)) > 1:
                wrong.append(values(average.module))

    def swap_in():
        while len(swaps) < 60:
            try:
                with average.swapped():
                    if len(values(model)) > 1:
                        wrong.append(values(model))
            except RuntimeError as error:
                refused.append(str(error))
            swaps.append(1)

    run_all(update, swap_in, swap_in)
    assert not wrong
    assert updates
    assert all("while the model holds its own weights" in text for text in refused)
    assert values(model) == {1.0}
    assert len(values(average.module)) == 1
    assert max(values(average.module)) < 5.0
    assert not swap.any_swapped()


def test_a_swap_waits_for_an_update_in_another_thread(pair, monkeypatch):
    model, average = pair
    is_updating, may_go_on = threading.Event(), threading.Event()
    (group,) = average._pairing.groups

    def slow_kernel(*arguments):
        is_updating.set()
        may_go_on.wait(5)
        group.kernel(*arguments)

    monkeypatch.setattr(average._pairing, "groups", [group._replace(kernel=slow_kernel)])
    updating = threading.Thread(target=average.update, args=(0.5,))
    updating.start()
    is_updating.wait(5)
    threading.Timer(0.05, may_go_on.set).start()
    with average.swapped():
        assert not updating.is_alive() or may_go_on.is_set()
        assert values(model) == values(average.module) == {3.0}
    updating.join()
    assert values(model) == {1.0}


@pytest.mark.parametrize("action", [lambda a: a.reset(), lambda a: a.load_state_dict(a.state_dict())])
def test_what_moves_an_average_ends_its_turn(action, pair):
    _, average = pair
    action(average)
    average.update(0.5)
    with pytest.raises(ValueError, match="should be a momentum"):
        average.update(2.0)
    assert not swap._moving
