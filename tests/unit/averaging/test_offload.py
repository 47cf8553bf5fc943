"""The way of an average on the CPU to a model on a GPU, with a GPU that is made up; `test_cuda` has a real one."""

from math import nan
from unittest.mock import Mock
from weakref import WeakSet

import pytest
import torch

from ignite_ema.averaging import kernels

ALIVE = WeakSet()


class Arrival:
    """Stands for the event after copies: the values are there once it was waited for."""

    def __init__(self, log, copies):
        self.log, self.copies = log, copies
        ALIVE.add(self)

    def synchronize(self):
        self.log.append("wait")
        for value, copy in self.copies:
            copy.copy_(value)


@pytest.fixture
def gpu(monkeypatch):
    """Lets tensors pass for those of a GPU, whose values come when they are waited for; what was done is in the log."""
    log = []

    def send(online, side):
        assert len(ALIVE) < 2  # the memory of two chunks is all that there is
        log.append(f"send {len(online)}")
        values = [torch.empty_like(value, requires_grad=False) for value in online]
        for value in values:
            value.fill_(nan if value.is_floating_point() else 99)
        return values, Arrival(log, list(zip(online, values, strict=True)))

    monkeypatch.setattr(kernels, "_side_stream", lambda device: log.append("stream"))
    monkeypatch.setattr(kernels, "_send", send)
    monkeypatch.setattr(kernels, "_CHUNK", 1000)
    return log


def tensors(*sizes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(sizes))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


SIZES = {
    "one chunk": ((10, 20, 30), [3]),
    "several": ((100, 100, 100, 100, 100), [2, 2, 1]),
    "larger than a chunk": ((10, 999, 10, 999, 999), [1, 1, 1, 1, 1]),
    "empty ones": ((0, 0, 250, 0), [4]),
}


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize(("sizes", "chunks"), [(s, c) for s, c in SIZES.values()], ids=SIZES)
def test_what_is_staged_is_averaged_as_what_is_not(gpu, sizes, chunks, dtypes, weight):
    held, theirs = dtypes
    averaged, online = tensors(*sizes, dtype=held), tensors(*sizes, 7, dtype=theirs)[:-1]
    due = [average.clone() for average in averaged]
    kernels._lerp_converted(due, online, weight)
    kernels._lerp_staged(averaged, online, weight)
    assert all(torch.equal(a, b) for a, b in zip(averaged, due, strict=True))
    assert gpu == [] or weight
    if weight and theirs is torch.float32:
        sent = [f"send {n}" for n in chunks]
        waits = ["wait"] * len(sent)
        # one is ahead of the one that is waited for
        order = [sent[0], *(x for pair in zip(sent[1:], waits[1:], strict=True) for x in pair), "wait"]
        assert gpu == ["stream", *order]


def test_integers_are_copied_the_same_way(gpu):
    averaged, online = [torch.zeros(3, dtype=torch.int64)], [torch.arange(3)]
    kernels._copy_staged(averaged, online, 0.0)
    assert averaged[0].tolist() == [0, 1, 2]
    assert gpu == ["stream", "send 1", "wait"]


def test_all_copies_from_a_gpu_take_one_stream(monkeypatch):
    """Each stream would keep the memory that was gathered on it."""
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or Mock())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    kernels._stream.cache_clear()
    for index in (0, 1, 0, 1):
        kernels._side_stream(torch.device("cuda", index))
    kernels._stream.cache_clear()
    assert [device.index for device in made] == [0, 1]


class Far:
    """As much of a tensor on a GPU as the choice of a kernel asks for."""

    dtype, device, is_cuda, layout = torch.bfloat16, torch.device("cuda", 0), True, torch.strided


def test_only_a_gpu_is_staged():
    near, average = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)
    roles = {"is_buffer": False, "is_trained": True}
    assert kernels.lerping_kernel_for(Far, average, **roles) is kernels._lerp_staged
    assert kernels.lerping_kernel_for(near, average, **roles) is kernels._lerp_converted
    assert kernels.copying_kernel_for(Far, average) is kernels._copy_staged
    assert kernels.copying_kernel_for(near, average) is kernels._copy_strided
    assert kernels.copying_kernel_for(near.to_sparse(), average) is kernels._copy_sparse
