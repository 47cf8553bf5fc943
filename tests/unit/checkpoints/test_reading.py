"""Averaged weights out of files: of every system bit for bit, chosen clearly, and never by running what is in them."""

import argparse
import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from ignite_ema import EMAHandler
from ignite_ema.checkpoints import averaged_state_dict, load_file, read, save_file
from tests.helpers.files import files_in
from tests.helpers.peer_files import MAKERS, averages_of, copied, equal, made, mmcv_state, net, prefixed, tied

EVERY = pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)


def state(fill=0.0):
    return {"a.weight": torch.full((2, 2), fill), "a.bias": torch.full((2,), fill)}


# --- the systems ---


@EVERY
def test_peer_bit_for_bit(maker):
    peer = made(maker)
    found = read(peer.path, key=peer.key, names=peer.names)
    assert found.system == peer.system
    assert equal(found.tensors, peer.tensors)
    assert not any(tensor.requires_grad for tensor in found.tensors.values())
    assert found.num_updates == peer.num_updates
    assert (found.online is None) == (peer.online is None)
    if peer.online is not None:
        assert equal(found.online, peer.online)
        assert not equal(found.online, found.tensors)


@EVERY
def test_peer_one_level_inside(maker):
    peer = made(maker)
    found = read({"epoch": 1, "checkpoint": load_file(peer.path)}, key=peer.key, names=peer.names)
    assert found.system == peer.system
    assert equal(found.tensors, peer.tensors)
    assert equal(found.online or {}, peer.online or {})


def test_plain_state_dict_is_what_load_state_dict_takes():
    handler = EMAHandler(tied())
    file = {"trainer": {}, "ema_handler": handler.state_dict()}
    tied().load_state_dict(averaged_state_dict(file))
    tensors = averaged_state_dict(file)
    assert tensors["tied.first.weight"].data_ptr() == tensors["tied.second.weight"].data_ptr()
    assert "tied.cache" not in tensors


def test_raw_weights_beside_an_average_without_names():
    model = net()
    raw = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    shadow = [parameter.detach() for parameter in model.parameters()]
    file = {"model": raw, "ema": {"optimization_step": 3, "shadow_params": shadow}}
    found = read(file, names=model)
    assert equal(found.online, {name: raw[name] for name, _ in model.named_parameters()})


@pytest.mark.parametrize("n_averaged", [7, torch.tensor(7), torch.tensor([7])])
def test_count_of_an_averaged_model(n_averaged):
    assert read({"module.weight": torch.zeros(1), "n_averaged": n_averaged}).num_updates == 7


def test_wrapped_names_beside_others_are_no_averaged_model():
    file = {"module.weight": torch.zeros(1), "n_averaged": torch.tensor(7), "head.weight": torch.zeros(1)}
    assert read(file).system == "plain"


def test_torch_ema_with_the_raw_weights_put_by():
    file = {"shadow_params": [torch.zeros(1)], "collected_params": [torch.ones(1)], "num_updates": 2}
    assert equal(read(file, names={"x": torch.zeros(1)}).online, {"x": torch.ones(1)})
    assert read(file | {"collected_params": None}, names={"x": torch.zeros(1)}).online is None


def test_submodule_called_ema_without_its_model_is_no_average():
    assert read(prefixed("g_ema.", state()) | {"g.a.weight": torch.zeros(2, 2)}).system == "plain"
    assert read({"ema.x_ema": torch.zeros(1), "ema.x": torch.zeros(1)}).system == "plain"


@pytest.mark.parametrize("twin", [{"module.a": torch.ones(1), "b": torch.ones(2)}, {"module.a": torch.ones(1)}])
def test_mmgen_keeps_a_module_of_the_models_own(twin):
    assert equal(read(prefixed("g_ema.", twin) | prefixed("g.", twin)).tensors, twin)


def test_torch_ema_without_a_count():
    assert (
        read({"shadow_params": [torch.zeros(1)], "num_updates": None}, names={"x": torch.zeros(1)}).num_updates is None
    )


# --- lists without names ---


def shadow():
    return {"optimization_step": 3, "shadow_params": [torch.zeros(2, 2), torch.zeros(2)]}


def test_list_without_names_is_refused():
    with pytest.raises(ValueError, match="list of 2 tensors without names, as diffusers.*named_parameters.*--names"):
        read(shadow())


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ({"w": torch.zeros(2, 2)}, ValueError, "names should be of 2 tensors, as many as diffusers has.*got 1"),
        (net(), ValueError, "got 6; pass"),
        ({"b": torch.zeros(2), "w": torch.zeros(2, 2)}, ValueError, r"'b' of names.*shape.*\(2, 2\), got \(2,\)"),
        ({"w": torch.zeros(2, 2), "b": 2}, ValueError, r"'b' of names.*\(2,\), got a int"),
        (["w", "b"], TypeError, "names should be a model, or a mapping.*got list"),
    ],
)
def test_names_that_do_not_fit(names, error, message):
    with pytest.raises(error, match=message):
        read(shadow(), names=names)


def test_names_from_a_model():
    assert list(read(shadow(), names=nn.Linear(2, 2)).tensors) == ["weight", "bias"]


# --- choosing ---


def gan():
    return (
        prefixed("g.", state(1.0))
        | prefixed("g_ema.", state(2.0))
        | prefixed("d.", state(3.0))
        | prefixed("d_ema.", state(4.0))
    )


