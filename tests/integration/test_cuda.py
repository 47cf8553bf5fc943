"""The contract on a GPU: no wait of the host, CUDA graphs, resume, swap, and an average on the CPU.

``python -m tests.benchmarks.gpu`` runs these tests with the others, and measures.
"""

import warnings
from contextlib import contextmanager

import pytest
import torch
from ignite.engine import Engine
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn

from ignite_ema import EMAHandler, EMAWarning, ModelAverage
from ignite_ema.averaging import kernels
from tests.helpers.bits import contents

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
BFLOAT16 = 5e-2  # it has 8 bits, and rounds at each of few updates


class Net(nn.Module):
    """Weights, a batch norm, an integer buffer, a mask with infinities, and a weight in another memory format."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 3)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("positions", torch.arange(4))

    def forward(self, x):
        return self.head(self.norm(self.convolution(x)).mean(dim=(2, 3)))


CASES = {  # what the model is held in, and its average
    "float32": (torch.float32, None),
    "bfloat16 in float32": (torch.bfloat16, torch.float32),
    "bfloat16": (torch.bfloat16, None),
    "float32 in float64": (torch.float32, torch.float64),
}


def made(case="float32", **options):
    held_by_model, dtype = CASES[case]
    torch.manual_seed(0)
    model = Net().to(DEVICE, held_by_model)
    return model, ModelAverage(model, dtype=dtype, **options)


@torch.no_grad()
def move(model):
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.add_(torch.ones_like(tensor) if not tensor.is_floating_point() else torch.rand_like(tensor))


@contextmanager
def watched(mode):
    """Inside, an operation that makes the host wait is an error, or a warning, as ``mode`` says."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def double(module):
    return {n: t.detach().cpu().double() for n, t in (*module.named_parameters(), *module.named_buffers())}


def followed(due, model, momentum, handle_buffers):
    """The float64 reference, one update on; infinities and integers as they are."""
    averaged = {"copy": (), "update": ("running", "mask"), "statistics": ("running",)}[handle_buffers]
    for name, value in double(model).items():
        averages = name in dict(model.named_parameters()) or any(part in name for part in averaged)
        # where all is copied, 0 times an infinity would be a NaN
        due[name] = (1 - momentum) * due[name] + momentum * value if averages and momentum < 1 else value


def assert_follows(module, due, precision):
    for name, tensor in double(module).items():
        torch.testing.assert_close(tensor, due[name], rtol=precision, atol=precision)


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "statistics"])
@pytest.mark.parametrize("case", CASES)
def test_an_update_does_not_make_the_host_wait(case, handle_buffers):
    model, average = made(case, handle_buffers=handle_buffers)
    due = double(average.module)
    with pytest.raises(RuntimeError, match="synchronizing"), watched("error"):
        model.head.bias.sum().item()  # it would be seen
    for momentum in (0.25, 0.5, 1.0, 0.0, 0.25):
        move(model)
        with watched("error"):
            average.update(momentum)
        if momentum != 0:  # which copies buffers, but averages nothing
            followed(due, model, momentum, handle_buffers)
    assert_follows(average.module, due, BFLOAT16 if case == "bfloat16" else 1e-6)


def test_stochastic_rounding_does_not_make_the_host_wait_after_the_first_update():
    model, average = made("bfloat16", stochastic_rounding=True)
    due = double(average.module)
    for update in range(5):
        move(model)
        with watched("error" if update else "default"):
            average.update(0.25)
        followed(due, model, 0.25, "copy")
    assert_follows(average.module, due, BFLOAT16)


def test_skip_nonfinite_makes_the_host_wait_for_one_number():
    model, average = made(skip_nonfinite=True)
    with warnings.catch_warnings(record=True) as seen, watched("warn"):
        warnings.simplefilter("always")
        assert average.update(0.25)
    assert sum("synchronizing" in str(warning.message) for warning in seen) == 1
    before = contents(average.module)
    with torch.no_grad():
        model.head.bias.fill_(torch.nan)
    with pytest.warns(EMAWarning, match="'head.bias' holds a NaN"):
        assert not average.update(0.25)
    assert contents(average.module) == before


@pytest.mark.parametrize("handle_buffers", ["copy", "update"])
@pytest.mark.parametrize("case", ["float32", "bfloat16 in float32"])
def test_an_update_in_a_graph_follows_the_reference(case, handle_buffers):
    model, average = made(case, handle_buffers=handle_buffers)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a warm-up, as torch asks for
        average.update(0.25)
    torch.cuda.current_stream().wait_stream(side)
    average.reset()
    due = double(average.module)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        average.update(0.25)
    assert_follows(average.module, due, 0)  # capturing does nothing
    for _ in range(5):
        move(model)
        graph.replay()
        followed(due, model, 0.25, handle_buffers)
    assert_follows(average.module, due, 1e-6)


