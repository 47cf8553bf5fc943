"""Finds the engines that evaluate an average, by what the functions of a trainer refer to."""

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ignite.engine import Engine
from torch import Tensor, nn

__all__ = ["evaluators_among"]

_MOST = 1000  # objects that are looked at; a handler is a few functions, not a data set
_LARGEST = 100  # entries of a container that is looked into
_LEAVES = (str, bytes, int, float, type, types.ModuleType, Tensor, nn.Module, Engine)


def evaluators_among(handlers: Iterable[Any], is_average: Callable[[object], bool]) -> list[Engine]:
    """The engines that ``handlers`` refer to and whose process functions refer to what ``is_average`` accepts.

    Looks into closures, default and partial arguments, globals by their names, bound methods, small containers and
    plain objects. An engine that is made or found only while a handler runs is not seen.
    """
    engines = {id(found): found for found in _reachable(handlers) if isinstance(found, Engine)}
    return [one for one in engines.values() if any(map(is_average, _reachable([one._process_function])))]


def _reachable(roots: Iterable[Any]) -> Iterator[Any]:
    """``roots`` and what they refer to, near ones first; modules and engines are not looked into."""
    waiting, seen = list(roots), set[int]()
    for found in waiting:  # which grows
        if len(seen) == _MOST:
            return
        if id(found) not in seen:
            seen.add(id(found))
            yield found
            waiting += _references(found)


def _references(found: Any) -> list[Any]:
    if isinstance(found, types.FunctionType):
        cells = [cell.cell_contents for cell in found.__closure__ or () if cell != types.CellType()]  # not empty
        is_library = (found.__module__ or "").partition(".")[0] in ("torch", "ignite")  # code of exec() has none
        names = () if is_library else (name for name in _names(found.__code__) if name in found.__globals__)
        defaults = *(found.__defaults__ or ()), *(found.__kwdefaults__ or {}).values()
        return [*cells, *(found.__globals__[name] for name in names), *defaults]
    if isinstance(found, types.MethodType):
        return [found.__self__, found.__func__]
    if isinstance(found, functools.partial):
        return [found.func, *found.args, *found.keywords.values()]
    if isinstance(found, (dict, list, tuple)):
        return [] if len(found) > _LARGEST else list(found.values() if isinstance(found, dict) else found)
    if isinstance(found, _LEAVES) or type(found).__module__.startswith("ignite_ema."):
        return []
    return list(getattr(found, "__dict__", {}).values())


def _names(code: types.CodeType) -> Iterator[str]:
    """The names of globals and attributes in a function, and in the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
