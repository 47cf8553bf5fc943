"""Measures what averages of several libraries cost, in turns and with cold caches: ``python -m tests.benchmarks``.

Each update goes through an event of an Ignite engine. The limit is one ``lerp_`` over as many contiguous bytes, the
floor one bare ``torch._foreach_lerp_`` of the same tensors. Times are medians; multiples compare those of one round.
Beside the times stand the operations that an update dispatches on an accelerator.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from .measure import machine, ratios, summary, timed, write
from .models import AVERAGED_IN, MODELS
from .operations import counts
from .peers import FLOOR, LIMIT, OURS, PEERS, built, event, floor, limit, update_of
from .report import draw, show

MOMENTUM = 0.001


def costs(model, dtype, rounds):
    """For "update", "state_dict", "swapped" and "construction" the figures of each peer that has it.

    ``ms`` is the time of one, ``to_ours`` how many times as long as ours it took in the same round; of updates also
    ``to_limit`` and, if the average has the type of the weights, ``to_floor``. All are medians with quartiles.
    """
    peers, missing = built(PEERS, model, MOMENTUM, dtype)
    updates = {name: update_of(peer) for name, peer in peers.items()} | {"event": event(), LIMIT: limit(model, dtype)}
    if dtype is None:
        updates[FLOOR] = floor(model)
    few = max(2, rounds // 5)
    swaps = {name: partial(_swap, peer.swapped) for name, peer in peers.items() if peer.swapped is not None}
    figures = {
        "missing": missing,
        "update": _figures(updates, rounds),
        "state_dict": _figures({name: peer.state_dict for name, peer in peers.items()}, rounds),
        "swapped": _figures(swaps, few),
    }
    builds = {name: partial(PEERS[name], model, MOMENTUM, dtype) for name in peers}
    del peers, updates, swaps  # or there would be two averages of each peer
    return figures | {"construction": _figures(builds, few)}


def _figures(calls, rounds):
    times = timed(calls, range(rounds))
    against = {"to_ours": OURS, "to_limit": LIMIT, "to_floor": FLOOR}
    return {
        name: {
            "ms": summary(times[name], 1000),
            **{key: summary(ratios(times[name], times[other])) for key, other in against.items() if other in times},
        }
        for name in calls
    }


def _swap(swapped):
    with swapped():
        pass


def main():
    options = _parsed()
    if options.from_json is not None:
        figures = json.loads(options.from_json.read_text(encoding="utf-8"))
    else:
        figures = {**machine(options.device), "rounds": options.rounds, "models": {}, "operations": counts()}
        for name in options.models:
            model = MODELS[name]().to(options.device)
            figures["models"][name] = costs(model, AVERAGED_IN.get(name), options.rounds)
            print(f"{name} measured", flush=True)
    if options.json is not None:
        write(options.json, figures)
    show(figures)
    if options.picture is not None:
        draw(figures, options.picture)


def _parsed():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=60, help="of each; a fifth of swaps and constructions")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--picture", type=Path, help="draw the updates into this PNG")
    parser.add_argument("--from-json", type=Path, help="measure nothing; show, and draw, the figures of this file")
    parser.add_argument("--force", action="store_true", help="overwrite files")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds should be at least 2, got {options.rounds}.")
    for path in (options.json, options.picture):
        if path is not None and path.exists() and not options.force:
            parser.error(f"{path} exists; pass --force to overwrite it.")
    return options


if __name__ == "__main__":
    main()
