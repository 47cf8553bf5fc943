"""Every flipped bit in what is read of a snapshot is noticed, with the file and the tensor."""

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from ignite_ema import PostHocEMA
from ignite_ema.checkpoints.safe_load import open_file
from ignite_ema.posthoc import reconstruct, stored


def train(folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.Linear(40, 3000))
    model[2].requires_grad_(False)
    trainer = Engine(lambda engine, batch: model[0].weight.data.normal_())
    ema = PostHocEMA(model, dirname=folder, share_frozen=True)
    ema.attach(trainer, snapshot_event=Events.ITERATION_COMPLETED(every=4))
    trainer.run(range(16))
    return ema


def flip(path, tensor):
    """Flips a bit in the middle of a tensor of the file."""
    data = bytearray(path.read_bytes())
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes()
    place = data.index(raw) + len(raw) // 2
    data[place] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize("time", [4, 8, 16])
@pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
@pytest.mark.parametrize("average", [0, 1])
def test_a_flipped_bit_in_an_average_is_noticed(average, name, time, tmp_path):
    train(tmp_path)
    path = tmp_path / f"snapshot_{time}.pt"
    flip(path, open_file(path).content["averaged"][average][name])
    what = f"the bytes of '{name}' have" if name == "0.weight" else "its entry 'archive/data/[0-9]+' has"  # a small one
    with pytest.raises(ValueError, match=f"snapshot_{time}.pt' should hold what was written, but {what} changed"):
        reconstruct(tmp_path, 0.1)


def test_a_flipped_bit_in_the_frozen_weights_is_noticed(tmp_path):
    train(tmp_path)
    path = tmp_path / "snapshot_frozen.pt"
    flip(path, open_file(path).content["tensors"]["2.weight"])
    with pytest.raises(
        ValueError, match="snapshot_frozen.pt' should hold what was written, but the bytes of '2.weight'"
    ):
        reconstruct(tmp_path, 0.1)


def test_what_is_not_used_is_not_read(tmp_path):
    train(tmp_path)
    path = tmp_path / "snapshot_16.pt"
    flip(path, open_file(path).content["averaged"][0]["0.weight"])
    assert reconstruct(tmp_path, 0.1, step=12)
    assert len(stored(tmp_path)) == 4  # the list of snapshots costs no more than their headers


def test_a_damaged_snapshot_can_be_left_out(tmp_path):
    train(tmp_path)
    path = tmp_path / "snapshot_8.pt"
    flip(path, open_file(path).content["averaged"][0]["0.weight"])
    path.unlink()
    assert reconstruct(tmp_path, 0.1)
