"""What each peer's average of one model costs: its updates, and what happens now and then beside them."""

import gc
from collections.abc import Iterable, Mapping
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import nn

from .measure import Call, Track, batch_of, in_turns, ratios, seconds, summary, wait_for
from .memory import memory_of, quick_collections
from .models import AVERAGED_IN, MODELS
from .peers import EVENT, LIMIT, OURS, PEERS, Peer, built, event, limit, update_of

__all__ = ["MOMENTUM", "model_costs", "swap"]

MOMENTUM = 0.001


def model_costs(name: str, device: torch.device, rounds: Mapping[str, int], track: Track) -> dict[str, Any]:
    """All figures of one model, each from its number of ``rounds`` in which the peers take turns.

    Returns:
        Beside counts, for "update", "state_dict", "swapped" and "construction" the figures of each peer that has it:
        ``ms``, the milliseconds of one, and ``to_ours``, how many times as long as ours it took in the same round, as
        median and quartiles; ``batch``, how many were timed at once. Of updates also ``to_limit``. Of the others
        ``peak`` and ``left``, the most memory that was allocated meanwhile and what stays, in copies of the model.
    """
    model, dtype = MODELS[name]().to(device), AVERAGED_IN.get(name)
    peers, missing = built(PEERS, model, MOMENTUM, dtype)
    states = {peer: average.state_dict for peer, average in peers.items()}
    swaps = {peer: partial(swap, average) for peer, average in peers.items() if average.swapped is not None}
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameter_tensors": len(list(model.parameters())),
        "buffer_tensors": len(list(model.buffers())),
        "missing": missing,
        "update": _updates(model, dtype, peers, device, track(f"{name}: update", rounds["update"])),
        "state_dict": _calls(states, model, device, track(f"{name}: state_dict", rounds["state_dict"])),
        "swapped": _calls(swaps, model, device, track(f"{name}: swapped", rounds["swapped"])),
    }
    builds = {peer: partial(PEERS[peer], model, MOMENTUM, dtype) for peer in peers}
    del peers, states, swaps  # or there would be two averages of each peer
    figures["construction"] = _constructions(
        builds, model, device, track(f"{name}: construction", rounds["construction"])
    )
    return figures


def swap(peer: Peer) -> None:
    """The averaged weights into the model and its own back."""
    assert peer.swapped is not None
    with peer.swapped():
        pass


def _updates(
    model: nn.Module,
    dtype: torch.dtype | None,
    peers: Mapping[str, Peer],
    device: torch.device,
    rounds: Iterable[object],
) -> dict[str, Any]:
    calls = {name: update_of(peer) for name, peer in peers.items()}
    calls |= {EVENT: event(), LIMIT: limit(model, dtype)}
    batches, times = _timed(calls, device, rounds)
    return {
        name: {**_figures(times, name, batches[name]), "to_limit": summary(ratios(times[name], times[LIMIT]))}
        for name in calls
    }


def _calls(
    calls: Mapping[str, Call], model: nn.Module, device: torch.device, rounds: Iterable[object]
) -> dict[str, Any]:
    batches, times = _timed(calls, device, rounds)
    with quick_collections():
        return {
            name: {**_figures(times, name, batches[name]), **_copies(call, model, device)}
            for name, call in calls.items()
        }


def _constructions(
    builds: Mapping[str, Call], model: nn.Module, device: torch.device, rounds: Iterable[object]
) -> dict[str, Any]:
    """Each average is dropped before the next is made."""
    with quick_collections():
        times = in_turns({name: partial(_construction, build, device) for name, build in builds.items()}, rounds)
        return {name: {**_figures(times, name, 1), **_copies(build, model, device)} for name, build in builds.items()}


def _construction(build: Call, device: torch.device) -> float:
    """Seconds; without those in which the average before it is released."""
    gc.collect()
    wait_for(device)
    start = perf_counter()
    average = build()
    wait_for(device)
    end = perf_counter()
    del average
    return end - start


def _timed(
    calls: Mapping[str, Call], device: torch.device, rounds: Iterable[object]
) -> tuple[dict[str, int], dict[str, list[float]]]:
    """How many calls make a batch, and the seconds per call in each round."""
    batches = {name: batch_of(call, device) for name, call in calls.items()}
    return batches, in_turns({name: partial(seconds, calls[name], batches[name], device) for name in calls}, rounds)


def _figures(times: Mapping[str, list[float]], name: str, batch: int) -> dict[str, Any]:
    to_ours = summary(ratios(times[name], times[OURS]))
    return {"batch": batch, "ms": summary(times[name], 1000), "to_ours": to_ours}


def _copies(call: Call, model: nn.Module, device: torch.device) -> dict[str, float]:
    """The memory that a call takes, in copies of the model's tensors."""
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return {key: amount / size for key, amount in memory_of(call, device)._asdict().items()}