def test_several_averages_need_a_key():
    with pytest.raises(ValueError, match=r"got several.*'g_ema' \(mmagic\), 'd_ema' \(mmagic\)\.$"):
        read(gan())
    with pytest.raises(ValueError, match="key should be one of 'state_dict.g_ema'.*got 'x_ema'"):
        read({"state_dict": gan()}, key="x_ema")


@pytest.mark.parametrize("key", ["d_ema", "state_dict.d_ema"])
def test_key_chooses(key):
    found = read({"state_dict": gan()}, key=key)
    assert equal(found.tensors, state(4.0))
    assert equal(found.online, state(3.0))


def test_key_may_be_a_system():
    file = {"shadow_params": [torch.zeros(1)], "num_updates": 3, "state_dict_ema": state(), "state_dict": state(1.0)}
    with pytest.raises(ValueError, match=r"'state_dict_ema' \(timm\), 'torch_ema' \(torch_ema\)"):
        read(file)
    assert read(file, key="timm").system == "timm"


def test_key_of_a_file_with_one_average():
    assert equal(read({"state_dict_ema": state(), "state_dict": state(1.0)}, key="timm").tensors, state())
    with pytest.raises(ValueError, match="key should be one of 'state_dict_ema'.*got 'state_dict'"):
        read({"state_dict_ema": state(), "state_dict": state(1.0)}, key="state_dict")


def test_equal_averages_are_one():
    file = {"model": state(1.0), "ema_a": state(), "ema_b": state()}
    assert equal(read(file).tensors, state())
    for other in (state(2.0), {name: tensor.double() for name, tensor in state().items()}, {"a.bias": torch.zeros(2)}):
        with pytest.raises(ValueError, match="'ema_a' .Ignite., 'ema_b' .Ignite."):
            read(file | {"ema_b": other})


def test_the_twin_beside_the_state_of_our_handler_is_the_same_average():
    handler = EMAHandler(nn.Linear(2, 2))
    file = {"ema_model": handler.ema_model.state_dict(), "ema_handler": handler.state_dict()}
    assert read(file).system == "ignite_ema"
    assert read(file, key="ema_model").system == "Ignite"
    file["ema_model"] = nn.Linear(2, 2).state_dict()
    with pytest.raises(ValueError, match="'ema_handler' .ignite_ema., 'ema_model' .Ignite."):
        read(file)


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "timm"])
def test_every_average_is_a_candidate(key):
    file = {"state_dict": state(1.0), "state_dict_ema": state(2.0), "model_ema": state(3.0)}
    with pytest.raises(ValueError, match=r"'state_dict_ema' \(timm\), 'model_ema' \(Ignite\)\.$"):
        read(file)
    found = read(file, key=key)
    assert equal(found.tensors, state(3.0 if key == "model_ema" else 2.0))
    assert equal(found.online, state(1.0))


def test_averages_inside_a_known_format_are_candidates():
    inner = prefixed("g.", state(1.0)) | prefixed("g_ema.", state(2.0))
    with pytest.raises(
        ValueError, match="'state_dict_ema' .timm., 'state_dict.g_ema' .mmagic., 'state_dict_ema.g_ema'"
    ):
        read({"state_dict": inner, "state_dict_ema": prefixed("g.", state(3.0)) | prefixed("g_ema.", state(4.0))})


def test_two_of_our_handlers_need_a_key():
    handlers = [EMAHandler(nn.Linear(2, 2)) for _ in range(2)]
    file = {"ema_g": handlers[0].state_dict(), "ema_d": handlers[1].state_dict()}
    with pytest.raises(ValueError, match="'ema_g' .ignite_ema., 'ema_d' .ignite_ema."):
        read(file)
    assert equal(read(file, key="ema_d").tensors, handlers[1].ema_model.state_dict())


def test_raw_weights_are_those_of_the_same_name():
    file = {"g": state(1.0), "d": state(2.0), "ema_g": state(3.0), "ema_d": state(4.0)}
    assert equal(read(file, key="ema_d").online, state(2.0))
    assert read({"one": state(1.0), "two": state(2.0), "ema": state(3.0)}).online is None
    assert equal(read({"one": state(1.0), "model": state(2.0), "ema": state(3.0)}).online, state(2.0))


def test_raw_weights_that_do_not_match_are_none():
    assert read({"state_dict_ema": state(), "state_dict": {"a.weight": torch.zeros(2, 2)}}).online is None
    assert read({"state_dict_ema": state(), "state_dict": state() | {"a.bias": torch.zeros(3)}}).online is None


@pytest.mark.parametrize("name", ["ema_model", "model_ema", "EMA", "ema", "ema2", "generator-ema.1"])
def test_names_of_an_average(name):
    assert read({name: state(), "model": state(1.0), "trainer": {"iteration": 3}}).system == "Ignite"


@pytest.mark.parametrize("name", ["schema", "remark", "cinema", "emanation", "avg_loss", "swap"])
def test_names_of_no_average(name):
    assert read({name: {"loss": torch.zeros(1)}, "model": state(1.0)}).system == "plain"


@pytest.mark.parametrize(
    "name", ["modelEMA", "netEMA", "emaModel", "EMAModel", "swa_state_dict", "averaged", "model_avg"]
)
def test_names_of_an_average_of_the_model_beside(name):
    found = read({"model": state(1.0), name: state(2.0), "optimizer": {}})
    assert found.system == "Ignite"
    assert equal(found.tensors, state(2.0))
    assert equal(found.online, state(1.0))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_word_of_an_average_beside_a_wrapped_model(prefix):
    assert equal(read({"model": prefixed(prefix, state(1.0)), "swa": state(2.0)}).tensors, state(2.0))


