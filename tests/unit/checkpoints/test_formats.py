"""The average of every system is found in its file bit for bit, with its count, and the raw weights beside it."""

import pytest
import torch
from torch import nn

from ignite_ema import EMAHandler
from ignite_ema.checkpoints import averaged_state_dict, load_file, read
from tests.helpers.peer_files import MAKERS, equal, made, mmcv_state, net, prefixed, state, tied

ONE = torch.ones(1)


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_peer_bit_for_bit(maker):
    peer = made(maker)
    for source in (peer.path, {"epoch": 1, "checkpoint": load_file(peer.path)}):  # or one level inside
        found = read(source, key=peer.key, names=peer.names)
        assert found.system == peer.system
        assert equal(found.tensors, peer.tensors)
        assert not any(tensor.requires_grad for tensor in found.tensors.values())
        assert found.num_updates == peer.num_updates
        assert (found.online is None) == (peer.online is None)
        if peer.online is not None:
            assert equal(found.online, peer.online)
            assert not equal(found.online, found.tensors)


@pytest.mark.parametrize(
    ("count", "due"),
    [
        *((count, 7) for count in (7, torch.tensor(7), torch.tensor([7]))),
        *((count, None) for count in (-1, torch.tensor(float("nan")), torch.tensor(3, device="meta"), "3")),
    ],
)
def test_count_of_an_averaged_model(count, due):
    assert read({"module.weight": ONE, "n_averaged": count}).num_updates == due


@pytest.mark.parametrize(("collected", "online"), [([2 * ONE], {"x": 2 * ONE}), (None, None), ([], None)])
def test_torch_ema_has_the_raw_weights_put_by_or_not(collected, online):
    found = read({"shadow_params": [ONE], "collected_params": collected, "num_updates": None}, names={"x": ONE})
    assert (found.online, found.num_updates) == (online, None)


@pytest.mark.parametrize("twin", [{"module.a": torch.ones(1), "b": torch.ones(2)}, {"module.a": torch.ones(1)}])
def test_mmgen_keeps_a_module_of_the_models_own(twin):
    assert equal(read(prefixed("g_ema.", twin) | prefixed("g.", twin)).tensors, twin)


def test_ema_field_of_a_script_that_does_not_swap():
    file = {"state_dict": state(1), "ema_state_dict": state(2)}
    for ema in (state(2), prefixed("module.", state(2)), state(2) | {"steps": torch.tensor(3)}):
        found = read(file | {"ema_state_dict": ema})
        assert found.system == "Ignite"
        assert torch.equal(found.tensors["a.bias"], torch.full((2,), 2.0))
    swapped = prefixed("module.", state(1)) | {"steps": torch.tensor(3)}
    found = read({"state_dict": state(2), "ema_state_dict": swapped})
    assert found.system == "mmengine"
    assert equal(found.tensors, state(2))
    assert equal(found.online, state(1))


def test_mmcv_needs_a_key():
    own, raw, buffers = mmcv_state(net(), dict(net().named_parameters()))
    file = {"meta": {"epoch": 3}, "state_dict": own | buffers}
    with pytest.raises(ValueError, match="model' .mmcv; .* at the end of an epoch., .*ema_' .mmcv; .*IterBasedRunner"):
        read(file)
    for key, averaged, online in (("model", own, raw), ("ema_", raw, own)):
        found = read(file, key=key)
        assert equal(found.tensors, averaged)
        assert equal(found.online, online)


def test_lightnings_swa_is_not_silently_the_raw_weights():
    callback = {"n_averaged": 3, "latest_update_epoch": 5, "scheduler_state": {}, "average_model_state": state(2)}
    file = {"state_dict": state(1), "callbacks": {"Other": {}, "Log": 3, "StochasticWeightAveraging": callback}}
    with pytest.raises(ValueError, match="average_model_state' .Lightning; .*running_mean.*'state_dict' .plain; raw"):
        read(file)
    found = read(file, key="average_model_state")
    assert (found.system, found.num_updates) == ("Lightning", 3)
    assert equal(found.tensors, state(2))
    assert equal(found.online, state(1))
    callback["n_averaged"] = 0  # not begun: a copy of the first weights
    assert read(file).system == "plain"


def test_our_state_is_what_load_state_dict_takes():
    file = {"trainer": {}, "ema_handler": EMAHandler(tied()).state_dict()}
    tensors = averaged_state_dict(file)
    tied().load_state_dict(tensors)
    assert tensors["tied.first.weight"].data_ptr() == tensors["tied.second.weight"].data_ptr()


def test_the_raw_weights_of_a_checkpoint_for_deployment():
    model = nn.Linear(2, 1)
    handler = EMAHandler(model)
    model.weight.data.add_(1.0)
    average = handler.ema_model.state_dict()
    file = {"model": average, "raw_model": model.state_dict(), "ema_handler": handler.state_dict()}
    assert torch.equal(read(file).online["weight"], model.weight)
