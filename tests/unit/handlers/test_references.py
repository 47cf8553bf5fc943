"""Engines that evaluate an average are found through functions, wherever those were defined."""

import torch
from ignite.engine import Engine

from ignite_ema.handlers.references import evaluators_among


def test_functions_without_a_module_are_looked_into():
    average = torch.nn.Linear(1, 1)

    def process(engine, batch):
        return average(batch)

    def evaluate():
        evaluator.run([torch.ones(1)])

    evaluator = Engine(process)
    process.__module__ = evaluate.__module__ = None  # as exec() leaves it where no name is given
    assert evaluators_among([evaluate], lambda found: found is average) == [evaluator]
