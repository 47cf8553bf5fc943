"""What befalls a run and its files: SIGKILL at any time, a full disk, files that are cut short, damaged, or evil."""

import contextlib
import io
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver

from ignite_ema import EMAHandler, EMAWarning, checkpoints
from ignite_ema.checkpoints import averaged_state_dict, load_file, read, save_file
from ignite_ema.cli import main
from ignite_ema.distributed import ShardedSaver, load_objects
from tests.helpers import runs
from tests.helpers.files import Evil, newest
from tests.helpers.models import net as small_net

LAST = 100  # iterations; no checkpoint is taken at the last one
KILLS = 6  # of each run
SUFFIXES = [".pt", ".safetensors"]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["pytest", "torch._dynamo", "ignite.handlers", "ignite_ema.distributed", "safetensors.torch"]
)  # a process costs a tenth of a second then


# SIGKILL


class Killed:
    """A process that was started with `target(sender, *args)`, and has sent that it is about to begin."""

    def __init__(self, target, *args):
        self.receiver, sender = _CONTEXT.Pipe(duplex=False)
        self.process = _CONTEXT.Process(target=_begin, args=(target, sender, *args))
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
    return leaves(folder / "final.pt")


def leaves(path):
    """What a file holds, flat, tensors as bytes."""
    found, paths = torch.utils._pytree.tree_flatten_with_path(torch.load(path, weights_only=True))
    return str(paths), [(str(key), leaf.numpy().tobytes() if hasattr(leaf, "numpy") else leaf) for key, leaf in found]


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
    assert leaves(tmp_path / "final.pt") == uninterrupted


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


# A full disk


@contextlib.contextmanager
def full_disk(room):
    """No file can become larger than ``room`` bytes, as if the disk were full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


net = partial(small_net, width=40)  # so that a file has parts with nothing but numbers


def checkpoint_file(path):
    """A checkpoint of Ignite with an average; as safetensors the plain weights."""
    model, handler = net(), EMAHandler(net(1))
    handler.num_updates = 3
    if path.suffix == ".safetensors":
        save_file(handler.ema_model.state_dict(), path)
    else:
        torch.save({"model": model.state_dict(), "ema_model": handler.ema_model.state_dict()}, path)
    return path


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(("old", "room"), [(True, 0), (False, 100), (True, 2000), (False, 100_000)])
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


@pytest.mark.parametrize(("suffix", "room"), [(".pt", 2000), (".safetensors", 0)])
def test_export_to_a_full_disk_is_one_sentence(suffix, room, tmp_path, capsys):
    file = tmp_path / "checkpoint.pt"
    torch.save({"model": net(0, width=4000).state_dict(), "ema_model": net(1, width=4000).state_dict()}, file)
    out = tmp_path / f"out{suffix}"
    out.write_bytes(b"precious")
    before = content(tmp_path)
    with full_disk(room):
        code = main(["export", str(file), str(out), "--force"])
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err.count("\n")) == (1, "", 1)
    assert "File too large" in printed.err
    assert f"'{out}'" in printed.err
    assert content(tmp_path) == before


# Files that are not what they should be


def state_of(handler):
    tensors = {name: one.clone() for name, one in handler.state_dict()["averaged_tensors"].items()}
    return handler.num_updates, {name: one.numpy().tobytes() for name, one in tensors.items()}


def load_averaged(path):
    handler = EMAHandler(net(2))
    before = state_of(handler)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The checkpoint has no average")
            handler.load_averaged(path)
    except Exception:
        assert state_of(handler) == before
        raise


def command(*arguments):
    """The command, with what it says as an error of the kind that the functions raise."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    if code:
        assert code == 1
        assert err.getvalue().count("\n") == 1
        raise ValueError(err.getvalue().strip())


def export(path):
    out = path.with_name("out.pt")
    try:
        command("export", path, out)
    finally:
        assert not list(path.parent.glob(".*"))
        written = out.exists()
        out.unlink(missing_ok=True)
    assert written


def names(path):
    source = path.with_name("list.pth")
    torch.save({"shadow_params": list(net().parameters()), "num_updates": 2}, source)
    command("inspect", source, "--names", path)


