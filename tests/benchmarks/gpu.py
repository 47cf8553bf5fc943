"""What only a GPU can show: ``python -m tests.benchmarks.gpu FILE`` measures and checks it within ten minutes.

FILE gets a table in Markdown, written again after each part. The exit status is 0 if the run is over and nothing is
wrong. Each part takes a device, so that tests can run those on a CPU that need no GPU.
"""

import argparse
import faulthandler
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch
from torch import distributed as dist
from torch import nn
from torch.autograd import DeviceType
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile

from ignite_ema import ModelAverage

from .measure import machine, ratios, replace, summary, timed
from .models import MODELS, TITLES
from .peers import limit

LIMIT = 600  # seconds
MOMENTUM = 0.25  # moves 16-bit averages, too

# The types of the model and of its average.
HELD = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16 averaged in float32": (torch.bfloat16, torch.float32),
}


class Row(NamedTuple):
    """A line of the table."""

    what: str
    found: str
    is_right: bool = True


def updates(device, models=("many", "gpt2"), rounds=30):
    """Updates against one ``lerp_`` over contiguous memory that moves as many bytes, and their launches."""
    for name in models:
        for title, (weights, dtype) in HELD.items():
            model = MODELS[name]().to(device, weights)
            update = partial(ModelAverage(model, dtype=dtype).update, MOMENTUM)
            times = timed({"update": update, "limit": limit(model, dtype)}, range(rounds))
            milliseconds = summary(times["update"], 1000)["median"]
            ratio = summary(ratios(times["update"], times["limit"]))["median"]
            row = launched(f"update, {TITLES[name]}, {title}", update)
            time = f"{milliseconds:.3g} ms, {ratio:.3g} times the contiguous `lerp_`"
            yield row._replace(found=f"{time}; {row.found}")


def fast_paths(device, tensors=1200):
    """Whether the two operations that every update uses take their fast paths."""
    for title, (weights, dtype) in HELD.items():
        online = [torch.ones(1600, dtype=weights, device=device) for _ in range(tensors)]
        averaged = [torch.zeros(1600, dtype=dtype, device=device) for _ in range(tensors)]
        yield launched(f"`_foreach_copy_`, {tensors} tensors, {title}", partial(torch._foreach_copy_, averaged, online))
        if weights == dtype:
            lerp = partial(torch._foreach_lerp_, averaged, online, MOMENTUM)
            yield launched(f"`_foreach_lerp_`, {tensors} tensors, {title}", lerp)


def launched(what, call):
    """The launches of a call, which are right if each is of many tensors."""
    names = kernels_of(call)
    others = [name for name in names if "multi_tensor_apply" not in name]
    found = f"{len(others)} of them off the fast path, as {others[0][:80]}" if others else "all on the fast path"
    return Row(what, f"{len(names)} launches, {found}", is_right=bool(names) and not others)


def kernels_of(call):
    """The names of what the GPU runs for the second of two calls."""
    call()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return [event.name for event in seen.events() if event.device_type == DeviceType.CUDA]


def graph(device, model="many", rounds=30):
    """An update that is replayed from a CUDA graph, and one that is not; the tests compare what they make."""
    for title, (weights, dtype) in HELD.items():
        online = MODELS[model]().to(device, weights)
        replayed, plain = ModelAverage(online, dtype=dtype), ModelAverage(online, dtype=dtype)
        calls = {"replay": captured(replayed, device), "update": partial(plain.update, MOMENTUM)}
        times = timed(calls, range(rounds))
        replay_ms, update_ms = (summary(times[name], 1000)["median"] for name in calls)
        yield Row(f"CUDA graph, {title}", f"{replay_ms:.3g} ms, not captured {update_ms:.3g} ms")


def captured(average, device):
    """Replays an update from a CUDA graph; on a CPU, which has none, makes it."""
    update = partial(average.update, MOMENTUM)
    if device == "cpu":
        return update
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a warm-up, as torch asks for
        update()
    torch.cuda.current_stream().wait_stream(side)
    average.reset()
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        update()
    return made.replay


