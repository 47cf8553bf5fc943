"""What the pages say and their own blocks do not show."""

import torch
from ignite.engine import Engine, Events
from torch import nn

from ignite_ema import EMAHandler
from ignite_ema.distributed import ShardedSaver


def test_an_entry_for_the_average_alone_is_stored_once_in_a_file_and_twice_in_a_sharded_checkpoint(tmp_path):
    handler = EMAHandler(nn.Linear(200, 200))
    objects = {"ema_handler": handler.state_dict(), "ema_model": handler.ema_model.state_dict()}
    torch.save(objects, tmp_path / "file.pt")
    ShardedSaver(tmp_path / "sharded")(objects, "checkpoint")
    once = handler.ema_model.weight.nbytes
    assert (tmp_path / "file.pt").stat().st_size < 1.5 * once
    assert sum(path.stat().st_size for path in (tmp_path / "sharded" / "checkpoint").iterdir()) > 2 * once


def test_at_a_later_event_the_order_of_attaching_does_not_matter():
    model, seen = nn.Linear(1, 1), []
    handler = EMAHandler(model, momentum=1.0)
    trainer = Engine(lambda engine, batch: nn.init.constant_(model.weight, batch))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: seen.append(handler.ema_model.weight.item()))
    handler.attach(trainer)  # after what evaluates
    trainer.run([1.0, 2.0], max_epochs=2)
    assert seen == [2.0, 2.0]
