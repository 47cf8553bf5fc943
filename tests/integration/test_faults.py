"""What befalls a run and its files: SIGKILL at any time, and a full disk."""

import contextlib
import random
import resource
import signal
import time
import warnings

import pytest
import torch
from ignite.engine import Events
from ignite.handlers import Checkpoint, DiskSaver

from ignite_ema import EMAWarning
from ignite_ema.checkpoints import load_file, save_file
from ignite_ema.distributed import ShardedSaver, load_objects
from tests.helpers import runs
from tests.helpers.bits import assert_same_bits
from tests.helpers.files import newest
from tests.helpers.worlds import PROCESSES

LAST = 100  # iterations; no checkpoint is taken at the last one
KILLS = 6  # of each run
SUFFIXES = [".pt", ".safetensors"]


class Killed:
    """A process that was started with `target(sender, *args)`, and has sent that it is about to begin."""

    def __init__(self, target, *args):
        self.receiver, sender = PROCESSES.Pipe(duplex=False)
        self.process = PROCESSES.Process(target=_begin, args=(target, sender, *args))
        self.process.start()
        sender.close()
        assert self.receiver.recv() == "begins"

    def kill_after(self, seconds):
        """Ends it at once, wherever it is; it does not end by itself before."""
        time.sleep(seconds)
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL

    def end(self):
        assert self.receiver.poll(60)
        assert self.receiver.recv() == "ends"
        self.process.kill()
        self.process.join()


def _begin(target, sender, *args):
    warnings.simplefilter("error", EMAWarning)
    target(sender, *args)
    sender.send("ends")
    time.sleep(60)  # until it is killed


def train(sender, folder, saver):
    """From the newest checkpoint to the last iteration, with a checkpoint every three."""
    run = runs.Run()
    save = {"DiskSaver": DiskSaver, "ShardedSaver": ShardedSaver}[saver](folder, require_empty=False)
    checkpoint = Checkpoint(run.objects(), save, n_saved=2)
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), checkpoint)
    sender.send("begins")
    if saved := newest(folder):
        load_objects(run.objects(), saved) if saved.is_dir() else Checkpoint.load_objects(run.objects(), saved)
    run.train(LAST)
    torch.save(run.states(), folder / "final.pt")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    Killed(train, folder, "DiskSaver").end()
    return torch.load(folder / "final.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("saver", ["DiskSaver"] * 9 + ["ShardedSaver"] * 2)
def test_a_run_that_is_killed_at_any_time_ends_with_the_same_bits(saver, uninterrupted, tmp_path, request):
    chosen = random.Random(request.node.name)
    longest, kills = 0.15, 0
    while kills < KILLS or not newest(tmp_path):
        Killed(train, tmp_path, saver).kill_after(chosen.uniform(0, longest))
        kills += 1
        longest *= 1 if newest(tmp_path) else 2  # on a slow machine
    Killed(train, tmp_path, saver).end()
    assert_same_bits(torch.load(tmp_path / "final.pt", weights_only=True), uninterrupted)


def write_again_and_again(sender, path):
    versions = [{"a": torch.full((20000,), float(n)), "b": torch.full((3,), float(n))} for n in range(8)]
    save_file(versions[0], path, force=True)
    sender.send("begins")
    for count in range(10**6):
        save_file(versions[count % 8], path, force=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_written_when_its_writer_is_killed_is_whole(suffix, tmp_path):
    path, chosen = tmp_path / f"file{suffix}", random.Random(0)
    for _ in range(5):
        Killed(write_again_and_again, path).kill_after(chosen.uniform(0, 0.05))
        loaded = load_file(path)
        assert loaded["a"].shape == (20000,)
        assert len({*loaded["a"].tolist(), *loaded["b"].tolist()}) == 1


@contextlib.contextmanager
def full_disk(room):
    """No file can become larger than ``room`` bytes, as if the disk were full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(("old", "room"), [(True, 0), (False, 2000)])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_is_said_and_leaves_the_old_file(suffix, old, room, tmp_path):
    path = tmp_path / f"file{suffix}"
    if old:
        path.write_bytes(b"precious")
    before = content(tmp_path)
    with pytest.raises(OSError, match=".+") as info, full_disk(room):
        save_file({"weight": torch.zeros(10**5), "bias": torch.zeros(10**3)}, path, force=old)
    assert "file" in str(info.value)
    assert "\n" not in str(info.value)
    assert content(tmp_path) == before
