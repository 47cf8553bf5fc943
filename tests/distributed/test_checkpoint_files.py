"""A sharded checkpoint is read without running, or believing, what its files say."""

import contextlib
import io
import pickle
import resource
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ignite_ema import EMAHandler
from ignite_ema.distributed import ShardedSaver, load_objects
from ignite_ema.distributed.safe_reader import DamagedError, Reader


def objects(value):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    handler = EMAHandler(model)
    handler.num_updates = 7
    return {"model": model, "ema_handler": handler}


def save(folder, value=1.0, name="1.pt"):
    ShardedSaver(folder, require_empty=False)({k: v.state_dict() for k, v in objects(value).items()}, name)
    return folder / name


def assert_refused(path, text):
    these = objects(3.0)
    with pytest.raises(ValueError, match=text) as raised:
        load_objects(these, path)
    assert "\n" not in str(raised.value)
    assert all(torch.all(parameter == 3) for parameter in these["model"].parameters())
    assert all(torch.all(parameter == 3) for parameter in these["ema_handler"].ema_model.parameters())
    assert these["ema_handler"].num_updates == 7


# Pickles that reach for a class of the process: BUILD with a state of two dictionaries sets attributes.


def built(module, name, attribute):
    """A pickle that asks for a class or function, and sets one of its attributes."""
    state = pickle.dumps((None, {attribute: 1}), 2)[2:-1]
    return b"\x80\x02" + f"c{module}\n{name}\n".encode() + state + b"b."


