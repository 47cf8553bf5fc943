"""Files of tensors are read as torch reads them, verified, and cost what they weigh."""

import argparse
import copyreg
import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path

import pytest
import torch
from torch import nn

from ignite_ema.checkpoints import load_file, read, save_file
from ignite_ema.checkpoints.safe_load import open_file
from tests.helpers.files import Evil, files_in

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # compressed sparse tensors are in beta
    CSR = torch.eye(3).to_sparse_csr()
TENSORS = {
    "float32": torch.randn(3, 4),
    "turned": torch.randn(3, 4).t(),
    "row": torch.randn(5, 4)[2],
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
    "buffer": nn.Buffer(torch.randn(2)),
    "expanded": torch.randn(1).expand(3),
    "meta": torch.zeros(2, 3, device="meta"),
    "coo": torch.eye(3).to_sparse(),
    "csr": CSR,
}


def saved(content, path, **options):
    torch.save(content, path, **options)
    return path


@FORMATS
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_those_that_were_saved(name, zipped, tmp_path):
    due = TENSORS[name].detach()
    loaded = load_file(saved({"w": TENSORS[name]}, tmp_path / "f.pt", _use_new_zipfile_serialization=zipped))["w"]
    assert (loaded.shape, loaded.dtype, loaded.layout, loaded.device) == (due.shape, due.dtype, due.layout, due.device)
    assert not loaded.requires_grad
    if name in ("turned", "row", "expanded", "meta"):
        assert loaded.stride() == due.stride()
    if name == "meta":
        return
    if name in ("coo", "csr"):
        loaded, due = loaded.to_dense(), due.to_dense()
    assert (
        torch.equal(loaded.view(torch.uint8), due.view(torch.uint8)) if name == "float8" else torch.equal(loaded, due)
    )


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_values_of_every_protocol(protocol, zipped, tmp_path):
    numbers = [1, -2, 2**70, 0.5, True, None, 1j]
    others = ["ä", b"\x00\xff", (1, (2,)), {3, 4}, frozenset("a"), bytearray(b"x")]
    content = {"plain": numbers + others, "ordered": OrderedDict(b=1, a=2), (1, "a"): {}}
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    assert load_file(saved(content, tmp_path / "file.pt", **options)) == content


def test_versions_of_modules_stay_with_a_state_dict(tmp_path):
    state = load_file(saved(nn.BatchNorm1d(2).state_dict(), tmp_path / "file.pt"))
    assert state._metadata[""] == {"version": 2}


def test_ties_are_one_memory(tmp_path):
    long = torch.randn(9)
    loaded = load_file(saved({"a": long, "b": long[3:], "c": long}, tmp_path / "file.pt"))
    assert loaded["a"].data_ptr() == loaded["c"].data_ptr() == loaded["b"].data_ptr() - 12


def test_writing_into_what_was_loaded_leaves_the_file_alone(tmp_path):
    path = saved({"w": torch.zeros(5000)}, tmp_path / "file.pt")
    load_file(path)["w"].fill_(1.0)
    assert not load_file(path)["w"].any()


