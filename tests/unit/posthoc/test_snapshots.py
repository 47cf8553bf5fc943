"""Snapshot files that are not as they should be are refused in one sentence at every entrance; how they are written."""

import io
import os
import pickle
import sys

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from ignite_ema import PostHocEMA
from ignite_ema.cli import main
from ignite_ema.posthoc import (
    reconstruct,
    snapshots,
    stored,
)
from tests.helpers.files import Evil
from tests.helpers.snapshots import make_snapshot, write_raw

# Files that are not as they should be, at every entrance


ENTRANCES = {
    "stored": lambda folder: stored(folder),
    "reconstruct": lambda folder: reconstruct(folder, 0.15),
    "--list": lambda folder: command(folder, "--list"),
    "--out": lambda folder: command(folder, "--sigma-rel", "0.15", "--out", str(folder.parent / "out.pt")),
}


def command(folder, *arguments):
    """What it says on stderr is raised, as from the other entrances."""
    stderr, old = io.StringIO(), sys.stderr
    sys.stderr = stderr
    try:
        code = main(["reconstruct", str(folder), *arguments])
    finally:
        sys.stderr = old
    message = stderr.getvalue()
    assert code == 1
    assert message.startswith("ignite-ema: ")
    assert message.count("\n") == 1
    raise ValueError(message.removeprefix("ignite-ema: "))


def of_bytes(make):
    """Of the bytes of a good file."""
    return lambda folder: (folder / "snapshot_65.pt").write_bytes(make((folder / "snapshot_64.pt").read_bytes()))


def damaged(data):
    start = data.index(b"data.pkl") + 64
    return data[:start] + os.urandom(200) + data[start + 200 :]


def saved(content):
    return lambda folder: torch.save(content, folder / "snapshot_65.pt")


def renamed(folder):
    (folder / "snapshot_64.pt").rename(folder / "snapshot_65.pt")


def numbered_otherwise(folder):
    write_raw(folder).rename(folder / "snapshot_065.pt")


def entries(**changes):
    return lambda folder: write_raw(folder, **changes)


def averages(tensor, **others):
    return entries(averaged=[{"a": tensor, **others}] * 2, **({} if others else {"state_dict_names": {"a": "a"}}))


EVIL = Evil(os.system, ("touch executed",))
ENTRIES, ANOTHER = "the entries that a PostHocEMA writes, but", "should be of the run of 'snapshot_65.pt', .* another"
BAD_FILES = [
    (of_bytes(lambda data: data[:-300]), "snapshot_65.pt' should be a file .*cut short"),
    (of_bytes(damaged), "snapshot_65.pt' should be a file .* damaged"),
    (of_bytes(lambda data: b""), "snapshot_65.pt' should hold weights, but it is empty"),
    (of_bytes(lambda data: b"not found"), "snapshot_65.pt' should be a file that"),
    (lambda folder: (folder / "snapshot_65.pt").mkdir(), "snapshot_65.pt' should be a file, got a directory"),
    (of_bytes(lambda data: pickle.dumps(EVIL)), "snapshot_65.pt' should"),
    (saved({"ignite_ema_snapshot": 2, "evil": EVIL}), ENTRIES),
    (saved(nn.Linear(1, 1).state_dict()), "should be a snapshot of a PostHocEMA, but it is another file"),
    (renamed, "snapshot_65.pt' should be named 'snapshot_64.pt', after its time"),
    (numbered_otherwise, "snapshot_065.pt' should be named 'snapshot_65.pt', after its time"),
    (entries(ignite_ema_snapshot=1), "should be of version 2, got 1; read it with the ignite_ema that wrote it"),
    (entries(more=1), ENTRIES),
    (entries(copied=...), ENTRIES),
    (entries(time=65.0), ENTRIES),
    (entries(num_updates=True), ENTRIES),
    (entries(averaged=(1, 2)), ENTRIES),
    (entries(run_id=3), ENTRIES),
    (entries(run_id="other"), ANOTHER),
    (entries(frozen_shapes={"f": [3]}), ANOTHER),
    (entries(time_unit="samples"), ANOTHER),
    (entries(sigma_rels=[0.05, 0.2]), ANOTHER),
    (entries(state_dict_names={"a": "a", "b": "b"}), ANOTHER),
    (averages(torch.zeros(3, 2), b=torch.zeros(())), ANOTHER),
]


EACH = list(ENTRANCES.values())


