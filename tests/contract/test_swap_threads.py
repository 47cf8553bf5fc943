"""Updates and swaps in several threads at a time: one after the other or refused, never a wrong average."""

import threading

import pytest
import torch
from torch import nn

from ignite_ema import ModelAverage
from ignite_ema.averaging import swap


def run_all(*actions):
    threads = [threading.Thread(target=action) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_updates_beside_swaps_see_the_models_own_weights_or_are_refused():
    model = nn.Sequential(*[nn.Linear(30, 30, bias=False) for _ in range(20)])
    average = ModelAverage(model)
    for online, averaged in zip(model.parameters(), average.module.parameters(), strict=True):
        online.data.fill_(1.0)
        averaged.fill_(5.0)
    updates, refused, swaps, wrong = [], [], [], []

    def update():
        while len(swaps) < 60:
            try:
                average.update(0.0)
                average.update(1e-3)
                updates.append(1)
            except RuntimeError as error:
                refused.append(str(error))
            values = {value for weight in average.module.parameters() for value in weight.unique().tolist()}
            if not all(1.0 <= value <= 5.0 for value in values) or len(values) > 1:
                wrong.append(values)

    def swap_in():
        while len(swaps) < 60:
            with average.swapped():
                inside = {value for weight in model.parameters() for value in weight.unique().tolist()}
            if len(inside) > 1:
                wrong.append(inside)
            swaps.append(1)

    run_all(update, swap_in)
    assert not wrong
    assert updates
    assert all("while the model holds its own weights" in text for text in refused)
    assert {value for weight in model.parameters() for value in weight.unique().tolist()} == {1.0}
    expected = 5.0
    assert average.module[0].weight.unique().numel() == 1
    assert average.module[0].weight[0, 0].item() < expected
    assert not swap.any_swapped()


def test_a_swap_waits_for_an_update_in_another_thread(monkeypatch):
    model = nn.Linear(1, 1, bias=False)
    average = ModelAverage(model)
    model.weight.data.fill_(1.0)
    average.module.weight.fill_(5.0)
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
        assert model.weight.item() == average.module.weight.item() == 3.0
    updating.join()
    assert model.weight.item() == 1.0


def test_two_threads_that_swap_one_model_take_turns_or_are_refused():
    model = nn.Linear(3, 3)
    average = ModelAverage(model)
    with torch.no_grad():
        average.module.weight.add_(1.0)
    before, wrong = model.weight.clone(), []

    def swap_in():
        for _ in range(50):
            try:
                with average.swapped():
                    if not torch.equal(model.weight, average.module.weight):
                        wrong.append("inside")
            except RuntimeError as error:
                if "holds averaged ones now" not in str(error):
                    wrong.append(str(error))

    run_all(swap_in, swap_in)
    assert not wrong
    assert torch.equal(model.weight, before)
    assert not swap.any_swapped()


@pytest.mark.parametrize("action", [lambda a: a.reset(), lambda a: a.load_state_dict(a.state_dict())])
def test_what_moves_an_average_ends_its_turn(action):
    average = ModelAverage(nn.Linear(1, 1))
    action(average)
    average.update(0.5)
    with pytest.raises(ValueError, match="should be a momentum"):
        average.update(2.0)
    assert not swap._moving
