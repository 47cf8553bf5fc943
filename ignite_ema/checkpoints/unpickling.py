"""Reads a pickle as data: values are built from it, and nothing of this process is imported, called or changed.

`pickle.Unpickler` calls whatever a file names, and even one that is restricted writes attributes into the functions and
classes that it lets through. Here a name stays a name. A few names have a builder, which makes plain values and
tensors; what a file makes with any other name becomes a `ForeignObject`.
"""

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

__all__ = ["Builders", "ForeignObject", "Name", "Record", "Unpickler", "kind_of", "plain_builders"]

_MOST_STEPS = 10_000_000  # some ten seconds; a checkpoint of 10,000 tensors takes 500,000
_LARGEST_INTEGER = 2**1024
_LONGEST_KEY = 16  # items of a tuple: hashing one takes as long each time


@dataclass(frozen=True)
class Name:
    """The dotted name of a class or a function in a file."""

    text: str


class ForeignObject(dict[Any, Any]):
    """Takes the place of an object of a class that is not known: has its items, as a mapping, and nothing else."""

    __slots__ = ("class_name",)

    def __init__(self, class_name: str = "") -> None:
        super().__init__()
        self.class_name = class_name

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


class Record:
    """What an object of a known class is made of, for a builder that keeps it: does nothing with it.

    Attributes:
        kind: the name of the class.
        arguments: what the file calls the class with.
        state: what the file fills the object with.
    """

    __slots__ = ("arguments", "kind", "state")

    def __init__(self, kind: str, *arguments: Any) -> None:
        self.kind = kind
        self.arguments = arguments
        self.state: Any = None


Builders = Mapping[str, Callable[..., Any]]


def kind_of(value: Any) -> str:
    """What a value is, for a message."""
    if isinstance(value, Name):
        return f"the object named {value.text!r}"
    if isinstance(value, ForeignObject):
        return f"an object of the class {value.class_name!r}"
    return value.kind if isinstance(value, Record) else type(value).__name__


def plain_builders() -> dict[str, Callable[..., Any]]:
    """Builders of what the standard library has, by dotted name."""
    return {
        "builtins.set": lambda items=(): _set(items),
        "builtins.frozenset": lambda items=(): frozenset(_set(items)),
        "builtins.bytearray": lambda data=b"", *_: bytearray(_checked(data, bytes, str)),
        "builtins.complex": lambda real=0.0, imag=0.0: complex(_checked(real, float), _checked(imag, float)),
        "collections.OrderedDict": lambda items=(): OrderedDict(_pairs(items)),
        "collections.Counter": lambda items=(): dict(_pairs(items)),
        "collections.defaultdict": lambda *_: {},
        "collections.deque": lambda items=(), *_: list(_checked(items, list, tuple)),
        "_codecs.encode": lambda text, *_: _checked(text, str).encode("latin-1"),
    }


