"""Well-known architectures, tiny and of random weights: one update against float64, save and resume, swap."""

import io
import os

import pytest
import torch
from ignite.engine import Engine

from ignite_ema import EMAHandler
from tests.helpers.bits import contents, copied

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is built from a configuration
zoo = pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[peers]"')

# transformers' own, of what it builds or computes with

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "layer_type": "basic"}
WAVES = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}


WORDS = torch.arange(2 * 6).view(2, 6) % 29 + 3
TEXT = {"input_ids": WORDS}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}


# class of the model: its configuration, its inputs
ARCHITECTURES = {
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}, TEXT),  # a tied head
    "AlbertForMaskedLM": ("AlbertConfig", {**SMALL, "embedding_size": 8}, TEXT),  # one layer, used twice
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        {**TEXT, "decoder_input_ids": WORDS},
    ),  # an embedding under three names
    "LlamaForCausalLM": (
        "LlamaConfig",
        {**SMALL, "num_key_value_heads": 1, "head_dim": 8},
        TEXT,
    ),  # rotary buffers that are not saved
    "MambaForCausalLM": ("MambaConfig", {**SMALL, "state_size": 4, "expand": 2}, TEXT),
    "ResNetForImageClassification": ("ResNetConfig", STAGES, IMAGE),  # batch norm
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        {
            "vocab_size": 32,
            "d_model": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 24,
            "decoder_start_token_id": 1,
            "num_mel_bins": 4,
            "max_source_positions": 10,
            "max_target_positions": 10,
        },
        {"input_features": torch.linspace(-1, 1, 2 * 4 * 20).view(2, 4, 20), "decoder_input_ids": WORDS},
    ),  # a frozen embedding of positions
    "Wav2Vec2ForCTC": (
        "Wav2Vec2Config",
        {**SMALL, **WAVES, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        {"input_values": torch.linspace(-1, 1, 2 * 400).view(2, 400)},
    ),  # weight norm as a parametrisation
}


def build(name, seed):
    kind, sizes, _ = ARCHITECTURES[name]
    torch.manual_seed(seed)
    model = getattr(zoo, name)(getattr(zoo, kind)(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():  # many start from zeros and ones
            parameter += 0.02 * torch.randn_like(parameter)
    return model.eval()


def every_name(model):
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def ties(model):
    groups = {}
    for name, tensor in every_name(model).items():
        groups.setdefault(id(tensor), []).append(name)
    return sorted(names for names in groups.values() if len(names) > 1)


@torch.no_grad()
def outputs(model, inputs):
    """The tensors that a model answers with."""
    found = torch.utils._pytree.tree_leaves(dict(model(**inputs, return_dict=True)))
    return [leaf for leaf in found if isinstance(leaf, torch.Tensor)]


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def averaged(name):
    """A model, its handler after one update, and what the average was before."""
    model = build(name, 0)
    handler = EMAHandler(model, 0.25)
    before = copied(every_name(handler.ema_model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
        for buffer in model.buffers():
            buffer.copy_(buffer.roll(1))
    trainer = Engine(lambda engine, batch: None)
    handler.attach(trainer)
    handler.num_updates = 0  # it is meant to start from other weights
    trainer.run([0])
    return model, handler, before


def test_an_update_is_that_of_float64(averaged):
    model, handler, before = averaged
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in every_name(handler.ema_model).items():
        online = every_name(model)[name].detach()
        if name in parameters:
            expected = 0.75 * before[name].double() + 0.25 * online.double()
            assert not torch.equal(tensor, before[name]), name
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)  # two roundings of float32
        else:
            assert torch.equal(tensor, online), name
    assert ties(handler.ema_model) == ties(model)


def test_a_saved_state_resumes(name, averaged):
    model, handler, _ = averaged
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "ema_handler": handler.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = build(name, 1)
    resumed = EMAHandler(other, 0.25)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["ema_handler"])
    kept = resumed.ema_model.state_dict()
    assert all(map(torch.equal, kept.values(), handler.ema_model.state_dict().values()))  # other buffers are not saved
    assert resumed.num_updates == 1
    plain = build(name, 2)
    plain.load_state_dict(handler.ema_model.state_dict())
    assert ties(plain) == ties(resumed.ema_model) == ties(model)


def test_the_swapped_model_answers_as_its_twin(name, averaged):
    model, handler, _ = averaged
    model.requires_grad_(False)  # torch has other convolutions for weights that require gradients, even without any
    inputs, before = ARCHITECTURES[name][2], contents(model)
    own, due = outputs(model, inputs), outputs(handler.ema_model, inputs)
    with handler.swapped():
        assert equal(outputs(model, inputs), due)
    assert not equal(own, due)
    assert contents(model) == before
    assert equal(outputs(model, inputs), own)
