"""Worlds of worker processes: each is started once for all tests, and runs one scenario after the other.

A world is a gloo process group of a fixed number of ranks. A scenario is a function that can be imported; each rank
calls it. A world in which a scenario failed, took the group apart or left many others behind is ended, and the next
scenario of that size starts another one.
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
from dataclasses import dataclass
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

_CONTEXT = multiprocessing.get_context("forkserver")  # workers are forked from a process that has imported torch
_CONTEXT.set_forkserver_preload(
    [
        *("pytest", "torch._dynamo.testing", "torch.distributed.fsdp", "torch.distributed.tensor.debug"),
        *("torch.distributed.tensor", "ignite.distributed", "ignite_ema.distributed"),
    ]
)


@dataclass(frozen=True)
class Outcome:
    """How a scenario ended on one rank: with a result, an exception, the end of its process, or not in time.

    Attributes:
        result: what the scenario returned.
        error: the traceback, or how the process ended; None where it returned.
        seconds: from the start of the scenario until this rank was done.
    """

    result: Any
    error: str | None
    seconds: float


class World:
    """The worker processes of one process group.

    Args:
        ranks: their number.
    """

    def __init__(self, ranks: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="world-"))
        self.is_usable = True
        self._processes = []
        self._pipes = []
        for rank in range(ranks):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(
                target=_work, args=(theirs, self.folder / "group", rank, ranks), daemon=True, name=f"rank {rank}"
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def start(self, scenario, *args):
        """Lets each rank call ``scenario(*args)``, and does not wait."""
        for pipe in self._pipes:
            pipe.send((scenario, args))

    def outcomes(self, scenario, *args, timeout=TIMEOUT) -> list[Outcome]:
        """How ``scenario(*args)`` ended on each rank; when it has failed on one, the others are not waited for.

        Args:
            scenario: a function that can be imported.
            timeout: seconds; a rank that is not done then has an error that says so.
        """
        begin = monotonic()
        self.start(scenario, *args)
        outcomes: list[Any] = [None] * len(self._pipes)
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting and (ready := wait(list(waiting), max(0, begin + timeout - monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    result, error = pipe.recv()
                except EOFError:
                    self._processes[rank].join(10)
                    result, error = None, f"it ended with exit code {self._processes[rank].exitcode}"
                outcomes[rank] = Outcome(result, error, monotonic() - begin)
            if any(outcome and outcome.error for outcome in outcomes):
                break
        late = "not waited for" if monotonic() - begin < timeout else f"it should end within {timeout} s"
        outcomes = [outcome or Outcome(None, late, monotonic() - begin) for outcome in outcomes]
        self.is_usable &= not any(outcome.error for outcome in outcomes)
        return outcomes

    def settle(self) -> None:
        """Ends the scenario: no messages are under way. A world whose group was taken apart is not used again."""
        settled = self.outcomes(_settle)
        raise_first(_settle, settled)
        self.is_usable = all(outcome.result for outcome in settled)

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
    world = _of_size(ranks)
    try:
        found = world.outcomes(scenario, folder, *args, timeout=timeout)
        raise_first(scenario, found)
    finally:
        _tidy(world, ranks)
    return [outcome.result for outcome in found]


def start_world(folder, ranks, scenario, *args) -> World:
    """A world of its own in which ``scenario(folder, *args)`` runs, to be killed by the caller."""
    world = World(ranks)
    world.start(scenario, folder, *args)
    return world


def raise_first(scenario, found: list[Outcome]) -> None:
    """Raises AssertionError with the error of a rank, if there is one."""
    failed = [(outcome.seconds, rank, outcome.error) for rank, outcome in enumerate(found) if outcome.error]
    if failed:
        _, rank, error = min(failed)
        raise AssertionError(f"{scenario.__name__} on rank {rank} of {len(found)}:\n{error}")


_worlds: dict[int, World] = {}


def _of_size(ranks: int) -> World:
    if ranks not in _worlds:
        _worlds[ranks] = World(ranks)
    return _worlds[ranks]


def _tidy(world: World, ranks: int) -> None:
    try:
        if world.is_usable:
            world.settle()
    finally:
        if not world.is_usable:
            _worlds.pop(ranks).kill()


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
        warnings.filterwarnings("ignore", "After .* of the average of .* is still", EMAWarning)
        try:
            return scenario(*args), None
        except BaseException:
            return None, traceback.format_exc()


def _settle():
    """Whether the group can be used again."""
    if not dist.is_initialized() or dist.group.WORLD is not _group:
        return False
    dist.barrier()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    return len(dist.distributed_c10d._world.pg_map) <= MOST_GROUPS