def _checked(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise ValueError(f"a pickle builds a value from a {type(value).__name__}")
    return value


def _set(items: Any) -> set[Any]:
    return {_key(item) for item in _checked(items, list, tuple)}


def _pairs(items: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(items, dict):
        yield from items.items()
        return
    for pair in _checked(items, list, tuple):
        key, value = _checked(pair, list, tuple)
        yield _key(key), value


def _key(value: Any, depth: int = 2) -> Hashable:
    """The value, if hashing it takes a moment only: nested tuples overflow the stack, large integers collide."""
    if isinstance(value, tuple):
        if len(value) > _LONGEST_KEY or not depth:
            raise ValueError("a pickle has a long tuple as a key")
        for item in value:
            _key(item, depth - 1)
    elif isinstance(value, int) and abs(value) >= 2**61 - 1:
        raise ValueError("a pickle has a large integer as a key")
    hash(value)
    return value  # type: ignore[no-any-return]


_SIZED = (list, tuple, dict, str, bytes)


class Unpickler:
    """Builds the value of one pickle.

    Args:
        builders: what makes a value, by dotted name; called with the arguments that the file has.
        persistent: what makes a value of a persistent id, such as torch's storages.
        size: in bytes, of the file: builders copy no more items in all.
        most_steps: that are taken; there are no more than bytes.
    """

    def __init__(
        self, builders: Builders, persistent: Callable[[Any], Any], size: int, most_steps: int = _MOST_STEPS
    ) -> None:
        self._builders = builders
        self._persistent = persistent
        self._left_to_copy = size
        self._most_steps = most_steps
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self, stream: IO[bytes]) -> Any:
        """The value of the pickle at which the stream stands, which stands behind it afterwards.

        Raises whatever comes of a broken pickle: ValueError, TypeError, KeyError, IndexError and others.
        """
        argument: Any
        for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if step > self._most_steps:
                raise ValueError(f"a pickle has more than {self._most_steps:,} steps")
            if opcode.name == "STOP":
                return self._stack.pop()
            _STEPS[opcode.name](self, argument)  # KeyError for what no file of tensors has
        raise ValueError("a pickle has no end")

    def _push(self, value: Any) -> None:
        if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
            raise ValueError("a pickle has an integer of more than 1,024 bits")
        self._stack.append(value)

    def _put(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _tuple_of(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._stack.append(items)

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, set):
            target.update(map(_key, items))
        elif not isinstance(target, ForeignObject):
            _checked(target, list).extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise TypeError(f"a pickle sets an item of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _push_dict(self, items: list[Any]) -> None:
        self._stack.append({})
        self._set_items(items)

    def _global(self, argument: str) -> None:
        """Two words; of Python 2, with which protocol 2 keeps in step, some modules have other names."""
        module, _, name = argument.partition(" ")
        self._push_name(module, name)

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._push_name(_checked(module, str), _checked(name, str))

    def _push_name(self, module: str, name: str) -> None:
        self._stack.append(Name(f"{'builtins' if module == '__builtin__' else module}.{name}"))

    def _call(self, function: Any, arguments: Any) -> None:
        name = function.text if isinstance(function, Name) else ""
        if (builder := self._builders.get(name)) is None:
            self._stack.append(ForeignObject(name))
            return
        self._left_to_copy -= sum(len(one) for one in _checked(arguments, tuple) if isinstance(one, _SIZED))
        if self._left_to_copy < 0:
            raise ValueError("a pickle copies the same items again and again")
        self._stack.append(builder(*arguments))

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._call(function, arguments)

    def _new_object_with_keywords(self, _: Any) -> None:
        self._stack.pop()
        self._reduce(None)

    def _old_object(self, _: Any) -> None:
        function, *arguments = self._since_mark()
        self._call(function, tuple(arguments))

    def _instance(self, argument: str) -> None:
        arguments = self._since_mark()
        self._global(argument)
        self._call(self._stack.pop(), tuple(arguments))

    def _build(self, _: Any) -> None:
        """Drops the attributes of an object, but of a record, and the versions that torch keeps with a state dict."""
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Record):
            target.state = state
        if isinstance(target, OrderedDict) and isinstance(state, dict) and isinstance(state.get("_metadata"), dict):
            target._metadata = state["_metadata"]  # type: ignore[attr-defined]

    def _persistent_value(self, _: Any) -> None:
        self._stack.append(self._persistent(self._stack.pop()))


_LITERALS = (
    *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
_STEPS: dict[str, Callable[[Unpickler, Any], Any]] = {
    **dict.fromkeys(_LITERALS, Unpickler._push),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), Unpickler._put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda self, place: self._stack.append(self._memo[place])),
    **dict.fromkeys(("PROTO", "FRAME"), lambda self, _: None),
    "NONE": lambda self, _: self._stack.append(None),
    "NEWTRUE": lambda self, _: self._stack.append(True),
    "NEWFALSE": lambda self, _: self._stack.append(False),
    "EMPTY_DICT": lambda self, _: self._stack.append({}),
    "EMPTY_LIST": lambda self, _: self._stack.append([]),
    "EMPTY_SET": lambda self, _: self._stack.append(set()),
    "EMPTY_TUPLE": lambda self, _: self._stack.append(()),
    "MARK": Unpickler._mark,
    "POP": lambda self, _: self._stack.pop(),
    "POP_MARK": lambda self, _: self._since_mark(),
    "DUP": lambda self, _: self._stack.append(self._stack[-1]),
    "MEMOIZE": Unpickler._memoize,
    "TUPLE": lambda self, _: self._stack.append(tuple(self._since_mark())),
    "TUPLE1": lambda self, _: self._tuple_of(1),
    "TUPLE2": lambda self, _: self._tuple_of(2),
    "TUPLE3": lambda self, _: self._tuple_of(3),
    "LIST": lambda self, _: self._stack.append(self._since_mark()),
    "DICT": lambda self, _: self._push_dict(self._since_mark()),
    "FROZENSET": lambda self, _: self._stack.append(frozenset(_set(self._since_mark()))),
    "APPEND": lambda self, _: self._append([self._stack.pop()]),
    "APPENDS": lambda self, _: self._append(self._since_mark()),
    "ADDITEMS": lambda self, _: self._append(self._since_mark()),
    "SETITEM": lambda self, _: self._set_items([self._stack.pop(-2), self._stack.pop()]),
    "SETITEMS": lambda self, _: self._set_items(self._since_mark()),
    "GLOBAL": Unpickler._global,
    "STACK_GLOBAL": Unpickler._stack_global,
    "INST": Unpickler._instance,
    "OBJ": Unpickler._old_object,
    "REDUCE": Unpickler._reduce,
    "NEWOBJ": Unpickler._reduce,
    "NEWOBJ_EX": Unpickler._new_object_with_keywords,
    "BUILD": Unpickler._build,
    "BINPERSID": Unpickler._persistent_value,
}
