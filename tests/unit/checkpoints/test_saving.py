"""Files get to their places whole, synced, and without overwriting another."""

import errno
import multiprocessing
import os
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

from ignite_ema.checkpoints import files, load_file, save_file
from tests.helpers.files import files_in
from tests.helpers.peer_files import equal, tied

TENSORS = {"w": torch.arange(1000.0)}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "ignite_ema.checkpoints"])

suffixes = pytest.mark.parametrize("suffix", [".pt", ".safetensors"])


# What is written


def save_of(suffix):
    """Where the function is that writes: a module, and its name there."""
    return (torch, "save") if suffix != ".safetensors" else (pytest.importorskip("safetensors.torch"), "save_file")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_what_is_written_is_read_again(suffix, tmp_path):
    save_of(suffix)
    long = torch.randn(100_000)
    views = {"a": long[:10], "b": long[:10], "c": long[5:15], "d": long.view(torch.int32)[:10]}
    others = {"half": torch.randn(3).bfloat16(), "turned": torch.randn(3, 4).t(), "nothing": torch.zeros(0, 2)}
    averaged = tied().state_dict() | views | others | {"parameter": nn.Parameter(torch.ones(2))}
    file = tmp_path / f"file{suffix}"
    save_file(averaged, file)
    loaded = load_file(file)
    assert files_in(tmp_path) == [file.name]
    assert file.stat().st_size < 20_000  # views without the rest of their memory
    assert equal(loaded, averaged)
    assert not any(tensor.requires_grad for tensor in loaded.values())
    if suffix != ".safetensors":
        assert list(loaded) == list(averaged)
        for one, other in (("tied.first.weight", "tied.second.weight"), ("a", "b")):
            assert loaded[one].data_ptr() == loaded[other].data_ptr()


def test_conjugate_is_not_taken_for_a_tie(tmp_path):
    long = torch.full((9,), 1j)
    save_file({"a": long[:2], "b": long[:2].conj()}, tmp_path / "file.pt")
    assert torch.equal(load_file(tmp_path / "file.pt")["b"], torch.full((2,), -1j))


@pytest.mark.parametrize(
    ("change", "name", "error", "message"),
    [
        ({}, "file.bin", ValueError, "should end in .pt, .pth or .safetensors"),
        ({}, "folder.pt", OSError, "folder.pt' should be a file in a folder that exists"),
        ({}, "nowhere/file.pt", OSError, "nowhere/file.pt' should be a file in a folder that exists"),
        ({"n": 3}, "file.pt", TypeError, "'n' should be a tensor, got int"),
        ({"n": torch.zeros(1, device="meta")}, "file.pt", ValueError, "'n' should have values, got a tensor on"),
    ],
)
def test_what_cannot_be_saved(change, name, error, message, tmp_path):
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(error, match=message):
        save_file(TENSORS | change, tmp_path / name, force=True)
    assert files_in(tmp_path) == ["folder.pt"]


# What is there


@suffixes
def test_nothing_is_overwritten_unless_forced(suffix, tmp_path):
    save_of(suffix)
    file = tmp_path / f"file{suffix}"
    file.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="exists already; choose another name, or overwrite"):
        save_file(TENSORS, file)
    assert file.read_bytes() == b"precious"
    save_file(TENSORS, file, force=True)
    assert equal(load_file(file), TENSORS)


def test_link_is_written_through(tmp_path):
    (tmp_path / "store").mkdir()
    link, target = tmp_path / "link.pt", tmp_path / "store" / "v1"
    link.symlink_to(target)
    save_file({"w": torch.zeros(1)}, link)
    with pytest.raises(FileExistsError, match="link.pt' exists already"):
        save_file(TENSORS, link)
    save_file(TENSORS, link, force=True)
    assert link.is_symlink()
    assert equal(load_file(target), TENSORS)
    assert files_in(tmp_path / "store") == ["v1"]


def test_save_over_the_file_that_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "file.pt")
    save_file(load_file(tmp_path / "file.pt"), tmp_path / "file.pt", force=True)
    assert equal(load_file(tmp_path / "file.pt"), TENSORS)


# Modes


@suffixes
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_has_the_mode_of_any_new_file(mask, suffix, tmp_path):
    save_of(suffix)
    file = tmp_path / f"file{suffix}"
    before = os.umask(mask)
    try:
        save_file(TENSORS, file)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


# On the disk


def test_the_file_is_synced_before_its_move_and_the_folder_after_it(tmp_path, monkeypatch):
    events, replace = [], Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: events.append(stat.S_ISDIR(os.fstat(number).st_mode)))
    monkeypatch.setattr(Path, "replace", lambda *args: (replace(*args), events.append("moved")))
    save_file(TENSORS, tmp_path / "file.pt")
    assert events == [False, "moved", True]


def test_a_file_system_that_cannot_sync_a_folder_is_enough(tmp_path, monkeypatch):
    def refuse(descriptor, sync=os.fsync):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    save_file(TENSORS, tmp_path / "file.pt")
    assert files_in(tmp_path) == ["file.pt"]


# Killed writers


def write_half(folder, sender):
    """Begins to write, says so, and waits to be killed."""
    with files.whole_file(folder / "file.pt", force=True) as temporary:
        temporary.write_bytes(b"half")
        sender.send("half")
        sender.close()
        multiprocessing.Event().wait()


def test_what_a_killed_writer_leaves_is_a_file_beside_the_old_one(tmp_path):
    save_file(TENSORS, tmp_path / "file.pt")
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=write_half, args=(tmp_path, sender))
    process.start()
    assert receiver.recv() == "half"
    process.kill()
    process.join()
    leftover, file = files_in(tmp_path)
    assert leftover.startswith(".ignite_ema-")
    assert equal(load_file(tmp_path / file), TENSORS)
    save_file(TENSORS, tmp_path / "file.pt", force=True)


# Failures


@suffixes
@pytest.mark.parametrize("error", [RuntimeError("disk full"), OSError("disk full"), KeyboardInterrupt()])
def test_failing_save_leaves_the_old_file_alone(suffix, error, tmp_path, monkeypatch):
    file = tmp_path / f"file{suffix}"
    file.write_bytes(b"precious")

    def fail(content, path, **kwargs):
        (path if isinstance(path, Path) else Path(path.name)).write_bytes(b"half")
        raise error

    monkeypatch.setattr(*save_of(suffix), fail)
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError
    with pytest.raises(kind, match=str(error) or None):
        save_file(TENSORS, file, force=True)
    assert files_in(tmp_path) == [file.name]
    assert file.read_bytes() == b"precious"


def fail_as_torch_does(content, file):
    """The reason is behind an error of its own."""
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError:
        raise RuntimeError("enforce fail") from None


def fail_as_safetensors_does(content, path, metadata):
    raise ValueError("Error while serializing: I/O error: No space left on device (os error 28)")


@suffixes
def test_a_full_disk_is_told_with_the_file(suffix, tmp_path, monkeypatch):
    fail = fail_as_torch_does if suffix == ".pt" else fail_as_safetensors_does
    monkeypatch.setattr(*save_of(suffix), fail)
    with pytest.raises(OSError, match="No space left on device") as info:
        save_file(TENSORS, tmp_path / f"file{suffix}")
    assert f"file{suffix}'" in str(info.value)
    assert suffix != ".pt" or info.value.errno == errno.ENOSPC
    assert files_in(tmp_path) == []
