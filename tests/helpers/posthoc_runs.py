"""Small runs that keep a PostHocEMA, and what is in their files."""

import copy
import dataclasses
import hashlib
import io

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from torch import nn
from torch.utils._pytree import tree_map

from ignite_ema import PostHocEMA
from ignite_ema.posthoc import snapshots
from tests.helpers.files import reloaded

LAST = 40
EVERY, EVERY_5 = Events.ITERATION_COMPLETED, Events.ITERATION_COMPLETED(every=5)


def batches(count=LAST):
    """Their sizes change."""
    return [range(1 + (7 * k) % 5) for k in range(count)]


def size_of_batch(engine):
    """The same, also where a run is resumed inside of an epoch and Ignite starts its data anew."""
    return len(batches()[engine.state.iteration - 1])


class Run:
    """A model whose weights walk, moved by nothing but themselves and the iteration, and a PostHocEMA beside."""

    def __init__(self, dirname, *, event=EVERY, snapshot=EVERY_5, attach=True, seed=0, loaded=None, **options):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.trainer = Engine(self.step)
        self.trainer.logger.disabled = True  # it would print the traceback of what a test provokes
        self.ema = PostHocEMA(self.model, dirname=dirname, **options)
        self.history = []
        self.event, self.snapshot = event, snapshot
        if attach:
            self.attach()
        if loaded is not None:
            Checkpoint.load_objects(self.objects(), loaded)

    def attach(self):
        return self.ema.attach(self.trainer, event=self.event, snapshot_event=self.snapshot)

    def step(self, engine, batch):
        generator = torch.Generator().manual_seed(engine.state.iteration)
        for parameter in self.model.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator))
        self.model[1].running_mean += torch.randn(2, generator=generator)
        self.model[1].num_batches_tracked += 1
        self.history.append(copy.deepcopy(self.model.state_dict()))

    def train(self, until=LAST):
        stop = self.trainer.add_event_handler(EVERY(once=until), lambda: self.trainer.terminate())
        self.trainer.run(batches(), max_epochs=100)
        stop.remove()
        return self

    def at(self, iteration, action):
        self.trainer.add_event_handler(EVERY(once=iteration), action)

    def objects(self):
        return {"model": self.model, "ema": self.ema, "trainer": self.trainer}

    def saved(self):
        """What Ignite's Checkpoint would write."""
        return reloaded({name: one.state_dict() for name, one in self.objects().items()})


def kept(model, dirname, values=(1.0, 2.0, 3.0), state=None, **options):
    """A PostHocEMA after updates at which all parameters have these values; a snapshot at each."""

    def step(engine, batch):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(batch)

    trainer = Engine(step)
    trainer.logger.disabled = True
    ema = PostHocEMA(model, dirname=dirname, **options)
    if state is not None:
        ema.load_state_dict(state)
    ema.attach(trainer, snapshot_event=EVERY)
    trainer.run(list(values))
    return ema


def files(folder):
    """The bits of each, short enough to be shown; but for the name of the run, which is drawn."""
    found = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix == ".pt"):
        one = dataclasses.replace(snapshots.read(path), run_id="the run")
        file = io.BytesIO()
        torch.save(tree_map(lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, vars(one)), file)
        found[path.name] = hashlib.sha256(file.getvalue()).hexdigest()[:8]
    return found


def times_in(folder):
    """The times of the snapshots that lie there."""
    return sorted(snapshots.paths_in(folder))
