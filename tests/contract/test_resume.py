"""A run that is stopped anywhere and resumed ends with the same bits as one that never stopped."""

import io
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn

from ignite_ema import EMAHandler
from tests.helpers import runs
from tests.helpers.bits import assert_same_bits

LAST = 47


@pytest.fixture(scope="module")
def uninterrupted():
    run = runs.Run()
    run.train(LAST)
    return run.states()


def saved(run):
    """What Ignite's Checkpoint would write, through a file's bytes and back."""
    file = io.BytesIO()
    torch.save({name: thing.state_dict() for name, thing in run.objects().items()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.filterwarnings("ignore:The run of 1 iteration should have updated")
@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("stop", [1, 10, 33])
def test_a_resumed_run_ends_with_the_same_bits(uninterrupted, stop, attach_first):
    first, second = runs.Run(), runs.Run(attach=attach_first)
    first.train(stop)
    in_memory = {name: thing.state_dict() for name, thing in first.objects().items()}
    Checkpoint.load_objects(second.objects(), in_memory if stop == 10 else saved(first))
    if not attach_first:
        second.attach()
    second.train(LAST)
    assert_same_bits(second.states(), uninterrupted)


@pytest.mark.slow
def test_a_killed_process_resumes_with_the_same_bits(tmp_path, uninterrupted):
    """SIGKILL at three random places of the run, each time resumed from the newest checkpoint on disk."""
    chosen = random.Random(0)
    script = [sys.executable, runs.__file__, str(tmp_path), str(LAST)]
    iterations = sorted(chosen.sample(range(2, LAST), 3))
    for iteration in iterations:
        event = chosen.choice(["ITERATION_STARTED", "ITERATION_COMPLETED"])
        killed = subprocess.run([*script, str(iteration), event], cwd=Path(__file__).parents[2], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert not (tmp_path / "final.pt").exists()
    subprocess.run(script, cwd=Path(__file__).parents[2], check=True)
    assert_same_bits(torch.load(tmp_path / "final.pt", weights_only=True), uninterrupted)


def test_checkpoint_by_path_with_two_handlers_and_intervals(tmp_path):
    def gan():
        torch.manual_seed(0)
        nets = {"generator": nn.Linear(2, 2), "discriminator": nn.Linear(2, 1)}

        def step(engine, batch):
            for net in nets.values():
                for parameter in net.parameters():
                    parameter.data += engine.state.iteration

        trainer = Engine(step)
        handlers = {
            "generator_ema": EMAHandler(nets["generator"], 0.1, 0.9, 8),
            "discriminator_ema": EMAHandler(nets["discriminator"], 0.3),
        }
        handlers["generator_ema"].attach(trainer, "g_momentum", event=Events.ITERATION_COMPLETED(every=5))
        handlers["discriminator_ema"].attach(trainer, "d_momentum")
        return trainer, {**nets, **handlers, "trainer": trainer}, handlers

    whole, _, expected = gan()
    whole.run([0] * 10, max_epochs=4)

    trainer, objects, _ = gan()
    saver = Checkpoint(objects, DiskSaver(tmp_path), n_saved=1)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=20), saver)
    trainer.run([0] * 10, max_epochs=2)

    trainer, objects, handlers = gan()
    Checkpoint.load_objects(objects, tmp_path / saver.last_checkpoint)
    assert trainer.state.g_momentum == handlers["generator_ema"].momentum_scheduler(4)
    trainer.run([0] * 10, max_epochs=4)
    assert_same_bits(
        {name: handler.state_dict() for name, handler in handlers.items()},
        {name: handler.state_dict() for name, handler in expected.items()},
    )


@pytest.mark.parametrize("key", ["ema_handler", "momentum"])
def test_a_checkpoint_of_the_handler_alone_loads(tmp_path, key):
    # Ignite stores a single object without its key and guesses when it loads.
    handler = EMAHandler(nn.Linear(2, 2))
    handler.average.update(0.25)
    saver = Checkpoint({key: handler}, DiskSaver(tmp_path), global_step_transform=lambda *_: 1)
    saver(Engine(lambda engine, batch: None))
    other = EMAHandler(nn.Linear(2, 2))
    Checkpoint.load_objects({key: other}, tmp_path / saver.last_checkpoint)
    assert_same_bits(other.state_dict(), handler.state_dict())


def size_of(*states):
    file = io.BytesIO()
    torch.save(states, file)
    return file.tell()


def test_a_file_holds_the_average_once():
    handler = EMAHandler(nn.Linear(300, 300))
    alone = size_of(handler.ema_model.state_dict())
    assert size_of(handler.ema_model.state_dict(), handler.state_dict()) < 1.01 * alone