ENTRANCES = {
    "load_file": load_file,
    "read": read,
    "averaged_state_dict": averaged_state_dict,
    "load_averaged": load_averaged,
    "inspect": lambda path: command("inspect", path),
    "export": export,
    "--names": names,
}
EVERY_ENTRANCE = pytest.mark.parametrize("entrance", ENTRANCES)


@pytest.mark.parametrize("suffix", SUFFIXES)
@EVERY_ENTRANCE
def test_what_a_file_ought_not_to_be_is_one_sentence(entrance, suffix, tmp_path):
    """Cut short, or something else."""
    path = checkpoint_file(tmp_path / f"file{suffix}")
    whole, said = path.read_bytes(), []
    others = [b"epoch,loss\n1,0.5\n", b"\x89PNG\r\n\x1a\n" + bytes(100), b"<!DOCTYPE html><html><body>404: Not Found"]
    for content in [*(whole[: len(whole) * part // 8] for part in range(8)), whole[:-1], *others]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"file{suffix}' should") as info:
            ENTRANCES[entrance](path)
        said.append(str(info.value))
    assert not any("\n" in text for text in said)
    assert max(map(len, said)) < 1500


@pytest.mark.parametrize("kind", ["inside", "whole", "bare pickle", "old format"])
@EVERY_ENTRANCE
def test_no_entrance_runs_what_a_file_holds(entrance, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil, path = Evil(os.system, ("touch trace",)), tmp_path / "file.pt"
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps({"ema_model": evil}))
    else:
        file = {"model": net().state_dict(), "ema_model": net(1).state_dict(), "args": evil}
        torch.save(evil if kind == "whole" else file, path, _use_new_zipfile_serialization=kind != "old format")
    with contextlib.suppress(ValueError, TypeError):
        ENTRANCES[entrance](path)
    assert not Path("trace").exists()


@pytest.mark.parametrize("fault", ["cut", "damaged", "empty", "text"])
@pytest.mark.parametrize("part", [".metadata", "__0_0.distcp"])
def test_a_damaged_sharded_checkpoint_is_one_sentence_and_loads_nothing(part, fault, tmp_path):
    model = net()
    objects = {"model": model, "ema_handler": EMAHandler(model), "trainer": Engine(lambda engine, batch: None)}
    Checkpoint(objects, ShardedSaver(tmp_path / "saved"), n_saved=1)(objects["trainer"])
    path = tmp_path / "saved" / "checkpoint_0.pt" / part
    whole, chosen = path.read_bytes(), random.Random(0)
    other = net(1)
    loaded = {"model": other, "ema_handler": EMAHandler(other), "trainer": Engine(lambda engine, batch: None)}
    before = state_of(loaded["ema_handler"])
    said = []
    for number in range(12 if fault in ("cut", "damaged") else 1):
        damaged = bytearray(whole)
        if fault == "cut":
            del damaged[len(whole) * number // 12 :]
        elif fault == "damaged":
            damaged[chosen.randrange(len(whole))] ^= 255
        path.write_bytes({"empty": b"", "text": b"epoch,loss\n"}.get(fault, bytes(damaged)))
        try:
            load_objects(loaded, path.parent)
        except ValueError as error:
            said.append(str(error))
            same = state_of(loaded["ema_handler"]) == before
            assert same, "nothing should have been loaded"
        else:
            assert fault == "damaged", "numbers alone can be damaged without being noticed"
            before = state_of(loaded["ema_handler"])
    assert said
    assert not any("\n" in text for text in said)


def test_a_directory_that_lost_a_part_is_refused(tmp_path):
    model = net()
    objects = {"model": model, "ema_handler": EMAHandler(model)}
    Checkpoint(objects, ShardedSaver(tmp_path / "saved"))(Engine(lambda engine, batch: None))
    folder = tmp_path / "saved" / "checkpoint_0.pt"
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / ".metadata").unlink()
    with pytest.raises(FileNotFoundError, match="there is no '.metadata' in it; name one of"):
        load_objects(objects, tmp_path / "copy")
    with pytest.raises(ValueError, match="should be a file, got a directory; name the file in it"):
        load_file(folder)
    assert checkpoints.read(folder).system == "ignite_ema"
    (next(folder.glob("*.distcp"))).unlink()
    for entrance in (checkpoints.read, EMAHandler(net()).load_averaged):
        with pytest.raises(ValueError, match="should hold all that was saved, but .* is not whole in its files"):
            entrance(folder)
