"""Every flipped bit in what is read of a snapshot is noticed, and the file is named."""

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from ignite_ema import PostHocEMA
from ignite_ema.checkpoints.files import load_file
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


@pytest.mark.parametrize(
    ("file", "places"),
    [
        ("snapshot_4.pt", ("averaged", 0, "0.weight")),
        ("snapshot_16.pt", ("averaged", 1, "0.weight")),
        ("snapshot_8.pt", ("averaged", 1, "1.running_var")),
        ("snapshot_frozen.pt", ("tensors", "2.weight")),
    ],
)
def test_a_flipped_bit_is_noticed_where_it_is_read(file, places, tmp_path):
    train(tmp_path)
    tensor = load_file(tmp_path / file)
    for place in places:
        tensor = tensor[place]
    flip(tmp_path / file, tensor)
    assert len(stored(tmp_path)) == 4  # the list of snapshots costs no more than their headers
    with pytest.raises(ValueError, match=f"{file}' .* has changed since"):
        reconstruct(tmp_path, 0.1)
    if file == "snapshot_16.pt":
        assert reconstruct(tmp_path, 0.1, step=12)
