"""The names of a model's tensors, and where its modules keep them.

Names are those of ``model.state_dict()``, found by the identity of the tensors: a module that renames its entries
there, such as activation checkpointing or Fabric, has the same names here. Wrappers are unwrapped.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


class Place(NamedTuple):
    """Where a module keeps a tensor.

    Attributes:
        table: the module's ``_parameters`` or ``_buffers``.
        key: the tensor's key there.
        path: the prefix of the module's names, as in :func:`modules_by_path`.
        is_buffer: whether the table is ``_buffers``.
        is_saved: whether ``state_dict()`` has the tensor; False for a non-persistent buffer.
    """

    table: dict[str, Any]
    key: str
    path: str
    is_buffer: bool
    is_saved: bool

    def get(self) -> Tensor:
        """The tensor that is there now."""
        tensor: Tensor = self.table[self.key]
        return tensor


def unwrapped(module: nn.Module, *, keep: type[nn.Module] | tuple[()] = ()) -> nn.Module:
    """The module inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``, except in a ``keep``."""
    while not isinstance(module, keep) and (key := _wrapper_key(module)) is not None:
        module = module._modules[key]  # type: ignore[assignment]
    return module


def places_of(root: nn.Module) -> dict[str, Place]:
    """The place of each parameter and buffer of ``root``, by name; a tied tensor under each of its names.

    A tensor that ``root.state_dict()`` lacks, or has only a copy of, is named by its path.
    """
    root = unwrapped(root)
    try:
        state = root.state_dict(keep_vars=True)
    except TypeError:  # the user's own method, without torch's arguments
        state = root.state_dict()
    saved: dict[int, list[str]] = {}
    for name, value in state.items():
        saved.setdefault(id(value), []).append(name)
    found: dict[int, list[tuple[str, Place]]] = {}  # for each tensor its places, each with its name with wrappers
    for path, raw, module in _walk(root, "", "", set()):
        for table, is_buffer in ((module._parameters, False), (module._buffers, True)):
            for key, tensor in table.items():
                if tensor is not None:
                    is_saved = id(tensor) in saved or raw + key in state
                    place = Place(table, key, path, is_buffer, is_saved)
                    found.setdefault(id(tensor), []).append((raw + key, place))
    names: dict[str, Place] = {}
    for identity, places in found.items():
        raw, place = places[0]
        if len(places) == 1 and saved.get(identity, [raw]) == [raw]:
            names[place.path + place.key] = place
        else:
            names.update(_named(places, saved.get(identity, [])))
    return names


def first_names(places: dict[str, Place]) -> dict[str, str]:
    """The first name of the tensor that each name in ``places`` stands for."""
    firsts: dict[int, str] = {}
    return {name: firsts.setdefault(id(place.get()), name) for name, place in places.items()}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of ``module`` by its first name, each tied tensor once."""
    places = places_of(module)
    return {name: places[name].get() for name, first in first_names(places).items() if name == first}


def parameters_of(module: nn.Module) -> Iterator[nn.Parameter]:
    """Like ``module.parameters()``, which a model may have overridden to return groups for an optimizer."""
    return nn.Module.parameters(module)


def parameters_and_buffers(module: nn.Module) -> Iterator[Tensor]:
    """First the parameters, then the buffers of ``module``, each tensor once."""
    yield from parameters_of(module)
    yield from nn.Module.buffers(module)


def modules_by_path(root: nn.Module) -> dict[str, nn.Module]:
    """Each module once, by the prefix of its names, without wrappers: ``""`` is ``root``, then ``"0."``, …"""
    return {path: module for path, _, module in _walk(root, "", "", set())}


def _wrapper_key(module: nn.Module) -> str | None:
    """The key of the wrapped module; None if ``module`` is not a wrapper."""
    if isinstance(module, (DistributedDataParallel, DataParallel)):
        return "module"
    # What torch.compile returns, known by its name: importing the class would take a second.
    return "_orig_mod" if type(module).__name__ == "OptimizedModule" else None


def _walk(module: nn.Module, path: str, raw: str, visited: set[int]) -> list[tuple[str, str, nn.Module]]:
    """Each module once, with the prefix of its names without and with those of wrappers."""
    while (key := _wrapper_key(module)) is not None:
        module, raw = module._modules[key], f"{raw}{key}."  # type: ignore[assignment]
    if id(module) in visited:
        return []
    visited.add(id(module))
    found = [(path, raw, module)]
    for key, child in module._modules.items():
        if child is not None:
            found += _walk(child, f"{path}{key}.", f"{raw}{key}.", visited)
    return found


def _named(places: list[tuple[str, Place]], saved: list[str]) -> dict[str, Place]:
    """Gives each place of one tensor its name in the ``state_dict``, or its path."""
    by_path = {place.path + place.key: place for _, place in places}
    paths = {raw: place.path + place.key for raw, place in places}
    names = [paths.get(name, name.replace("_orig_mod.", "")) for name in saved]
    found = {path: place for path, place in by_path.items() if path in names}
    left = [place for path, place in by_path.items() if path not in found]
    names_left = [name for name in names if name not in found]
    if not names_left:  # not saved, or more places than names, such as those of a wrapper that lists a module twice
        return found or by_path
    if len(left) != len(names_left):  # a module with several names has one place for each of its tensors
        left = [places[0][1]] * len(names_left)
    found.update(zip(names_left, left, strict=True))
    return {name: found[name] for name in names}
