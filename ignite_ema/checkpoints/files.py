"""Reads and writes files of tensors: reading runs nothing in a file, and a file is written whole or not at all."""

import errno
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import torch
from torch import Tensor


def quoted(name: Any) -> str:
    """A name from a file on one line, with escape sequences spelled out, and no longer than a line."""
    text = str(name)
    return repr(text if len(text) <= 120 else f"{text[:120]}…")


def kind_of(value: Any) -> str:
    """What a value is, for a message."""
    kind = value if isinstance(value, type) else type(value)
    is_foreign = issubclass(kind, ForeignObject)
    return f"an object of the class '{kind.__module__}.{kind.__name__}'" if is_foreign else kind.__name__


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """The size of the dense tensors, in bytes."""
    return sum(tensor.nbytes for tensor in tensors.values() if tensor.layout == torch.strided)


def compact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without unused parts of their storages, which torch would save, too; tied ones stay tied."""
    copies: dict[Any, Tensor] = {}
    result = {name: value.detach() for name, value in tensors.items()}
    for name, tensor in result.items():
        if tensor.layout == torch.strided and tensor.untyped_storage().nbytes() != tensor.nbytes:
            view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
            if view not in copies:
                copies[view] = tensor.clone()
            result[name] = copies[view]
    return result


# --- reading ---


class ForeignObject(dict[Any, Any]):
    """Stands for an object whose class is not in the table: keeps the items of a mapping, drops everything else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __call__(self, *args: Any, **kwargs: Any) -> "ForeignObject":
        return self

    def swallow(self, *args: Any) -> None:
        """Does nothing; pickle calls it to add items or set a state."""

    __setstate__ = append = extend = add = swallow


_PLAIN = ("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "list", "set", "tuple")
_REBUILDERS = ("tensor", "tensor_v2", "tensor_v3", "sparse_tensor", "meta_tensor_no_storage")
_CONTENTS = ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta")
_TENSORS = ("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")
_NAMES: dict[str, tuple[str, ...]] = {
    "torch": ("Size", "device", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "torch._utils": tuple(f"_rebuild_{name}" for name in _REBUILDERS),
    "torch.serialization": ("_get_layout",),
    "torch.storage": ("UntypedStorage",),
    "torch.distributed.checkpoint.metadata": (*_CONTENTS, *_TENSORS),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "builtins": (*_PLAIN, "int", "range", "str"),
    "__builtin__": (*_PLAIN, "long", "unicode", "xrange"),  # the names of Python 2, which protocol 2 writes
    "_codecs": ("encode",),  # bytes in protocol 2
    "collections": ("Counter", "OrderedDict", "defaultdict", "deque"),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "numpy": ("dtype", "ndarray"),
    **dict.fromkeys(("numpy.core.multiarray", "numpy._core.multiarray"), ("_reconstruct", "scalar")),
    **dict.fromkeys(("numpy.core.numeric", "numpy._core.numeric"), ("_frombuffer",)),
}  # what a file may import: modules, and names in them
_BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda rebuild, kind, args, state: rebuild(*args),
}  # replaces other names: parameters and tensors of other classes come back as plain tensors


# The unpickler in Python: in C, a flipped bit in the index of a memo takes up to 64 GB of memory.
class _RestrictedUnpickler(pickle._Unpickler):
    """Imports only the names in the tables, and returns a fresh :class:`ForeignObject` class for any other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _BUILDERS:
            return partial(_BUILDERS[module, name])  # a file must not set attributes of functions
        if name in _NAMES.get(module, ()):
            for place in (module.replace("numpy.core", "numpy._core"), module):
                with suppress(ImportError, AttributeError):  # numpy is missing, or older than 2
                    found = super().find_class(place, name)
                    return found if isinstance(found, type) or not callable(found) else partial(found)
        return type(name, (ForeignObject,), {"__module__": module})


def unpickled(file: IO[bytes], **options: Any) -> Any:
    """What a pickle holds; runs nothing in it, and may raise anything if it is damaged."""
    return _RestrictedUnpickler(file, **options).load()


class _Pickle:
    """What ``torch.load`` takes as ``pickle_module``."""

    Unpickler = _RestrictedUnpickler
    load = staticmethod(unpickled)


def load_stream(file: Path | IO[bytes], *, mmap: bool = False) -> Any:
    """What ``torch.save`` wrote, on the CPU; runs nothing in it, and may raise anything if it is damaged."""
    return torch.load(file, map_location="cpu", mmap=mmap, pickle_module=_Pickle, weights_only=False)


def load_file(path: str | os.PathLike[str], *, verified: bool = True) -> Any:
    """What a file of ``torch.save``, or a ``.safetensors`` file, holds, on the CPU.

    Nothing in the file runs. Torch's own classes, containers, numpy's scalars and arrays, and dates are kept; objects
    of other classes become empty ones. Parameters and tensors of other classes come back as plain tensors. Tensors stay
    mapped to the file if its format allows: clone what should outlive a file that is overwritten in place.

    Args:
        path: the file.
        verified: whether to compare the file with its checksums first, at about the speed of the disk. Safetensors
            files and those of torch before 1.6 have no checksums: changes in these go unnoticed.

    Raises:
        FileNotFoundError, ValueError: if it is not such a file, or has changed since it was written.
        ImportError: for a ``.safetensors`` file if safetensors is not installed.
        RuntimeError: if torch is told to refuse all but ``weights_only=True``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{quoted(path)} should be a file, but there is none; check the path, and name a file if it is a directory."
        )
    with path.open("rb") as file:
        head = file.read(9)
    if path.suffix == ".safetensors" or head[8:] == b"{":
        load = _safetensors_for(path).load_file
    elif os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true"):
        raise RuntimeError(
            "TORCH_FORCE_WEIGHTS_ONLY_LOAD should not be set when ignite_ema reads a file, which never runs anything "
            "in it; unset it, or load the file with torch.load and pass the mapping."
        )
    elif head.startswith(b"PK"):
        verify(path, checksums=verified)
        load = partial(load_stream, mmap=True)
    else:
        load = load_stream
    try:
        return load(path)
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything, even a MemoryError
        raise _unreadable(path) from error


