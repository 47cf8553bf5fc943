"""How files get to their places: private, synced, and without what killed writers have left."""

import contextlib
import errno
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from ignite_ema.checkpoints import load_file, save_file, saving

TENSORS = {"w": torch.arange(1000.0)}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "ignite_ema.checkpoints"])

suffixes = pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# Modes


def modes_while_written(file, monkeypatch):
    """The mode of the file and of its folder when the first byte comes, and when the last one does."""
    seen = []

    def look(path):
        path = path if isinstance(path, Path) else Path(path.name)
        seen.append((stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)))

    def watched(save):
        def write(content, target, **kwargs):
            look(target)
            save(content, target, **kwargs)
            look(target)

        return write

    monkeypatch.setattr(torch, "save", watched(torch.save))
    if file.suffix == ".safetensors":
        library = pytest.importorskip("safetensors.torch")
        monkeypatch.setattr(library, "save_file", watched(library.save_file))
    save_file(TENSORS, file, force=True)
    return seen


@suffixes
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o400])
def test_what_replaces_a_file_has_its_mode_from_the_first_byte(mode, suffix, tmp_path, monkeypatch):
    file = tmp_path / f"file{suffix}"
    file.touch()
    file.chmod(mode)
    first, *_ = seen = modes_while_written(file, monkeypatch)
    assert first == (mode | 0o600, 0o700)
    assert all(folder == 0o700 and not found & ~(mode | 0o600) for found, folder in seen)
    assert stat.S_IMODE(file.stat().st_mode) == mode


@suffixes
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_of_any_new_file(mask, suffix, tmp_path, monkeypatch):
    before = os.umask(mask)
    try:
        modes_while_written(tmp_path / f"file{suffix}", monkeypatch)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / f"file{suffix}").stat().st_mode) == 0o666 & ~mask


@suffixes
def test_a_file_may_have_the_longest_name_that_there_is(suffix, tmp_path):
    file = tmp_path / f"{'x' * (255 - len(suffix))}{suffix}"
    save_file(TENSORS, file)
    assert torch.equal(load_file(file)["w"], TENSORS["w"])


# On the disk


def test_the_file_is_synced_before_its_move_and_the_folder_after_it(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda number: events.append(stat.S_ISDIR(os.fstat(number).st_mode)))
    for name in ("link", "replace"):
        monkeypatch.setattr(saving, "_put", lambda *args, put=saving._put: (put(*args), events.append("moved")))
        file = tmp_path / f"{name}.pt"
        save_file(TENSORS, file, force=name == "replace")
        assert events == [False, "moved", True]
        events.clear()
        monkeypatch.undo()
        monkeypatch.setattr(os, "fsync", lambda number: events.append(stat.S_ISDIR(os.fstat(number).st_mode)))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_a_folder_is_enough(number, tmp_path, monkeypatch):
    def refuse(descriptor, sync=os.fsync):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    save_file(TENSORS, tmp_path / "file.pt")
    assert names_in(tmp_path) == ["file.pt"]


def test_a_sync_that_fails_is_told(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"file.pt' should be written, but the system says: Input/output error; ") as info:
        save_file(TENSORS, tmp_path / "file.pt")
    assert info.value.errno == errno.EIO


# Leftovers


def write_half(folder, suffix, sender):
    """Begins to write, says so, and waits to be killed."""
    with saving.whole_file(folder / f"file{suffix}", force=True) as temporary:
        temporary.write_bytes(b"half")
        sender.send("half")
        sender.close()
        multiprocessing.Event().wait()


@contextlib.contextmanager
def writer(folder, suffix=".pt"):
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=write_half, args=(folder, suffix, sender))
    process.start()
    assert receiver.recv() == "half"
    try:
        yield process
    finally:
        process.kill()
        process.join()


@suffixes
def test_what_a_killed_writer_left_is_cleaned_up_by_the_next(suffix, tmp_path):
    for _ in range(2):
        with writer(tmp_path, suffix):
            pass
    assert len(names_in(tmp_path)) == 1  # the second has cleaned up after the first
    save_file(TENSORS, tmp_path / "other.pt")
    assert names_in(tmp_path) == ["other.pt"]


def test_what_a_living_writer_writes_stays(tmp_path):
    with writer(tmp_path):
        before = {path.name for path in tmp_path.rglob("*")}
        saving.clean_leftovers(tmp_path)
        save_file(TENSORS, tmp_path / "other.pt")
        assert {path.name for path in tmp_path.rglob("*")} == before | {"other.pt"}
    saving.clean_leftovers(tmp_path)
    assert names_in(tmp_path) == ["other.pt"]


