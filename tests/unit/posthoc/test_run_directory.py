"""What a run finds in its directory when it begins or goes on there."""

import multiprocessing

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from ignite_ema import EMAWarning, PostHocEMA
from ignite_ema.posthoc import snapshots, stored
from tests.helpers.files import files_in
from tests.helpers.snapshots import make_snapshot

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "ignite.handlers", "ignite_ema.handlers.posthoc"])


def make(folder, last=0, state=None):
    model = nn.Linear(1, 1)
    trainer = Engine(lambda engine, batch: model.weight.data.fill_(batch))
    trainer.logger.disabled = True
    ema = PostHocEMA(model, dirname=folder)
    if state is not None:
        ema.load_state_dict(state)
    ema.attach(trainer, snapshot_event=Events.ITERATION_COMPLETED)
    if last:
        trainer.run([float(k) for k in range(ema.num_updates, last)])
    return ema


def stop_in_the_middle(folder, sender):
    """Begins to write its second snapshot, says so, and waits to be killed."""

    def wait(content, file):
        file.write(b"half")
        file.flush()
        sender.send("half")
        sender.close()
        multiprocessing.Event().wait()

    ema = make(folder, 1)
    ema.update()
    torch.save = wait
    ema.save()


@pytest.fixture
def killed(tmp_path):
    """The folder of a run that was killed while it wrote its second snapshot, before its first checkpoint."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=stop_in_the_middle, args=(tmp_path, sender))
    process.start()
    assert receiver.recv() == "half"
    process.kill()
    process.join()
    assert len(files_in(tmp_path)) == 2
    return tmp_path


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again_as_it_is_told(killed):
    with pytest.raises(
        ValueError, match=r"got 'snapshot_1.pt' of another .* delete '.*/snapshot_\*.pt' to start again"
    ):
        make(killed, 1)
    (killed / "snapshot_1.pt").unlink()
    make(killed, 3)
    assert [one.time for one in stored(killed)] == [1, 2, 3]


def test_a_checkpoint_at_the_start_lets_it_start_again_by_itself(tmp_path):
    first = make(tmp_path)
    state = first.state_dict()
    second = make(tmp_path, 2, state)  # and is killed
    with pytest.warns(UserWarning, match="had 2 snapshots that are later than the loaded state, of time 0"):
        make(tmp_path, 3, state)
    assert [one.time for one in stored(tmp_path)] == [1, 2, 3]
    assert {one.run_id for one in stored(tmp_path)} == {second.state_dict()["run_id"]}


def test_each_run_from_scratch_has_an_id_of_its_own(tmp_path):
    ids = [make(tmp_path / name).state_dict()["run_id"] for name in "ab"]
    assert len(set(ids)) == 2
    ema = make(tmp_path / "c")
    before = ema.state_dict()["run_id"]
    ema.reset()
    assert ema.state_dict()["run_id"] not in (before, *ids)


def test_the_state_of_the_seed_is_left_alone(tmp_path):
    torch.manual_seed(0)
    due = torch.rand(1)
    torch.manual_seed(0)
    model = nn.Linear(1, 1, device="meta").to_empty(device="cpu")
    PostHocEMA(model, dirname=tmp_path)
    assert torch.equal(torch.rand(1), due)


def test_a_directory_with_a_snapshot_of_another_run_is_refused_and_nothing_is_moved(tmp_path):
    for time in (5, 6, 10):
        snapshots.write(make_snapshot(time), tmp_path)
    snapshots.write(make_snapshot(20, run_id="other"), tmp_path)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=r"snapshots of this run alone, got 'snapshot_20.pt' of another"):
        snapshots.prepare(tmp_path, "run", 7, [5, 6])
    assert files_in(tmp_path) == before


def test_a_snapshot_of_the_very_time_of_the_state_is_taken_over(tmp_path):
    for time in (5, 10):
        snapshots.write(make_snapshot(time), tmp_path)
    assert snapshots.prepare(tmp_path, "run", 10, [5]) == [5, 10]


def test_what_is_set_aside_is_on_the_disk_before_the_run_goes_on(tmp_path, monkeypatch):
    snapshots.write(make_snapshot(5), tmp_path)
    synced = []
    monkeypatch.setattr(snapshots, "sync_directory", lambda folder: synced.append(files_in(folder)))
    with pytest.warns(EMAWarning, match="set aside"):
        assert snapshots.prepare(tmp_path, "run", 3, []) == []
    assert synced == [["snapshot_5.pt.superseded"]]


def test_what_was_set_aside_before_is_kept(tmp_path):
    for attempt in (1.0, 2.0, 3.0):
        snapshots.write(make_snapshot(5, attempt), tmp_path)
        with pytest.warns(EMAWarning, match="set aside as '….superseded'"):
            snapshots.prepare(tmp_path, "run", 3, [])
    names = ["snapshot_5.pt.superseded", "snapshot_5.pt.superseded.2", "snapshot_5.pt.superseded.3"]
    assert files_in(tmp_path) == names
    kept = [torch.load(tmp_path / name)["averaged"][0]["b"].item() for name in names]
    assert kept == [-1.0, -2.0, -3.0]


def test_repr_says_in_one_line_what_it_is_and_where_it_stands(tmp_path):
    ema = make(tmp_path / "run", 3)
    assert repr(ema) == (
        f"PostHocEMA(Linear: sigma_rel 0.05 and 0.1; at 3 updates; 3 snapshots in '{tmp_path / 'run'}')"
    )
