"""PostHocEMA in a run that is stopped, killed, taken back or started again: its files are those of one that was not."""

import copy
import multiprocessing
import os
import signal
import time
import warnings

import pytest
import torch
from ignite.engine import Events
from ignite.handlers import Checkpoint, DiskSaver
from torch.utils._pytree import tree_map

from ignite_ema.posthoc import snapshots, stored
from tests.helpers.bits import assert_same_bits
from tests.helpers.files import newest
from tests.helpers.posthoc_runs import EVERY_5, Run, files, size_of_batch, times_in
from tests.helpers.snapshots import make_snapshot

EVENT = Events.ITERATION_COMPLETED
OPTIONS = {
    "updates": {},
    "samples": {"samples": size_of_batch},
    "every 3": {"event": EVENT(every=3), "snapshot": EVENT(every=6)},
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


def later(time, count, first):
    """The warning of snapshots that are set aside."""
    text = f"{count} snapshots that are later than the loaded state, of time {time}, from 'snapshot_{first}.pt'"
    return pytest.warns(UserWarning, match=text)


@pytest.mark.parametrize("attach_first", [True, False], ids=["attached before", "attached after"])
@pytest.mark.parametrize("stop", [1, 10, 24])
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


@pytest.mark.parametrize("name", OPTIONS)
def test_snapshots_after_the_state_are_set_aside_and_written_again(name, uninterrupted, tmp_path):
    first = Run(tmp_path, **OPTIONS[name]).train(8)
    state = first.saved()
    first.train(27)
    before, time = files(tmp_path), state["ema"]["updated_at"]
    set_aside = [at for at in times_in(tmp_path) if at > time]
    second = Run(tmp_path, loaded=state, **OPTIONS[name])
    with later(time, len(set_aside), set_aside[0]) as record:
        second.train()
    assert len(record) == 1
    assert files(tmp_path) == uninterrupted[name][1]
    (tmp_path / "superseded").mkdir()
    for at in set_aside:
        (tmp_path / f"snapshot_{at}.pt.superseded").rename(tmp_path / "superseded" / f"snapshot_{at}.pt")
    assert files(tmp_path / "superseded").items() <= before.items()


def test_a_run_that_goes_back_to_an_earlier_state_sets_its_snapshots_aside(uninterrupted, tmp_path):
    run = Run(tmp_path).train(8)
    state = run.saved()
    run.train(27)
    run.ema.load_state_dict(state["ema"])
    run.model.load_state_dict(state["model"])
    again = type(run.trainer)(run.step)
    again.load_state_dict(state["trainer"])
    run.trainer = again
    run.attach()
    with later(8, 4, 10):
        run.train()
    assert files(tmp_path) == uninterrupted["updates"][1]


def test_a_state_from_before_the_first_update_sets_all_aside(uninterrupted, tmp_path):
    first = Run(tmp_path)
    state = first.saved()
    first.train(12)
    with later(0, 2, 5):
        Run(tmp_path, loaded=state).train()
    assert files(tmp_path) == uninterrupted["updates"][1]


def test_a_rollback_in_the_middle_of_a_run_writes_its_own_snapshots(tmp_path):
    run, states = Run(tmp_path), []
    run.at(18, lambda: states.append(copy.deepcopy(run.saved())))

    def roll_back():
        run.ema.load_state_dict(states[0]["ema"])
        for parameter in run.model.parameters():
            parameter.data.fill_(100)

    run.at(32, roll_back)
    with later(18, 3, 20):
        run.train()
    assert times_in(tmp_path) == [5, 10, 15, 21, 26]  # at iterations 5, 10, 15, 35, 40
    assert stored(tmp_path)[-1].averaged[0]["0.weight"].max() > 50


# What does not belong to the run that goes on


ANOTHERS = "snapshots of this run alone, got 'snapshot_{}.pt' of another one; load .* delete .* another directory"


def test_a_fresh_run_into_a_folder_with_snapshots_is_refused_before_training(tmp_path):
    Run(tmp_path).train()
    before, second = files(tmp_path), Run(tmp_path)
    with pytest.raises(ValueError, match=ANOTHERS.format(5)):
        second.train()
    assert second.history == []
    assert files(tmp_path) == before


@pytest.mark.parametrize("what", ["another seed", "the same start", "a snapshot of its own start"])
def test_a_foreign_snapshot_is_refused_before_training(what, tmp_path):
    if what == "a snapshot of its own start":  # which cannot be told by what is in the file
        Run(tmp_path / "one", snapshot=EVENT(once=7)).train(7)
    else:
        Run(tmp_path / "one", **({"seed": 1} if what == "another seed" else {"scale": 2})).train()
    second = Run(tmp_path / "one", loaded=Run(tmp_path / "other").train(8).saved())
    before = files(tmp_path / "one")
    with pytest.raises(ValueError, match=ANOTHERS.format(7 if "own" in what else 5)):
        second.train()
    assert second.history == []
    assert files(tmp_path / "one") == before
    if what == "the same start":
        (tmp_path / "other" / "snapshot_5.pt").rename(tmp_path / "one" / "snapshot_5.pt")
        message = "snapshot_5.pt' should be of the run of 'snapshot_40.pt'"
        with pytest.raises(ValueError, match=message):
            stored(tmp_path / "one")


def test_a_damaged_snapshot_is_refused_before_training(tmp_path):
    state = Run(tmp_path).train(8).saved()
    (tmp_path / "snapshot_5.pt").write_bytes(b"half")
    second = Run(tmp_path, loaded=state)
    with pytest.raises(ValueError, match="snapshot_5.pt' should be a file that torch.save"):
        second.train()
    assert second.history == []


def test_missing_snapshots_are_warned_about(tmp_path):
    state = Run(tmp_path).train(18).saved()
    (tmp_path / "snapshot_10.pt").unlink()
    with pytest.warns(
        UserWarning, match="3 snapshots that this run has written, but 1 are missing, the first of time 10"
    ):
        Run(tmp_path, loaded=state).train()
    assert times_in(tmp_path) == [5, 15, 20, 25, 30, 35, 40]


def test_a_resumed_run_may_go_on_elsewhere(tmp_path):
    state = Run(tmp_path / "one").train(8).saved()
    with pytest.warns(UserWarning, match="1 are missing, the first"):
        Run(tmp_path / "other", loaded=state).train()
    (tmp_path / "one" / "snapshot_5.pt").rename(tmp_path / "other" / "snapshot_5.pt")
    assert len(stored(tmp_path / "other")) == 8


def test_a_run_that_resumes_without_its_averages_is_warned_about(tmp_path):
    state = Run(tmp_path / "one").train(8).saved()
    second = Run(tmp_path / "two")
    Checkpoint.load_objects({"model": second.model, "trainer": second.trainer}, state)
    with pytest.warns(UserWarning, match="resumes at iteration 8, but its PostHocEMA was not restored") as record:
        second.train()
    assert len(record) == 1


# A checkpoint that was saved just before the snapshot of its iteration


def saved_before_its_snapshot(folder):
    """A run that writes a checkpoint and then a snapshot at iteration 10; the state of the checkpoint."""
    run, states = Run(folder, snapshot=EVENT(once=40)), []
    run.at(10, lambda: states.append(run.saved()))
    run.trainer.add_event_handler(EVERY_5, lambda engine: run.ema._save(engine))
    run.train(10)
    assert states[0]["ema"]["snapshot_times"] == [5]
    assert times_in(folder) == [5, 10]
    return states[0]


def test_a_checkpoint_that_was_saved_just_before_a_snapshot_resumes(uninterrupted, tmp_path):
    state = saved_before_its_snapshot(tmp_path)
    Run(tmp_path, loaded=state).train()
    assert files(tmp_path) == uninterrupted["updates"][1]


# The state


def test_the_state_is_not_shared(tmp_path):
    run = Run(tmp_path).train(8)
    state = run.ema.state_dict()
    other = Run(tmp_path, attach=False)
    other.ema.load_state_dict(state)
    other.ema.state_dict()["snapshot_times"].append(99)
    other.ema.streams[0].module[0].weight.data.fill_(0)
    assert other.ema.state_dict()["snapshot_times"] == [5]
    other.ema.save()
    run.train(12)
    assert state["snapshot_times"] == [5]
    assert run.ema.streams[0].module[0].weight.abs().min() > 0


def test_a_refused_state_leaves_a_run_that_goes_on(tmp_path):
    state = Run(tmp_path / "one").train(8).saved()["ema"]
    other = Run(tmp_path / "two").train(7)
    before = tree_map(lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, other.saved())
    stream = {**state["stream_1"], "averaged_tensors": {}}
    with pytest.raises(ValueError, match="of one model and one run"):
        other.ema.load_state_dict({**state, "stream_1": stream})
    assert_same_bits(other.saved(), before)
    other.train()
    assert other.ema.num_updates == 40


# SIGKILL

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pytest", "torch._dynamo", "ignite.handlers", "ignite_ema"])


def train(folder, kill_at=None, event=None):
    """From the newest checkpoint to the end, with a checkpoint every four iterations; kills itself where told to."""
    warnings.filterwarnings("ignore", ".* later than the loaded state")
    run = Run(folder / "snapshots", samples=size_of_batch)
    checkpoint = Checkpoint(run.objects(), DiskSaver(folder, require_empty=False), n_saved=2)
    run.trainer.add_event_handler(EVENT(every=4), checkpoint)
    if kill_at is not None:
        run.trainer.add_event_handler(Events[event](once=kill_at), lambda: os.kill(os.getpid(), signal.SIGKILL))
    if saved := newest(folder):
        Checkpoint.load_objects(run.objects(), saved)
    run.train()


def test_a_killed_process_resumes_and_writes_the_same_files(uninterrupted, tmp_path):
    for iteration in (7, 26):
        event = "ITERATION_STARTED" if iteration % 2 else "ITERATION_COMPLETED"
        process = _CONTEXT.Process(target=train, args=(tmp_path, iteration, event))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    train(tmp_path)
    assert files(tmp_path / "snapshots") == uninterrupted["samples"][1]


def write_for_ever(folder, sender):
    weights = [{"a": torch.ones(500_000)}] * 2
    sender.send("begins")
    for at in range(1, 10_000):
        one = make_snapshot(at, averaged=weights, copied={}, state_dict_names={"a": "a"})
        snapshots.write(one, folder)


@pytest.mark.parametrize("delay", [0.03, 0.05, 0.07])
def test_a_process_that_is_killed_while_it_writes_leaves_whole_files_alone(delay, tmp_path):
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=write_for_ever, args=(tmp_path, sender))
    process.start()
    assert receiver.recv() == "begins"
    while not snapshots.paths_in(tmp_path):
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.join()
    found = stored(tmp_path)
    assert [one.time for one in found] == list(range(1, len(found) + 1))
    assert all(one.averaged[1]["a"].min() == 1 for one in found)