@pytest.mark.parametrize(
    ("spoil", "message", "enter"),
    [
        *((*one, EACH[index % len(EACH)]) for index, one in enumerate(BAD_FILES)),
        *((*BAD_FILES[0], enter) for enter in EACH[1:]),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(spoil, message, enter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for time in (1, 63, 64):
        snapshots.write(make_snapshot(time), tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        enter(tmp_path)
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path.parent / "out.pt").exists()


@pytest.mark.parametrize("enter", EACH)
@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_snapshots_is_refused(name, enter, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "checkpoint_3.pt").touch()
    (tmp_path / "empty" / "snapshot_5.pt.superseded").touch()
    with pytest.raises((ValueError, FileNotFoundError), match="no file such as 'snapshot_1000.pt'; check the path"):
        enter(tmp_path / name)


def test_other_files_in_the_folder_are_left_alone(folder):
    for name in ("snapshot_3.pt.superseded", ".abc.pt", "snapshot_.pt", "snapshot_3.safetensors", "Snapshot_3.pt"):
        (folder / name).write_text("mine")
    assert len(stored(folder)) == 64


def test_snapshots_are_in_the_order_of_their_times(tmp_path):
    for time in (100, 9, 20):
        snapshots.write(make_snapshot(time), tmp_path)
    assert [one.time for one in stored(tmp_path)] == [9, 20, 100]
    assert [one.time for one in stored(tmp_path, 20)] == [9, 20]
    assert stored(str(tmp_path))[0].sigma_rels == [0.05, 0.1]


# Writing


def test_a_snapshot_that_is_there_is_not_overwritten(tmp_path):
    path = snapshots.write(make_snapshot(3), tmp_path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="snapshot_3.pt' exists already, and this run has not written it"):
        snapshots.write(make_snapshot(3, 7.0), tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_infinities_stay_what_they_are(mean, tmp_path):
    model = nn.Linear(2, 1)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf, torch.inf]))
    model.frozen = nn.Parameter(torch.tensor([0.1, -torch.inf]), requires_grad=False)
    ema = PostHocEMA(model, dirname=tmp_path)
    trainer = Engine(lambda engine, batch: model.weight.data.normal_(mean))
    ema.attach(trainer, snapshot_event=Events.ITERATION_COMPLETED(every=4))
    trainer.run(range(80))
    got = reconstruct(tmp_path, 0.15)
    assert torch.equal(got["mask"], model.mask)
    assert torch.equal(got["frozen"], model.frozen)  # bit for bit, too
    assert got["weight"].isfinite().all()


def test_a_weight_that_becomes_infinite_is_that_of_the_last_snapshot(tmp_path):
    for time in range(1, 65):
        tensors = {"a": torch.tensor([-torch.inf if time > 32 else float(time), time])}
        one = make_snapshot(time, averaged=[tensors] * 2, copied={}, state_dict_names={"a": "a"})
        snapshots.write(one, tmp_path)
    got = reconstruct(tmp_path, 0.15)["a"]
    assert got[0] == -torch.inf
    assert got[1].isfinite()


@pytest.mark.parametrize(
    ("dtype", "told"),
    [
        (torch.float16, lambda message: pytest.warns(UserWarning, match=message)),
        (torch.bfloat16, lambda message: pytest.raises(ValueError, match=message)),
    ],
)
def test_rounding_that_a_sum_amplifies_is_told(dtype, told, tmp_path):
    model = nn.Linear(8, 8)
    ema = PostHocEMA(model, (0.05, 0.1, 0.2), dirname=tmp_path, snapshot_dtype=dtype)
    trainer = Engine(lambda engine, batch: None)
    ema.attach(trainer, snapshot_event=Events.ITERATION_COMPLETED(every=4))
    trainer.run(range(256))
    reconstruct(tmp_path, 0.15)
    with told(r"amplifies the rounding of each weight to \d+\.\d%, .*; choose a longer average, store"):
        reconstruct(tmp_path, 0.02)


def test_channels_last_weights_are_read_part_by_part(tmp_path):
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    ema = PostHocEMA(model, dirname=tmp_path)
    trainer = Engine(lambda engine, batch: None)
    ema.attach(trainer)
    trainer.run(range(3))
    assert stored(tmp_path)[0].averaged[0]["weight"].is_contiguous()
    assert torch.equal(reconstruct(tmp_path, 0.1)["weight"], model.weight)
