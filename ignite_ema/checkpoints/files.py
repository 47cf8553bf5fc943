"""Reads and writes files of tensors: nothing in a file runs, and a file is written whole or not at all."""

import errno
import os
import pickle
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import torch
from torch import Tensor

__all__ = [
    "ForeignObject",
    "check_target",
    "compact",
    "copied",
    "is_dense",
    "kind_of",
    "load_file",
    "load_stream",
    "quoted",
    "restricted_unpickler",
    "save_file",
    "size_of",
    "sync_directory",
    "verify",
    "whole_file",
]

Pair = tuple[str, str]  # a module, and a name in it


def quoted(name: Any) -> str:
    """A name from a file on one line, with escape sequences spelled out, and no longer than a line."""
    text = str(name)
    return repr(text if len(text) <= 120 else f"{text[:120]}…")


def kind_of(value: Any) -> str:
    """What a value is, for a message."""
    kind = value if isinstance(value, type) else type(value)
    is_foreign = issubclass(kind, ForeignObject)
    return f"an object of the class '{kind.__module__}.{kind.__name__}'" if is_foreign else kind.__name__


def is_dense(tensor: Tensor) -> bool:
    """True if the tensor is strided, not sparse or of another layout."""
    return tensor.layout == torch.strided


def _view_of(tensor: Tensor) -> Any:
    """What two tensors have in common exactly if they are the same view of the same memory."""
    if not is_dense(tensor) or tensor.is_meta:
        return id(tensor)
    place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return (*place, tensor.dtype, tensor.is_conj(), tensor.is_neg())


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in memory of their own; tied tensors stay tied."""
    views = {name: _view_of(value) for name, value in tensors.items()}
    copies = {view: tensors[name].detach().clone() for view, name in {views[name]: name for name in tensors}.items()}
    return {name: copies[view] for name, view in views.items()}


def compact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the unused rest of their storages, all of which torch would save with each view."""
    parts = {k: v for k, v in tensors.items() if is_dense(v) and v.untyped_storage().nbytes() != v.nbytes}
    return {name: value.detach() for name, value in {**tensors, **copied(parts)}.items()}


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """The size of the dense tensors, in bytes."""
    return sum(tensor.nbytes for tensor in tensors.values() if is_dense(tensor))


# --- reading ---


