"""MONAI, whose trainers are built on Ignite, with the handler attached as its users would."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ignite_ema import EMAHandler
from ignite_ema.schedules import LinearWarmup
from tests.helpers.bits import contents


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


def samples(count=8):
    generator = torch.Generator().manual_seed(0)
    return [
        {"image": torch.randn(3, generator=generator), "label": torch.randn(1, generator=generator)}
        for _ in range(count)
    ]


# MONAI

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        from monai.engines import SupervisedEvaluator, SupervisedTrainer
        from monai.handlers import CheckpointLoader, CheckpointSaver, ValidationHandler, from_engine
        from monai.handlers import MeanSquaredError as MonaiError
    except ImportError:
        SupervisedTrainer = None

monai = pytest.mark.skipif(SupervisedTrainer is None, reason='needs MONAI: pip install -e ".[peers]"')


class Monai:
    """A trainer and an evaluator as MONAI's tutorials put them together."""

    def __init__(self, folder=None, epochs=2, momentum=0.25, **options):
        self.model = net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.handler = EMAHandler(self.model, momentum)
        self.evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(samples(), batch_size=4),
            network=self.model,
            key_val_metric={"error": MonaiError(output_transform=from_engine(["pred", "label"]))},
        )
        self.swap = self.handler.swap_during(self.evaluator)
        handlers = [ValidationHandler(validator=self.evaluator, interval=1, epoch_level=True)]
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=epochs,
            train_data_loader=DataLoader(samples(), batch_size=4),
            network=self.model,
            optimizer=self.optimizer,
            loss_function=nn.MSELoss(),
            train_handlers=handlers,
            **options,
        )
        self.handler.attach(self.trainer)
        if folder is not None:
            CheckpointSaver(save_dir=str(folder), save_dict=self.objects(), save_interval=1).attach(self.trainer)

    def objects(self):
        return {
            "model": self.model,
            "ema_model": self.handler.ema_model,
            "optimizer": self.optimizer,
            "ema_handler": self.handler,
            "trainer": self.trainer,
        }

    def load(self, path):
        CheckpointLoader(load_path=str(path), load_dict=self.objects(), map_location="cpu").attach(self.trainer)


@pytest.mark.slow
@monai
def test_monai_checkpoints_resume(tmp_path):
    whole = Monai(epochs=4, momentum=LinearWarmup(0.1, 0.9, 6))
    whole.trainer.run()
    first = Monai(tmp_path, epochs=2, momentum=LinearWarmup(0.1, 0.9, 6))
    first.trainer.run()
    second = Monai(epochs=4, momentum=LinearWarmup(0.1, 0.9, 6))
    (saved,) = tmp_path.glob("*epoch=2.pt")
    second.load(saved)
    second.trainer.run()
    assert second.handler.num_updates == whole.handler.num_updates == 8
    assert contents(second.handler.ema_model) == contents(whole.handler.ema_model)
    assert contents(second.model) == contents(whole.model)
