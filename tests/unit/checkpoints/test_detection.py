"""Averages are told from other state dicts by name, shape and value, in time that is linear in the file."""

import time

import pytest
import torch
from torch import nn

from ignite_ema import EMAHandler
from ignite_ema.checkpoints import read
from tests.helpers.peer_files import equal, gan, prefixed, state

ONE = torch.ones(1)
A, B, C, D = (state(fill) for fill in (1, 2, 3, 4))
WRAPPED = prefixed("module.", B)
MOCO = prefixed("encoder.", A) | prefixed("encoder_ema.", B)
MOCO_AVERAGED = prefixed("encoder.", C) | prefixed("encoder_ema.", D)
NAN = {"w": torch.tensor([float("nan"), 1.0])}
THREE = {"state_dict": A, "state_dict_ema": B, "model_ema": C}
DOUBLE = {name: tensor.double() for name, tensor in B.items()}
AVERAGES = (
    *("ema_model", "model_ema", "EMA", "ema", "ema2", "generator-ema.1", "modelEMA", "netEMA", "emaModel"),
    *("EMAModel", "swa_state_dict", "averaged", "model_avg"),
)
TWO = {"g": A, "d": B, "ema_g": C, "ema_d": D}
DRY = {"a.weight": torch.zeros(2, 2)}

# A file, a key, and what is found: the system, the average, the raw weights.
FOUND = [
    ({"state_dict": gan()}, "d_ema", "mmagic", D, C),
    ({"state_dict": gan()}, "state_dict.d_ema", "mmagic", D, C),
    ({"state_dict_ema": B, "state_dict": A}, "timm", "timm", B, A),
    (THREE, "timm", "timm", B, A),
    (THREE, "state_dict_ema", "timm", B, A),
    (THREE, "model_ema", "Ignite", C, A),
    ({"model": A, "ema_a": B, "ema_b": state(2)}, None, "Ignite", B, A),  # equal averages are one
    ({"ema_a": NAN, "ema_b": {"w": NAN["w"].clone()}}, None, "Ignite", ..., ...),
    ({"model": A, "best": state(1)}, None, "plain", A, ...),
    # Raw weights are those of the same name, or of a model's usual one, if they match.
    (TWO, "ema_d", "Ignite", D, B),
    ({"netG": A, "netD": B, "netGEma": C, "netDEma": D}, "netDEma", "Ignite", D, B),
    ({"one": A, "two": B, "ema": C}, None, "Ignite", C, None),
    ({"one": A, "model": B, "ema": C}, None, "Ignite", C, B),
    ({"state_dict_ema": A, "state_dict": DRY}, None, "timm", A, None),
    ({"state_dict_ema": A, "state_dict": A | {"a.bias": torch.zeros(3)}}, None, "timm", A, None),
    ({"state_dict_ema": A, "state_dict": 3}, None, "timm", A, None),
    ({"ema": {"w": ONE}, "model": {"w": torch.zeros(2), "_orig_mod.w": torch.zeros(2)}}, None, "Ignite", ..., None),
    # A wrapper's prefix goes where the model beside it is not wrapped.
    ({"model": prefixed("_orig_mod.", A), "swa": B}, None, "Ignite", B, ...),
    ({"model": prefixed("module.", A), "swa": B}, None, "Ignite", B, ...),
    ({"model": A, "ema_a": WRAPPED, "ema_b": prefixed("module.", C)}, "ema_b", "Ignite", C, A),
    (WRAPPED, None, "plain", WRAPPED, None),
    ({"ema": WRAPPED, "optimizer": {}}, None, "Ignite", WRAPPED, None),
    ({"ema": WRAPPED, "model": prefixed("module.", A)}, None, "Ignite", WRAPPED, prefixed("module.", A)),
    ({"ema": WRAPPED, "model": A}, None, "Ignite", B, A),
    ({"ema": WRAPPED, "model": prefixed("module.", A), "pretrained": C}, None, "Ignite", WRAPPED, ...),
    (prefixed("module.", WRAPPED) | {"n_averaged": torch.tensor(1)}, None, "torch AveragedModel", WRAPPED, None),
    # Parts of a model that are averages themselves, and twins under other names.
    ({"model": MOCO, "ema_model": MOCO_AVERAGED}, "ema_model", "Ignite", MOCO_AVERAGED, MOCO),
    ({"model": MOCO, "ema_model": MOCO_AVERAGED}, "ema_model.encoder_ema", "mmagic", D, ...),
    ({"model": A, "ema": {"decay": 0.9, "shadow": B}}, "shadow", ..., B, A),
    ({"model": A, "teacher": B}, "model", "plain", A, ...),
    ({"model": A, "statistics": {"mean": ONE}}, None, "plain", A, None),
    ({"model": A, "statistics": {"mean": ONE}}, "statistics", "plain", {"mean": ONE}, None),
    ({"epoch": 3, "weights": A, "optimizer": {"state": {0: {"step": 1}}}}, None, "plain", A, None),
    *(({name: B, "model": A, "trainer": {"iteration": 3}}, None, "Ignite", B, A) for name in AVERAGES),
    *(
        ({name: {"loss": ONE}, "model": A}, None, "plain", A, None)
        for name in ("schema", "remark", "cinema", "emanation", "avg_loss", "swap")
    ),
]


