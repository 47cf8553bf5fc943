"""What an engine's functions refer to is looked for in every function, wherever it was defined."""

import torch
from ignite.engine import Engine

from ignite_ema import EMAHandler


def test_a_step_without_a_module_trains():
    namespace = {}
    exec("def step(engine, batch):\n    pass\n", namespace)
    step = namespace["step"]
    step.__module__ = None
    trainer = Engine(step)
    handler = EMAHandler(torch.nn.Linear(1, 1), momentum=0.45)
    handler.attach(trainer)
    trainer.run([0, 1, 2])
    assert handler.num_updates == 3
