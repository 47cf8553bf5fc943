"""Averages that share frozen weights with the model: these are stored once, and what is rebuilt is complete."""

import pytest
import torch
from torch import nn

from ignite_ema.checkpoints import save_file
from ignite_ema.cli import main
from ignite_ema.posthoc import reconstruct, stored
from tests.helpers.posthoc_runs import kept


class Adapted(nn.Module):
    """A frozen base whose weights are tied, and a head that learns."""

    def __init__(self, frozen=True):
        super().__init__()
        self.embedding = nn.Embedding(100, 50)
        self.output = nn.Linear(50, 100, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor([1.0]))
        self.adapter = nn.Linear(2, 2)
        self.embedding.requires_grad_(not frozen)


def run(dirname, values=(1.0, 2.0, 3.0, 4.0), model=None, state=None):
    model = model or Adapted()
    return model, kept(model, dirname, values, state, share_frozen=True)


def test_what_is_rebuilt_is_complete_and_in_order(tmp_path):
    model, ema = run(tmp_path)
    got = reconstruct(tmp_path, 0.1)
    assert list(got) == list(model.state_dict())
    Adapted(frozen=False).load_state_dict(got, strict=True)
    assert torch.equal(got["embedding.weight"], model.embedding.weight)
    assert got["output.weight"] is got["embedding.weight"]
    torch.testing.assert_close(got["adapter.weight"], ema.streams[1].module.adapter.weight.data)


def test_frozen_weights_are_stored_once_and_again_where_a_run_goes_on(tmp_path):
    model, ema = run(tmp_path, [1.0, 2.0])
    before = (tmp_path / "snapshot_frozen.pt").stat().st_mtime_ns
    model, ema = run(tmp_path, [3.0, 4.0], model, ema.state_dict())  # nor by a run that goes on
    assert (tmp_path / "snapshot_frozen.pt").stat().st_mtime_ns == before
    assert [one.time for one in stored(tmp_path)] == [1, 2, 3, 4]
    found = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert 20_000 < found.pop("snapshot_frozen.pt") < 25_000
    assert len(found) == 4
    assert all(size < 10_000 for size in found.values())
    with pytest.warns(UserWarning, match="4 are missing"):
        run(tmp_path / "other", [5.0, 6.0], model, ema.state_dict())
    assert list(reconstruct(tmp_path / "other", 0.1, max_residual=9)) == list(model.state_dict())


def test_another_file_of_that_name_stays(tmp_path):
    (tmp_path / "snapshot_frozen.pt").write_text("mine")
    with pytest.raises(ValueError, match="snapshot_frozen.pt' should be"):
        run(tmp_path)
    assert (tmp_path / "snapshot_frozen.pt").read_text() == "mine"


def test_what_is_missing_is_said_or_taken_from_a_base(tmp_path, capsys):
    dirname = tmp_path / "snapshots"
    model, _ = run(dirname)
    (dirname / "snapshot_frozen.pt").unlink()
    command = ["reconstruct", str(dirname), "--sigma-rel", "0.1", "--out", str(tmp_path / "out.pt")]
    assert main(command) == 1
    assert "(--base FILE)" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="snapshot_frozen.pt' should have the 1 frozen .* pass .* base="):
        reconstruct(dirname, 0.1)
    for base, got in (({}, "NoneType"), ({"embedding.weight": torch.zeros(2)}, r"\[2\]"), (3.5, "float")):
        with pytest.raises(ValueError, match=rf"'embedding.weight' of shape \[100, 50\], got {got}; pass the plain"):
            reconstruct(dirname, 0.1, base=base)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    for base in (model.state_dict(), tmp_path / "base.safetensors"):
        one, other = reconstruct(dirname, [0.1, 0.05], base=base)
        Adapted(frozen=False).load_state_dict(one, strict=True)
        assert torch.equal(one["embedding.weight"], model.embedding.weight)
        assert one["embedding.weight"].data_ptr() != model.embedding.weight.data_ptr()
        assert other["embedding.weight"] is one["embedding.weight"]
    assert main([*command, "--base", str(tmp_path / "base.safetensors")]) == 0


def test_those_of_another_run_are_refused(tmp_path):
    run(tmp_path / "one")
    run(tmp_path / "other")
    (tmp_path / "one" / "snapshot_frozen.pt").replace(tmp_path / "other" / "snapshot_frozen.pt")
    with pytest.raises(FileNotFoundError, match="missing or of another run"):
        reconstruct(tmp_path / "other", 0.1)
