"""Checkpoints of other systems: written by the system itself where it can be installed, else from its definition.

`made(system)` trains a small net for a few steps and returns the file, and what ought to be read from it.
"""

import argparse
import functools
import tempfile
import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from ignite import handlers
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn

from ignite_ema import EMAHandler
from tests.helpers.bits import copied
from tests.helpers.models import Tied
from tests.helpers.runs import idle

_FOLDER = tempfile.TemporaryDirectory()
STEPS = 6


@dataclass
class Peer:
    """A file, and what is in it."""

    system: str
    path: Path
    tensors: dict
    online: dict | None = None
    num_updates: int | None = None
    names: dict | None = None
    key: str | None = None


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(1, 3, 3), bn=nn.BatchNorm2d(3), flat=nn.Flatten(), head=nn.Linear(48, 2))
    )


def loss_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 1, 6, 6, generator=generator), torch.randint(0, 2, (8,), generator=generator)
    return nn.functional.cross_entropy(model(x), y)


def train(model, after_step):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        after_step()
    return optimizer


def path_of(name):
    return Path(_FOLDER.name) / name


def written(name, content):
    torch.save(content, path_of(name))
    return path_of(name)


def need(package):
    """The package, imported without its warnings; skips where it is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(package, reason=f'needs {package}: pip install -e ".[peers]"', exc_type=ImportError)


def torch_averaged_model():
    model = net()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8), use_buffers=True
    )
    train(model, lambda: average.update_parameters(model))
    path = written("averaged_model.pt", average.state_dict())
    return Peer("torch AveragedModel", path, copied(average.module.state_dict()), None, STEPS)


def nested():
    """The average one level inside, the model beside it compiled."""
    peer = torch_averaged_model()
    online = {name: tensor + 1 for name, tensor in peer.tensors.items()}
    content = {"epoch": 3, "model": prefixed("_orig_mod.", online), "ema": torch.load(peer.path)}
    path = written("nested.pt", content | {"optimizer": {"state": {0: {"step": 1}}}})
    return replace(peer, path=path, online=online)


def timm():
    model = net()
    average = need("timm.utils").ModelEmaV3(model, decay=0.8)
    optimizer = train(model, lambda: average.update(model))
    content = {
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(model="net", lr=0.1, data=Path("data")),
        "state_dict": model.state_dict(),
        "state_dict_ema": average.module.state_dict(),  # the saver takes wrappers off
        "saver": {"checkpoint_files": [("checkpoint-0.pth.tar", None)], "pending": (1, 0.5)},
    }
    path = written("timm.pth.tar", content)
    return Peer("timm", path, copied(average.module.state_dict()), copied(model.state_dict()))


def ema_pytorch():
    model = net()
    average = need("ema_pytorch").EMA(model, beta=0.8, update_after_step=1, update_every=2)
    train(model, average.update)
    path = written("ema_pytorch.pt", average.state_dict())
    return Peer("ema-pytorch", path, copied(average.ema_model.state_dict()), copied(model.state_dict()))


def diffusers():
    model, expected = net(), net()
    average = need("diffusers.training_utils").EMAModel(model.parameters(), decay=0.8)
    train(model, lambda: average.step(model.parameters()))
    average.copy_to(expected.parameters())
    path, names = written("diffusers.pt", average.state_dict()), dict(model.named_parameters())
    return Peer("diffusers", path, copied(dict(expected.named_parameters())), None, STEPS, names)


def torch_ema():
    model, expected = net(), net()
    average = need("torch_ema").ExponentialMovingAverage(model.parameters(), decay=0.8)
    train(model, average.update)
    average.store()
    average.copy_to(expected.parameters())
    path = written("torch_ema.pt", {"step": 4, "ema": average.state_dict(), "model": model.state_dict()})
    names = dict(model.named_parameters())
    tensors = copied(dict(expected.named_parameters()))
    return Peer("torch_ema", path, tensors, copied(names), STEPS, names)


def lightning():
    pl, callbacks = need("lightning.pytorch"), need("lightning.pytorch.callbacks")
    average, online = callbacks.EMAWeightAveraging(decay=0.8), {}

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()
            self.save_hyperparameters({"args": argparse.Namespace(lr=0.05)})

        def training_step(self, seed, index):
            return loss_of(self.net, int(seed))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.05)

    class Capture(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            online.update(copied(module.state_dict()))

    folder = path_of("lightning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            callbacks=[average, Capture(), callbacks.ModelCheckpoint(folder, "last", save_on_train_epoch_end=True)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(range(4), batch_size=1))
    tensors = copied(average._average_model.module.state_dict())
    return Peer("Lightning", folder / "last.ckpt", tensors, online, 8)


def mmengine():
    runners, models, hooks = (need(f"mmengine.{name}") for name in ("runner", "model", "hooks"))

    class Model(models.BaseModel):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, seed, mode="tensor"):
            return {"loss": loss_of(self.net, int(seed))}

    online, averaged = {}, {}

    class Capture(hooks.Hook):
        priority = "LOWEST"

        def after_train_epoch(self, runner):
            online.update(copied(runner.model.state_dict()))
            averaged.update(copied(average.ema_model.module.state_dict()))

    average = hooks.EMAHook(momentum=0.2)
    folder = path_of("mmengine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner = runners.Runner(
            Model(),
            str(folder),
            train_dataloader=torch.utils.data.DataLoader([{"seed": seed} for seed in range(4)], batch_size=1),
            train_cfg={"by_epoch": True, "max_epochs": 2},
            optim_wrapper={"optimizer": {"type": "Adam", "lr": 0.05}},
            custom_hooks=[average, Capture()],
            experiment_name="ignite_ema_peer",
            log_level="ERROR",
        )
        runner.train()
    return Peer("mmengine", folder / "epoch_2.pth", averaged, online)


def ignite():
    """Ignite's Checkpoint with Ignite's own handler."""
    model, trainer = net(), idle()
    handler = handlers.EMAHandler(model, momentum=0.2)
    handler.attach(trainer)
    trainer.run([0])
    train(model, lambda: handler._update_ema_model(trainer, "ema_momentum"))
    return checkpointed("Ignite", "ignite", trainer, model, handler)


def tied():
    """A net with a tied weight and a buffer that no state dict has."""
    return nn.Sequential(OrderedDict(net=net(), tied=Tied(2)))


def checkpointed(system, folder, trainer, model, handler, **objects):
    """A file of Ignite's Checkpoint."""
    objects = {"model": model, "ema_model": handler.ema_model, "trainer": trainer, **objects}
    Checkpoint(objects, DiskSaver(path_of(folder), require_empty=False))(trainer)
    path = next(path_of(folder).glob("*.pt"))
    return Peer(system, path, copied(handler.ema_model.state_dict()), copied(model.state_dict()))