def test_raw_weights_of_camel_case():
    file = {"netG": state(1.0), "netD": state(2.0), "netGEma": state(3.0), "netDEma": state(4.0)}
    assert equal(read(file, key="netDEma").online, state(2.0))


@pytest.mark.parametrize("name", ["shadow", "teacher", "means", "polyak", "emamodel"])
@pytest.mark.parametrize("wrap", [state, lambda fill: prefixed("module.", state(fill))])
def test_twin_of_the_model_of_any_name_needs_a_key(name, wrap):
    file = {"model": wrap(1.0), name: state(2.0), "optimizer": {}}
    if name == "means":
        file["means"].popitem()  # such as parameters alone, without buffers
    with pytest.raises(ValueError, match=f"got several.*'model' .plain., '{name}' .plain; of the names and shapes of"):
        read(file)
    assert equal(averaged_state_dict(file, key=name), file[name])
    assert read(file, key="model").system == "plain"


def test_twin_one_level_deeper_needs_a_key():
    file = {"model": state(1.0), "ema": {"decay": 0.9, "shadow": state(2.0)}}
    with pytest.raises(ValueError, match="'model' .plain., 'ema.shadow' .plain; of the names"):
        read(file)
    assert equal(read(file, key="shadow").online, state(1.0))


def test_equal_twin_is_the_model():
    assert read({"model": state(), "best": state()}).system == "plain"


def test_part_of_a_model_that_is_an_average_itself():
    moco = prefixed("encoder.", state(1.0)) | prefixed("encoder_ema.", state(2.0))
    averaged = prefixed("encoder.", state(3.0)) | prefixed("encoder_ema.", state(4.0))
    file = {"model": moco, "ema_model": averaged}
    with pytest.raises(
        ValueError, match="'model.encoder_ema' .mmagic., 'ema_model.encoder_ema' .*, 'ema_model' .Ignite"
    ):
        read(file)
    found = read(file, key="ema_model")
    assert equal(found.tensors, averaged)
    assert equal(found.online, moco)
    assert equal(read(file, key="ema_model.encoder_ema").tensors, state(4.0))


def test_ema_field_of_a_script_that_does_not_swap():
    file = {"state_dict": state(1.0), "ema_state_dict": state(2.0)}
    for ema in (state(2.0), prefixed("module.", state(2.0)), state(2.0) | {"steps": torch.tensor(3)}):
        found = read(file | {"ema_state_dict": ema})
        assert found.system == "Ignite"
        assert torch.equal(found.tensors["a.bias"], torch.full((2,), 2.0))
    swapped = prefixed("module.", state(1.0)) | {"steps": torch.tensor(3)}
    found = read({"state_dict": state(2.0), "ema_state_dict": swapped})
    assert found.system == "mmengine"
    assert equal(found.tensors, state(2.0))
    assert equal(found.online, state(1.0))


# --- mmcv ---


def test_mmcv_names_that_collide():
    file = {"a.b_c": torch.zeros(2), "a_b.c": torch.zeros(2), "ema_a_b_c": torch.zeros(2)}
    with pytest.raises(ValueError, match="'ema_a_b_c' should belong to one tensor.*got 'a.b_c', 'a_b.c'"):
        read({"state_dict": file})


@pytest.mark.parametrize("meta", [{"epoch": 3, "iter": 12, "config": "runner = dict(type='EpochBasedRunner')"}, None])
def test_mmcv_needs_a_key(meta):
    own, raw, buffers = mmcv_state(net(), dict(net().named_parameters()))
    file = {"meta": meta, "state_dict": own | buffers}
    with pytest.raises(ValueError, match="model' .mmcv; .* at the end of an epoch., .*ema_' .mmcv; .*IterBasedRunner"):
        read(file)
    assert equal(read(file, key="model").tensors, own)
    assert equal(read(file, key="model").online, raw)
    found = read(file, key="ema_")
    assert equal(found.tensors, raw)
    assert equal(found.online, own)


@pytest.mark.parametrize("extra", [{"ema_decay": torch.zeros(1)}, {"ema_a_bias": torch.zeros(3)}])
def test_buffers_that_are_no_averages_are_not_mmcvs(extra):
    assert read(state() | extra).system == "plain"


def test_mmcv_own_buffers_are_not_taken_for_averages():
    file = {"model": state(1.0), "ema_model": state(2.0)}  # as if 'ema_model' were the average of 'model'
    assert read(file).system == "Ignite"


# --- names and values ---


def test_orig_mod_is_taken_out():
    compiled = {"_orig_mod.a.weight": torch.ones(1), "b._orig_mod.c": torch.ones(2)}
    assert list(read({"ema_model": compiled}).tensors) == ["a.weight", "b.c"]
    with pytest.raises(ValueError, match="'x' should be in source once.*_orig_mod"):
        read({"ema": {"x": torch.ones(1), "_orig_mod.x": torch.zeros(1)}})


