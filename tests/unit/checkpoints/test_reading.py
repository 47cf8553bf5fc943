"""What is read is a plain state dict of tensors with values and memory, with the names asked for; or one sentence."""

import pytest
import torch
from torch import nn

from ignite_ema.checkpoints import averaged_state_dict, read
from tests.helpers.peer_files import equal, net, prefixed, state

ONE = torch.ones(1)


def test_names_from_a_model_for_a_list_and_the_raw_weights_beside_it():
    shadow = {"optimization_step": 3, "shadow_params": [torch.zeros(2, 2), torch.zeros(2)]}
    assert list(read(shadow, names=nn.Linear(2, 2)).tensors) == ["weight", "bias"]
    model = net()
    raw = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    ema = {"optimization_step": 3, "shadow_params": [parameter.detach() for parameter in model.parameters()]}
    found = read({"model": raw, "ema": ema}, names=model)
    assert equal(found.online, {name: raw[name] for name, _ in model.named_parameters()})


def test_orig_mod_is_taken_out_where_it_is_a_component():
    names = ["_orig_mod.my_orig_mod.w", "a._orig_mod._orig_mod.b", "_orig_model.c"]
    assert list(read({"ema": dict.fromkeys(names, ONE)}).tensors) == ["my_orig_mod.w", "a.b", "_orig_model.c"]


def test_a_prefix_is_taken_off():
    model = nn.Linear(2, 1)
    average = prefixed("module.module.", model.state_dict()) | {"n_averaged": torch.tensor(1)}  # of DDP(model)
    file = {"average": average, "model": prefixed("module.", model.state_dict())}
    assert list(read(file).tensors) == ["module.weight", "module.bias"]
    found = read(file, strip_prefix="module.")
    assert equal(found.tensors, dict(model.state_dict()))
    assert list(found.online) == ["weight", "bias"]
    assert equal(averaged_state_dict(file, strip_prefix="module."), found.tensors)


def test_extra_state_that_is_no_tensor_is_left_out():
    extra = {"a._extra_state": {"scale": 1}, "b._extra_state": ONE}
    assert list(read({"state_dict_ema": state() | extra}).tensors) == ["a.weight", "a.bias", "b._extra_state"]
    assert read(state() | extra).system == "plain"


def test_extra_state_is_no_average():
    file = {"a_ema.weight": ONE, "a_ema._extra_state": {"scale": ONE}}
    assert equal(read(file).tensors, {"a_ema.weight": ONE})
    assert equal(read({"ema": file}).tensors, {"a_ema.weight": ONE})


def test_a_part_of_a_tensor_is_read_without_the_rest(tmp_path):
    """Of a flat tensor with all weights, for example."""
    torch.save({"model": {"w": torch.ones(1000)[:2]}, "model_ema": {"w": torch.zeros(1000)[:2]}}, tmp_path / "file.pt")
    found = read(tmp_path / "file.pt")
    assert [one["w"].untyped_storage().nbytes() for one in (found.tensors, found.online)] == [8, 8]


def test_repr_is_one_line_without_tensors():
    assert repr(read({"model": state(1), "ema": state(2)})) == (
        "Averaged(Ignite, 2 tensors, 0.000 MiB, raw weights, num_updates=unknown)"
    )


def test_plain_weights_are_no_average_unless_a_key_says_so(tmp_path):
    file = {"model": state(), "epoch": 3}
    torch.save(file, tmp_path / "file.pt")
    for source, name in ((file, "source"), (tmp_path / "file.pt", "file.pt'")):
        found = read(source)
        assert (found.system, found.online, found.num_updates) == ("plain", None, None)
        with pytest.raises(ValueError, match=f"{name} should hold an average, but it has only plain weights; use"):
            averaged_state_dict(source)
        assert equal(averaged_state_dict(source, key="model"), state())


LINEAR = "an object of the class 'torch.nn.modules.linear.Linear'"


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"epoch": 3, "model": nn.Linear(1, 1)}, ValueError, rf"'model' \({LINEAR}\)"),
        (nn.Linear(1, 1), TypeError, f"got {LINEAR}"),
    ],
)
def test_an_object_in_a_file_is_told_with_its_class(content, error, message, tmp_path):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(error, match=message):
        read(tmp_path / "file.pt")