@pytest.mark.parametrize(("file", "key", "system", "averaged", "online"), FOUND)
def test_what_is_found(file, key, system, averaged, online):
    found = read(file, key=key)
    assert system in (..., found.system)
    assert averaged is ... or equal(found.tensors, averaged)
    assert online is ... or (found.online is None if online is None else equal(found.online, online))


SEVERAL = [
    (gan(), None, r"got several.*'g_ema' \(mmagic\), 'd_ema' \(mmagic\)\.$"),
    ({"state_dict": gan()}, "x_ema", "key should be one of 'state_dict.g_ema'.*got 'x_ema'"),
    ({"state_dict_ema": B, "state_dict": A}, "state_dict", "key should be one of 'state_dict_ema'.*got 'state_dict'"),
    (
        {"shadow_params": [ONE], "num_updates": 3, "state_dict_ema": B},
        None,
        r"_ema' \(timm\), 'torch_ema' \(torch_ema\)",
    ),
    ({"model": A, "ema_a": B, "ema_b": C}, None, "'ema_a' .Ignite., 'ema_b' .Ignite."),
    ({"model": A, "ema_a": B, "ema_b": {"a.bias": torch.zeros(2)}}, None, "'ema_a' .Ignite., 'ema_b' .Ignite."),
    ({"ema_a": B, "ema_b": DOUBLE}, None, "'ema_a' .Ignite., 'ema_b' .Ignite."),
    (THREE, None, r"'state_dict_ema' \(timm\), 'model_ema' \(Ignite\)\.$"),
    (
        {"state_dict": MOCO, "state_dict_ema": MOCO_AVERAGED},
        None,
        "'state_dict_ema' .timm., 'state_dict.encoder_ema' .mmagic., 'state_dict_ema.encoder_ema'",
    ),
    (
        {"model": MOCO, "ema_model": MOCO_AVERAGED},
        None,
        "'model.encoder_ema' .mmagic., 'ema_model.encoder_ema' .*, 'ema_model' .Ignite",
    ),
    ({f"ema_{x}": EMAHandler(nn.Linear(2, 2)).state_dict() for x in "gd"}, None, "'ema_g' .ignite_ema., 'ema_d' .ign"),
    ({f"ema_{name}": {"w": torch.eye(2).to_sparse()} for name in "ab"}, None, "got several"),
    ({"model": A, "ema": {"shadow": B}}, None, "'model' .plain., 'ema.shadow' .plain; of the names"),
    ({"one": A, "two": {"mean": ONE}}, None, "got several.*'one' .plain., 'two' .plain."),
    ({"student": A, "teacher": B}, None, "got several.*'student' .plain.*'teacher' .plain; of the names"),
    *(
        ({"model": model, name: twin}, None, f"several.*'model' .plain., '{name}' .plain; of the names and shapes of")
        for model in (A, prefixed("module.", A))
        for name, twin in (("shadow", B), ("teacher", B), ("means", DRY), ("polyak", B), ("emamodel", B))
    ),
]


@pytest.mark.parametrize(("file", "key", "message"), SEVERAL)
def test_what_needs_another_key(file, key, message):
    with pytest.raises(ValueError, match=message):
        read(file, key=key)


def test_the_same_sparse_tensor_twice_is_one_average():
    sparse = {"w": torch.eye(2).to_sparse()}
    assert read({"ema_a": sparse, "ema_b": sparse}).tensors["w"].layout == torch.sparse_coo


# --- cost ---


def mapping(count, fill=1.0):
    return {f"n{index}": torch.full((1,), fill) for index in range(count)}


CROWDED = {
    "many twins": lambda: {f"h{i}{end}.w": ONE for i in range(10_000) for end in ("", "_ema")},
    "mmcv": lambda: {f"{head}a{i}": ONE for i in range(10_000) for head in ("", "ema_")},
    "many averages": lambda: {f"ema{i}": mapping(100, i) for i in range(200)},
    "many means": lambda: {f"avg{i}": mapping(100, i) for i in range(200)},
    "many state dicts": lambda: {f"k{i}": mapping(100, i) for i in range(200)},
}


@pytest.mark.parametrize("kind", CROWDED)
def test_time_is_linear_in_the_file(kind):
    content = CROWDED[kind]()
    start = time.process_time()
    try:
        read(content)
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    assert time.process_time() - start < 4
    assert len(message) < 2500