def test_sparse_tensors_are_read_where_warnings_are_errors(tmp_path):
    """In a process of its own: torch warns once in each."""
    whole = torch.eye(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [whole.to_sparse(), whole.to_sparse_csr(), whole.to_sparse_csc(), whole.to_sparse_bsr((2, 2))]
    path = saved(made, tmp_path / "file.pt")
    code = (
        f"import torch, warnings; warnings.simplefilter('error'); from ignite_ema.checkpoints import load_file; "
        f"assert all(torch.equal(one.to_dense(), torch.eye(4)) for one in load_file({str(path)!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what a file asks for is not run ---

TRACE = "import pathlib; pathlib.Path('trace').touch()"
ATTACKS = {
    "os.system": lambda: Evil(os.system, ("touch trace",)),
    "exec": lambda: Evil(exec, (TRACE,)),
    "eval": lambda: Evil(eval, ("__import__('pathlib').Path('trace').touch()",)),
    "subprocess": lambda: Evil(subprocess.run, (["touch", "trace"],)),
    "getattr": lambda: Evil(getattr, (Path("trace"), "touch")),
    "open": lambda: Evil(open, ("trace", "w")),
    "torch.save": lambda: Evil(torch.save, (1, "trace")),
    "state": lambda: Evil(Evil, (), {"call": Evil(exec, (TRACE,))}),
}


@FORMATS
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_run(attack, zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"ema": {"w": torch.ones(1)}, "args": ATTACKS[attack]()}
    torch.save(content, "evil.pt", _use_new_zipfile_serialization=zipped)
    assert read("evil.pt").tensors == {"w": torch.ones(1)}
    assert files_in(tmp_path) == ["evil.pt"]


def test_modules_of_foreign_objects_are_not_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("foreign.py").write_text("class Thing: ...\n")
    import foreign

    torch.save({"thing": foreign.Thing()}, "file.pt")
    del sys.modules["foreign"]
    Path("foreign.py").write_text(TRACE)
    load_file("file.pt")
    assert "foreign" not in sys.modules
    assert not Path("trace").exists()


class Settings(dict):
    """A dictionary of a class of its own."""


@FORMATS
def test_harmless_foreign_objects(zipped, tmp_path):
    import numpy as np

    content = {
        "args": argparse.Namespace(path=Path("x"), nested=argparse.Namespace()),
        "metric": np.float64(0.5),
        "history": np.arange(3),
        "queue": deque([1, 2], maxlen=3),
        "counts": defaultdict(int, a=1),
        "counter": Counter("aab"),
        "kinds": {argparse.Namespace, int},
        "log": [Settings(a=1)],
    }
    loaded = load_file(saved(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped))
    assert list(loaded) == list(content)
    assert (loaded["queue"], loaded["counts"], loaded["log"]) == ([1, 2], {"a": 1}, [{"a": 1}])
    assert not hasattr(loaded["args"], "path")


# --- damage ---


def flipped(path, old, new):
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


def test_a_flipped_bit_is_told_with_the_file_and_the_tensor_where_it_is_asked_for(tmp_path):
    big = torch.arange(5000.0)
    content = {"optimizer": {"m": -big}, "model": {"a": torch.zeros(9)}, "ema": {"x": torch.ones(9), "big": big}}
    path = saved(content, tmp_path / "f.pt")
    flipped(path, (-big).numpy().tobytes(), (-big).index_fill(0, torch.tensor([7]), 0.0).numpy().tobytes())
    assert torch.equal(read(path).tensors["x"], torch.ones(9))  # what is not asked for is not verified
    flipped(path, big.numpy().tobytes(), big.index_fill(0, torch.tensor([7]), 0.0).numpy().tobytes())
    for call, name in ((load_file, "(optimizer.m|ema.big)"), (read, "big")):
        with pytest.raises(ValueError, match=rf"f.pt' should hold what was written, but the bytes of '{name}' have"):
            call(path)
    opened = open_file(path)
    opened.verify([("x", opened.content["ema"]["x"])])


def test_a_flipped_bit_in_a_count_is_told(tmp_path):
    path = saved({"module.w": torch.zeros(1), "n_averaged": torch.tensor(0x1234567)}, tmp_path / "file.pt")
    flipped(path, struct.pack("<q", 0x1234567), struct.pack("<q", 0x1234566))
    with pytest.raises(ValueError, match=r"its entry 'file/data/1' has changed since"):
        read(path)


def test_what_was_read_outlives_the_file(tmp_path):
    """But not what has not been looked at."""
    path = saved({"ema": {"w": torch.zeros(100_000)}, "model": {"w": torch.ones(100_000)}}, tmp_path / "file.pt")
    found, unread = read(path), load_file(path)["ema"]["w"]
    with path.open("r+b") as file:  # in place
        file.write(path.read_bytes().replace(bytes(400_000), b"\x00\x00\x80?" * 100_000))
    assert torch.equal(unread, torch.ones(100_000))
    assert not found.tensors["w"].any()
    assert torch.equal(found.online["w"], torch.ones(100_000))


# --- files of another kind ---


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def zipped(**entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def torchscript():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


def written():
    buffer = io.BytesIO()
    torch.save({"w": TENSORS["float32"]}, buffer)
    return buffer.getvalue()


def with_a_name_twice():
    buffer = io.BytesIO(written())
    with zipfile.ZipFile(buffer, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("archive/data.pkl", b"")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "should hold weights, but it is empty"),
        (bytes(4096), "begins with zeros"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a pointer of Git LFS; get the file"),
        (b"<!DOCTYPE html><html>", "is an HTML page"),
        (b"  <html lang=en>", "is an HTML page"),
        ("größe,loss\n1,0.5\n".encode() * 100, "is text; name the file that holds"),
        (b"\x1f\x8b\x08" + bytes(600), "was compressed; decompress it"),
        (tar(), "is a tar archive; unpack it"),
        (b"\x89HDF\r\n\x1a\n" + bytes(9), "is an HDF5 file"),
        (pickle.dumps({"a": 1}), "is a pickle that torch.save did not write"),
        (zipped(readme=b"nothing"), "is a zip archive of another kind; unzip it, and name the file in it that holds"),
        (torchscript(), r"is a TorchScript archive, a program; save the state_dict\(\) of the module"),
        (written()[:300], "is cut short: a zip archive without its end"),
        (written().replace(b"\x80\x02}", b"\x80\x02\xff"), "its entry 'archive/data.pkl' has changed since"),
        (with_a_name_twice(), "cannot be read as one; it is cut short or damaged"),
        (b"\x80", "cannot be read as one; it is cut short or damaged"),
        (b"\xca\xfe" * 300, "cannot be read as one; it is cut short or damaged"),
    ],
)
def test_files_of_another_kind_are_told_as_what_they_are(content, message, tmp_path):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as info:
        load_file(path)
    assert str(info.value).startswith(f"'{path}' should")
    assert len(str(info.value)) < 350 + len(str(path))
    assert "weights_only" not in str(info.value)
    assert "\n" not in str(info.value)


def test_no_file_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt' should be a file, but there is none"):
        load_file(tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="should be a file, got a directory; name the file in it"):
        read(str(tmp_path))


@pytest.mark.parametrize("content", [b"no header", (10**12).to_bytes(8, "little") + b"{}"])
def test_broken_safetensors(content, tmp_path):
    pytest.importorskip("safetensors")
    file = tmp_path / "broken.safetensors"
    file.write_bytes(content)
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


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_zipped_again(compression, tmp_path):
    torch.save({"w": torch.ones(9)}, tmp_path / "file.pt")
    with zipfile.ZipFile(tmp_path / "file.pt") as old, zipfile.ZipFile(tmp_path / "again.pt", "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    if compression == zipfile.ZIP_STORED:
        assert torch.equal(load_file(tmp_path / "again.pt")["w"], torch.ones(9))
        return
    with pytest.raises(ValueError, match="again.pt' should be a file that torch.save .* wrote, but it was compressed"):
        load_file(tmp_path / "again.pt")


def test_safetensors_are_known_by_their_content(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"w": torch.ones(2)}, tmp_path / "model.bin")
    assert torch.equal(load_file(tmp_path / "model.bin")["w"], torch.ones(2))


# --- hostile files ---


def archive_of(pickled, path, storages=(), compression=zipfile.ZIP_STORED, comment=b""):
    """A file as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", pickled)
        for index, content in enumerate(storages):
            archive.writestr(f"a/data/{index}", content)
        archive.comment = comment
    return path


def storage(dtype="Float", key="0", count=1):
    """The opcodes of a storage."""
    return (
        b"((X\x07\0\0\0storagectorch\n%bStorage\nX\x01\0\0\0%bX\x03\0\0\0cpuJ%btQ"
        % (dtype.encode(), key.encode(), struct.pack("<i", count))
    )[1:]


def tensor(size, stride, dtype="Float", count=1):
    """The opcodes of a strided tensor of one storage."""

    def whole(values):
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage(dtype, count=count)
        + b"K\0"
        + whole(size)
        + whole(stride)
        + b"\x89NtR"
    )


def entry(*items):
    return b"\x80\x02}(" + b"".join(b"X\x01\0\0\0%b" % name + value for name, value in items) + b"u."


GLOBAL = b"ctorch\nTensor\n"
HOSTILE = {
    "an uninitialised tensor": entry((b"w", GLOBAL + b"J\0\xca\x9a;\x85R")),
    "a tensor that repeats": entry((b"w", tensor((10**13,), (0,)))),
    "a tensor of too many numbers": entry((b"w", tensor((3,), (1,)))),
    "a storage of too many numbers": entry((b"w", tensor((1,), (1,), count=10**9))),
    "a negative stride": entry((b"w", tensor((2,), (-1,)))),
    "a deque of a tensor": entry((b"w", b"ccollections\ndeque\n" + tensor((10**6,), (0,)) + b"\x85R")),
    "a memo of many places": entry((b"w", b"Nr\xff\xff\xff\x7f")),
    "a long string": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.",
    "nested tuples as a key": b"\x80\x02})" + b"\x85" * 10**5 + b"Ns.",
    "nested lists": entry((b"w", b"]" * 30_000 + b"a" * 29_999)),
    "bytes that are copied again and again": entry(
        (
            b"w",
            b"(B"
            + struct.pack("<I", 10**6)
            + bytes(10**6)
            + b"q\0"
            + b"cbuiltins\nbytearray\nq\1"
            + b"h\1h\0\x85R" * 10**4
            + b"l",
        )
    ),
    "a number of many digits": entry((b"w", b"\x8b" + struct.pack("<i", 10**6) + b"\1" * 10**6)),
    "a persistent id that is none": entry((b"w", b"K\1Q")),
    "an escape sequence that is none": entry((b"w", b"S'\\q'\n")),
    "an extension": b"\x80\x02\x82\1.",
}


@pytest.fixture
def cost():
    """Fails a test that takes long or much memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - start < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024


HARMLESS = {"an uninitialised tensor", "a memo of many places", "nested lists", "an escape sequence that is none"}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_cost_what_they_weigh(name, tmp_path, cost):
    path = archive_of(HOSTILE[name], tmp_path / "file.pt", [struct.pack("<f", 1.0)])
    if name in HARMLESS:
        load_file(path)
    with pytest.raises((TypeError, ValueError), match=r"^'.*file.pt' should") as info:
        (read if name in HARMLESS else load_file)(path)
    assert "\n" not in str(info.value)


def test_the_makers_of_hostile_files_make_good_ones_too(tmp_path):
    path = archive_of(entry((b"w", tensor((1,), (1,)))), tmp_path / "file.pt", [struct.pack("<f", 1.0)])
    assert load_file(path) == {"w": torch.ones(1)}


def test_a_tensor_beyond_memory_that_could_grow_is_refused(tmp_path):
    path = saved({"w": torch.zeros(3)}, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    flipped(path, b"K\x03\x85", b"K\x09\x85")
    with pytest.raises(ValueError, match="cannot be read as one"):
        load_file(path)


def test_a_comment_does_not_hide_a_compressed_archive(tmp_path, cost):
    hidden = io.BytesIO()
    archive_of(entry((b"w", tensor((1,), (1,)))), hidden, [bytes(4)])
    for comment in (b"PK\5\6", b"PK\5\6" + bytes(18), hidden.getvalue()[-22:]):
        path = tmp_path / "file.pt"
        archive_of(entry((b"w", b"N")), path, [bytes(2**25)], zipfile.ZIP_DEFLATED, comment)
        with pytest.raises(ValueError, match=r"file.pt' should"):
            load_file(path)


def test_a_compressed_tar_is_not_unpacked(tmp_path, cost):
    with tarfile.open(tmp_path / "file.pt", "w:gz") as archive:
        member = tarfile.TarInfo("big")
        member.size = 2**24
        archive.addfile(member, io.BytesIO(bytes(2**24)))
    with pytest.raises(ValueError, match="was compressed; decompress it first"):
        load_file(tmp_path / "file.pt")


def test_attributes_in_a_file_change_nothing_of_the_process(tmp_path):
    """BUILD writes attributes: here to a class, a function and a state dict."""
    state = b"}X\x05\0\0\0itemsNsb"
    for target in (
        b"ccollections\nOrderedDict\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ccollections\nOrderedDict\n)R",
    ):
        path = archive_of(b"\x80\x02}X\x01\0\0\0w" + target + state + b"s.", tmp_path / "file.pt")
        load_file(path)
    assert list(OrderedDict(a=1).items()) == [("a", 1)]


def test_extensions_of_the_process_are_not_called(tmp_path, monkeypatch):
    monkeypatch.setitem(copyreg._inverted_registry, 1, ("os", "getcwd"))
    with pytest.raises(ValueError, match="cannot be read as one"):
        load_file(archive_of(HOSTILE["an extension"], tmp_path / "file.pt"))


def test_threads_and_warnings_are_left_alone(tmp_path):
    allowed, filters = torch.serialization.get_safe_globals(), list(warnings.filters)
    load_file(saved({"p": OrderedDict, "path": tmp_path}, tmp_path / "f.pt"))
    assert torch.serialization.get_safe_globals() == allowed
    assert warnings.filters == filters