def _unreadable(what: Any) -> ValueError:
    return ValueError(
        f"{quoted(what)} should be a file that torch.save or safetensors wrote, but it cannot be read as such. It is "
        "damaged, cut short, or of another kind, such as TorchScript or a Git LFS pointer; take another copy."
    )


def verify(file: Path | IO[bytes], name: str | None = None, *, checksums: bool = True) -> None:
    """Checks a zip archive of ``torch.save``, and compares it with the checksums in it; messages call it ``name``.

    Raises:
        ValueError: if a byte has changed since the file was written, or it is not a zip archive of tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            for entry in entries:  # torch would run a TorchScript archive, and read compressed bytes as numbers
                if entry.filename.endswith("/constants.pkl") or entry.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile(entry.filename)
            # All are zero if torch was told to write none (torch.serialization.set_crc32_options).
            changed = archive.testzip() if checksums and any(entry.CRC for entry in entries) else None
    except Exception as error:  # as in load_file
        raise _unreadable(name or file) from error
    if changed:
        raise ValueError(
            f"{quoted(name or file)} should be as it was written, but has changed since: the checksum of its entry "
            f"{quoted(changed)} differs; take another copy."
        )


def _safetensors_for(path: Path) -> Any:
    """The module ``safetensors.torch``."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{quoted(path)} needs the package safetensors; pip install safetensors.") from error
    return safetensors.torch


# --- writing ---


def save_file(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Writes a plain state dict, as ``torch.save`` (``.pt``, ``.pth``) or as ``.safetensors``.

    The file appears at once and whole: it is written under a temporary name, synced and renamed. If ``path`` is a link,
    the file that it points to is written. Tied tensors stay tied in a torch file; safetensors stores a copy for each.

    Args:
        tensors: a mapping from names to tensors.
        path: the file to write; its suffix says which format.
        force: whether to overwrite a file that exists.

    Raises:
        FileExistsError: if the file exists and ``force`` is False.
        TypeError, ValueError: for another suffix, or a value that is not a tensor or has no values.
        OSError: if it cannot be written; nothing is left behind then, and an old file stays.
    """
    path = Path(path)
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"tensors should be a mapping from names to tensors, got {kind_of(tensors)}; pass the state_dict() of a "
            "module."
        )
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"'{name}' should be a tensor, got {kind_of(value)}; take it out.")
        if value.is_meta:
            raise ValueError(f"'{name}' should have values, got a tensor on the meta device; load its values first.")
    safetensors = _safetensors_for(path) if path.suffix == ".safetensors" else None
    check_target(path, force=force)
    with whole_file(path) as temporary:
        if safetensors:
            safetensors.save_file(_unshared(tensors), temporary, metadata={"format": "pt"})
        else:
            with temporary.open("wb") as file:  # torch does not say why it could not write to a path
                torch.save(compact(tensors), file)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in contiguous memory that no two of them share; copies only what it has to."""
    unshared, taken = {}, set()
    for name, value in tensors.items():
        tensor = value.detach().contiguous()
        if tensor.layout == torch.strided:  # safetensors refuses the others
            place = tensor.untyped_storage().data_ptr()
            tensor = tensor.clone() if place in taken else tensor
            taken.add(place)
        unshared[name] = tensor
    return unshared


def check_target(path: Path, *, force: bool) -> None:
    """Raises as :func:`save_file` does if ``path`` cannot be its target."""
    if path.suffix not in (".pt", ".pth", ".safetensors"):
        raise ValueError(f"{str(path)!r} should end in .pt, .pth or .safetensors; rename it.")
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"{str(path)!r} should be a file in a folder that exists; make it, or choose another.")
    if path.exists() and not force:
        raise FileExistsError(f"{str(path)!r} exists already; choose another name, or pass force=True (--force).")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a file to write to, which becomes ``path`` when the block ends; an OSError leaves nothing behind."""
    target = path.resolve()
    temporary = target.with_name(f".ignite_ema-{uuid4().hex}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors replaces it with a file that only the owner can read
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_directory(target.parent)
    except Exception as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch raises its own error
        if isinstance(cause, OSError) and cause.errno:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise OSError(f"{str(path)!r} should be written, but could not be: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Syncs a directory, so that renames in it are on the disk, if its file system can do so."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
            raise
