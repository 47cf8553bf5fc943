"""Trains a sharded model and resumes on any number of ranks: torchrun --nproc-per-node 2 train_sharded.py 2"""

import sys
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from ignite_ema import EMAHandler, checkpoints
from ignite_ema.distributed import ShardedSaver, gathered_state_dict, load_objects

dist.init_process_group("gloo")  # "cpu:gloo,cuda:nccl" on GPUs
mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        options = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(**options) for _ in range(2))
        self.head = nn.Linear(16, 11)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden).log_softmax(dim=-1)


def sharded():
    model = Net()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


torch.manual_seed(0)
model = sharded()
with torch.device("meta"):
    twin = sharded()  # gets memory for its shards from the handler: no rank holds a full copy
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)


def train_step(engine, batch):
    predicted = model(batch[:, :-1])
    loss = nn.functional.nll_loss(predicted.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


trainer = Engine(train_step)
ema_handler = EMAHandler(model, momentum=0.2, ema_model=twin)
ema_handler.attach(trainer)

objects = {"model": model, "optimizer": optimizer, "ema_handler": ema_handler, "trainer": trainer}
saved = sorted(Path("checkpoints").glob("checkpoint_*"), key=lambda path: path.stat().st_mtime)
saver = ShardedSaver("checkpoints", require_empty=False)
trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(objects, saver, n_saved=2))
if saved:
    load_objects(objects, saved[-1])

data = list((torch.arange(8 * 4 * 6).view(8, 4, 6) * 3) % 11)
trainer.run(data, max_epochs=int(sys.argv[1]))

state = gathered_state_dict(ema_handler)
if dist.get_rank() == 0:
    checkpoints.save_file(state, "averaged.pt", force=True)
dist.barrier()
dist.destroy_process_group()
