"""Files of tensors: read without running anything that they hold, written whole or not at all. See `checkpoints`."""

import errno
import os
import pickle
import re
import stat
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

__all__ = [
    "check_target",
    "compact",
    "copied",
    "has_memory",
    "is_dense",
    "load_file",
    "mebibytes",
    "save_file",
    "whole_file",
]

_SUFFIXES = (".pt", ".pth", ".safetensors")
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
    tensors: dict[str, Tensor] = _safetensors(path).load_file(path)
    return tensors


def _safetensors(path: Path) -> Any:
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


def save_file(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Writes a plain state dict, as ``torch.save`` (``.pt``, ``.pth``) or as ``.safetensors``.

    The file appears at once and whole: it is written beside its place first. A file that is overwritten keeps its
    mode, and a link stays a link: what it points to is written. Tied tensors stay tied in a torch file; safetensors
    knows no ties and gets a copy for each name.

    Args:
        tensors: a mapping from names to tensors.
        path: where to; its suffix decides about the format.
        force: whether to overwrite a file that is there.

    Raises:
        FileExistsError: where there is a file already, or there is one in the end, and ``force`` is False.
        TypeError, ValueError: for another suffix, or for what is not a tensor or has no values.
        OSError: where it cannot be written; nothing is left behind then, and an old file stays.
    """
    path = Path(path)
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"tensors should be a mapping from names to tensors, got {type(tensors).__name__}; pass the state_dict() "
            "of a module."
        )
    check_target(path, force=force)
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"'{name}' should be a tensor, got {type(value).__name__}; take it out.")
        if value.is_meta:
            raise ValueError(f"'{name}' should have values, got a tensor on the meta device; load its values first.")
    with whole_file(path, force=force) as temporary:
        if path.suffix == ".safetensors":  # which would make it for the owner alone
            _safetensors(path).save_file(_alone(tensors), temporary, metadata={"format": "pt"})
        else:
            torch.save(compact(tensors), temporary)


def check_target(path: Path, *, force: bool) -> None:
    """Raises as :func:`save_file` does where ``path`` cannot be its target."""
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"'{path}' should end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}; choose one of them.")
    _check_place(path, force)


def _check_place(path: Path, force: bool) -> None:
    if path.is_dir():
        raise ValueError(f"'{path}' should be a file, got a directory; name a file in it.")
    if path.resolve().exists() and not force:
        raise _exists(path)
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"'{path}' should be in a folder that exists, but there is none; make it first.")


@contextmanager
def whole_file(path: Path, *, force: bool) -> Iterator[Path]:
    """Gives a path beside ``path`` to be written to, and moves what was written to its place at the end.

    Raises as :func:`save_file` does; nothing is left behind then.
    """
    _check_place(path, force)
    target = path.resolve()
    temporary = target.with_name(f".{uuid4().hex}{path.suffix}")
    try:
        temporary.touch()
        mode = (target if target.exists() else temporary).stat().st_mode
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.chmod(stat.S_IMODE(mode))
        _put(temporary, target, path, force)
    except (ImportError, OSError, TypeError):
        raise
    except Exception as error:  # of safetensors, and of torch where the disk is full
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise OSError(f"'{path}' could not be written: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _put(temporary: Path, target: Path, path: Path, force: bool) -> None:
    """Moves the whole file to its place; without ``force`` by a link, which alone is refused where a file is."""
    if not force:
        try:
            os.link(temporary, target)
        except FileExistsError:
            raise _exists(path) from None
        except OSError:  # a file system without links
            if target.exists():
                raise _exists(path) from None
        else:
            return
    temporary.replace(target)


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(f"'{path}' exists already; choose another name, or overwrite it with force (--force).")


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in memory of their own, which ties share."""
    copies: dict[Any, Tensor] = {}
    result = {}
    for name, value in tensors.items():
        view = _view(value)
        if view not in copies:
            copies[view] = value.detach().clone()
        result[name] = copies[view]
    return result


def _view(tensor: Tensor) -> Any:
    """What two tensors have in common that are one."""
    if tensor.layout != torch.strided:
        return id(tensor)
    place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return (*place, tensor.dtype, tensor.is_conj(), tensor.is_neg())


def compact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, ties kept, without what else their memory holds: torch saves the whole of it with each view."""
    parts = {name: value for name, value in tensors.items() if _is_part(value)}
    copies = copied(parts)
    return {name: copies[name] if name in parts else value.detach() for name, value in tensors.items()}


def _is_part(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.untyped_storage().nbytes() != tensor.nbytes


def _alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in memory of their own."""
    known: set[int] = set()
    result = {}
    for name, value in tensors.items():
        tensor = value.detach().contiguous()
        place = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if place in known else tensor
        known.add(place)
    return result


def is_dense(tensor: Tensor) -> bool:
    """Whether it is strided, and not sparse or of another layout."""
    return tensor.layout == torch.strided


def has_memory(tensor: Tensor) -> bool:
    """Whether a dense one is as large as it looks; of one number, expanded, a small file can make any size."""
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def mebibytes(tensors: Mapping[str, Tensor]) -> str:
    """The size of the dense ones, in MiB."""
    return f"{sum(one.nbytes for one in tensors.values() if is_dense(one)) / 2**20:.3f}"
