"""Snapshots that no run has written."""

import torch

from ignite_ema.posthoc.snapshots import StoredSnapshot


def make_snapshot(time, value=None, **changes):
    """With an average of two streams, a buffer, and a tied name."""
    value = float(time) if value is None else value
    averaged = [{"a": torch.full((2, 3), value), "b": torch.full((), -value)} for _ in range(2)]
    entries = {
        "time": time,
        "time_unit": "updates",
        "num_updates": time,
        "iteration": 2 * time,
        "epoch": 0,
        "sigma_rels": [0.05, 0.1],
        "averaged": averaged,
        "copied": {"count": torch.tensor(time)},
        "state_dict_names": {"a": "a", "also_a": "a", "b": "b", "count": "count"},
        "frozen_shapes": {},
        "run_id": "run",
    }
    return StoredSnapshot(**(entries | changes))


def write_raw(folder, **changes):
    """A file as it should be, but for some entries."""
    content = {"ignite_ema_snapshot": 2, **vars(make_snapshot(65)), **changes}
    path = folder / "snapshot_65.pt"
    torch.save({key: value for key, value in content.items() if value is not ...}, path)
    return path