def test_what_another_thread_writes_stays(tmp_path):
    with saving.whole_file(tmp_path / "one.pt", force=False) as temporary:
        save_file(TENSORS, tmp_path / "other.pt")
        saving.clean_leftovers(tmp_path)
        temporary.write_bytes(b"whole")
    assert (tmp_path / "one.pt").read_bytes() == b"whole"
    assert names_in(tmp_path) == ["one.pt", "other.pt"]


@pytest.mark.parametrize("found", [[], ["lock"], ["lock", "file.pt", ".tmpAbC"]])
def test_a_writer_may_be_killed_at_any_point(found, tmp_path):
    leftover = tmp_path / f"{saving._PREFIX}abc"
    leftover.mkdir()
    for name in found:
        (leftover / name).touch()
    saving.clean_leftovers(tmp_path)
    assert names_in(tmp_path) == []


def test_a_cleaner_that_is_killed_leaves_it_to_the_next(tmp_path, monkeypatch):
    leftover = tmp_path / f"{saving._PREFIX}abc"
    leftover.mkdir()
    for name in ("lock", "a", "b"):
        (leftover / name).touch()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # killed before the last step
        saving.clean_leftovers(tmp_path)
    assert names_in(leftover) == ["lock"]
    saving.clean_leftovers(tmp_path)
    assert names_in(tmp_path) == []


def test_a_writer_whose_folder_was_taken_for_a_leftover_makes_another(tmp_path, monkeypatch):
    taken = []

    def take(lock, how, flock=saving.fcntl.flock):
        if not taken:  # between making the lock and locking it
            folder = Path(lock.name).parent
            taken.append(folder)
            shutil.rmtree(folder)
        flock(lock, how)

    monkeypatch.setattr(saving.fcntl, "flock", take)
    save_file(TENSORS, tmp_path / "file.pt")
    assert taken
    assert names_in(tmp_path) == ["file.pt"]


def test_without_locks_nothing_is_cleaned_up_and_all_is_written(tmp_path, monkeypatch):
    def refuse(lock, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with writer(tmp_path):
        pass
    before = names_in(tmp_path)
    monkeypatch.setattr(saving.fcntl, "flock", refuse)
    save_file(TENSORS, tmp_path / "file.pt")
    assert names_in(tmp_path) == [*before, "file.pt"]


def test_files_and_links_of_others_stay(tmp_path):
    (tmp_path / "store").mkdir()
    for path in (tmp_path / "store" / "lock", tmp_path / f"{saving._PREFIX}file", tmp_path / ".ignite_ema"):
        path.touch()
    (tmp_path / f"{saving._PREFIX}link").symlink_to(tmp_path / "store")
    before = names_in(tmp_path)
    saving.clean_leftovers(tmp_path)
    assert names_in(tmp_path) == before
    assert names_in(tmp_path / "store") == ["lock"]


# A full disk

SENTENCE = (
    "'{}' should be written, but the disk is full (No space left on device); make room there, or choose another place."
)


def fail_of_torch(content, file):
    """As torch.save does: the reason is behind another error."""
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError:
        raise RuntimeError("enforce fail") from None


def fail_of_safetensors(content, path, metadata):
    raise ValueError("Error while serializing: I/O error: No space left on device (os error 28)")


@suffixes
def test_a_full_disk_is_called_so(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", fail_of_torch)
    if suffix == ".safetensors":
        monkeypatch.setattr(pytest.importorskip("safetensors.torch"), "save_file", fail_of_safetensors)
    file = tmp_path / f"file{suffix}"
    with pytest.raises(OSError, match="is full") as info:
        save_file(TENSORS, file)
    assert (info.value.errno, str(info.value)) == (errno.ENOSPC, SENTENCE.format(file))
    assert names_in(tmp_path) == []


def test_other_reasons_keep_their_class(tmp_path, monkeypatch):
    def fail(content, file):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/else")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(PermissionError, match=r"file.pt' should be written, but the system says: Permission denied; "):
        save_file(TENSORS, tmp_path / "file.pt")


SCRIPT = """
    import sys
    import torch
    from ignite_ema.checkpoints import save_file
    for file in sys.argv[1:]:
        try:
            save_file({"w": torch.zeros(10**6)}, file)
        except OSError as error:
            print(error.errno, error)
"""


@pytest.mark.slow
def test_a_disk_that_is_full_is_called_so(tmp_path):
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    files = [tmp_path / f"file{suffix}" for suffix in (".pt", ".pth", ".safetensors")]
    command = ["sh", "-c", f'{mount} && "$@" && ls -A {tmp_path}', "sh", sys.executable, "-c", textwrap.dedent(SCRIPT)]
    done = subprocess.run(["unshare", "-rm", *command, *files], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"28 {SENTENCE.format(file)}" for file in files]
