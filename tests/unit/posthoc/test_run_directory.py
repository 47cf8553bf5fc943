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


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again_as_it_is_told(tmp_path):
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=stop_in_the_middle, args=(tmp_path, sender))
    process.start()
    assert receiver.recv() == "half"
    process.kill()
    process.join()
    assert len(files_in(tmp_path)) == 2
    assert [one.time for one in stored(tmp_path)] == [1]
    with pytest.raises(ValueError, match=r"got 'snapshot_1.pt' of another .* delete '.*/snapshot_\*.pt'"):
        make(tmp_path, 1)
    (tmp_path / "snapshot_1.pt").unlink()
    assert repr(make(tmp_path, 3)) == (
        f"PostHocEMA(Linear: sigma_rel 0.05 and 0.1; at 3 updates; 3 snapshots in '{tmp_path}')"
    )
    assert [one.time for one in stored(tmp_path)] == [1, 2, 3]


def test_a_directory_with_a_snapshot_of_another_run_is_refused_and_nothing_is_moved(tmp_path):
    for time in (5, 6, 10):
        snapshots.write(make_snapshot(time), tmp_path)
    snapshots.write(make_snapshot(20, run_id="other"), tmp_path)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=r"snapshots of this run alone, got 'snapshot_20.pt' of another"):
        snapshots.prepare(tmp_path, "run", 7, [5, 6])
    assert files_in(tmp_path) == before
    (tmp_path / "snapshot_20.pt").unlink()
    assert snapshots.prepare(tmp_path, "run", 10, [5, 6]) == [5, 6, 10]  # of the very time of the state


def test_what_was_set_aside_before_is_kept(tmp_path):
    for attempt in (1.0, 2.0, 3.0):
        snapshots.write(make_snapshot(5, attempt), tmp_path)
        with pytest.warns(EMAWarning, match="set aside as '….superseded'"):
            assert snapshots.prepare(tmp_path, "run", 3, []) == []
    names = ["snapshot_5.pt.superseded", "snapshot_5.pt.superseded.2", "snapshot_5.pt.superseded.3"]
    assert files_in(tmp_path) == names
    kept = [torch.load(tmp_path / name)["averaged"][0]["b"].item() for name in names]
    assert kept == [-1.0, -2.0, -3.0]
