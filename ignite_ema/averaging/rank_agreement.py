"""Checks that all ranks of a sharded model pass the same ``skip_nonfinite``, without a collective.

Each rank writes its own into the store of the process group when it makes its average, and the first update reads what
the others have written. No rank sends anything that another has to receive, so that an average on one rank alone, which
needs no communication, still waits for nobody.
"""

from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from hashlib import sha256

import torch.distributed as dist
from torch import nn

from .sharding import is_sharded

__all__ = ["Announcement", "announced"]

_made: Counter[str] = Counter()  # averages of this process, by the names and shapes of what they average
_PATIENCE = timedelta(seconds=20)  # for ranks that are slower to make their averages


class Announcement:
    """Whether this rank's average skips updates, in the store, where the other ranks of its shards find it.

    Args:
        skips: the ``skip_nonfinite`` of this rank's average.
        name: of what is averaged, the same on all ranks. They make averages of one name in the same order.
        ranks: those that hold parts of its shards.
    """

    def __init__(self, skips: bool, name: str, ranks: Iterable[int]) -> None:
        self._skips = skips
        self._key = f"ignite_ema/{name}/{_made[name]}"
        _made[name] += 1
        self._others = sorted(set(ranks) - {dist.get_rank()})
        dist.distributed_c10d._get_default_store().set(f"{self._key}/{dist.get_rank()}", str(skips))

    def check(self) -> None:
        """Raises RuntimeError where another rank's average differs, or, if this one skips updates, is not there."""
        store = dist.distributed_c10d._get_default_store()
        for other in self._others:
            key = f"{self._key}/{other}"
            if self._skips:
                try:
                    store.wait([key], _PATIENCE)
                except RuntimeError:  # a DistStoreError, or of torch 2.6 another
                    raise _unequal(dist.get_rank(), f"rank {other} has made no average") from None
            if store.check([key]) and store.get(key).decode() != str(self._skips):
                with_it, without = (dist.get_rank(), other) if self._skips else (other, dist.get_rank())
                raise _unequal(with_it, f"rank {without} leaves it out")


def _unequal(rank: int, what: str) -> RuntimeError:
    return RuntimeError(
        f"skip_nonfinite should be the same on all ranks of a sharded model, got True on rank {rank}, but {what}; make "
        "the average in the same way on all ranks."
    )


def announced(skips: bool, model: nn.Module) -> Announcement | None:
    """The announcement of an average of ``model``; None where no other rank holds a part of it."""
    tensors = dict(model.named_parameters())
    meshes = dict.fromkeys(one.device_mesh for one in tensors.values() if is_sharded(one))  # type: ignore[attr-defined]
    ranks = {rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}
    if len(ranks) < 2:
        return None
    shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    return Announcement(skips, sha256(repr(shapes).encode()).hexdigest()[:16], ranks)