class ForeignObject(dict[Any, Any]):
    """Stands for an object of a class that is not in the table: keeps the items of a mapping, swallows all else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __call__(self, *args: Any, **kwargs: Any) -> "ForeignObject":
        return self

    def swallow(self, *args: Any) -> None:
        """Does nothing; pickle calls it to add items or set a state."""

    __setstate__ = append = extend = add = swallow


def restricted_unpickler(
    pairs: Collection[Pair], builders: Mapping[Pair, Callable[..., Any]] | None = None
) -> type[pickle._Unpickler]:
    """An unpickler that imports the given names only, and gives a fresh :class:`ForeignObject` class for any other.

    Functions are handed out wrapped, so that a file cannot set attributes of the originals.

    Args:
        pairs: (module, name) of what may be imported.
        builders: functions that take the place of what has these names.
    """
    replaced = builders or {}

    # The one in Python: in C, a flipped bit in the index of a memo takes up to 64 GB of memory.
    class RestrictedUnpickler(pickle._Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in replaced:
                return partial(replaced[module, name])
            if (module, name) in pairs:
                for place in dict.fromkeys((module.replace("numpy.core", "numpy._core"), module)):
                    with suppress(ImportError, AttributeError):  # numpy is missing, or older than 2
                        found = super().find_class(place, name)
                        is_function = callable(found) and not isinstance(found, type)
                        return partial(found) if is_function else found
            return type(name, (ForeignObject,), {"__module__": module})

    return RestrictedUnpickler


_PLAIN = ("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "list", "set", "tuple")
_REBUILDERS = ("tensor", "tensor_v2", "tensor_v3", "sparse_tensor", "meta_tensor_no_storage")
_NAMES: dict[str, tuple[str, ...]] = {
    "torch": ("Size", "device", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "torch._utils": tuple(f"_rebuild_{name}" for name in _REBUILDERS),
    "torch.serialization": ("_get_layout",),
    "torch.storage": ("UntypedStorage",),
    "builtins": (*_PLAIN, "int", "range", "str"),
    "__builtin__": (*_PLAIN, "long", "unicode", "xrange"),  # the names of Python 2, which protocol 2 writes
    "_codecs": ("encode",),  # bytes in protocol 2
    "collections": ("Counter", "OrderedDict", "defaultdict", "deque"),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "numpy": ("dtype", "ndarray"),
    **dict.fromkeys(("numpy.core.multiarray", "numpy._core.multiarray"), ("_reconstruct", "scalar")),
    **dict.fromkeys(("numpy.core.numeric", "numpy._core.numeric"), ("_frombuffer",)),
}
_BUILDERS: dict[Pair, Callable[..., Any]] = {
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda rebuild, kind, args, state: rebuild(*args),
}


class _Pickle:
    """What ``torch.load`` takes as ``pickle_module``."""

    Unpickler = restricted_unpickler({(module, name) for module, names in _NAMES.items() for name in names}, _BUILDERS)

    @classmethod
    def load(cls, file: IO[bytes], **options: Any) -> Any:
        return cls.Unpickler(file, **options).load()


def load_stream(stream: str | IO[bytes], *, mmap: bool = False) -> Any:
    """What ``torch.save`` wrote, on the CPU, with nothing in it run; raises whatever a damaged stream leads to."""
    return torch.load(stream, map_location="cpu", mmap=mmap, pickle_module=_Pickle, weights_only=False)


_OTHER_KINDS = {
    b"version https://git-lfs": "is a pointer of Git LFS; get the file itself with git lfs pull",
    b"<": "is an HTML page, as a download that needs a login leaves; download it again",
}  # by their first bytes
_DAMAGED = "cannot be read as such; it is of another kind, cut short or damaged, take another copy"


def load_file(path: str | os.PathLike[str], *, verified: bool = True) -> Any:
    """What a file of ``torch.save``, or a ``.safetensors`` file, holds, on the CPU.

    Nothing in the file runs. Objects of other classes than torch's own, containers, numpy's scalars and arrays, and
    dates are replaced by empty ones. Parameters and tensors of other classes come back as plain tensors. Tensors stay
    mapped to the file if its format allows: clone what should outlive a file that is overwritten in place.

    Args:
        path: of the file.
        verified: whether to verify the file first, see :func:`verify`. Safetensors and the files of torch before 1.6
            have no checksums: what was changed in these goes unnoticed.

    Raises:
        FileNotFoundError, ValueError: if it is no such file, or has changed since it was written.
        ImportError: for a ``.safetensors`` file if safetensors is not installed.
        RuntimeError: if torch is told to refuse all but ``weights_only=True``.
    """
    path = Path(path)
    head = _head(path)
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        load = partial(_safetensors_for(path).load_file, path)
    elif head.startswith(b"PK"):
        if verified:
            verify(path)
        load = partial(load_stream, str(path), mmap=True)
    else:
        load = partial(load_stream, str(path))
        for beginning, what in _OTHER_KINDS.items():
            if head.lstrip().startswith(beginning):
                raise _not_torch(path, what)
    if os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true"):
        raise RuntimeError(
            "TORCH_FORCE_WEIGHTS_ONLY_LOAD should not be set when ignite_ema reads a file, in which nothing is run "
            "either way; unset it, or load the file with torch.load and pass the mapping."
        )
    try:
        return load()
    except OSError:
        raise
    except Exception as error:  # a damaged file can lead to nearly any, MemoryError too
        raise _not_torch(path, _DAMAGED) from error


def _not_torch(what: Any, fault: str) -> ValueError:
    return ValueError(f"{quoted(what)} should be a file that torch.save or safetensors wrote, but it {fault}.")


def _head(path: Path) -> bytes:
    """The first bytes of a file that is there, and not empty."""
    if not path.exists():
        raise FileNotFoundError(f"{quoted(path)} should be a file, but there is none; check the path.")
    if path.is_dir():
        raise ValueError(
            f"{quoted(path)} should be a file, got a directory; name the file in it that holds the weights."
        )
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{quoted(path)} should hold weights, but it is empty; take another checkpoint.")
    return head


def verify(file: Path | IO[bytes], name: str | None = None) -> None:
    """Compares a file of ``torch.save``, a zip archive, with the checksums in it, at about the speed of the disk.

    A file whose checksums are all zero has none (``torch.serialization.set_crc32_options``).

    Args:
        file: a path, or a stream.
        name: of the file, for messages.

    Raises:
        ValueError: if a byte has changed since the file was written, or it is no zip archive of tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            changed = archive.testzip() if any(entry.CRC for entry in entries) else None
    except Exception as error:  # see above
        raise _not_torch(name or file, _DAMAGED) from error
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise _not_torch(name or file, "is a TorchScript archive; save the state_dict() of the module instead")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):  # torch would read other numbers
        raise _not_torch(name or file, "was compressed; unzip it, and zip it again without compression")
    if changed:
        fault = f"has changed since: the checksum of its entry {quoted(changed)} differs; take another copy"
        raise _not_torch(name or file, fault)