def ignite_ema():
    model, trainer = tied(), idle()
    handler = EMAHandler(model, momentum=0.2, handle_buffers="update")
    handler.attach(trainer)
    handler.num_updates = 0  # or it would warn that the model moves before the first run
    train(model, lambda: trainer.run([0]))
    peer = checkpointed("ignite_ema", "ignite_ema", trainer, model, handler, ema_handler=handler)
    return replace(peer, num_updates=STEPS)


def averages_of(model):
    """The state dicts (raw, averaged) after a small training run."""
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    train(model, lambda: average.update_parameters(model))
    return copied(model.state_dict()), copied(average.module.state_dict())


def mmcv_state(model, covered):
    """From the definition of mmcv's EMAHook: buffers registered at the root, swapped at the end of an epoch."""
    raw, averaged = averages_of(model)
    own = {name: averaged[name] if name in covered else raw[name] for name in raw}
    buffers = {f"ema_{name.replace('.', '_')}": raw[name] for name in raw if name in covered}
    return own, raw, buffers


def mmcv():
    model, meta = net(), {"epoch": 3, "iter": 12, "hook_msgs": {"best": 0.1}}
    own, raw, buffers = mmcv_state(model, dict(model.named_parameters()))
    path = written("mmcv.pth", {"meta": meta, "state_dict": own | buffers, "optimizer": {"state": {}}})
    return Peer("mmcv", path, own, raw, key="model")


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def state(fill=0.0):
    return {"a.weight": torch.full((2, 2), float(fill)), "a.bias": torch.full((2,), float(fill))}


def gan():
    """Two models and their averages, as mmagic has them."""
    names = ("g.", "g_ema.", "d.", "d_ema.")
    return {name: one for fill, prefix in enumerate(names, 1) for name, one in prefixed(prefix, state(fill)).items()}


def mmagic():
    """From the definition of mmagic's BaseGAN with ema_config, and two twins; DDP around the parts that train."""
    raw, averaged = averages_of(net())
    state = prefixed("generator.module.", raw) | prefixed("generator_ema.module.", averaged)
    state |= prefixed("encoder.", averaged) | prefixed("encoder_ema.module.", raw)
    state |= {"generator_ema.steps": torch.tensor(6), "encoder_ema.steps": torch.tensor(6)}
    path = written("mmagic.pth", {"meta": {"iter": 7}, "state_dict": state, "message_hub": {}})
    return Peer("mmagic", path, averaged, raw, key="generator_ema")


PACKAGES = [timm, ema_pytorch, diffusers, torch_ema, lightning, mmengine]
MAKERS = [torch_averaged_model, nested, *PACKAGES, ignite, ignite_ema, mmcv, mmagic]


@functools.cache
def made(maker):
    """The peer's file, made once per process."""
    return maker()


def equal(one, other):
    """Whether two state dicts are the same bit for bit: names, types and values."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )
