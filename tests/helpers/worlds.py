"""Worlds of worker processes, each a gloo process group that runs one scenario after the other.

A scenario is a function that can be imported; each rank calls it. A world in which a scenario failed, took the group
apart or left many others behind is ended, and the next scenario of that size starts another one.
"""

import atexit
import gc
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

from ignite_ema import EMAWarning

MOST_GROUPS = 20  # that scenarios may leave behind in a world; the threads of each wake up now and then
TIMEOUT = 60  # seconds for a scenario, and for a message between ranks; the longest scenario needs five

PROCESSES = multiprocessing.get_context("forkserver")  # they are forked from a process that has imported torch
PROCESSES.set_forkserver_preload(
    [
        *("pytest", "torch._dynamo.testing", "torch.distributed.fsdp", "torch.distributed.tensor.debug"),
        *("torch.distributed.tensor", "ignite.distributed", "ignite_ema.distributed", "safetensors.torch"),
    ]
)


class World:
    """The worker processes of one process group."""

    def __init__(self, ranks: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="world-"))
        self.is_usable = True
        self._processes, self._pipes = [], []
        for rank in range(ranks):
            ours, theirs = PROCESSES.Pipe()
            process = PROCESSES.Process(target=_work, args=(theirs, self.folder / "group", rank, ranks), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def results(self, scenario, *args, timeout=TIMEOUT) -> list[Any]:
        """What ``scenario(*args)`` returns on each rank; raises the first error of one, or that one is not done."""
        end, results = monotonic() + timeout, [None] * len(self._pipes)
        for pipe in self._pipes:
            pipe.send((scenario, args))
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        self.is_usable = False
        while waiting and (ready := wait(list(waiting), max(0, end - monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                results[rank], error = self._answer(rank)
                if error:
                    raise AssertionError(f"{scenario.__name__} on rank {rank} of {len(results)}:\n{error}")
        if waiting:
            raise AssertionError(f"{scenario.__name__} is not done in {timeout} s on ranks {sorted(waiting.values())}")
        self.is_usable = True
        return results

    def _answer(self, rank):
        try:
            return self._pipes[rank].recv()
        except EOFError:
            self._processes[rank].join(10)
            return None, f"it ended with exit code {self._processes[rank].exitcode}"

    def kill(self) -> None:
        """Ends all processes at once."""
        self.is_usable = False
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def run_world(folder, ranks, scenario, *args, timeout=TIMEOUT) -> list[Any]:
    """What ``scenario(folder, *args)`` returns on each rank; raises the first thing that goes wrong."""
    if ranks not in _worlds:
        _worlds[ranks] = World(ranks)
    world = _worlds[ranks]
    try:
        results = world.results(scenario, folder, *args, timeout=timeout)
        world.is_usable = all(world.results(_settle))
    finally:
        if not world.is_usable:
            _worlds.pop(ranks).kill()
    return results


_worlds: dict[int, World] = {}


@atexit.register
def close_worlds() -> None:
    """Ends all worlds."""
    while _worlds:
        _worlds.popitem()[1].kill()


# In the worker processes.


def _work(pipe, group, rank, ranks):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)  # the bits of a sum depend on the number of threads
    dist.init_process_group(
        "gloo", init_method=f"file://{group}", rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT)
    )
    global _group
    _group = dist.group.WORLD
    while True:
        try:
            scenario, args = pipe.recv()
        except EOFError:  # the tests have ended
            os._exit(0)
        except BaseException:  # the scenario cannot be imported here
            answer = None, traceback.format_exc()
        else:
            answer = _call(scenario, args)
        try:
            pipe.send(answer)
        except BaseException:  # the result cannot be pickled
            pipe.send((None, traceback.format_exc()))


def _call(scenario, args):
    random.seed(0)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EMAWarning)
        warnings.filterwarnings("ignore", ".* is still the weights that it started from")  # these runs are short
        try:
            return scenario(*args), None
        except BaseException:
            return None, traceback.format_exc()


def _settle():
    """Whether the group can be used again, when no messages are under way."""
    if not dist.is_initialized() or dist.group.WORLD is not _group:
        return False
    dist.barrier()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    return len(dist.distributed_c10d._world.pg_map) <= MOST_GROUPS
