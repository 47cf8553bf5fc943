"""What an update of a sharded average should cost by the bytes that it moves, and what it does cost here.

``python -m tests.benchmarks.cost`` times, in turns, the update of what one of several devices holds of a model that
``fully_shard`` has sharded, and one ``lerp_`` over contiguous memory, which gives the bandwidth.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

from ignite_ema import ModelAverage

__all__ = ["Blocks", "Weights", "held", "main", "milliseconds", "moved"]

WIDTH = 4096  # of a row, as in models of some billion parameters
ROWS = WIDTH  # of a weight
CONTIGUOUS = 2**27  # floats, by which the bandwidth is measured


class Weights(nn.Module):
    """One weight of which a device holds some rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, WIDTH))


class Blocks(nn.Module):
    """As many weights as have ``parameters`` elements together, over ``devices``, of which this is one."""

    def __init__(self, parameters: float, devices: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Weights(max(1, ROWS // devices)) for _ in range(round(parameters / ROWS / WIDTH)))


def held(parameters: float, devices: int, bytes_of_average: int = 4) -> float:
    """Bytes of the average on each device."""
    return bytes_of_average * parameters / devices


def moved(parameters: float, devices: int, bytes_per_parameter: int = 12) -> float:
    """Bytes that an update moves on each device: read the average, read the model, write the average."""
    return bytes_per_parameter * parameters / devices


def milliseconds(parameters: float, devices: int, bandwidth: float, bytes_per_parameter: int = 12) -> float:
    """What an update takes at ``bandwidth`` bytes per second."""
    return 1000 * moved(parameters, devices, bytes_per_parameter) / bandwidth


@contextmanager
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _sharded(parameters: float, devices: int) -> Blocks:
    model, mesh = Blocks(parameters, devices), dist.init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _seconds(average: ModelAverage) -> float:
    start = perf_counter()
    average.update(0.001)
    return perf_counter() - start


def _bandwidth(ours: Tensor, theirs: Tensor) -> float:
    start = perf_counter()
    ours.lerp_(theirs, 0.001)
    return 12 * ours.numel() / (perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints one line for each number of devices."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cost", description=__doc__)
    parser.add_argument("--parameters", type=float, default=1e9, help="of the whole model (default: %(default)g)")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 1024], help="default: 1 8 1024")
    parser.add_argument("--rounds", type=int, default=20, help="median of so many (default: %(default)s)")
    options = parser.parse_args(arguments)
    ours, theirs = torch.zeros(CONTIGUOUS), torch.ones(CONTIGUOUS)
    with _group():
        for devices in options.devices:
            model = _sharded(options.parameters, devices)
            with torch.device("meta"):
                twin = _sharded(options.parameters, devices)
            average = ModelAverage(model, ema_model=twin)
            size = sum(parameter.numel() for parameter in model.parameters())
            _seconds(average), _bandwidth(ours, theirs)
            rounds = [(_seconds(average), _bandwidth(ours, theirs)) for _ in range(options.rounds)]
            seconds, bandwidth = (median(column) for column in zip(*rounds, strict=True))
            times = median(1000 * seconds / milliseconds(size, 1, bandwidth) for seconds, bandwidth in rounds)
            print(
                f"{size:,} of {options.parameters:g} parameters on one of {devices:,} devices, in "
                f"{len(list(model.parameters()))} tensors: {1000 * seconds:.3g} ms measured, "
                f"{milliseconds(size, 1, bandwidth):.3g} ms computed at {bandwidth / 1e9:.3g} GB/s "
                f"({times:.2f} times as long, median of {options.rounds} rounds)"
            )


if __name__ == "__main__":
    main()
