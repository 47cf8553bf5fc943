"""Files of tensors are read as torch reads them, and verified; nothing in them runs."""

import argparse
import datetime
import io
import itertools
import os
import pickle
import sys
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ignite_ema.checkpoints import load_file, read, save_file
from ignite_ema.checkpoints.files import ForeignObject
from tests.helpers.bits import bits
from tests.helpers.files import Evil, files_in

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # compressed sparse tensors are in beta
    CSR = torch.eye(3).to_sparse_csr()
TENSORS = {
    "float32": torch.randn(3, 4),
    "turned": torch.randn(5, 4).t()[2:],
    "scalar": torch.tensor(2.5),
    "nothing": torch.zeros(0, 3),
    "bfloat16": torch.randn(3).bfloat16(),
    "bool": torch.tensor([True, False]),
    "int8": torch.tensor([-3], dtype=torch.int8),
    "uint16": torch.tensor([3], dtype=torch.uint16),
    "float8": torch.tensor([0.5]).to(torch.float8_e4m3fn),
    "complex": torch.randn(2, dtype=torch.complex64),
    "conjugate": torch.randn(2, dtype=torch.complex64).conj(),
    "negative": torch.randn(2, dtype=torch.complex64).conj().imag,
    "parameter": nn.Parameter(torch.randn(2)),
    "expanded": torch.randn(1).expand(3),
    "meta": torch.zeros(2, 3, device="meta"),
    "coo": torch.eye(3).to_sparse(),
    "csr": CSR,
}


def saved(content, path, **options):
    torch.save(content, path, **options)
    return path


@pytest.fixture(params=itertools.product([2, 4, 5], [True, False]), ids="protocol {0[0]}, zipped {0[1]}".format)
def in_each_way(request, tmp_path):
    """Saves a file in one of the ways that torch has."""
    protocol, zipped = request.param
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    return lambda content: saved(content, tmp_path / "file.pt", **options)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_those_that_were_saved(name, zipped, tmp_path):
    if name in ("uint16", "float8") and not zipped:
        pytest.skip("torch writes such a file, and cannot read it")
    due = TENSORS[name].detach()
    loaded = load_file(saved({"w": TENSORS[name]}, tmp_path / "f.pt", _use_new_zipfile_serialization=zipped))["w"]
    assert (loaded.layout, loaded.device, loaded.requires_grad) == (due.layout, due.device, False)
    if name in ("turned", "expanded", "meta"):
        assert (loaded.shape, loaded.dtype, loaded.stride()) == (due.shape, due.dtype, due.stride())
    if name != "meta":
        assert bits(loaded) == bits(due)


def test_values_come_back_with_their_types(in_each_way):
    numbers = [1, -2, 2**70, 0.5, True, None, 1j, range(3)]
    others = ["ä", b"\x00\xff", b"", (1, (2,)), {3, 4}, frozenset("a"), bytearray(b"x"), torch.float16, torch.Size([2])]
    containers = [OrderedDict(b=1, a=2), deque([1, 2], maxlen=3), defaultdict(int, a=1), Counter("aab")]
    dates = [datetime.timedelta(3), datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)]
    content = numbers + others + containers + dates
    loaded = load_file(in_each_way({"values": content, (1, "a"): {}}))
    assert loaded == {"values": content, (1, "a"): {}}
    assert [type(value) for value in loaded["values"]] == [type(value) for value in content]


def test_numpys_scalars_and_arrays_come_back(in_each_way):
    content = [
        *(np.float64(0.5), np.int32(3), np.bool_(True), np.datetime64("2026-01-02"), np.str_("a")),
        *(np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.array(["a", "b"])),
        *(np.array([1, "a", None], dtype=object), np.zeros((0, 2)), np.array(3, dtype="float16")),
    ]
    for value, due in zip(load_file(in_each_way(content)), content, strict=True):
        assert type(value) is type(due)
        assert value.dtype == due.dtype
        assert np.array_equal(value, due)


