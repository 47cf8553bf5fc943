"""What an update of a sharded average costs by the bytes that it moves, and what it takes here.

``python -m tests.benchmarks.cost`` times, in turns, the update of what one of several devices holds of a model that
``fully_shard`` has sharded, and one ``lerp_`` over contiguous memory, which gives the bandwidth.
"""

import argparse
from statistics import median

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from ignite_ema import ModelAverage

from .measure import ratios, timed

WIDTH = 4096  # of a weight's rows, and their number, as in models of some billion parameters
CONTIGUOUS = 2**27  # floats, by which the bandwidth is measured


def held(parameters, devices):
    """Bytes of the average on each device, in float32."""
    return 4 * parameters / devices


def milliseconds(parameters, devices, bandwidth):
    """What an update takes at ``bandwidth`` bytes per second: it reads the average and the model, and writes one."""
    return 1000 * 3 * held(parameters, devices) / bandwidth


def sharded(parameters, devices):
    """What one of the devices holds of a model of square weights, sharded."""
    mesh, rows = dist.init_device_mesh("cpu", (1,)), max(1, WIDTH // devices)
    model = nn.Sequential(*(nn.Linear(WIDTH, rows, bias=False) for _ in range(round(parameters / WIDTH**2))))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main():
    """Prints one line for each number of devices."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cost", description=__doc__)
    parser.add_argument("--parameters", type=float, default=1e9, help="of the whole model (default: %(default)g)")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 1024])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    ours, theirs = torch.zeros(CONTIGUOUS), torch.ones(CONTIGUOUS)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for devices in options.devices:
        model = sharded(options.parameters, devices)
        with torch.device("meta"):
            twin = sharded(options.parameters, devices)
        average = ModelAverage(model, ema_model=twin)
        size = sum(parameter.numel() for parameter in model.parameters())
        calls = {"update": lambda average=average: average.update(0.001), "lerp": lambda: ours.lerp_(theirs, 0.001)}
        times = timed(calls, range(options.rounds))
        bandwidths = [12 * CONTIGUOUS / seconds for seconds in times["lerp"]]
        computed = [milliseconds(size, 1, bandwidth) / 1000 for bandwidth in bandwidths]
        print(
            f"{size:,} of {options.parameters:g} parameters on one of {devices:,} devices, in "
            f"{len(list(model.parameters()))} tensors: {1000 * median(times['update']):.3g} ms measured, "
            f"{1000 * median(computed):.3g} ms computed at {median(bandwidths) / 1e9:.3g} GB/s "
            f"({median(ratios(times['update'], computed)):.2f} times as long, median of {options.rounds} rounds)"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