def test_module_is_taken_out_only_where_the_layout_puts_it():
    wrapped = prefixed("module.", state())
    assert equal(read(wrapped).tensors, wrapped)
    assert equal(read({"ema": wrapped, "optimizer": {}}).tensors, wrapped)
    assert equal(read({"ema": wrapped, "model": prefixed("module.", state(1.0))}).tensors, wrapped)
    assert equal(read({"ema": wrapped, "model": state(1.0)}).tensors, state())
    both = {"model": prefixed("module.", state(1.0)), "pretrained": state(2.0)}
    assert equal(read({"ema": wrapped} | both).tensors, wrapped)
    assert equal(read(prefixed("module.", wrapped) | {"n_averaged": torch.tensor(1)}).tensors, wrapped)


def test_extra_state():
    extra = {"a._extra_state": {"scale": 1}, "b._extra_state": torch.ones(1)}
    assert list(read({"state_dict_ema": state() | extra}).tensors) == ["a.weight", "a.bias", "b._extra_state"]
    assert read(state() | extra).system == "plain"


@pytest.mark.parametrize("file", [{"state_dict_ema": state() | {"n": 3}}, {"ema_model": state() | {"n": 3}}])
def test_what_is_no_tensor_is_named(file):
    with pytest.raises(ValueError, match="'n' of the weights in source should be a tensor, got int"):
        read(file)


def test_gradients_are_left_behind():
    assert not read({"ema": {"w": nn.Parameter(torch.zeros(1))}}).tensors["w"].requires_grad


# --- files without an average ---


def test_plain():
    assert equal(read(state()).tensors, state())
    found = read({"epoch": 3, "weights": state(), "optimizer": {"state": {0: {"step": 1}}, "param_groups": []}})
    assert (found.system, found.online, found.num_updates) == ("plain", None, None)
    assert equal(found.tensors, state())
    file = {"model": state(1.0), "statistics": {"mean": torch.zeros(1)}}
    assert equal(read(file).tensors, state(1.0))
    assert equal(read(file, key="statistics").tensors, {"mean": torch.zeros(1)})
    with pytest.raises(ValueError, match="got several.*'one' .plain., 'two' .plain."):
        read({"one": state(1.0), "two": {"mean": torch.zeros(1)}})
    with pytest.raises(ValueError, match="got several.*'student' .plain.*'teacher' .plain; of the names"):
        read({"student": state(1.0), "teacher": state()})


def test_plain_weights_are_no_average_unless_a_key_says_so(tmp_path):
    file = {"model": state(), "epoch": 3}
    torch.save(file, tmp_path / "file.pt")
    for source, name in ((file, "source"), (tmp_path / "file.pt", "file.pt'")):
        assert read(source).system == "plain"
        with pytest.raises(ValueError, match=f"{name} should hold an average, but it has plain weights alone; use"):
            averaged_state_dict(source)
        assert equal(averaged_state_dict(source, key="model"), state())


@pytest.mark.parametrize(
    "file",
    [
        {"state_dict_ema": {}, "state_dict": state()},
        {"state_dict_ema": {"_extra_state": 3}},
        {"shadow_params": [], "optimization_step": 3},
        {"ignite_ema_version": 3, "averaged_tensors": {}, "state_dict_names": {}},
    ],
)
def test_empty_average(file):
    with pytest.raises(ValueError, match="The average in source should have tensors, but it is empty"):
        read(file, names={})


def test_tensors_without_values():
    meta = nn.Linear(2, 2, device="meta").state_dict()
    for file in ({"ema": meta}, meta, {"module.w": torch.zeros(1, device="meta"), "n_averaged": meta["bias"][0]}):
        with pytest.raises(ValueError, match="should have values, got a tensor on the meta device"):
            read(file)
    average = nn.Linear(2, 2).state_dict()
    assert read({"model": meta, "ema": average}).online is None
    assert read({"ema": {"w": torch.zeros(1).expand(5)}}).tensors["w"].shape == (5,)


def test_tensors_of_repeated_memory():
    huge = {"w": torch.zeros(1).expand(10**13)}
    for file in ({"ema": huge}, huge, {"ema": {str(i): torch.zeros(1).expand(2**27) for i in range(3)}}):
        with pytest.raises(ValueError, match="should have memory for its shape.*got 4 bytes that are repeated"):
            read(file)
    with pytest.raises(ValueError, match="got several"):  # and are not compared either
        read({"ema_a": huge, "ema_b": {"w": torch.zeros(1).expand(10**13)}})


def test_sparse_tensors():
    sparse = {"w": torch.eye(2).to_sparse()}
    assert read({"ema_a": sparse, "ema_b": sparse}).tensors["w"].layout == torch.sparse_coo
    with pytest.raises(ValueError, match="got several"):
        read({"ema_a": sparse, "ema_b": {"w": torch.eye(2).to_sparse()}})
    assert read({"ema": {"module.w": torch.zeros(1)}, "n_averaged": torch.tensor(float("nan"))}).num_updates is None


@pytest.mark.parametrize("count", [float("nan"), torch.tensor(float("nan")), torch.tensor(3, device="meta"), "3"])
def test_counts_that_are_none(count):
    assert read({"module.w": torch.zeros(1), "n_averaged": count}).num_updates is None


def test_parts_that_are_no_mappings():
    assert read({"state_dict_ema": state(), "state_dict": 3}).online is None
    file = {"shadow_params": [torch.zeros(1)], "collected_params": [], "num_updates": 2}
    assert read(file, names={"x": torch.zeros(1)}).online is None


