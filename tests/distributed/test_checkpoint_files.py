"""What is read of a sharded checkpoint is verified, and what killed runs leave behind is cleaned up."""

import contextlib
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from ignite_ema import EMAHandler
from ignite_ema.checkpoints import read
from ignite_ema.distributed import ShardedSaver, load_objects
from tests.helpers.files import Evil, changed_contents, files_in


def objects(value):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    handler = EMAHandler(model)
    handler.num_updates = 7
    return {"model": model, "ema_handler": handler}


def states(value):
    return {name: one.state_dict() for name, one in objects(value).items()}


def save(folder, value=1.0, name="1.pt"):
    ShardedSaver(folder, require_empty=False)(states(value), name)
    return folder / name


def loaded(path):
    these = objects(3.0)
    load_objects(these, path)
    (value,) = these["model"][0].weight.unique().tolist()
    return value


def assert_refused(path, text):
    these = objects(3.0)
    with pytest.raises((OSError, ValueError), match=text):
        load_objects(these, path)
    for module in (these["model"], these["ema_handler"].ema_model):
        assert all(torch.all(parameter == 3) for parameter in module.parameters())
    assert these["ema_handler"].num_updates == 7


def flip_a_bit(path):
    file = path / "__0_0.distcp"
    written = bytearray(file.read_bytes())
    written[written.index(torch.ones(6).numpy().tobytes())] ^= 1
    file.write_bytes(written)


def lose_a_chunk(path):
    with changed_contents(path) as metadata:
        metadata.state_dict_metadata["model.0.weight"].chunks.clear()


def lose_a_place(path):
    with changed_contents(path) as metadata:
        places = metadata.storage_data.items()
        metadata.storage_data = {index: place for index, place in places if index.fqn != "model.0.weight"}


DAMAGES = {
    "no table of contents": (lambda path: (path / ".metadata").write_bytes(b"epoch,loss\n"), "table of contents"),
    "another table": (lambda path: (path / ".metadata").write_bytes(pickle.dumps({"a": 1})), "table of contents"),
    "no chunk": (lose_a_chunk, "0.weight' is not whole"),
    "no file": (lambda path: (path / "__0_0.distcp").unlink(), "No such file .*__0_0.distcp"),
    "a file cut short": (lambda path: os.truncate(path / "__0_0.distcp", 2000), "distcp .* damaged, cut short"),
    "a chunk in no file": (lose_a_place, "'.metadata', is damaged"),
    "a flipped bit of a weight": (flip_a_bit, "has changed since"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_nothing_is_loaded(tmp_path, damage):
    path = save(tmp_path)
    change, text = DAMAGES[damage]
    change(path)
    assert_refused(path, text)
    with pytest.raises((OSError, ValueError), match=text):
        read(path)


def test_hostile_values_are_refused_and_nothing_is_run(tmp_path):
    state = states(1.0)
    state["ema_handler"]["num_updates"] = Evil(os.system, (f"touch {tmp_path / 'touched'}",))
    ShardedSaver(tmp_path / "saved")(state, "1.pt")
    (tmp_path / "touched").unlink(missing_ok=True)
    assert_refused(tmp_path / "saved" / "1.pt", "'ema_handler.num_updates' should be a plain value, but has")
    (tmp_path / "saved" / "1.pt" / ".metadata").write_bytes(pickle.dumps(state["ema_handler"]["num_updates"]))
    assert_refused(tmp_path / "saved" / "1.pt", "table of contents")
    assert not (tmp_path / "touched").exists()


class Note:
    """What the table of contents of a later torch may hold (issue 21)."""


def test_a_class_in_the_table_of_contents_that_is_new_is_no_obstacle(tmp_path, monkeypatch):
    create = DefaultSavePlanner.create_global_plan

    def with_a_note(self, plans):
        plans, metadata = create(self, plans)
        metadata.storage_meta = Note()
        metadata.state_dict_metadata["model.0.weight"].properties.note = Note()
        return plans, metadata

    monkeypatch.setattr(DefaultSavePlanner, "create_global_plan", with_a_note)
    assert loaded(save(tmp_path)) == 1


def test_what_is_no_checkpoint_is_refused_and_a_link_to_one_is_followed(tmp_path):
    save(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "1.pt")
    assert loaded(tmp_path / "link") == 1
    with pytest.raises(FileNotFoundError, match="should be a directory that ShardedSaver wrote"):
        load_objects(objects(3.0), tmp_path)


@pytest.mark.parametrize("has_successor", [True, False])
def test_a_replaced_checkpoint_that_was_left_comes_back_only_if_it_is_alone(tmp_path, has_successor):
    save(tmp_path).rename(tmp_path / ".1.pt.old")
    assert loaded(tmp_path / "1.pt") == 1  # without a saver, too
    if has_successor:
        save(tmp_path / "other", 2.0).rename(tmp_path / "1.pt")
    ShardedSaver(tmp_path, require_empty=False)
    assert set(files_in(tmp_path)) - {"other"} == {"1.pt"}
    assert loaded(tmp_path / "1.pt") == (2 if has_successor else 1)


def test_the_checkpoint_before_is_in_its_place_if_the_new_one_cannot_be_moved_there(tmp_path, monkeypatch):
    path, rename = save(tmp_path), Path.rename

    def fail_to_publish(self, target):
        if self.name.endswith(".partial"):
            raise OSError("the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_to_publish)
    with pytest.raises(RuntimeError, match="the disk is gone.*the checkpoint before it is still there"):
        save(tmp_path, 2.0)
    assert files_in(tmp_path) == ["1.pt"]
    assert loaded(path) == 1.0


def test_a_save_that_was_killed_is_cleaned_by_the_next_saver_and_nothing_else(tmp_path):
    save(tmp_path).rename(tmp_path / ".1.pt.partial")
    (tmp_path / "notes.old").mkdir()
    paths = [tmp_path / name for name in (".2.pt.old", ".x.partial", "notes.old/page")]
    for path in paths:
        path.write_text("mine")
    ShardedSaver(tmp_path, require_empty=False)
    assert [path.read_text() for path in paths] == ["mine"] * 3
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("at", range(1, 9))
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
        with contextlib.suppress(KeyboardInterrupt, RuntimeError):
            save(tmp_path, 2.0)
    saver = ShardedSaver(tmp_path, require_empty=False)
    assert [path.name for path in tmp_path.iterdir()] == ["1.pt"]
    assert loaded(tmp_path / "1.pt") in (1, 2)
    saver(states(4.0), "1.pt")
    assert loaded(tmp_path / "1.pt") == 4