def _safetensors_for(path: Path) -> Any:
    """The module ``safetensors.torch``."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{quoted(path)} needs the package safetensors; pip install safetensors.") from error
    return safetensors.torch


# --- writing ---

_SUFFIXES = (".pt", ".pth", ".safetensors")
_CANNOT_SYNC = (errno.EACCES, errno.EINVAL, errno.ENOTSUP)


def save_file(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Writes a plain state dict, as ``torch.save`` (``.pt``, ``.pth``) or as ``.safetensors``.

    The file appears at once and whole: it is written beside its place, synced and renamed. If ``path`` is a link, the
    file that it points to is written. Tied tensors stay tied in a torch file; safetensors knows no ties and gets a
    copy for each name.

    Args:
        tensors: a mapping from names to tensors.
        path: the file to write; its suffix decides about the format.
        force: whether to overwrite a file.

    Raises:
        FileExistsError: if there is a file already and ``force`` is False.
        TypeError, ValueError: for another suffix, or for what is not a tensor or has no values.
        OSError: if it cannot be written; nothing is left behind then, and an old file stays.
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
    safetensors = _safetensors_for(path) if path.suffix == ".safetensors" else None
    with whole_file(path, force=force) as temporary:
        if safetensors:
            safetensors.save_file(_alone(tensors), temporary, metadata={"format": "pt"})
        else:
            with temporary.open("wb") as file:  # torch does not say why it could not write to a path
                torch.save(compact(tensors), file)


def _alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in contiguous memory, which no two of them share."""
    known: set[int] = set()
    result = {}
    for name, value in tensors.items():
        tensor = value.detach().contiguous()
        place = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if place in known else tensor
        known.add(place)
    return result


def check_target(path: Path, *, force: bool) -> None:
    """Raises as :func:`save_file` does if ``path`` cannot be its target."""
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"{str(path)!r} should end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}; choose one of them."
        )
    if path.is_dir():
        raise ValueError(f"{str(path)!r} should be a file, got a directory; name a file in it.")
    if path.exists() and not force:
        raise FileExistsError(
            f"{str(path)!r} exists already; choose another name, or overwrite it with force (--force)."
        )
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"{str(path)!r} should be in a folder that exists, but there is none; make it first.")


@contextmanager
def whole_file(path: Path, *, force: bool) -> Iterator[Path]:
    """Gives an empty file to write to, which becomes ``path`` when the block ends; then it is on the disk.

    Raises as :func:`save_file` does; nothing is left behind then.
    """
    check_target(path, force=force)
    target = path.resolve()
    temporary = target.with_name(f".ignite_ema-{uuid4().hex}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors replaces it by one that only the owner can read
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_directory(target.parent)
    except Exception as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch raises an error of its own
        if isinstance(cause, OSError) and cause.errno:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise OSError(f"{str(path)!r} should be written, but could not be: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Waits until renames in a directory are on the disk, if the file system can say so."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