class Run:
    """Model, AdamW and trainer, with batches that depend on nothing but the iteration."""

    def __init__(self, seed=0, **options):
        torch.manual_seed(seed)
        self.model = Net().to(DEVICE)
        self.handler = EMAHandler(self.model, 0.25, **options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.trainer = Engine(self.step)
        self.handler.attach(self.trainer)
        self.objects = {
            "model": self.model,
            "optimizer": self.optimizer,
            "ema_handler": self.handler,
            "trainer": self.trainer,
        }

    def step(self, engine, batch):
        generator = torch.Generator().manual_seed(engine.state.iteration)
        x, y = torch.randn(8, 3, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator)
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x.to(DEVICE)), y.to(DEVICE)).backward()
        self.optimizer.step()

    def train(self, epochs):
        self.trainer.run(range(3), max_epochs=epochs)


@torch.backends.cudnn.flags(deterministic=True, benchmark=False)
@pytest.mark.parametrize("options", [{}, {"device": "cpu"}], ids=["on the GPU", "on the CPU"])
def test_resuming_and_swapping_are_exact(tmp_path, options):
    straight = Run(**options)
    straight.train(4)
    killed = Run(**options)
    killed.train(2)
    checkpoint = Checkpoint(killed.objects, DiskSaver(tmp_path), filename_pattern="{name}.{ext}")
    checkpoint(killed.trainer)
    resumed = Run(seed=1, **options)
    Checkpoint.load_objects(resumed.objects, tmp_path / "checkpoint.pt")
    resumed.train(4)
    assert resumed.handler.num_updates == straight.handler.num_updates == 12
    assert contents(resumed.model) == contents(straight.model)
    before, averaged = contents(straight.model), contents(straight.handler.ema_model)
    assert contents(resumed.handler.ema_model) == averaged != before
    with straight.handler.swapped():
        assert contents(straight.model) == averaged
        assert all(tensor.device == DEVICE for tensor in straight.model.state_dict().values())
    assert contents(straight.model) == before
    assert contents(straight.handler.ema_model) == averaged


@pytest.mark.parametrize("handle_buffers", ["copy", "update"])
@pytest.mark.parametrize("case", ["float32", "bfloat16 in float32"])
@pytest.mark.parametrize("chunk", [kernels._CHUNK, 100], ids=["one chunk", "many chunks"])
def test_an_average_on_the_cpu_follows_the_reference(monkeypatch, case, handle_buffers, chunk):
    monkeypatch.setattr(kernels, "_CHUNK", chunk)
    model, average = made(case, handle_buffers=handle_buffers, device="cpu")
    assert {tensor.device.type for tensor in average.module.state_dict().values()} == {"cpu"}
    due = double(average.module)
    for momentum in (0.25, 1.0, 0.25):
        move(model)
        average.update(momentum)
        followed(due, model, momentum, handle_buffers)
    model.head.weight = nn.Parameter(torch.rand_like(model.head.weight))  # rebound, and not contiguous
    model.norm.weight = nn.Parameter(torch.rand(10, device=DEVICE, dtype=model.norm.weight.dtype)[::2])
    average.update(0.25)
    followed(due, model, 0.25, handle_buffers)
    assert_follows(average.module, due, 1e-6)


def test_what_is_under_way_is_waited_for_on_both_sides():
    """A long queue before an update is awaited by it, and what is queued after it does not reach the average."""
    model = nn.Linear(4096, 4096, bias=False, device=DEVICE)
    average = ModelAverage(model, device="cpu")
    noise = torch.randn(4096, 4096, device=DEVICE)
    with torch.no_grad():
        for i in range(5):
            for _ in range(30):
                noise = (noise @ noise).clamp(-1, 1)
            model.weight.copy_(noise).fill_(i)  # once all of that is done
            average.update(1.0)
            model.weight.fill_(-1)
            assert average.module.weight.unique().tolist() == [i]


def test_further_updates_of_an_average_on_the_cpu_reserve_no_memory_of_the_gpu():
    _, average = made(device="cpu")
    average.update(0.25)
    before = torch.cuda.memory_reserved()
    for _ in range(40):  # more than there are streams in torch's pool
        average.update(0.25)
    assert torch.cuda.memory_reserved() == before
