"""Messages between the ranks of a group. A process without a group is alone, and agrees with itself.

What can fail on one rank alone is told to all before any of them goes on, so that none waits for another in vain.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import Any, TypeAlias, TypeVar

import torch.distributed as dist

__all__ = [
    "Group",
    "LostRankError",
    "first_difference",
    "gather",
    "is_first_rank",
    "leave",
    "new_group",
    "on_all_ranks",
    "on_first_rank",
    "raise_first_error",
    "rank",
    "reports_lost_ranks",
]

_T = TypeVar("_T")
Group: TypeAlias = dist.ProcessGroup | None


class LostRankError(RuntimeError):
    """A rank does not answer any more."""


def rank() -> int:
    """The rank of this process, 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first_rank() -> bool:
    """Whether this process is alone or the first of its group."""
    return rank() == 0


def new_group() -> Group:
    """A gloo group of all ranks, which have to call this; None where this process is alone."""
    return dist.new_group(backend="gloo") if dist.is_initialized() else None


def gather(value: _T, group: Group = None) -> list[_T]:
    """The values of all ranks, in their order; they have to be picklable.

    Raises:
        LostRankError: where a rank has ended.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    with reports_lost_ranks(group):
        dist.all_gather_object(values, value, group=group)
    return values


def raise_first_error(error: Exception | None, group: Group = None) -> None:
    """Raises on all ranks what went wrong on the lowest rank on which something did.

    Args:
        error: what went wrong on this rank, if anything did.
        group: all of its ranks have to call this.
    """
    errors = gather(None if error is None else _picklable(error), group)
    first = next((index for index, one in enumerate(errors) if one is not None), None)
    if first is not None:
        raise (errors[first] if error is None or first != rank() else error)  # type: ignore[misc]


def on_all_ranks(action: Callable[[], _T], group: Group = None) -> _T:
    """Calls ``action`` on each rank; where it raises on one, all ranks raise that, else each has its own result."""
    try:
        result = action()
    except Exception as error:
        raise_first_error(error, group)
        raise
    raise_first_error(None, group)
    return result


def on_first_rank(action: Callable[[], _T], group: Group = None) -> _T:
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
            dist.broadcast_object_list(answer, src=0, group=group)
    if answer[1] is not None:
        raise failure or answer[1]
    result: _T = answer[0]
    return result


def first_difference(description: dict[str, str], group: Group = None) -> str | None:
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
def reports_lost_ranks(group: Group) -> Iterator[None]:
    """Raises :class:`LostRankError` where a message fails, and takes the group apart, so that the others learn it."""
    try:
        yield
    except LostRankError:
        raise
    except RuntimeError as error:
        if group is not None:
            leave(group)
        raise LostRankError(
            "All ranks should answer, but one does not, and has probably ended; see what it said, and start the run "
            "again from its last checkpoint."
        ) from error


def leave(group: Group) -> None:
    """Takes a group of :func:`new_group` apart."""
    with suppress(ValueError, AssertionError):  # it is gone, or all groups are
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)
