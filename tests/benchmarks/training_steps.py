"""What an average adds to the steps of a real training run: Ignite trainers, one for each peer, that take turns."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import torch
from ignite.engine import Engine, create_supervised_trainer
from torch import Tensor, nn

from .measure import Track, in_turns, seconds, summary, threads
from .model_costs import MOMENTUM
from .peers import PEERS, Unavailable

__all__ = ["TRAININGS", "Run", "Training", "runs_of", "training_costs"]

_BARE = "bare"
_VOCABULARY, _WIDTH, _LAYERS, _SEQUENCES, _TOKENS = 1000, 256, 4, 8, 64

Batch: TypeAlias = tuple[Tensor, Tensor]


class Training(NamedTuple):
    """What makes a training run; ``batches`` are gone through once in each round, with as many ``threads``."""

    model: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    loss: Callable[[Tensor, Tensor], Tensor]
    batches: list[Batch]
    threads: int


class Run(NamedTuple):
    """One model in training, with an average or without."""

    model: nn.Module
    trainer: Engine

    def go_through(self, batches: list[Batch]) -> None:
        self.trainer.run(batches, max_epochs=self.trainer.state.epoch + 1)


def digits() -> Training:
    """An epoch of the demo, which takes one thread too: on tensors this small, more cost more than they bring."""
    from ignite_ema import demo  # which asks for a newer Ignite than the rest

    data, _ = demo.load_data()
    batches = list(islice(demo.batches(*data, seed=0, start=0), demo.EPOCH_LENGTH))
    sgd = partial(torch.optim.SGD, lr=demo.LEARNING_RATE, momentum=0.9, weight_decay=demo.WEIGHT_DECAY)
    return Training(demo.network, sgd, nn.functional.cross_entropy, batches, 1)


class LanguageModel(nn.Module):
    """A transformer of 3.7 million parameters that sees the tokens before each token; without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_VOCABULARY, _WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(_TOKENS, _WIDTH))
        layer = nn.TransformerEncoderLayer(_WIDTH, _WIDTH // 64, 4 * _WIDTH, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(_WIDTH, _VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(_TOKENS), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """From tokens (sequences, tokens) to scores (sequences, tokens, vocabulary)."""
        hidden: Tensor = self.encoder(self.tokens(tokens) + self.positions, mask=self.mask, is_causal=True)
        scores: Tensor = self.head(hidden)
        return scores


def transformer() -> Training:
    """One step on 512 random tokens."""
    tokens = torch.randint(_VOCABULARY, (_SEQUENCES, _TOKENS + 1), generator=torch.Generator().manual_seed(0))

    def loss(scores: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())

    batches = [(tokens[:, :-1], tokens[:, 1:])]
    return Training(LanguageModel, partial(torch.optim.Adam, lr=3e-4), loss, batches, torch.get_num_threads())


TRAININGS: dict[str, Callable[[], Training]] = {"digits": digits, "transformer": transformer}


def training_costs(name: str, device: torch.device, rounds: int, track: Track) -> dict[str, Any]:
    """The figures of one training.

    Returns:
        Beside counts, ``bare``, the milliseconds of an iteration without an average, and of each peer ``ms``, those
        with it, and ``percent``, by how much they exceed those without in the same round; medians and quartiles.
    """
    training = TRAININGS[name]()
    batches = [(inputs.to(device), targets.to(device)) for inputs, targets in training.batches]
    runs, missing = runs_of(training, device)
    measures = {peer: partial(_iteration, run, batches, device) for peer, run in runs.items()}
    with threads(training.threads):
        for measure in measures.values():
            measure()  # the first steps make what the optimizer holds
        times = in_turns(measures, track(f"training, {name}", rounds))
    bare = times.pop(_BARE)
    return {
        "parameters": sum(p.numel() for p in runs[_BARE].model.parameters()),
        "iterations": len(batches),
        "threads": training.threads,
        "missing": missing,
        "bare": summary(bare, 1000),
        "peers": {
            peer: {"ms": summary(own, 1000), "percent": summary(_percent(own, bare))} for peer, own in times.items()
        },
    }


def runs_of(training: Training, device: torch.device) -> tuple[dict[str, Run], dict[str, str]]:
    """A run without an average and one for each peer, all of the same weights; and why peers are missing."""
    runs, missing = {_BARE: _run(training, device)}, {}
    for name, build in PEERS.items():
        run = _run(training, device)
        try:
            build(run.model, MOMENTUM, None).attach(run.trainer)
        except Unavailable as reason:
            missing[name] = str(reason)
        else:
            runs[name] = run
    return runs, missing


def _run(training: Training, device: torch.device) -> Run:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = training.model().to(device)
    return Run(model, create_supervised_trainer(model, training.optimizer(model.parameters()), training.loss, device))


def _iteration(run: Run, batches: list[Batch], device: torch.device) -> float:
    """Seconds per iteration."""
    return seconds(partial(run.go_through, batches), 1, device) / len(batches)


def _percent(times: list[float], bare: list[float]) -> list[float]:
    return [100 * (own - base) / base for own, base in zip(times, bare, strict=True)]
