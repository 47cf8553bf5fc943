"""What a model and its averaged twin have in common: two trees of modules, walked side by side.

Tensors are paired by owner and name, never by position, and wrappers (``DistributedDataParallel``, ``DataParallel``,
what ``torch.compile`` returns) are looked through. What does not match raises :class:`Mismatch` and names the path.
"""

from collections.abc import Container, Iterator
from operator import getitem, is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from .sharding import is_sharded, local, sharding
from .storage import holds_values
from .traversal import TABLES, inside

__all__ = ["LostValues", "Mismatch", "Pair", "Slot", "Structure", "TreeWatch"]

Slot = tuple[dict[str, Any], str]


class Mismatch(RuntimeError):
    """The model and its averaged twin do not match; the text is a clause that says where."""

    way_out = "make the change before the average, or make a new average and load the old weights into it"


class LostValues(Mismatch):
    """There is no memory for the values of the tensor ``path`` of the model or the twin, which ``where`` names."""

    way_out = "give the tensor its values back (to_empty, then load_state_dict), or make a new average"

    def __init__(self, path: str, where: str) -> None:
        super().__init__(f"'{path}' has lost its values in the {where} (moved to meta, or its memory freed)")


class Pair(NamedTuple):
    """A tensor of the model and its counterpart in the averaged twin, as the places where they live.

    Attributes:
        path: dotted name of the tensor in the model, without the names of wrappers; of a tied tensor the first one.
        online: the module of the model that owns the tensor.
        averaged: the module of the twin that owns the counterpart.
        kind: the dictionary of these modules that holds it, ``"_parameters"`` or ``"_buffers"``.
        key: its key there.
    """

    path: str
    online: nn.Module
    averaged: nn.Module
    kind: str
    key: str

    def slots(self) -> tuple[Slot, Slot]:
        """Where the two tensors (online, averaged) are read from: a dictionary and a key each."""
        return (getattr(self.online, self.kind), self.key), (getattr(self.averaged, self.kind), self.key)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The two tensors (online, averaged) as they are now, of the same shape, layout and kind of number.

        Of sharded ones the parts that this rank holds.

        Raises:
            Mismatch: where they differ in that, or one of them cannot be read or written.
        """
        online, averaged = (owner[key] for owner, key in self.slots())
        self.refuse_nested(online, averaged)
        if is_sharded(online) or is_sharded(averaged):
            if (ours := sharding(online)) != (theirs := sharding(averaged)):
                raise Mismatch(f"'{self.path}' is {ours} in the model and {theirs} in the twin")
            if online.shape == averaged.shape:
                online, averaged = local(online), local(averaged)
        if online.shape != averaged.shape:
            raise Mismatch(
                f"'{self.path}' has shape {tuple(online.shape)} in the model and {tuple(averaged.shape)} in the twin"
            )
        if online.layout != averaged.layout:
            raise Mismatch(f"'{self.path}' has {online.layout} in the model and {averaged.layout} in the twin")
        if online.dtype != averaged.dtype and (
            online.is_floating_point() != averaged.is_floating_point() or online.is_complex() != averaged.is_complex()
        ):
            raise Mismatch(f"'{self.path}' has {online.dtype} in the model and {averaged.dtype} in the twin")
        for tensor, where in ((online, "model"), (averaged, "twin")):
            if not holds_values(tensor):
                raise LostValues(self.path, where)
        if averaged.is_inference():
            raise Mismatch(f"'{self.path}' of the twin was made inside torch.inference_mode() and cannot be written")
        return online, averaged

    def refuse_nested(self, online: Tensor, averaged: Tensor) -> None:
        """Raises Mismatch where one of the two tensors is nested, and has no one shape."""
        if online.is_nested or averaged.is_nested:
            where = "model" if online.is_nested else "twin"
            raise Mismatch(f"'{self.path}' is a nested tensor in the {where}")


class Structure:
    """Every parameter and buffer of two equal trees of modules, in pairs, each tied tensor once.

    Args:
        online: the model.
        averaged: its averaged twin.
        share_frozen: whether the two may share parameters that do not require gradients.
        once_shared: parameters that they have shared. Where the twin still holds one of these and the model holds
            another one in its place, :meth:`share` lets the twin share that.

    Attributes:
        roots: the two modules (online, averaged).
        modules: all modules of both, wrappers included.
        pairs: the pairs, in the order of the model, but not those of shared parameters.
        shared: the shared parameters.
        names: all of them, tied tensors under each name.

    Raises:
        Mismatch: where the trees differ in the names or ties of their tensors, or share a module or a tensor.
    """

    def __init__(
        self,
        online: nn.Module,
        averaged: nn.Module,
        share_frozen: bool = False,
        once_shared: Container[Tensor] = (),
    ) -> None:
        self.roots = online, averaged
        self.share_frozen = share_frozen
        self.modules: list[nn.Module] = []
        self.pairs: list[Pair] = []
        self.shared: list[Pair] = []
        self.names: list[Pair] = []
        self._once_shared = once_shared
        self._to_share: list[Pair] = []
        self._walk(online, averaged, "", {}, set())

    def share(self) -> None:
        """Lets the twin hold what the model holds in place of a parameter that was shared."""
        for pair in self._to_share:
            setattr(pair.averaged, pair.key, pair.online._parameters[pair.key])

    def _walk(
        self, online: nn.Module, averaged: nn.Module, prefix: str, known: dict[int, Pair], visited: set[tuple[int, int]]
    ) -> None:
        online, averaged = (self._unwrapped(module) for module in (online, averaged))
        if (id(online), id(averaged)) in visited:
            return
        visited.add((id(online), id(averaged)))
        if online is averaged:
            place = f"'{prefix.removesuffix('.')}'" if prefix else "the root"
            raise Mismatch(f"{place} is one and the same module in the model and in the twin")
        self.modules += (online, averaged)
        for kind in TABLES:
            owners: list[dict[str, Any]] = [getattr(module, kind) for module in (online, averaged)]
            names, theirs = ([key for key, value in o.items() if value is not None] for o in owners)
            for name in sorted(set(names) ^ set(theirs)):
                here, there = ("model", "twin") if name in names else ("twin", "model")
                raise Mismatch(f"'{prefix}{name}' is in the {here} but not in the {there}")
            for name in names:
                if kind == "_modules":
                    self._walk(owners[0][name], owners[1][name], f"{prefix}{name}.", known, visited)
                else:
                    self._add(Pair(prefix + name, online, averaged, kind, name), known)

    def _unwrapped(self, module: nn.Module) -> nn.Module:
        while (wrapped := inside(module)) is not None:
            self.modules.append(module)
            module = wrapped
        return module

    def _add(self, pair: Pair, known: dict[int, Pair]) -> None:
        self.names.append(pair)
        ours, theirs = (owner[key] for owner, key in pair.slots())
        pair.refuse_nested(ours, theirs)
        if theirs is not ours and theirs in self._once_shared:
            self._to_share.append(pair)
            theirs = ours
        if ours is theirs:
            self._check_shared(pair, ours)
        in_model, in_twin = known.get(id(ours)), known.get(id(theirs))
        if in_model is not in_twin:
            here, there = ("model", "twin") if in_model else ("twin", "model")
            path = (in_model or in_twin or pair).path
            raise Mismatch(f"'{pair.path}' is tied to '{path}' in the {here} but not in the {there}")
        if in_model is None:
            known[id(ours)] = known[id(theirs)] = pair
            (self.shared if ours is theirs else self.pairs).append(pair)

    def _check_shared(self, pair: Pair, tensor: Tensor) -> None:
        if not (self.share_frozen and isinstance(tensor, nn.Parameter)):
            raise Mismatch(f"'{pair.path}' is one and the same tensor in the model and in the twin")
        if tensor.requires_grad:
            raise Mismatch(f"'{pair.path}' was frozen and is shared with the average, but requires gradients now")


class TreeWatch:
    """Reads tensors out of two module trees, in microseconds, as long as these have the structure that they had.

    That is: each module has the tables that it had (``_parameters``, ``_buffers`` and ``_modules``; of those without
    entries one stands for all), of as many entries, with the same modules in them; what was tied, or shared, still is.
    It holds no tensors itself.

    Args:
        structure: the two trees.
        slots: where the tensors are, all of them in tables of the two trees.
    """

    def __init__(self, structure: Structure, slots: list[Slot]) -> None:
        tables = [getattr(module, name) for module in structure.modules for name in TABLES]
        self._empty = [table for table in tables if not table]
        self._filled = [table for table in tables if table]
        self._sizes = list(map(len, self._filled))
        fixed = list(_fixed_entries(structure.modules))
        self._tables = [table for table, _ in slots] + [table for table, _, _ in fixed]
        self._keys = [key for _, key in slots] + [key for _, key, _ in fixed]
        self._fixed = slice(len(slots), None)
        self._held = [value for _, _, value in fixed]
        named = [slot for pair in structure.names for slot in pair.slots()]
        self._ties = list(_ties(named))
        read = {(id(table), key) for table, key in slots}
        self._kept = [(table, key) for table, key in named if (id(table), key) not in read]

    def read(self) -> list[Any] | None:
        """What is in the slots now, and other things after it; None where the structure has changed.

        Raises:
            KeyError: where a name is gone.
        """
        found = list(map(getitem, self._tables, self._keys))
        if any(self._empty) or list(map(len, self._filled)) != self._sizes:
            return None
        if not all(map(is_, found[self._fixed], self._held)):
            return None
        if self._kept and any(table[key] is None for table, key in self._kept):
            return None
        if self._ties and any(a[i] is not b[j] for a, i, b, j in self._ties):
            return None
        return found


def _fixed_entries(modules: list[nn.Module]) -> Iterator[tuple[Any, str, object]]:
    """Where a module holds a table, or a table what is no tensor, and what that is; as tables, keys and values."""
    for module in modules:
        tables = [(name, getattr(module, name)) for name in TABLES]
        filled = [(name, table) for name, table in tables if table]
        for name, table in filled or tables[:1]:
            yield vars(module), name, table
        for _, table in filled:
            for key, value in table.items():
                if not isinstance(value, Tensor):
                    yield table, key, value


def _ties(slots: list[Slot]) -> Iterator[tuple[Any, str, Any, str]]:
    """Each slot whose tensor is in another one before it, as table and key, and that first one."""
    first: dict[int, Slot] = {}
    for table, key in slots:
        other, name = first.setdefault(id(table[key]), (table, key))
        if other is not table or name != key:
            yield table, key, other, name
