"""What tensors, modules and states hold, bit for bit, and where."""

from itertools import chain

import torch
from torch.utils._pytree import tree_flatten_with_path


def bits(tensor):
    """Type, shape and bytes of a tensor; not how they lie in memory."""
    plain = tensor.detach().to_dense().cpu().clone(memory_format=torch.contiguous_format)
    return tensor.dtype, tuple(tensor.shape), plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def tensors(module):
    """Parameters and buffers by name, without the names of wrappers; a tied one by its first name."""
    named = chain(module.named_parameters(), module.named_buffers())
    return {name.replace("_orig_mod.", "").removeprefix("module."): tensor.detach() for name, tensor in named}


def contents(module):
    """The bits of each parameter and buffer by name."""
    return {name: bits(tensor) for name, tensor in tensors(module).items()}


def storages(module):
    """Where the memory of each tensor of a module begins; empty ones have none."""
    pointers = {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors(module).items()}
    return {name: pointer for name, pointer in pointers.items() if pointer}


def copied(state):
    """A state dict with tensors of its own."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def assert_same_bits(one, other):
    """Every leaf of two nested states is equal, tensors bit for bit; names the first that is not."""
    leaves, spec = tree_flatten_with_path(one)
    others, other_spec = tree_flatten_with_path(other)
    assert spec == other_spec
    for (path, leaf), (_, counterpart) in zip(leaves, others, strict=True):
        assert type(leaf) is type(counterpart), path
        same = bits(leaf) == bits(counterpart) if isinstance(leaf, torch.Tensor) else leaf == counterpart
        assert same, path


def places(module):
    """What must be the same object in the same memory, in the same order, tied ones too."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    memory = [(t.data_ptr(), t.stride()) if t.layout is torch.strided else None for _, t in named]
    return [(name, id(t), t.requires_grad, place) for (name, t), place in zip(named, memory, strict=True)]


def wide(tensor):
    """In float64, or complex128."""
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