TRACE = "import pathlib; pathlib.Path('trace').touch()"
ATTACKS = {
    "os.system": lambda: Evil(os.system, ("touch trace",)),
    "exec": lambda: Evil(exec, (TRACE,)),
    "a dotted name": lambda: Evil(io.BytesIO.__init__, (TRACE,)),
    "a pickle in a pickle": lambda: Evil(torch.storage._load_from_bytes, (pickle.dumps(Evil(exec, (TRACE,))),)),
    "state": lambda: Evil(Evil, (), {"call": Evil(exec, (TRACE,))}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_run(attack, in_each_way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = in_each_way({"ema": {"w": torch.ones(1)}, "args": ATTACKS[attack]()})
    assert read(path).tensors == {"w": torch.ones(1)}
    assert files_in(tmp_path) == ["file.pt"]


class Settings(dict):
    """A mapping of a class of its own."""


class Log(list):
    """A list of a class of its own, with attributes."""


def test_foreign_objects_are_inert(in_each_way):
    log = Log([1, 2])
    log.name = "loss"
    content = {
        "args": argparse.Namespace(path=Path("x"), nested=argparse.Namespace()),
        "settings": [Settings(a=1)],
        "log": log,
        "path": Path("x"),
        "kinds": {argparse.Namespace, int},
        "keys": {Path("x"): 1},
    }
    loaded = load_file(in_each_way(content))
    assert list(loaded) == list(content)
    assert loaded["settings"] == [{"a": 1}]
    assert all(isinstance(loaded[name], ForeignObject) for name in ("args", "log", "path"))
    assert not hasattr(loaded["args"], "path")


def test_attributes_in_a_file_change_nothing_of_torch(tmp_path):
    """BUILD sets attributes: here of a function, and of a class."""
    before = torch._utils._rebuild_tensor_v2.__defaults__
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"cargparse\nNamespace\n"):
        pickled = b"\x80\x02}X\x01\0\0\0w" + target + b"}}X\x0c\0\0\0__defaults__K\x01\x85s\x86bs."
        with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
            archive.writestr("a/data.pkl", pickled)
            archive.writestr("a/version", "3")
        try:
            load_file(tmp_path / "file.pt")
        except ValueError:
            continue
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before
    assert not hasattr(argparse.Namespace, "__defaults__")


def test_a_flipped_bit_is_told_with_the_file_and_the_entry(tmp_path):
    big = torch.arange(5000.0)
    path = saved({"optimizer": {"m": -big}, "ema": {"x": torch.ones(9), "big": big}}, tmp_path / "f.pt")
    content = bytearray(path.read_bytes())
    content[content.index(big.numpy().tobytes()) + 29] ^= 1
    path.write_bytes(content)
    for call in (load_file, read):
        with pytest.raises(ValueError, match=r"f.pt' should .* changed since: the checksum of its entry 'f/data/\d"):
            call(path)
    assert torch.equal(load_file(path, verified=False)["ema"]["x"], torch.ones(9))


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved({"w": torch.arange(9.0)}, tmp_path / "f.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_file(path)["w"], torch.arange(9.0))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_was_read_outlives_the_file(suffix, tmp_path):
    path, ones = tmp_path / f"file{suffix}", {"module.w": torch.ones(100_000)}
    save_file({"n_averaged": torch.tensor(4)} | ones, path)
    found = read(path)
    with path.open("r+b") as file:  # in place
        file.write(bytes(path.stat().st_size))
    assert (found.system, found.num_updates) == ("torch AveragedModel", 4)
    assert torch.equal(found.tensors["w"], torch.ones(100_000))


@pytest.mark.parametrize("call", [load_file, read])
def test_torch_may_be_told_to_refuse(call, tmp_path, monkeypatch):
    path = saved({"ema": {"w": torch.ones(1)}}, tmp_path / "f.pt")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(RuntimeError, match="TORCH_FORCE_WEIGHTS_ONLY_LOAD should not be set .*; unset it, or"):
        call(path)
    assert read(torch.load(path)).tensors  # one way out
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    assert call(path)  # the other


def written(save, content):
    buffer = io.BytesIO()
    save(content, buffer)
    return buffer.getvalue()


PLAIN = written(torch.save, {"w": TENSORS["float32"]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as such. It is damaged, cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "such as .* a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "of another kind"),
        ("größe,loss\n1,0.5\n".encode() * 100, "cannot be read as such"),
        (pickle.dumps({"a": 1}), "cannot be read as such"),
        (written(torch.jit.save, torch.jit.script(nn.Linear(1, 1))), "such as TorchScript"),
        (PLAIN[:300], "cannot be read as such"),
        (PLAIN.replace(b"PK\6\7\0", b"PK\6\7\1"), "cannot be read as such"),  # of several disks
    ],
)
def test_files_of_another_kind_are_told_as_what_they_are(content, message, tmp_path):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    for verified in (False, True):
        with pytest.raises(ValueError, match=message) as info:
            load_file(path, verified=verified)
    assert str(info.value).startswith(f"'{path}' should")
    assert len(str(info.value)) < 350 + len(str(path))
    assert "weights_only" not in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("length", [7, -1])
def test_safetensors_that_are_cut_short(length, tmp_path):
    file = tmp_path / "file.safetensors"
    save_file({"w": torch.ones(9)}, file)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match="should be a file that torch.save or safetensors wrote, but it cannot be"):
        load_file(file)


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    file = tmp_path / "file.safetensors"
    with pytest.raises(ImportError, match="file.safetensors' needs the package safetensors; pip install"):
        save_file({"w": CSR}, file)
    assert not files_in(tmp_path)
    file.write_bytes(b"x")
    with pytest.raises(ImportError, match="needs the package safetensors"):
        load_file(file)


def test_a_file_that_was_compressed_is_refused(tmp_path):
    path = tmp_path / "file.pt"
    with zipfile.ZipFile(io.BytesIO(PLAIN)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    for verified in (False, True):  # torch would read the compressed bytes as numbers
        with pytest.raises(ValueError, match="file.pt' should be .* cannot be read as such"):
            load_file(path, verified=verified)
