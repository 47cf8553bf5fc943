"""Timing in turns, so that whatever else slows the machine down slows all of them down."""

import json
import multiprocessing
import os
import platform
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any, TypeAlias

import torch

Call: TypeAlias = Callable[[], object]

_SWEPT = 2**22  # floats, 16 MiB: more than the caches of a core, and much of those that cores share
_PACKAGES = {"pytorch-ignite", "torch", "diffusers", "ema-pytorch", "lightning", "timm", "torch-ema"}


def timed(calls: Mapping[str, Call], rounds: Iterable[object]) -> dict[str, list[float]]:
    """Seconds of one call of each in every round; before each, other data goes through the caches, as in training.

    Every round has an order of its own: torch's threads go on spinning for a moment after a parallel operation, and
    where cores are scarce, whatever always came next would pay for it.
    """
    for call in (*calls.values(), *calls.values()):  # the first two calls may copy, or allocate
        call()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    swept = [torch.zeros(_SWEPT, device=device) for device in devices]
    values: dict[str, list[float]] = {name: [] for name in calls}
    shuffled = random.Random(0)
    for _ in rounds:
        for name in shuffled.sample(list(calls), len(calls)):
            for tensor in swept:
                tensor.add_(1)
            values[name].append(_seconds(calls[name]))
    return values


def _seconds(call: Call) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else int
    synchronize()
    start = perf_counter()
    call()
    synchronize()
    return perf_counter() - start


def ratios(numerators: Iterable[float], denominators: Iterable[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def summary(values: Iterable[float], scale: float = 1) -> dict[str, float]:
    """Median and quartiles of the values, each ``scale`` times as large."""
    first, median, third = quantiles([scale * value for value in values], n=4, method="inclusive")
    return {"q1": first, "median": median, "q3": third}


@contextmanager
def busy() -> Iterator[None]:
    """Inside, another process computes on the same cores, as it often is on a shared machine."""
    other = multiprocessing.get_context("spawn").Process(target=_compute, daemon=True)
    other.start()
    try:
        yield
    finally:
        other.terminate()
        other.join()


def _compute() -> None:
    matrix = torch.ones(1024, 1024)
    while True:
        matrix @ matrix


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on, when, and of which versions."""
    versions = {one.metadata["Name"]: one.version for one in distributions()}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: version for name, version in sorted(versions.items()) if name in _PACKAGES},
    }


def _cpu() -> str:
    found = Path("/proc/cpuinfo")  # Linux alone has it
    lines = found.read_text(encoding="utf-8").splitlines() if found.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def write(path: Path, figures: Mapping[str, Any]) -> None:
    replace(path, json.dumps(figures, indent=1) + "\n")


def replace(path: Path, text: str) -> None:
    """Writes a file that is there whole, or not at all."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
