"""Snapshot files that are not as they should be are refused in one sentence at every entrance; how they are written."""

import os

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from ignite_ema import EMAWarning, PostHocEMA
from ignite_ema.checkpoints.files import load_file
from ignite_ema.cli import main
from ignite_ema.posthoc import reconstruct, snapshots, stored
from tests.helpers.files import Evil, files_in
from tests.helpers.posthoc_runs import kept
from tests.helpers.snapshots import make_snapshot, write_raw


def saved(content):
    return lambda folder: torch.save(content, folder / "snapshot_65.pt")


def entries(**changes):
    return lambda folder: write_raw(folder, **changes)


EVIL = Evil(os.system, ("touch executed",))
OTHER = "should be a snapshot .* but it is another file"
BAD_FILES = [
    (lambda folder: (folder / "snapshot_65.pt").touch(), "snapshot_65.pt' should be a file .*cut short"),
    (lambda folder: (folder / "snapshot_65.pt").mkdir(), "65.pt' should be a file, but .* if it is a directory"),
    *((saved(content), OTHER) for content in ({"ignite_ema_snapshot": 2, "evil": EVIL}, {"weight": torch.zeros(1)})),
    (entries(ignite_ema_snapshot=1), "of version 2, .* of version 1; .* read it with the ignite_ema that wrote it"),
    *((entries(**{name: bad}), OTHER) for name, bad in (("more", 1), ("copied", ...))),
    (entries(run_id="other"), "should be of the run of 'snapshot_65.pt', .* another"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_FILES)
def test_a_bad_file_is_refused(spoil, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for time in (1, 63, 64):
        snapshots.write(make_snapshot(time), tmp_path)
    spoil(tmp_path)
    for enter in (stored, lambda folder: reconstruct(folder, 0.15)):
        with pytest.raises((OSError, ValueError), match=message):
            enter(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_folder_without_snapshots_is_refused_at_every_entrance(tmp_path, capsys):
    (tmp_path / "snapshot_5.pt.superseded").touch()
    message = "no file such as 'snapshot_1000.pt'; check the path"
    for enter in (stored, lambda folder: reconstruct(folder, 0.15)):
        with pytest.raises(FileNotFoundError, match=message):
            enter(tmp_path)
    assert main(["reconstruct", str(tmp_path), "--list"]) == 1
    assert message in capsys.readouterr().err


def test_snapshots_are_in_the_order_of_their_times_and_other_files_are_left_alone(tmp_path):
    for name in ("snapshot_3.pt.superseded", ".abc.pt", "snapshot_.pt", "snapshot_3.safetensors", "Snapshot_3.pt"):
        (tmp_path / name).write_text("mine")
    for time in (100, 9, 20):
        snapshots.write(make_snapshot(time), tmp_path)
    assert [one.time for one in stored(tmp_path)] == [9, 20, 100]
    assert [one.time for one in stored(str(tmp_path), 20)] == [9, 20]


@pytest.mark.parametrize(
    ("file", "places"),
    [
        ("snapshot_1.pt", ("averaged", 0, "0.weight")),
        ("snapshot_4.pt", ("averaged", 1, "1.running_var")),
        ("snapshot_frozen.pt", ("tensors", "2.weight")),
    ],
)
def test_a_flipped_bit_is_noticed_where_it_is_read(file, places, tmp_path):
    model = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.Linear(40, 3000).requires_grad_(False))
    kept(model, tmp_path, [0.1, 0.2, 0.3, 0.4], share_frozen=True)
    tensor = load_file(tmp_path / file)
    for place in places:
        tensor = tensor[place]
    data, raw = bytearray((tmp_path / file).read_bytes()), tensor.contiguous().numpy().tobytes()
    data[data.index(raw) + len(raw) // 2] ^= 0x40
    (tmp_path / file).write_bytes(data)
    assert len(stored(tmp_path)) == 4  # the list of snapshots costs no more than their headers
    with pytest.raises(ValueError, match=f"{file}' .* has changed since"):
        reconstruct(tmp_path, 0.1, max_residual=9)
    if file == "snapshot_4.pt":
        assert reconstruct(tmp_path, 0.1, step=3, max_residual=9)


def test_infinities_stay_what_they_are(tmp_path):
    model = nn.Linear(2, 1)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf, torch.inf]))
    model.frozen = nn.Parameter(torch.tensor([0.1, -torch.inf]), requires_grad=False)
    ema = PostHocEMA(model, dirname=tmp_path)
    trainer = Engine(lambda engine, batch: model.weight.data.normal_(5.0))
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_that_a_sum_amplifies_is_told(dtype, tmp_path):
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    ema = PostHocEMA(model, (0.05, 0.1, 0.2), dirname=tmp_path, snapshot_dtype=dtype)
    trainer = Engine(lambda engine, batch: None)
    ema.attach(trainer, snapshot_event=Events.ITERATION_COMPLETED(every=4))
    trainer.run(range(256))
    assert stored(tmp_path)[0].averaged[0]["weight"].is_contiguous()
    torch.testing.assert_close(reconstruct(tmp_path, 0.15)["weight"], model.weight.data, rtol=0.01, atol=0)
    words = r"amplifies the rounding of each weight to \d+\.\d%, .*; choose a longer average, store"
    is_told = pytest.warns(EMAWarning, match=words)
    with is_told if dtype is torch.float16 else pytest.raises(ValueError, match=words):
        reconstruct(tmp_path, 0.02)


def test_what_was_set_aside_before_is_kept(tmp_path):
    for attempt in (1.0, 2.0, 3.0):
        snapshots.write(make_snapshot(5, attempt), tmp_path)
        with pytest.warns(EMAWarning, match="set aside as '….superseded'"):
            assert snapshots.prepare(tmp_path, "run", 3, []) == []
    names = ["snapshot_5.pt.superseded", "snapshot_5.pt.superseded.2", "snapshot_5.pt.superseded.3"]
    assert files_in(tmp_path) == names
    kept = [torch.load(tmp_path / name)["averaged"][0]["b"].item() for name in names]
    assert kept == [-1.0, -2.0, -3.0]
