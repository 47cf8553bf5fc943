"""A run that is stopped anywhere and resumed ends with the same bits as one that never stopped."""

import pytest
from ignite.engine import Engine
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn

from ignite_ema import EMAHandler
from tests.helpers import runs
from tests.helpers.bits import assert_same_bits
from tests.helpers.files import reloaded

LAST = 47


@pytest.fixture(scope="module")
def uninterrupted():
    run = runs.Run()
    run.train(LAST)
    return run.states()


@pytest.mark.filterwarnings("ignore:The run of 1 iteration should have updated")
@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("stop", [1, 10, 33])
def test_a_resumed_run_ends_with_the_same_bits(uninterrupted, stop, attach_first):
    first, second = runs.Run(), runs.Run(attach=attach_first)
    first.train(stop)
    saved = {name: thing.state_dict() for name, thing in first.objects().items()}
    Checkpoint.load_objects(second.objects(), saved if stop == 10 else reloaded(saved))
    if not attach_first:
        second.attach()
    second.train(LAST)
    assert_same_bits(second.states(), uninterrupted)


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
