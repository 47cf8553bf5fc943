"""Checkpoints of sharded training: every rank saves its shards, and any number of ranks loads them.

Ignite's ``Checkpoint`` asks every rank for its states and writes those of one. With :class:`ShardedSaver` it writes all
of them, by way of :mod:`torch.distributed.checkpoint`. Nothing in a checkpoint is run when it is read.
"""

from .gathering import gathered_state_dict, sync_buffers
from .loading import load_objects
from .saver import ShardedSaver

__all__ = ["ShardedSaver", "gathered_state_dict", "load_objects", "sync_buffers"]
