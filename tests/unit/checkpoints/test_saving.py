"""Files get to their places whole, synced, and without overwriting another."""

import errno
import os
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from ignite_ema.checkpoints import load_file, save_file
from tests.helpers.files import files_in
from tests.helpers.peer_files import equal, tied

TENSORS = {"w": torch.arange(1000.0)}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_what_is_written_is_read_again(suffix, tmp_path):
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


def test_a_large_state_is_not_copied_to_be_saved_as_safetensors(tmp_path, monkeypatch):
    written = {}
    monkeypatch.setattr(safetensors.torch, "save_file", lambda tensors, file, metadata: written.update(tensors))
    save_file(TENSORS, tmp_path / "file.safetensors")
    assert written["w"].data_ptr() == TENSORS["w"].data_ptr()


def test_conjugate_is_not_taken_for_a_tie(tmp_path):
    long = torch.full((9,), 1j)
    save_file({"a": long[:2], "b": long[:2].conj()}, tmp_path / "file.pt")
    assert torch.equal(load_file(tmp_path / "file.pt")["b"], torch.full((2,), -1j))


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


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_has_the_mode_of_any_new_file(mask, suffix, tmp_path):
    file = tmp_path / f"file{suffix}"
    before = os.umask(mask)
    try:
        save_file(TENSORS, file)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


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
