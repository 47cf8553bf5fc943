"""Timing in turns, so that whatever else slows the machine down slows all of them down."""

import json
import os
import platform
import random
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path
from statistics import quantiles
from time import perf_counter

import torch

_SWEPT = 2**22  # floats, 16 MiB: more than the caches of a core, and much of those that cores share
_PACKAGES = {"pytorch-ignite", "torch", "diffusers", "ema-pytorch", "lightning", "timm", "torch-ema"}


def timed(calls, rounds):
    """Seconds of one call of each in every round; before each, other data goes through the caches, as in training.

    Every round has an order of its own: torch's threads go on spinning for a moment after a parallel operation, and
    where cores are scarce, whatever always came next would pay for it.
    """
    for call in (*calls.values(), *calls.values()):  # the first two calls may copy, or allocate
        call()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    swept = [torch.zeros(_SWEPT, device=device) for device in devices]
    values, shuffled = {name: [] for name in calls}, random.Random(0)
    for _ in rounds:
        for name in shuffled.sample(list(calls), len(calls)):
            for tensor in swept:
                tensor.add_(1)
            values[name].append(_seconds(calls[name]))
    return values


def _seconds(call):
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else int
    synchronize()
    start = perf_counter()
    call()
    synchronize()
    return perf_counter() - start


def ratios(numerators, denominators):
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def summary(values, scale=1):
    """Median and quartiles of the values, each ``scale`` times as large."""
    first, median, third = quantiles([scale * value for value in values], n=4, method="inclusive")
    return {"q1": first, "median": median, "q3": third}


def machine(device):
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


def _cpu():
    found = Path("/proc/cpuinfo")  # Linux alone has it
    lines = found.read_text(encoding="utf-8").splitlines() if found.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def write(path, figures):
    replace(path, json.dumps(figures, indent=1) + "\n")


def replace(path, text):
    """Writes a file that is there whole, or not at all."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
