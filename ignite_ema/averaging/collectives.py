"""What the processes of a group say to each other, where there is a group."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

__all__ = ["first_said", "is_first_rank", "on_first_rank", "rank"]

_T = TypeVar("_T")


def rank() -> int:
    """The rank of this process, 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first_rank() -> bool:
    """Whether this process is alone or the first of its group."""
    return rank() == 0


def on_first_rank(action: Callable[[], _T]) -> _T:
    """Calls ``action`` on the first rank, while the others wait; all get its result, or raise what goes wrong there."""
    answer: list[Any] = [None, None]
    if is_first_rank():
        try:
            answer[0] = action()
        except Exception as error:
            answer[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    result: _T = answer[0]
    return result


def first_said(text: str | None) -> str | None:
    """The first text that one of the ranks has to say."""
    texts = [text]
    if dist.is_initialized():
        texts *= dist.get_world_size()
        dist.all_gather_object(texts, text)
    return next((said for said in texts if said is not None), None)
