"""Directories of ``save_pretrained`` and of torch.distributed.checkpoint are read as they lie; nothing in them runs."""

import datetime
import json
import os
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from ignite_ema import EMAHandler
from ignite_ema.checkpoints import averaged_state_dict, read, save_file
from ignite_ema.checkpoints.directories import read_directory
from ignite_ema.cli import main
from tests.helpers.files import Evil, changed_contents, files_in
from tests.helpers.peer_files import equal, state


def pretrained(folder, suffix=".safetensors", shards=2):
    """A model's directory as transformers writes it."""
    save = save_file if suffix == ".safetensors" else torch.save
    (folder / "config.json").write_text("{}")
    if shards == 1:
        save(state(1), folder / f"model{suffix}")
        return folder
    places = {name: f"model-{number:05}-of-00002{suffix}" for number, name in enumerate(state(1), 1)}
    for name, place in places.items():
        save({name: state(1)[name]}, folder / place)
    (folder / f"model{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_pretrained_model_in_one_file_or_several(suffix, shards, tmp_path, capsys):
    found = read(pretrained(tmp_path, suffix, shards))
    assert (found.system, found.online) == ("plain", None)
    assert equal(found.tensors, state(1))
    assert main(["inspect", str(tmp_path)]) == 0
    assert "tensors   2 (2 float32)" in capsys.readouterr().out
    assert main(["export", str(tmp_path), str(tmp_path / "out.pt")]) == 0
    assert equal(torch.load(tmp_path / "out.pt"), state(1))


def test_safetensors_are_taken_where_both_are_there(tmp_path):
    pretrained(tmp_path, ".safetensors", 1)
    (tmp_path / "pytorch_model.bin").write_bytes(b"damaged")
    assert equal(read(tmp_path).tensors, state(1))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "index.json' should say which file has which tensor"),
        ("nothing", "index.json' should say which file has which tensor"),
        ('{"weight_map": {"a.weight": "gone.bin"}}', "gone.bin' should be a file, but there is none"),
        ('{"weight_map": {"x": "model-00001-of-00002.bin"}}', "index.json' should say which file has which tensor"),
    ],
)
def test_an_index_that_does_not_fit(index, message, tmp_path):
    (pretrained(tmp_path, ".bin") / "model.bin.index.json").write_text(index)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        read(tmp_path)


def test_the_way_out_of_a_directory_of_several_models_is_to_name_a_file(tmp_path):
    for name in ("unet", "vae"):
        (tmp_path / name).mkdir()
        pretrained(tmp_path / name, ".bin", 1)
    torch.save(state(2), tmp_path / "one.pt")
    torch.save(state(3), tmp_path / "two.pt")
    with pytest.raises(ValueError, match="should be a file, or a directory that .*; name the file or directory in it"):
        read(tmp_path)
    for name, fill in (("one.pt", 2), ("two.pt", 3), ("unet/model.bin", 1), ("vae", 1)):
        assert equal(read(tmp_path / name).tensors, state(fill))


def distributed(content, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that there is one process alone
        dcp.save(content, checkpoint_id=path)
    return path


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    handler = EMAHandler(model)
    handler.ema_model[0].weight.data.add_(1.0)
    return model, handler


def test_an_average_of_a_distributed_checkpoint(tmp_path, capsys):
    model, handler = trained()
    content = {"model": model.state_dict(), "ema_handler": handler.state_dict(), "epoch": 3}
    found = read(distributed(content, tmp_path / "saved"))
    assert (found.system, found.num_updates) == ("ignite_ema", 0)
    assert equal(found.tensors, dict(handler.ema_model.state_dict()))
    assert equal(found.online, dict(model.state_dict()))
    assert main(["inspect", str(tmp_path / "saved")]) == 0
    assert "format    ignite_ema" in capsys.readouterr().out
    other = trained()[1]
    other.reset()
    other.load_averaged(tmp_path / "saved")
    assert equal(dict(other.ema_model.state_dict()), dict(handler.ema_model.state_dict()))


def test_what_a_distributed_checkpoint_holds_comes_back_nested(tmp_path):
    content = {
        "values": {"n": 3, "score": np.float64(0.5), "when": datetime.datetime(2026, 1, 2), "names": ["a", "b"]},
        "shadow_params": [torch.ones(2), torch.zeros(2, 0)],
        "half": torch.randn(3).bfloat16(),
    }
    loaded = read_directory(distributed(content, tmp_path / "saved"))
    assert loaded["values"] == content["values"]
    assert type(loaded["values"]["score"]) is np.float64
    assert [tensor.shape for tensor in loaded["shadow_params"]] == [(2,), (2, 0)]
    assert torch.equal(loaded["half"], content["half"])


def test_nothing_in_a_distributed_checkpoint_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = distributed({"model": state(1), "args": Evil(os.system, ("touch trace",))}, tmp_path / "saved")
    assert equal(averaged_state_dict(path, key="model"), state(1))
    with changed_contents(path) as metadata:
        metadata.planner_data["x"] = Evil(os.system, ("touch trace",))
    assert equal(averaged_state_dict(path, key="model"), state(1))
    assert files_in(tmp_path) == ["saved"]
