"""MONAI, whose trainers are built on Ignite, with the handler attached as its users would."""

import pytest
import torch
from ignite.engine import Events
from torch import nn
from torch.utils.data import DataLoader

from ignite_ema import EMAHandler
from ignite_ema.schedules import LinearWarmup
from tests.helpers.bits import contents
from tests.helpers.peer_files import need

engines, handlers = need("monai.engines"), need("monai.handlers")


def data():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 3, generator=generator), torch.randn(8, 1, generator=generator)
    samples = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    return DataLoader(samples, batch_size=4)


class Run:
    """A trainer and an evaluator as MONAI's tutorials put them together."""

    def __init__(self, epochs):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.handler = EMAHandler(self.model, LinearWarmup(0.1, 0.9, 6))
        device = torch.device("cpu")
        self.evaluator = engines.SupervisedEvaluator(device=device, val_data_loader=data(), network=self.model)
        self.trainer = engines.SupervisedTrainer(
            device=device,
            max_epochs=epochs,
            train_data_loader=data(),
            network=self.model,
            optimizer=self.optimizer,
            loss_function=nn.MSELoss(),
            train_handlers=[handlers.ValidationHandler(validator=self.evaluator, interval=1, epoch_level=True)],
        )
        self.handler.attach(self.trainer)
        self.swap, self.are_averaged = self.handler.swap_during(self.evaluator), []
        self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.look)

    def look(self):
        self.are_averaged.append(contents(self.model) == contents(self.handler.ema_model))

    def objects(self):
        own = {name: getattr(self, name) for name in ("model", "optimizer", "trainer")}
        return own | {"ema_model": self.handler.ema_model, "ema_handler": self.handler}


@pytest.mark.slow
def test_monai_evaluates_the_average_and_its_checkpoints_resume(tmp_path):
    whole, first, second = Run(epochs=4), Run(epochs=2), Run(epochs=4)
    whole.trainer.run()
    assert whole.are_averaged == [True] * 8
    assert contents(whole.model) != contents(whole.handler.ema_model)
    handlers.CheckpointSaver(save_dir=tmp_path, save_dict=first.objects(), save_interval=1).attach(first.trainer)
    first.trainer.run()
    (saved,) = tmp_path.glob("*epoch=2.pt")
    loader = handlers.CheckpointLoader(load_path=str(saved), load_dict=second.objects(), map_location="cpu")
    loader.attach(second.trainer)
    second.trainer.run()
    assert second.handler.num_updates == whole.handler.num_updates == 8
    assert contents(second.handler.ema_model) == contents(whole.handler.ema_model)
    assert contents(second.model) == contents(whole.model)
