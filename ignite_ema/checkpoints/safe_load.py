"""Reads files of tensors without running anything that they hold."""

import errno
import os
import pickle
import re
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["load_file", "safetensors_for"]

_lock = threading.Lock()  # torch has one list of allowed names for the whole process


def load_file(path: str | os.PathLike[str]) -> Any:
    """What a file of ``torch.save``, or a ``.safetensors`` file, holds, on the CPU.

    Nothing in the file is imported or run: objects of other classes than torch's own (an ``argparse.Namespace``, an
    entry of a log) become empty stand-ins. The exception are classes that the program itself has allowed with
    ``torch.serialization.add_safe_globals``: these are made, by their own code.

    Tensors stay mapped to the file where its format allows, so that what is never looked at is never read: clone what
    should outlive a file that is overwritten in place.

    Threads take turns here. A ``torch.load`` of their own that runs at the same time may get stand-ins too.

    Raises:
        FileNotFoundError, ValueError: for what is no such file, in one sentence.
        ImportError: for a ``.safetensors`` file where safetensors is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"'{path}' should be a file, but there is none; check the path.")
    if path.is_dir():
        raise ValueError(f"'{path}' should be a file, got a directory; name the file in it that holds the weights.")
    if not path.stat().st_size:
        raise ValueError(f"'{path}' should hold weights, but it is empty; take another checkpoint.")
    try:
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        with _lock:
            return _load_torch(path)
    except (ImportError, MemoryError, _Foreign):
        raise
    except Exception as error:  # of a broken file nearly anything can come
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which torch says of a file that is cut short
            raise
        kind = "safetensors" if path.suffix == ".safetensors" else "torch.save"
        raise ValueError(
            f"'{path}' should be a file that {kind} wrote, but it cannot be read as one; it may be cut short, or of "
            "another kind."
        ) from error


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = safetensors_for(path).load_file(path)
    return tensors


def safetensors_for(path: Path) -> Any:
    """The module ``safetensors.torch``; where it is not installed, raises ImportError that names ``path``."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"'{path}' needs the package safetensors; pip install safetensors.") from error
    return safetensors.torch


class _Foreign(ValueError):
    """A file holds objects that cannot be left out."""


def _load_torch(path: Path) -> Any:
    if not zipfile.is_zipfile(path) and tarfile.is_tarfile(path):
        raise _Foreign(
            f"'{path}' should be a file of torch 1.0 or newer, got the tar format of older ones; load it with "
            "torch.load(..., weights_only=False) if you trust it, and save it again."
        )
    if zipfile.is_zipfile(path) and _is_compressed(path):
        raise _Foreign(
            f"'{path}' should hold its tensors as they are, but the file was compressed; load it with "
            "torch.load(..., weights_only=True) if you trust its size, and save it again."
        )
    names: set[str] = set()
    while True:
        try:
            with _allowed(names):
                return _weights_only(path)
        except pickle.UnpicklingError as error:
            foreign = _foreign(path, error)
            if not foreign:
                raise
            if foreign <= names or not hasattr(torch.serialization, "safe_globals"):  # torch 2.4
                raise _Foreign(
                    f"'{path}' should hold tensors and plain values, but it holds objects that cannot be left out, "
                    f"among {', '.join(sorted(foreign)[:8])}; if you trust it, load it with torch.load(..., "
                    "weights_only=False) and pass the mapping."
                ) from error
            names |= foreign


def _is_compressed(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def _weights_only(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _allowed(names: set[str]) -> AbstractContextManager[Any]:
    """Puts stand-ins in the place of the objects of these names, inside of its block."""
    if not names:
        return nullcontext()
    return torch.serialization.safe_globals([_stand_in(name) for name in names])


def _foreign(path: Path, error: Exception) -> set[str]:
    """The dotted names of objects in a file that are not torch's own: all, or where they cannot be listed the next."""
    list_names = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    listed = list_names(path) if list_names is not None and zipfile.is_zipfile(path) else []
    first = re.findall(r"GLOBAL (\S+)", str(error))
    return {name if "." in name else f"builtins.{name}" for name in [*listed, *first]}


class _Inert:
    """Takes the place of a foreign object: swallows what it is made of, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _list(items: Iterable[Any] = (), maxlen: int | None = None) -> list[Any]:
    return list(items)


def _dict(factory: Any = None) -> dict[Any, Any]:
    return {}


_CONTAINERS: dict[str, Callable[..., Any]] = {
    "collections.deque": _list,
    "collections.defaultdict": _dict,
}  # torch fills no subclasses


def _stand_in(name: str) -> Callable[..., Any]:
    """Something harmless of that name."""
    module, _, qualname = name.rpartition(".")
    stand_in = _CONTAINERS.get(name, type(qualname, (_Inert,), {}))
    stand_in.__module__, stand_in.__qualname__ = module, qualname
    return stand_in