def test_lightnings_swa_is_not_silently_the_raw_weights():
    callback = {"n_averaged": 3, "latest_update_epoch": 5, "scheduler_state": {}, "average_model_state": state(2.0)}
    file = {"state_dict": state(1.0), "callbacks": {"Other": {}, "Log": 3, "StochasticWeightAveraging": callback}}
    with pytest.raises(ValueError, match="average_model_state' .Lightning; .*running_mean.*'state_dict' .plain; raw"):
        read(file)
    found = read(file, key="average_model_state")
    assert (found.system, found.num_updates) == ("Lightning", 3)
    assert equal(found.tensors, state(2.0))
    assert equal(found.online, state(1.0))
    callback["n_averaged"] = 0  # not begun: a copy of the first weights
    assert read(file).system == "plain"


@pytest.mark.parametrize("source", [{"epoch": 3}, {f"k{i}": {} for i in range(20)}])
def test_nothing_recognised(source):
    with pytest.raises(ValueError, match="source should hold averaged weights.*keys.*mmengine.*pass the part") as info:
        read(source)
    assert ("… (20 in all)" in str(info.value)) == (len(source) == 20)
    assert len(str(info.value)) < 400


@pytest.mark.parametrize(("source", "kind"), [([1], "list"), (nn.Linear(1, 1), "Linear"), (3, "int")])
def test_not_a_mapping(source, kind):
    with pytest.raises(TypeError, match=f"source should be, or hold, a mapping.*got {kind}; pass the state_dict"):
        read(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ignite_ema_version": torch.tensor(3)},
            "'ignite_ema_version' of the state .* should be 3, got Tensor; read it",
        ),
        ({"ignite_ema_version": [1]}, "should be 3, got list"),
        ({"ignite_ema_version": True}, "should be 3, got bool"),
        ({"ignite_ema_version": 2}, "should be 3, got 2; read it"),
        ({"ignite_ema_version": "3"}, "should be 3, got str; read it"),
        ({"ignite_ema_version": 10**5000}, "should be 3, got an integer of 16610 bits; read it"),
        ({"num_updates": 10**5000}, "'num_updates' should be a number of updates, .* got an integer of 16610 bits"),
        ({"num_updates": True}, "'num_updates' of the state of an EMAHandler should be an integer, got bool"),
        ({"num_skipped": torch.tensor(1)}, "'num_skipped' .* should be an integer, got Tensor"),
        ({"num_updates": -1}, "'num_updates' should be a number of updates, from 0"),
        ({"averaged_tensors": [1]}, "'averaged_tensors' .* should be a mapping, but is list"),
        ({"state_dict_names": None}, "'state_dict_names' .* should be a mapping, but is NoneType"),
        ({"state_dict_names": {"weight": ["weight"]}}, "should have text alone, got list for 'weight'"),
        ({"state_dict_names": {3: "weight"}}, "should have text alone, got int for '3'"),
        ({"state_dict_names": {"a": "x", "b": "x"}}, "should name averaged tensors, got 'x', which is none; take"),
    ],
)
def test_our_state_is_checked(change, message):
    with pytest.raises(ValueError, match=message) as info:
        read({"ema_handler": EMAHandler(nn.Linear(1, 1)).state_dict() | change})
    assert "\n" not in str(info.value)


def test_our_state_without_names():
    handler_state = EMAHandler(nn.Linear(1, 1)).state_dict()
    del handler_state["state_dict_names"]
    with pytest.raises(ValueError, match="'state_dict_names' .* should be a mapping, but is missing"):
        read(handler_state)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "but is empty; take another"),
        ({"state_dict": {1: torch.zeros(1)}}, "but in its 'state_dict', the name '1' is no text, but int; load it"),
        ({"state_dict": {"w": torch.zeros(1), "x": 3}}, "but in its 'state_dict', 'x' is no tensor, but int"),
        ({"state_dict": [torch.zeros(1)]}, "but its 'state_dict' is no state dict, but list"),
        ({"epoch": 3, "state_dict": {}}, "but in its 'state_dict', there are no tensors"),
        ({"ema": {"w": [torch.zeros(1)]}}, "but in its 'ema', 'w' is no tensor, but list"),
        ({"generator": {"w": torch.zeros(1), "x": "y"}}, "but in its 'generator', 'x' is no tensor, but str"),
        ({1: torch.zeros(1)}, "but in it, the name '1' is no text, but int"),
        ({"w": torch.zeros(1), "epoch": 3}, "but in it, 'epoch' is no tensor, but int"),
    ],
)
def test_what_is_wrong_with_a_state_dict_is_said(content, message):
    with pytest.raises(ValueError, match=f"source should hold averaged weights or a state dict, {message}"):
        read(content)


def test_a_whole_module_in_a_checkpoint_is_told(tmp_path):
    torch.save({"epoch": 3, "model": nn.Linear(1, 1)}, tmp_path / "file.pt")
    message = "its 'model' is no state dict, but an object of the class 'torch.nn.modules.linear.Linear'; load"
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "file.pt")


def test_a_class_in_place_of_a_tensor_is_named(tmp_path):
    torch.save({"state_dict_ema": {"w": argparse.Namespace}}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match="should be a tensor, got the object named 'argparse.Namespace'"):
        read(tmp_path / "file.pt")


# --- reading files ---


