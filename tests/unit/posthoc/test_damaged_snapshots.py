"""A flipped bit in what is read of a snapshot is noticed, and the file is named."""

import pytest
from torch import nn

from ignite_ema.checkpoints.files import load_file
from ignite_ema.posthoc import reconstruct, stored
from tests.helpers.posthoc_runs import kept


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
