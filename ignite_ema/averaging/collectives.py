"""Messages between the ranks of a group. A process without a group is alone, and agrees with itself.

What can fail on one rank alone is told to all before any of them goes on, so that none waits for another in vain.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from time import sleep
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import torch.distributed as dist

__all__ = [
    "Group",
    "LostRankError",
    "first_difference",
    "gather",
    "is_first_rank",
    "new_group",
    "on_all_ranks",
    "on_first_rank",
    "raise_first_error",
    "rank",
    "reports_lost_ranks",
    "shared_group",
]

_T = TypeVar("_T")


class LostRankError(RuntimeError):
    """A rank does not answer any more."""


def rank() -> int:
    """The rank of this process, 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first_rank() -> bool:
    """Whether this process is alone or the first of its group."""
    return rank() == 0


def new_group() -> "Group | None":
    """A gloo group of all ranks, which have to call this; None where this process is alone."""
    return _made() if dist.is_initialized() else None


def shared_group() -> "Group | None":
    """As :func:`new_group`, but one for all who call this, whose messages follow one another."""
    if not dist.is_initialized():
        return None
    if dist.group.WORLD not in _shared:
        _shared[dist.group.WORLD] = _made()
    return _shared[dist.group.WORLD]


class Group:
    """A process group that torch alone holds: it goes when ``destroy_process_group`` ends all of them.

    A last reference that is dropped elsewhere may deadlock: what ends the group waits for its threads, which may wait
    for Python's lock.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._reference = ref(group)

    def get(self) -> dist.ProcessGroup:
        """The group; raises LostRankError where it was taken apart."""
        group = self._reference()
        if group is None:
            raise LostRankError(
                "The process group should still be there, but it was taken apart; wait() for what is saved before "
                "torch.distributed.destroy_process_group, and start the run again where a rank has ended."
            )
        return group

    def leave(self) -> None:
        """Ends the group on this rank, so that ranks that wait for this one learn it."""
        sleep(0.1)  # its threads may hold what they have just sent
        group = self._reference()
        if group is not None and dist.is_initialized():
            with suppress(ValueError, AssertionError):  # torch has ended it already
                dist.destroy_process_group(group)


_shared: WeakKeyDictionary[Any, Group] = WeakKeyDictionary()


def _made() -> Group:
    group: Any = dist.new_group(backend="gloo")  # of which not every torch says that it is a group
    return Group(group)


def _of(group: Group | None) -> dist.ProcessGroup | None:
    return None if group is None else group.get()


def gather(value: _T, group: Group | None = None) -> list[_T]:
    """The values of all ranks, in their order; they have to be picklable.

    Raises:
        LostRankError: where a rank has ended.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with reports_lost_ranks(group):
        dist.all_gather_object(values, value, group=_of(group))
    return values


def raise_first_error(error: Exception | None, group: Group | None = None) -> None:
    """Raises on all ranks what went wrong on the lowest rank on which something did.

    Args:
        error: what went wrong on this rank, if anything did.
        group: all of its ranks have to call this.
    """
    errors = gather(None if error is None else _picklable(error), group)
    first = next((index for index, one in enumerate(errors) if one is not None), None)
    if first is not None:
        raise (errors[first] if error is None or first != rank() else error)  # type: ignore[misc]


def on_all_ranks(action: Callable[[], _T], group: Group | None = None) -> _T:
    """Calls ``action`` on each rank; where it raises on one, all ranks raise that, else each has its own result."""
    try:
        result = action()
    except Exception as error:
        raise_first_error(error, group)
        raise
    raise_first_error(None, group)
    return result


def on_first_rank(action: Callable[[], _T], group: Group | None = None) -> _T:
    """Calls ``action`` on the first rank, while the others wait; all have its result, or raise what it raised."""
    answer: list[Any] = [None, None]
    failure: Exception | None = None
    if is_first_rank():
        try:
            answer[0] = action()
        except Exception as error:
            failure, answer[1] = error, _picklable(error)
    if dist.is_initialized():
        with reports_lost_ranks(group):
            dist.broadcast_object_list(answer, src=0, group=_of(group))
    if answer[1] is not None:
        raise failure or answer[1]
    result: _T = answer[0]
    return result


def first_difference(description: dict[str, str], group: Group | None = None) -> str | None:
    """The first entry in which a rank differs from the first rank, in words; None where all are equal.

    Args:
        description: names and what they are, in words. Where all ranks agree, digests alone are sent.
        group: all of its ranks have to call this.
    """
    digest = sha256(repr(sorted(description.items())).encode()).hexdigest()
    digests = gather(digest, group)
    if len(set(digests)) == 1:
        return None
    first, *others = gather(description, group)
    for index, other in enumerate(others, start=1):
        for name in sorted({*first, *other}):
            one, two = first.get(name), other.get(name)
            if one is None or two is None:
                having, lacking = (0, index) if two is None else (index, 0)
                return f"{name} on rank {having} and not on rank {lacking}"
            if one != two:
                return f"{name} {one} on rank 0 and {two} on rank {index}"
    return None


def _picklable(error: Exception) -> Exception:
    """The error, or one that says the same and can be sent."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (our own)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def reports_lost_ranks(group: Group | None) -> Iterator[None]:
    """Raises :class:`LostRankError` where a message fails, and takes the group apart, so that the others learn it."""
    try:
        yield
    except LostRankError:
        raise
    except RuntimeError as error:
        if group is not None:
            group.leave()
        raise LostRankError(
            "All ranks should answer, but one does not, and has probably ended; see what it said, and start the run "
            "again from its last checkpoint."
        ) from error.with_traceback(None)  # whose frames hold the group