class Touch:
    """Leaves a trace when it is unpickled; ``call`` is a function and its arguments."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


TRACE = "import pathlib; pathlib.Path('trace').touch()"
ATTACKS = {
    "os.system": lambda: Touch(os.system, ("touch trace",)),
    "exec": lambda: Touch(exec, (TRACE,)),
    "eval": lambda: Touch(eval, ("__import__('pathlib').Path('trace').touch()",)),
    "subprocess": lambda: Touch(subprocess.run, (["touch", "trace"],)),
    "getattr": lambda: Touch(getattr, (Path("trace"), "touch")),
    "open": lambda: Touch(open, ("trace", "w")),
    "torch.load": lambda: Touch(torch.save, (1, "trace")),
    "state": lambda: Touch(Touch, (), {"call": Touch(exec, (TRACE,))}),
}


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_run(attack, new_format, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict_ema": state(), "args": ATTACKS[attack]()}
    torch.save(content, "evil.pt", _use_new_zipfile_serialization=new_format)
    assert equal(read("evil.pt").tensors, state())
    assert files_in(tmp_path) == ["evil.pt"]


def test_modules_of_foreign_objects_are_not_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("foreign.py").write_text("class Thing: ...\n")
    import foreign

    torch.save({"ema": state(), "thing": foreign.Thing()}, "file.pt")
    del sys.modules["foreign"]
    Path("foreign.py").write_text(TRACE)
    assert read("file.pt").system == "Ignite"
    assert "foreign" not in sys.modules
    assert not Path("trace").exists()


class Settings(dict):
    """A dictionary of a class of its own."""


@pytest.mark.parametrize("new_format", [True, False])
def test_harmless_foreign_objects(new_format, tmp_path):
    import numpy as np

    content = {
        "model": state(),
        "args": argparse.Namespace(path=Path("x"), nested=argparse.Namespace()),
        "metric": np.float64(0.5),
        "history": np.arange(3),
        "queue": deque([1, 2], maxlen=3),
        "counts": defaultdict(int, a=1),
        "counter": Counter("aab"),
        "kinds": {argparse.Namespace, int},
    }
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=new_format)
    allowed = set(torch.serialization.get_safe_globals())
    loaded = load_file(tmp_path / "file.pt")
    assert set(torch.serialization.get_safe_globals()) == allowed
    assert list(loaded) == list(content)
    assert (loaded["queue"], loaded["counts"]) == ([1, 2], {"a": 1})
    assert not hasattr(loaded["args"], "path")


@pytest.mark.parametrize("new_format", [True, False])
def test_mappings_of_foreign_classes_keep_their_items(new_format, tmp_path):
    content = {"ema": Settings(state(2.0)), "model": state(1.0), "log": [Settings(a=1)]}
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=new_format)
    assert load_file(tmp_path / "file.pt")["log"] == [{"a": 1}]
    assert equal(read(tmp_path / "file.pt").tensors, state(2.0))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_zipped_again(compression, tmp_path):
    torch.save({"ema": state(3.0)}, tmp_path / "file.pt")
    with zipfile.ZipFile(tmp_path / "file.pt") as old, zipfile.ZipFile(tmp_path / "again.pt", "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    if compression == zipfile.ZIP_STORED:
        assert equal(read(tmp_path / "again.pt").tensors, state(3.0))
        return
    with pytest.raises(
        ValueError, match="again.pt' should be a file that torch.save or safetensors wrote, but it was compressed"
    ):
        read(tmp_path / "again.pt")


def test_what_is_not_looked_at_is_not_read(tmp_path):
    torch.save({"ema": {"w": torch.zeros(100_000)}}, tmp_path / "file.pt")
    tensors = load_file(tmp_path / "file.pt")["ema"]
    content = (tmp_path / "file.pt").read_bytes()
    with (tmp_path / "file.pt").open("r+b") as file:  # in place, before the tensor has been read
        file.write(content.replace(bytes(400_000), b"\x00\x00\x80?" * 100_000))
    assert torch.equal(tensors["w"], torch.ones(100_000))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_was_read_outlives_the_file(suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    file = tmp_path / f"file{suffix}"
    save_file(prefixed("g.", state(1.0)) | prefixed("g_ema.", state(2.0)), file)
    found, tensors = read(file), averaged_state_dict(file)
    size = file.stat().st_size
    with file.open("r+b") as opened:  # in place
        opened.write(bytes(size))
    assert equal(found.tensors, state(2.0))
    assert equal(found.online, state(1.0))
    assert equal(tensors, state(2.0))


def test_ties_of_a_file_stay_ties(tmp_path):
    torch.save({"ema": tied().state_dict()}, tmp_path / "file.pt")
    tensors = averaged_state_dict(tmp_path / "file.pt")
    assert tensors["tied.first.weight"].data_ptr() == tensors["tied.second.weight"].data_ptr()
    assert tensors["tied.first.weight"].untyped_storage().nbytes() == 16


def test_old_format(tmp_path):
    torch.save({"ema": state()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert equal(read(tmp_path / "old.pt").tensors, state())


def broken(kind):
    buffer = io.BytesIO()
    torch.save(state(), buffer)
    whole = buffer.getvalue()
    if kind == "zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("readme.txt", "nothing")
        return buffer.getvalue()
    if kind == "pickle":
        return pickle.dumps({"a": 1}, protocol=4)
    if kind == "tar":
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("storages"))
        return buffer.getvalue()
    if kind == "damaged":  # in the pickle, the first thing in the file
        return whole.replace(b"\x80\x02}", b"\x80\x02\xff")
    if kind == "script":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in ("constants.pkl", "data.pkl"):
                archive.writestr(f"archive/{name}", pickle.dumps(1, protocol=2))
        return buffer.getvalue()
    return {"text": b"epoch,loss\n1,0.5\n", "empty": b"", "half": whole[: len(whole) // 2], "byte": b"\x80"}[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "is text; name the file that holds"),
        ("half", "is cut short: a zip archive without its end"),
        ("byte", "cannot be read as one; it is cut short or damaged"),
        ("zip", "is a zip archive of another kind; unzip it, and name the file in it that holds the weights"),
        ("script", "is a TorchScript archive, a program; save the state_dict"),
        ("pickle", "is a pickle that torch.save did not write"),
        ("damaged", "its entry 'archive/data.pkl' has changed since"),
        ("tar", "is a tar archive; unpack it"),
        ("empty", "should hold weights, but it is empty"),
    ],
)
def test_broken_files(kind, message, tmp_path):
    file = tmp_path / "broken.pt"
    file.write_bytes(broken(kind))
    with pytest.raises(ValueError, match=message) as info:
        load_file(file)
    assert str(info.value).startswith(f"'{file}' should")
    assert len(str(info.value)) < 350 + len(str(file))


def test_no_file_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt' should be a file, but there is none"):
        load_file(tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="should be a file, got a directory; name the file in it"):
        read(str(tmp_path))


@pytest.mark.parametrize("content", [b"no header", (10**12).to_bytes(8, "little") + b"{}"])
def test_broken_safetensors(content, tmp_path):
    pytest.importorskip("safetensors")
    file = tmp_path / "broken.safetensors"
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match="should be a file that torch.save or safetensors wrote, but it cannot be read"
    ):
        load_file(file)


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    file = tmp_path / "file.safetensors"
    with pytest.raises(ImportError, match="file.safetensors' needs the package safetensors; pip install"):
        save_file(state(), file)
    assert not files_in(tmp_path)
    file.write_bytes(b"x")
    with pytest.raises(ImportError, match="needs the package safetensors"):
        load_file(file)


def test_average_in_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    file = {"n_averaged": torch.tensor(4)} | prefixed("module.", state(2.0))
    save_file(file, tmp_path / "average.safetensors")
    found = read(tmp_path / "average.safetensors")
    assert (found.system, found.num_updates) == ("torch AveragedModel", 4)
    assert equal(found.tensors, state(2.0))


# --- writing files ---

SUFFIXES = pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])


@SUFFIXES
def test_save_and_load(suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    _, averaged = averages_of(tied())
    averaged |= {
        "half": torch.randn(3).bfloat16(),
        "turned": torch.randn(3, 4).t(),
        "nothing": torch.zeros(0),
        "nothing_else": torch.zeros(0, 2),
        "scalar": torch.tensor(2.5),
        "row": torch.randn(50, 4)[3],
        "parameter": nn.Parameter(torch.ones(2)),
    }
    save_file(averaged, tmp_path / f"file{suffix}")
    assert files_in(tmp_path) == [f"file{suffix}"]
    assert equal(load_file(tmp_path / f"file{suffix}"), averaged)
    assert not any(tensor.requires_grad for tensor in load_file(tmp_path / f"file{suffix}").values())


@SUFFIXES
def test_views_are_saved_without_the_rest_of_their_memory(suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    long = torch.randn(100_000)
    views = {"a": long[:10], "b": long[:10], "c": long[5:15], "d": long.view(torch.int32)[:10]}
    save_file(views, tmp_path / f"file{suffix}")
    assert (tmp_path / f"file{suffix}").stat().st_size < 10_000
    assert equal(load_file(tmp_path / f"file{suffix}"), views)


def test_ties_stay_in_a_torch_file(tmp_path):
    model = tied()
    long = torch.randn(100)
    save_file(model.state_dict() | {"v": long[:10], "w": long[:10]}, tmp_path / "tied.pt")
    loaded = load_file(tmp_path / "tied.pt")
    for one, other in (("tied.first.weight", "tied.second.weight"), ("v", "w")):
        assert loaded[one].data_ptr() == loaded[other].data_ptr()


def test_ties_in_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    save_file(tied().state_dict(), tmp_path / "tied.safetensors")
    assert equal(load_file(tmp_path / "tied.safetensors"), copied(tied().state_dict()))


@SUFFIXES
def test_nothing_is_overwritten_unless_forced(suffix, tmp_path):
    file = tmp_path / f"file{suffix}"
    file.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="exists already; choose another name, or overwrite"):
        save_file(state(), file)
    assert file.read_bytes() == b"precious"
    save_file(state(), file, force=True)
    assert equal(load_file(file), state())


def test_file_that_appears_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    file, save = tmp_path / "file.pt", torch.save

    def slow(content, path):
        save(content, path)
        file.write_bytes(b"precious")

    monkeypatch.setattr(torch, "save", slow)
    for link in (os.link, no_links):
        monkeypatch.setattr(os, "link", link)
        with pytest.raises(FileExistsError, match="exists already; choose another name"):
            save_file(state(), file)
        assert file.read_bytes() == b"precious"
        assert files_in(tmp_path) == ["file.pt"]
        file.unlink()


def no_links(*args):
    raise OSError("not supported")


def test_file_system_without_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    save_file(state(), tmp_path / "file.pt")
    assert equal(load_file(tmp_path / "file.pt"), state())
    assert files_in(tmp_path) == ["file.pt"]


@pytest.mark.parametrize("force", [True, False])
def test_threads_write_at_the_same_time(force, tmp_path):
    def save(index):
        try:
            save_file({"w": torch.full((1000,), float(index))}, tmp_path / "file.pt", force=force)
        except FileExistsError:
            return 0
        return 1

    with ThreadPoolExecutor(4) as pool:
        written = sum(pool.map(save, range(16)))
    assert written == (16 if force else 1)
    assert files_in(tmp_path) == ["file.pt"]
    assert load_file(tmp_path / "file.pt")["w"].unique().numel() == 1


@SUFFIXES
def test_mode_of_a_file_is_kept(suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    file = tmp_path / f"file{suffix}"
    save_file(state(), file)
    (tmp_path / "plain").touch()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode
    file.chmod(0o640)
    save_file(state(), file, force=True)
    assert file.stat().st_mode & 0o777 == 0o640


def test_link_is_written_through(tmp_path):
    (tmp_path / "store").mkdir()
    link, target = tmp_path / "link.pt", tmp_path / "store" / "v1"
    link.symlink_to(target)
    save_file(state(1.0), link)
    with pytest.raises(FileExistsError, match="link.pt' exists already"):
        save_file(state(2.0), link)
    save_file(state(2.0), link, force=True)
    assert link.is_symlink()
    assert equal(load_file(target), state(2.0))
    assert files_in(tmp_path / "store") == ["v1"]


def test_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    there = []
    monkeypatch.setattr(os, "fsync", lambda number: there.append((tmp_path / "file.pt").exists()))
    save_file(state(), tmp_path / "file.pt")
    assert there == [False, True]  # the file, and then its folder


def test_conjugate_is_not_taken_for_a_tie(tmp_path):
    long = torch.full((9,), 1j)
    save_file({"a": long[:2], "b": long[:2].conj()}, tmp_path / "file.pt")
    assert torch.equal(load_file(tmp_path / "file.pt")["b"], torch.full((2,), -1j))


@SUFFIXES
@pytest.mark.parametrize("error", [RuntimeError("disk full"), OSError("disk full"), KeyboardInterrupt()])
def test_failing_save_leaves_the_old_file_alone(suffix, error, tmp_path, monkeypatch):
    file = tmp_path / f"file{suffix}"
    file.write_bytes(b"precious")

    def fail(content, path, **kwargs):
        (path if isinstance(path, Path) else Path(path.name)).write_bytes(b"half")
        raise error

    if suffix == ".safetensors":
        monkeypatch.setattr(pytest.importorskip("safetensors.torch"), "save_file", fail)
    else:
        monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(
        KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError, match=str(error) or None
    ):
        save_file(state(), file, force=True)
    assert files_in(tmp_path) == [file.name]
    assert file.read_bytes() == b"precious"


def test_save_over_the_file_that_is_read(tmp_path):
    torch.save({"model": state(1.0), "ema_model": state(2.0)}, tmp_path / "file.pt")
    save_file(read(tmp_path / "file.pt").tensors, tmp_path / "file.pt", force=True)
    assert equal(load_file(tmp_path / "file.pt"), state(2.0))


@pytest.mark.parametrize(
    ("tensors", "name", "error", "message"),
    [
        (state(), "file.bin", ValueError, "should end in .pt, .pth or .safetensors"),
        (state(), "file", ValueError, "should end in"),
        (state(), "folder.pt", ValueError, "should be a file, got a directory"),
        (state() | {"n": 3}, "file.pt", TypeError, "'n' should be a tensor, got int"),
        (
            {"n": torch.zeros(1, device="meta")},
            "file.pt",
            ValueError,
            "'n' should have values, got a tensor on the meta",
        ),
        (state(), "nowhere/file.pt", OSError, "nowhere/file.pt' should be in a folder that exists"),
    ],
)
def test_what_cannot_be_saved(tensors, name, error, message, tmp_path):
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(error, match=message):
        save_file(tensors, tmp_path / name, force=True)
    assert files_in(tmp_path) == ["folder.pt"]


def test_sparse_tensors_of_a_file_are_not_mixed_up(tmp_path):
    tensors = {str(index): torch.full((2,), float(index)).to_sparse() for index in range(20)}
    torch.save({"ema": tensors}, tmp_path / "file.pt")
    for name, tensor in read(tmp_path / "file.pt").tensors.items():
        assert torch.equal(tensor.to_dense(), torch.full((2,), float(name)))


def test_order_of_an_ordered_state_dict_is_kept(tmp_path):
    tensors = OrderedDict((name, torch.ones(1)) for name in "zyxa")
    save_file(tensors, tmp_path / "file.pt")
    assert list(load_file(tmp_path / "file.pt")) == list("zyxa")


def test_the_raw_weights_of_a_checkpoint_for_deployment_are_not_the_average_once_more():
    model = torch.nn.Linear(2, 1)
    handler = EMAHandler(model)
    model.weight.data.add_(1.0)
    file = {
        "model": handler.ema_model.state_dict(),
        "raw_model": model.state_dict(),
        "ema_handler": handler.state_dict(),
    }
    assert torch.equal(read(file).online["weight"], model.weight)
    del file["raw_model"]
    file["net"] = model.state_dict()
    assert torch.equal(read(file).online["weight"], model.weight)


def test_a_snapshot_of_a_posthoc_ema_is_no_average_by_itself():
    with pytest.raises(ValueError, match=r"is a snapshot of a PostHocEMA; rebuild .*ignite-ema reconstruct DIR"):
        read({"ignite_ema_snapshot": 1, "copied": {"weight": torch.zeros(1)}})
