"""An average that shares frozen tensors with its model is completed, or says what it lacks."""

import copy

import pytest
import torch

from ignite_ema import EMAHandler
from ignite_ema.checkpoints import averaged_state_dict, read, save_file
from ignite_ema.cli import main
from tests.helpers.models import net
from tests.helpers.peer_files import equal


@pytest.fixture
def model():
    model = net()
    model[0].requires_grad_(False)
    return model


@pytest.fixture
def handler(model):
    handler = EMAHandler(model, share_frozen=True)
    handler.ema_model[2].weight.data.fill_(5.0)
    return handler


def test_frozen_tensors_come_from_the_raw_weights_of_the_same_file(model, handler, tmp_path):
    torch.save({"model": model.state_dict(), "ema_handler": handler.state_dict()}, tmp_path / "file.pt")
    found = read(tmp_path / "file.pt")
    assert equal(found.tensors, dict(handler.ema_model.state_dict()))
    assert equal(found.online, dict(model.state_dict()))
    net().load_state_dict(found.tensors)


@pytest.mark.parametrize("kind", ["model", "state dict", "file", "checkpoint"])
def test_frozen_tensors_come_from_a_base(kind, model, handler, tmp_path):
    torch.save({"ema_handler": handler.state_dict()}, tmp_path / "file.pt")
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pt")
    base = {
        "model": model,
        "state dict": model.state_dict(),
        "file": tmp_path / "plain.safetensors",
        "checkpoint": tmp_path / "checkpoint.pt",
    }[kind]
    assert equal(averaged_state_dict(tmp_path / "file.pt", base=base), dict(handler.ema_model.state_dict()))


def test_a_prefix_is_taken_off_frozen_tensors(model):
    wrapped = torch.nn.ModuleDict({"net": model})
    state = EMAHandler(wrapped, share_frozen=True).state_dict()
    found = read({"model": wrapped.state_dict(), "ema_handler": state}, strip_prefix="net.")
    assert equal(found.tensors, dict(model.state_dict()))
    assert equal(read({"ema_handler": state}, base=model, strip_prefix="net.").tensors, dict(model.state_dict()))


def test_what_is_missing_is_said_or_comes_from_the_base_of_an_export(model, handler, tmp_path, capsys):
    torch.save({"ema_handler": handler.state_dict()}, tmp_path / "file.pt")
    torch.save(model.state_dict() | {"another.weight": torch.ones(1)}, tmp_path / "base.pt")
    with pytest.raises(ValueError, match=r"shared 2 frozen ones with it, '0.weight', '0.bias'; pass the model.*--base"):
        read(tmp_path / "file.pt")
    arguments = ["export", *(str(tmp_path / name) for name in ("file.pt", "out.pt"))]
    assert main(arguments) == 1
    assert "'0.weight', '0.bias'; pass the model, or its file, as base (--base FILE)." in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()
    assert main([*arguments, "--base", str(tmp_path / "base.pt")]) == 0
    assert equal(torch.load(tmp_path / "out.pt"), dict(handler.ema_model.state_dict()))


def test_an_average_that_shares_the_same_tensors_starts_from_a_partial_one(model, handler):
    other = EMAHandler(copy.deepcopy(model), share_frozen=True)
    other.load_averaged(handler.state_dict())
    assert equal(dict(other.ema_model.state_dict()), dict(handler.ema_model.state_dict()))


def test_buffers_of_a_list_of_parameters_come_from_a_base(model):
    shadow = {"optimization_step": 3, "shadow_params": [torch.ones_like(one) for one in model.parameters()]}
    net().load_state_dict(averaged_state_dict(shadow, names=model, base=model))