def offload(device, width=4096, rounds=20):
    """The time of an average on the CPU beside a training step; the tests look at its values and its memory."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(5))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = torch.randn(width, width, device=device)
    average = ModelAverage(model, device="cpu")

    def step():
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    def both():
        step()
        average.update(MOMENTUM)

    calls = {"step": step, "update": partial(average.update, MOMENTUM), "both": both}
    times = timed(calls, range(rounds))
    figures = [f"{summary(times[name], 1000)['median']:.3g}" for name in calls]
    megabytes = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    found = "a step {} ms, an update {} ms, one after the other {} ms".format(*figures)
    yield Row(f"average of {megabytes:.0f} MB on the CPU", found)


def sharded(device, width=1024):
    """FSDP2 on one device, over NCCL if that is a GPU."""
    backend = "gloo" if device == "cpu" else "nccl"
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
        try:
            yield from _averaged_shards(device, width, f"FSDP2 over {backend}")
        finally:
            dist.destroy_process_group()


def _averaged_shards(device, width, title):
    mesh = dist.init_device_mesh(device, (1,))

    def built():
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def shards(module):
        with torch.no_grad():
            return [parameter.to_local() for parameter in module.parameters()]

    with torch.device(device):
        model = built()
    with torch.device("meta"):
        twin = built()
    average = ModelAverage(model, ema_model=twin, skip_nonfinite=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    due = [shard.double() for shard in shards(model)]
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, width, device=device)).square().mean().backward()
        optimizer.step()
        average.update(MOMENTUM)
        due = [torch.lerp(old, new.double(), MOMENTUM) for old, new in zip(due, shards(model), strict=True)]
    pairs = zip(shards(average.module), due, strict=True)
    error = max((shard.double() - exact).abs().max().item() for shard, exact in pairs)
    yield Row(f"{title}, three steps", f"off by {error:.1e} from an average in float64", error < 1e-6)
    shards(model)[0].fill_(torch.nan)
    is_skipped = not average.update(MOMENTUM)
    yield Row(f"{title}, a NaN with `skip_nonfinite`", "skipped" if is_skipped else "averaged", is_skipped)


def suite(device, paths=(), seconds=420):
    """The tests, those that need a GPU included if this is one."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", str(report), *paths]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], timeout=seconds)
        cases = list(ElementTree.parse(report).iter("testcase"))
    reasons = ["".join(found.itertext()) for case in cases if (found := case.find("skipped")) is not None]
    is_right = done.returncode == 0
    found = f"{len(cases) - len(reasons)} {'passed' if is_right else 'ran, and some failed'}, {len(reasons)} skipped"
    yield Row("tests", found, is_right)
    if device != "cpu":
        was_left_out = any("there is no CUDA device" in reason for reason in reasons)
        yield Row("tests that need a GPU", "skipped" if was_left_out else "ran", not was_left_out)


PARTS = (updates, fast_paths, graph, offload, sharded, suite)


def measured(path, device, parts=PARTS):
    """Writes the table, after each part anew, and says whether all is right."""
    rows = []
    for number, part in enumerate(parts, start=1):
        try:
            for row in part(device):
                rows.append(row)
                print(f"{row.what}: {row.found}", flush=True)
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append(Row(part.__name__, reason.replace("|", "/"), False))
        replace(path, _table(rows, device, is_over=number == len(parts)))
    return all(row.is_right for row in rows)


def _table(rows, device, is_over):
    here = machine(device)
    versions = ", ".join(f"{name} {here['packages'][name]}" for name in ("torch", "pytorch-ignite"))
    lines = [
        f"{here['device_name']}, {here['date'][:10]}, Python {here['python']}, {versions}, CUDA {torch.version.cuda}",
        "",
        "| what | found | |",
        "|---|---|---|",
        *(f"| {row.what} | {row.found} | {'right' if row.is_right else 'wrong'} |" for row in rows),
        *([] if is_over else ["", "The run is not over."]),
    ]
    return "\n".join(lines) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("file", type=Path, help="where to write the table; a file that is there is replaced")
    options = parser.parse_args(arguments)
    if not options.file.parent.is_dir():
        parser.error(f"{options.file.parent} should be a directory that is there.")
    if not torch.cuda.is_available():
        sys.exit("torch should find an NVIDIA GPU, but there is none; run this on a machine that has one.")
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # with status 1, whatever hangs
    is_right = measured(options.file, "cuda")
    faulthandler.cancel_dump_traceback_later()
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
