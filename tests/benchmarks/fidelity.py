"""How exact the averages are: ``python -m tests.benchmarks.fidelity`` compares each with one that float64 computes.

The weights of a small model stay as they are, or walk at random. What is averaged is what the model holds, rounded to
its type, so that the error is that of the averaging alone.
"""

import argparse
import warnings
from functools import partial
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn

from .measure import machine, write
from .peers import OURS, PEERS, built, ignite_ema, update_of
from .report import console

# What holds the average: the types of the weights and of the average.
HELD = {
    "float32": (torch.float32, torch.float32),
    "float32 of bfloat16 weights": (torch.bfloat16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
}
MOMENTA = (1e-2, 2e-4, 1e-5)
# Of each update, relative to the size of the weights of its tensor. Optimizers move weights by about 1e-3 of their
# size; as these steps do not depend on each other, 10,000 of them change a weight by a tenth of its size.
STEPS = {"constant": 0.0, "walk": 1e-3}
STOCHASTIC = f"{OURS}, stochastic_rounding=True"


def measure(model, builds, dtype, momentum, step, updates):
    """Averages ``model`` by all of ``builds`` at once while it walks in steps of ``step``, relative to its weights.

    Returns:
        ``peers``: for each ``error``, relative to the exact average, and ``error_of_way``, relative to how far the
        exact average has gone from the initial weights: 1 where it has stalled, None where there is no way.
        ``missing``: those that cannot, and why.
    """
    own = {parameter.dtype for parameter in model.parameters()} == {dtype}
    peers, missing = built(builds, model, momentum, None if own else dtype)
    fire = [update_of(peer) for peer in peers.values()]
    start = _flat(model.parameters())
    exact = start.clone()
    with torch.no_grad():
        for weights in _walk(model, step, updates):
            for update in fire:
                update()
            exact.lerp_(weights, momentum)
    way, size = _rms(exact - start), _rms(exact)
    errors = {name: _rms(_flat(peer.averaged()) - exact) for name, peer in peers.items()}
    figures = {
        name: {"error": error / size, "error_of_way": error / way if way else None} for name, error in errors.items()
    }
    return {"peers": figures, "missing": missing}


def small(dtype):
    """Three layers whose weights have sizes of .02, .1 and 1; the same at each call."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    for layer, size in zip(model, (0.02, 0.1, 1.0), strict=True):
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=size, generator=generator)
    return model.to(dtype)


def _walk(model, step, updates):
    """Sets the weights of the model, and gives them: the initial ones twice, since some copy them, then a walk."""
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    position = _flat(parameters)
    sizes = torch.cat([torch.full((p.numel(),), _rms(p.detach()), dtype=torch.float64) for p in parameters])
    weights = torch.empty_like(position)
    parts = torch.split(weights, [p.numel() for p in parameters])
    views = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
    for index in range(-2, updates):
        if index >= 0 and step:
            position += step * sizes * torch.randn(sizes.shape, generator=generator, dtype=torch.float64)
        weights.copy_(position.to(parameters[0].dtype))
        torch._foreach_copy_(parameters, views)
        yield weights


def _flat(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def _rms(tensor):
    return tensor.double().square().mean().sqrt().item()


def percent(part):
    """Two digits, but three from 100 % on."""
    return f"{100 * part:.2g} %" if part < 0.995 else f"{100 * part:.0f} %"


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fidelity", description=__doc__)
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--json", type=Path, help="write the figures to this file, over one that is there")
    options = parser.parse_args()
    torch.set_num_threads(1)  # on tensors this small, threads wait for each other longer than they compute
    held = {name: _measured(*types, options.updates) for name, types in HELD.items()}
    if options.json is not None:
        write(options.json, {**machine("cpu"), "updates": options.updates, "steps": STEPS, "held": held})
    for name, figures in held.items():
        console().print(_table(name, figures))


def _measured(weights, average, updates):
    """The figures of all momenta and walks."""
    builds = dict(PEERS)
    if average.itemsize == 2:
        builds[STOCHASTIC] = partial(ignite_ema, stochastic_rounding=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A momentum of .* is too small")  # which is what the table shows
        run = partial(measure, builds=builds, dtype=average, updates=updates)
        return {
            f"{momentum:g}": {walk: run(small(weights), momentum=momentum, step=step) for walk, step in STEPS.items()}
            for momentum in MOMENTA
        }


def _table(name, figures):
    table = Table("", title=f"Average in {name}", box=SIMPLE_HEAD, caption_justify="left")
    table.caption = "drift: of constant weights, relative to them. error: of walking weights, in percent of their way."
    for what in ("drift", "error"):
        for momentum in figures:
            table.add_column(f"{what}\n{momentum}", justify="right")
    cases = list(figures.values())
    for peer in cases[0]["walk"]["peers"]:
        drifts = [f"{case['constant']['peers'][peer]['error']:.1e}" for case in cases]
        table.add_row(peer, *drifts, *(percent(case["walk"]["peers"][peer]["error_of_way"]) for case in cases))
    for peer, reason in cases[0]["walk"]["missing"].items():
        table.add_row(f"{peer}: {reason}")
    return table


if __name__ == "__main__":
    main()
