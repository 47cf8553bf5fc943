"""Modules that hold the parameters and buffers of known models, by shape; none of them computes anything."""

import torch
from torch import nn


def mlp():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def many():
    return nn.Sequential(*(nn.Linear(40, 40) for _ in range(600)))


def resnet50():
    """The tensors of torchvision's ResNet-50 (He et al. 2015, arXiv 1512.03385), with its 1,000 classes."""
    stages = [(64, 64, 3), (256, 128, 4), (512, 256, 6), (1024, 512, 3)]
    blocks = [block for stage in stages for block in _bottlenecks(*stage)]
    return nn.Sequential(_convolution(3, 64, 7), *blocks, nn.Linear(2048, 1000))


def gpt2():
    """The tensors of GPT-2 124M (Radford et al. 2019): its head is tied to the embedding of tokens."""
    embedding = nn.Embedding(50257, 768)
    head = nn.Linear(768, 50257, bias=False, device="meta")  # its own weight is never needed
    head.weight = embedding.weight
    blocks = (_transformer_block(768) for _ in range(12))
    return nn.Sequential(embedding, nn.Embedding(1024, 768), *blocks, nn.LayerNorm(768), head)


def gpt2_bfloat16():
    """The same in bfloat16."""
    return gpt2().bfloat16()


MODELS = {"mlp": mlp, "many": many, "resnet50": resnet50, "gpt2": gpt2, "gpt2-bfloat16": gpt2_bfloat16}
TITLES = {
    "mlp": "MLP, 6 tensors",
    "many": "1,200 small tensors",
    "resnet50": "ResNet-50's shapes",
    "gpt2": "GPT-2 124M's shapes",
    "gpt2-bfloat16": "GPT-2, bf16 in fp32",
}

# How many times the floor our update should take at most, on an idle machine.
TARGETS = {"mlp": 3.4, "many": 1.75, "resnet50": 1.15, "gpt2": 1.08}

# The type that holds the average, where it is not that of the model.
AVERAGED_IN = {"gpt2-bfloat16": torch.float32}


def _bottlenecks(inputs, width, count):
    outputs = 4 * width
    yield _convolution(inputs, outputs, 1)  # the shortcut
    for _ in range(count):
        sizes = ((inputs, width, 1), (width, width, 3), (width, outputs, 1))
        yield nn.Sequential(*(_convolution(*size) for size in sizes))
        inputs = outputs


def _convolution(inputs, outputs, size):
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, bias=False), nn.BatchNorm2d(outputs))


def _transformer_block(width):
    attention = nn.Sequential(nn.Linear(width, 3 * width), nn.Linear(width, width))
    perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    return nn.Sequential(nn.LayerNorm(width), attention, nn.LayerNorm(width), perceptron)