CLASSES = [
    *(("pathlib", name) for name in ("PurePath", "PosixPath", "Path")),
    *(("torch", "Size"), ("torch", "float32"), ("torch.serialization", "_get_layout")),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in ("Metadata", "MetadataIndex", "TensorProperties", "_MEM_FORMAT_ENCODING")
    ),
    *(("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("collections", "OrderedDict")),
]


@pytest.mark.parametrize(("module", "name"), CLASSES)
def test_a_pickle_changes_no_class_of_the_process(tmp_path, module, name):
    path = save(tmp_path)
    (path / ".metadata").write_bytes(built(module, name, "is_touched"))
    assert_refused(path, "its table of contents cannot be read")
    found = __import__(module, fromlist=[name])
    assert not hasattr(getattr(found, name), "is_touched")


@pytest.mark.parametrize(
    "stated",
    [
        pickle.dumps(print, 2),
        b"\x80\x02cos\nsystem\n(S'true'\ntR.",
        b"\x80\x02cbuiltins\ngetattr\n(cpathlib\nPath\nS'home'\ntRR.",
        b"\x80\x04\x8c\x07pathlib\x8c\x08os.mkdir\x93.",
        b"\x80\x02ctorch\nload\n.",
        b"\x80\x02cpathlib\nPath\n)\x81.",
    ],
)
def test_what_a_table_of_contents_may_not_ask_for_is_refused(tmp_path, stated):
    path = save(tmp_path)
    (path / ".metadata").write_bytes(stated)
    assert_refused(path, "its table of contents cannot be read")


def with_shared_chunks(count):
    """A table of contents of few bytes, in which many names have the same many chunks."""
    size = torch.Size([1])
    chunks = [ChunkStorageMetadata(size, size) for _ in range(count)]
    entry = TensorStorageMetadata(TensorProperties(torch.float32), size, chunks)
    return pickle.dumps(Metadata({f"w{at}": entry for at in range(count)}, storage_data={}))


COSTLY = {
    "a memo of many places": (lambda: b"\x80\x02}r\xff\xff\xff\x0f.", "there should be a Metadata, got dict"),
    "a long array": (lambda: b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"abc.", "it is damaged"),
    "shared chunks": (lambda: with_shared_chunks(1500), "it has more chunks than places for them"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_table_of_contents_costs_what_it_weighs(tmp_path, name):
    written, text = COSTLY[name]
    (tmp_path / ".metadata").write_bytes(written())
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(DamagedError, match=text):
        Reader(tmp_path)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


# Tables of contents that say what is not so.


def rewrite(path, change):
    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


WEIGHT = "model.0.weight"
INDEX = MetadataIndex(WEIGHT, torch.Size([0, 0]))


def place(relative_path):
    def change(metadata):
        for one in metadata.storage_data.values():
            one.relative_path = relative_path

    return change


def chunks(*cells):
    def change(metadata):
        made = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in cells]
        metadata.state_dict_metadata[WEIGHT].chunks[:] = made

    return change


def stored(**fields):
    def change(metadata):
        for name, value in fields.items():
            setattr(metadata.storage_data[INDEX], name, value)

    return change


def changed(change):
    """A change of the entry of the weight."""
    return lambda metadata: change(metadata, metadata.state_dict_metadata[WEIGHT])


def of_another_type(metadata, entry):
    entry.properties.dtype = torch.int32


def of_another_shape(metadata, entry):
    entry.size = torch.Size([3, 2])
    chunks(((0, 0), (3, 2)))(metadata)


def with_the_bytes_of_another(metadata, entry):
    other = MetadataIndex("ema_handler.averaged_tensors.0.weight", INDEX.offset)
    metadata.storage_data[INDEX] = metadata.storage_data[other]


def of_a_value(metadata, entry):
    metadata.storage_data[MetadataIndex(WEIGHT)] = metadata.storage_data.pop(INDEX)
    metadata.state_dict_metadata[WEIGHT] = metadata.state_dict_metadata["ema_handler.num_updates"]


LIES = {
    "an absolute path": (place("/etc/passwd"), "'/etc/passwd' is not a file of this directory"),
    "a path above": (place("../2.pt/__0_0.distcp"), "is not a file of this directory"),
    "the directory": (place("."), "'.' is not a file of this directory"),
    "no file": (place("nothing"), "'nothing' is missing"),
    "no chunks": (chunks(), "'model.0.weight' should be covered by its chunks exactly once"),
    "a gap": (chunks(((0, 0), (1, 3))), "exactly once"),
    "an overlap": (chunks(((0, 0), (2, 3)), ((0, 0), (1, 3))), "exactly once"),
    "the same twice": (chunks(((0, 0), (2, 3)), ((0, 0), (2, 3))), "exactly once"),
    "out of bounds": (chunks(((0, 0), (2, 4))), "exactly once|not whole"),
    "fewer dimensions": (chunks(((0,), (6,))), "exactly once|not whole"),
    "no place": (lambda metadata: metadata.storage_data.pop(INDEX), "'model.0.weight' is not whole in its files"),
    "no places": (
        lambda metadata: setattr(metadata, "storage_data", None),
        r"cannot be read \(it is damaged\)",
    ),
    "too short": (stored(length=8), "'model.0.weight' is not whole in its files"),
    "beyond the end": (stored(offset=2**40), "is cut short"),
    "a negative offset": (stored(offset=-1), "a number is out of range"),
    "transformed": (stored(transform_descriptors=["zstd"]), "its values are transformed"),
    "elsewhere in the file": (stored(offset=17), "has the same bytes for several values|is damaged"),
    "the bytes of another": (changed(with_the_bytes_of_another), "has the same bytes for several values"),
    "another shape": (changed(of_another_shape), "Size mismatch"),
    "another type": (
        changed(lambda _, entry: setattr(entry.properties, "dtype", torch.int32)),
        "is not the tensor that the table of contents announces",
    ),
    "a value": (changed(of_a_value), "should be a tensor in the checkpoint as it is here"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_table_of_contents_is_not_believed(tmp_path, lie):
    save(tmp_path, 2.0, "2.pt")
    path = save(tmp_path)
    change, text = LIES[lie]
    rewrite(path, change)
    assert_refused(path, text)


def test_a_link_to_another_checkpoint_is_refused(tmp_path):
    other, path = save(tmp_path, 2.0, "2.pt"), save(tmp_path)
    file = path / "__0_0.distcp"
    file.unlink()
    file.symlink_to(other / "__0_0.distcp")
    assert_refused(path, "'__0_0.distcp' is a link to another directory")


def test_a_checkpoint_behind_a_link_is_loaded(tmp_path):
    path, these = save(tmp_path / "real"), objects(3.0)
    (tmp_path / "link").symlink_to(path)
    load_objects(these, tmp_path / "link")
    assert torch.all(these["model"][0].weight == 1)


def test_a_flipped_bit_of_a_weight_is_noticed_before_anything_is_loaded(tmp_path):
    path = save(tmp_path)
    file = path / "__0_0.distcp"
    held = bytearray(file.read_bytes())
    at = held.index(torch.ones(6).numpy().tobytes())
    held[at] ^= 1
    file.write_bytes(held)
    assert_refused(path, "is damaged")


def test_a_chunk_that_was_compressed_is_refused(tmp_path):
    path, plain = save(tmp_path), io.BytesIO()
    torch.save(torch.ones(2, 3), plain)
    with zipfile.ZipFile(plain) as read, zipfile.ZipFile(path / "packed", "w", zipfile.ZIP_DEFLATED) as written:
        for entry in read.infolist():
            written.writestr(entry.filename, read.read(entry))
    rewrite(path, stored(relative_path="packed", offset=0, length=(path / "packed").stat().st_size))
    assert_refused(path, "is damaged")


# What dead processes leave behind.


def leftover(folder, name, whole):
    made = save(folder, 1.0, "made.pt")
    made.rename(folder / name)
    if not whole:
        (folder / name / "__0_0.distcp").unlink()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("has_successor", [True, False])
def test_a_replaced_checkpoint_that_was_left_comes_back_only_if_it_is_whole_and_alone(tmp_path, whole, has_successor):
    leftover(tmp_path, ".1.pt.old", whole)
    if has_successor:
        save(tmp_path / "other", 2.0).rename(tmp_path / "1.pt")
    ShardedSaver(tmp_path, require_empty=False)
    left = sorted(path.name for path in tmp_path.iterdir() if path.name != "other")
    assert left == (["1.pt"] if has_successor or whole else [])
    if left:
        these = objects(3.0)
        load_objects(these, tmp_path / "1.pt")
        assert torch.all(these["model"][0].weight == (2 if has_successor else 1))


def test_what_a_saver_did_not_write_is_left_alone(tmp_path):
    (tmp_path / "notes.old").mkdir()
    paths = [tmp_path / name for name in (".1.pt.old", ".notes.old", ".x.partial", "notes.old/page")]
    for path in paths:
        path.write_text("mine")
    ShardedSaver(tmp_path, require_empty=False)
    assert [path.read_text() for path in paths] == ["mine"] * 4


def test_a_save_that_was_killed_is_cleaned_by_the_next_saver(tmp_path):
    leftover(tmp_path, ".1.pt.partial", whole=True)
    ShardedSaver(tmp_path, require_empty=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", range(1, 8))
def test_a_kill_at_any_step_of_publishing_leaves_a_whole_checkpoint(tmp_path, monkeypatch, at):
    """Whatever of the file operations was last, the next saver cleans up, and what is loaded is whole."""
    save(tmp_path, 1.0)
    calls = []

    def counted(operation):
        def call(*args, **options):
            calls.append(operation.__name__)
            if len(calls) >= at:
                raise KeyboardInterrupt  # as sudden as a kill, for what comes after is not done
            return operation(*args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        with contextlib.suppress(KeyboardInterrupt):
            save(tmp_path, 2.0)
    ShardedSaver._being_written.clear()  # as in a new process
    saver = ShardedSaver(tmp_path, require_empty=False)
    assert [path.name for path in tmp_path.iterdir()] == ["1.pt"]
    these = objects(3.0)
    load_objects(these, tmp_path / "1.pt")
    assert these["model"][0].weight.unique().item() in (1, 2)
    saver({k: v.state_dict() for k, v in objects(4.0).items()}, "1.pt")
    load_objects(these, tmp_path / "1.pt")
    assert these["model"][0].weight.unique().item() == 4


def test_a_replacement_that_cannot_be_moved_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path, rename = save(tmp_path, 1.0), Path.rename

    def fail(source, target):
        if source.name.endswith(".partial"):
            raise OSError("it cannot be moved")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(RuntimeError, match="it cannot be moved"):
        save(tmp_path, 2.0)
    assert path.is_dir()  # under its own name
    these = objects(3.0)
    load_objects(these, path)
    assert torch.all(these["model"][0].weight == 1)
