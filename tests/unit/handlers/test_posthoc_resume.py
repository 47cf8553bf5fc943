"""PostHocEMA in a run that is stopped, taken back or started again: its files are those of one that was not."""

import copy

import pytest
import torch
from ignite.engine import Events

from ignite_ema import PostHocEMA
from ignite_ema.posthoc import stored
from tests.helpers.bits import assert_same_bits, contents
from tests.helpers.models import net
from tests.helpers.posthoc_runs import Run, files, size_of_batch, times_in

EVENT = Events.ITERATION_COMPLETED
OPTIONS = {
    "updates": {},
    "samples": {"samples": size_of_batch},
    "buffers and 16 bits": {"handle_buffers": "update", "snapshot_dtype": torch.float16},
    "samples every 3": {"samples": size_of_batch, "event": EVENT(every=3)},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    runs = {}
    for name, options in OPTIONS.items():
        folder = tmp_path_factory.mktemp("uninterrupted")
        runs[name] = (Run(folder, **options).train().saved(), files(folder))
    return runs


def set_aside(time, count, first):
    text = f"{count} snapshots that are later than the loaded state, of time {time}, from 'snapshot_{first}.pt'"
    return pytest.warns(UserWarning, match=text)


@pytest.mark.parametrize(("stop", "attach_first"), [(1, True), (10, True), (24, False)])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_that_is_stopped_and_resumed_writes_the_same_files(name, stop, attach_first, uninterrupted, tmp_path):
    first = Run(tmp_path, **OPTIONS[name]).train(stop)
    second = Run(tmp_path, seed=1, attach=attach_first, loaded=first.saved(), **OPTIONS[name])
    if not attach_first:
        second.attach()
    second.train()
    state, due = copy.deepcopy(uninterrupted[name])
    assert files(tmp_path) == due
    assert {one.run_id for one in stored(tmp_path)} == {first.ema.state_dict()["run_id"]}
    state["ema"]["run_id"] = first.ema.state_dict()["run_id"]
    assert_same_bits(second.saved(), state)


@pytest.mark.parametrize("name", ["updates", "samples every 3"])
@pytest.mark.parametrize("stop", [0, 8])
def test_snapshots_after_the_state_are_set_aside_and_written_again(name, stop, uninterrupted, tmp_path):
    first = Run(tmp_path, **OPTIONS[name])
    state = (first.train(stop) if stop else first).saved()
    first.train(27)
    before, time = files(tmp_path), state["ema"]["updated_at"]
    later = [at for at in times_in(tmp_path) if at > time]
    with set_aside(time, len(later), later[0]) as record:
        Run(tmp_path, loaded=state, **OPTIONS[name]).train()
    assert len(record) == 1
    assert files(tmp_path) == uninterrupted[name][1]
    (tmp_path / "superseded").mkdir()
    for at in later:
        (tmp_path / f"snapshot_{at}.pt.superseded").rename(tmp_path / "superseded" / f"snapshot_{at}.pt")
    assert files(tmp_path / "superseded").items() <= before.items()


def test_a_rollback_in_the_middle_of_a_run_writes_its_own_snapshots(tmp_path):
    run, states = Run(tmp_path), []
    run.at(18, lambda: states.append(copy.deepcopy(run.saved())))

    def roll_back():
        run.ema.load_state_dict(states[0]["ema"])
        for parameter in run.model.parameters():
            parameter.data.fill_(100)

    run.at(32, roll_back)
    with set_aside(18, 3, 20):
        run.train()
    assert times_in(tmp_path) == [5, 10, 15, 21, 26]  # at iterations 5, 10, 15, 35, 40
    assert stored(tmp_path)[-1].averaged[0]["0.weight"].max() > 50


@pytest.mark.parametrize("resumed", [False, True])
def test_snapshots_of_another_run_are_refused_before_training(resumed, tmp_path):
    Run(tmp_path / "one").train(12)
    state = Run(tmp_path / "other").train(8).saved()
    second = Run(tmp_path / "one", loaded=state if resumed else None)
    before = files(tmp_path / "one")
    with pytest.raises(ValueError, match="this run alone, got 'snapshot_5.pt' of another one; load .* delete"):
        second.train()
    assert second.history == []
    assert files(tmp_path / "one") == before
    (tmp_path / "other" / "snapshot_5.pt").rename(tmp_path / "one" / "snapshot_5.pt")
    with pytest.raises(ValueError, match="snapshot_5.pt' should be of the run of 'snapshot_10.pt'"):
        stored(tmp_path / "one")


def test_missing_snapshots_are_warned_about(tmp_path):
    state = Run(tmp_path).train(18).saved()
    (tmp_path / "snapshot_10.pt").unlink()
    with pytest.warns(UserWarning, match="1 are missing, the first of time 10"):
        Run(tmp_path, loaded=state).train()
    assert times_in(tmp_path) == [5, 15, 20, 25, 30, 35, 40]


def test_a_checkpoint_that_was_saved_just_before_a_snapshot_resumes(uninterrupted, tmp_path):
    first, states = Run(tmp_path, snapshot=EVENT(once=5)), []
    first.at(10, lambda: states.append(first.saved()))
    first.trainer.add_event_handler(EVENT(once=10), lambda engine: first.ema._save(engine))
    first.train(10)
    assert (states[0]["ema"]["snapshot_times"], times_in(tmp_path)) == ([5], [5, 10])
    Run(tmp_path, loaded=states[0]).train()
    assert files(tmp_path) == uninterrupted["updates"][1]


def test_a_state_of_which_one_average_is_of_another_model_loads_nothing(tmp_path):
    ema = PostHocEMA(net(), dirname=tmp_path / "own")
    state = ema.state_dict()
    state["stream_1"] = PostHocEMA(net(width=5), dirname=tmp_path / "other").state_dict()["stream_1"]
    before = [contents(stream.module) for stream in ema.streams]
    with pytest.raises(ValueError, match="one model and one number of updates"):
        ema.load_state_dict(state)
    assert [contents(stream.module) for stream in ema.streams] == before
