"""The models and runs of the distributed tests."""

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ignite_ema import EMAHandler
from ignite_ema.distributed import ShardedSaver
from tests.helpers.bits import bits
from tests.helpers.models import compiled

gathers_on_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch gathers no weights on a CPU"
)


class Norm(nn.BatchNorm1d):
    """Batch normalisation that computes in float32 where weights and inputs are bfloat16."""

    def forward(self, x):
        if self.training:
            self.num_batches_tracked += 1
        buffers, weights = (self.running_mean, self.running_var), (self.weight.float(), self.bias.float())
        return nn.functional.batch_norm(x.float(), *buffers, *weights, self.training).to(x.dtype)


class Net(nn.Module):
    """Shapes that no number of ranks divides, one with fewer rows than ranks, tied weights, buffers of three kinds."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.body = nn.Linear(5, 5)
        self.norm = Norm(5)
        self.narrow = nn.Linear(5, 1)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("cache", torch.ones(3), persistent=False)

    def forward(self, x):
        hidden = self.norm(self.body(self.embedding(x)))
        return self.head(hidden * self.narrow(hidden).sigmoid()) * self.cache.mean()


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(model, **policy):
    """A part of its own, the rest with the root."""
    fully_shard(model.body, mesh=mesh(), **policy)
    return fully_shard(model, mesh=mesh(), **policy)


def sharded_in_part(model):
    """One that is sharded, beside some that are not."""
    fully_shard(model.body, mesh=mesh())
    fully_shard(model.narrow, mesh=mesh())
    return model


def sharded_over_meshes(model):
    """A part over all ranks, another one with a copy on each half (HSDP), and the rest over all."""
    replicated = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model.body, mesh=mesh())
    fully_shard(model.narrow, mesh=replicated)
    return fully_shard(model, mesh=mesh())


CASES = {
    "plain": lambda model: model,
    "DDP": DistributedDataParallel,
    "DDP of a compiled model": lambda model: DistributedDataParallel(compiled(model)),
    "FSDP2": sharded,
    "FSDP2 in part": sharded_in_part,
    "FSDP2 that keeps gathered weights": lambda model: sharded(model, reshard_after_forward=False),
    "FSDP2 in mixed precision": lambda model: sharded(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16)),
    "FSDP2 over several meshes": sharded_over_meshes,
    "compiled FSDP2": lambda model: compiled(sharded(model)),
}


def in_worlds(worlds):
    """Each case on each number of ranks; that of several meshes, which is the longest, in the slow run."""
    every = [
        pytest.param(n, case, id=f"{case} on {n}", marks=[pytest.mark.slow] if "several meshes" in case else [])
        for case, ranks in worlds.items()
        for n in ranks
    ]
    return pytest.mark.parametrize(("ranks", "case"), every)


class Run:
    """Model, twin, AdamW and trainer; each rank has batches of its own, which depend on nothing but the iteration."""

    def __init__(self, case, seed=0, **options):
        torch.manual_seed(seed)
        self.case = case
        self.model = CASES[case](Net())
        if "FSDP2" in case:
            with torch.device("meta"):
                options["ema_model"] = CASES[case.removeprefix("compiled ")](Net())
        self.handler = EMAHandler(self.model, 0.25, **options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.trainer = Engine(self.step)
        self.handler.attach(self.trainer)

    def step(self, engine, batch):
        # What is not sharded is not synchronised either: all ranks see the same then.
        rank = 0 if self.case == "FSDP2 in part" else dist.get_rank()
        generator = torch.Generator().manual_seed(100 * engine.state.iteration + rank)
        x = torch.randint(7, (8,), generator=generator)
        self.handler.model.cache.fill_(1 + engine.state.iteration)
        self.model.train()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x).float(), x).backward()
        self.optimizer.step()

    def train(self, until):
        stop = self.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=until), self.trainer.terminate)
        self.trainer.run(range(4), max_epochs=100)
        stop.remove()
        assert self.trainer.state.iteration == until

    def objects(self):
        models = {"model": self.handler.model, "ema_model": self.handler.ema_model}
        return models | {"optimizer": self.optimizer, "ema_handler": self.handler, "trainer": self.trainer}

    def checkpoint(self, folder, n_saved=1, **options):
        return Checkpoint(self.objects(), ShardedSaver(folder, **options), n_saved=n_saved)


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def tensors(module):
    """Parameters and buffers by name, each tied one once; of what is sharded the shards."""
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def full_tensors(module):
    return {name: full(tensor) for name, tensor in tensors(module).items()}


def local_bits(module):
    return {name: bits(local(tensor)) for name, tensor in tensors(module).items()}


def full_bits(module):
    return {name: bits(tensor) for name, tensor in full_tensors(module).items()}
