"""Writes files of tensors: whole or not at all, and nothing over what is there unless asked.

A file is written in a directory of its own beside its place, which nobody else can read, and then renamed. Its writer
holds a lock there for as long as it lives, so that what a killed one has left can be told, and cleaned up.
"""

import errno
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import torch
from torch import Tensor

from .memory import compact
from .safe_load import safetensors_for

if sys.platform != "win32":
    import fcntl

__all__ = ["check_target", "clean_leftovers", "save_file", "sync_directory", "whole_file"]

_SUFFIXES = (".pt", ".pth", ".safetensors")
_PREFIX = ".ignite_ema-"  # of the directories in which files are written
_LOCK = "lock"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CANNOT_SYNC = (errno.EACCES, errno.EINVAL, errno.ENOTSUP)


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
        if path.suffix == ".safetensors":
            safetensors_for(path).save_file(_alone(tensors), temporary, metadata={"format": "pt"})
        else:
            with temporary.open("wb") as file:  # of a path torch does not say why it could not write
                torch.save(compact(tensors), file)


def check_target(path: Path, *, force: bool) -> None:
    """Raises as :func:`save_file` does where ``path`` cannot be its target."""
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"{str(path)!r} should end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}; choose one of them."
        )
    _check_place(path, force)


def _check_place(path: Path, force: bool) -> None:
    if path.is_dir():
        raise ValueError(f"{str(path)!r} should be a file, got a directory; name a file in it.")
    if path.resolve().exists() and not force:
        raise _exists(path)
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"{str(path)!r} should be in a folder that exists, but there is none; make it first.")


@contextmanager
def whole_file(path: Path, *, force: bool) -> Iterator[Path]:
    """Gives an empty file to be written to, and moves it to ``path`` at the end.

    From its first byte on it has the mode of what it replaces. When the block ends, file and move are on the disk.
    Raises as :func:`save_file` does; nothing is left behind then.
    """
    _check_place(path, force)
    target = path.resolve()
    try:
        clean_leftovers(target.parent)
        with _private_directory(target.parent) as private:
            temporary = private / target.name
            mode = _make_alike(temporary, target)
            yield temporary
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            temporary.chmod(mode)
            _put(temporary, target, path, force)
            sync_directory(target.parent)
    except (FileExistsError, ImportError, MemoryError, TypeError):
        raise
    except Exception as error:  # of safetensors and torch any, where the disk is full
        raise _told(error, path) from error


def _make_alike(temporary: Path, target: Path) -> int:
    """Makes an empty file with the mode of ``target``, if there is one, but writable; returns the mode."""
    if not target.exists():
        temporary.touch()
        return stat.S_IMODE(temporary.stat().st_mode)
    mode = stat.S_IMODE(target.stat().st_mode)
    temporary.touch(mode=stat.S_IRUSR | stat.S_IWUSR)
    temporary.chmod(mode | stat.S_IRUSR | stat.S_IWUSR)
    return mode


@contextmanager
def _private_directory(parent: Path) -> Iterator[Path]:
    """A directory for the owner alone, with a lock that tells whether its maker lives; removed at the end."""
    lock = _locked_directory(parent)
    try:
        yield Path(lock.name).parent
    finally:
        _remove(Path(lock.name).parent)
        lock.close()


def _locked_directory(parent: Path) -> BinaryIO:
    while True:
        private = parent / f"{_PREFIX}{uuid4().hex}"
        private.mkdir(mode=stat.S_IRWXU)
        try:
            lock = (private / _LOCK).open("xb")
        except FileNotFoundError:
            continue  # another process has taken it for a leftover, so far without a lock
        if sys.platform != "win32":
            with suppress(OSError):  # a file system without locks, where nobody else gets one either
                fcntl.flock(lock, fcntl.LOCK_EX)
        if (private / _LOCK).exists():
            return lock
        lock.close()


def clean_leftovers(directory: Path) -> None:
    """Removes what killed writers have left in a directory; what a living one writes, on whatever machine, stays."""
    for leftover in directory.glob(f"{_PREFIX}*"):
        if leftover.is_symlink() or not leftover.is_dir():
            continue
        with suppress(OSError), (leftover / _LOCK).open("r+b") as lock:
            if _is_free(lock):
                _remove(leftover)
        with suppress(OSError):  # killed before it had a lock
            leftover.rmdir()


def _is_free(lock: BinaryIO) -> bool:
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # it is held, or the file system knows no locks
        return False
    return True


def _remove(private: Path) -> None:
    for path in private.glob("*"):  # the lock last, so that another process can go on where this one is killed
        if path.name != _LOCK:
            path.unlink(missing_ok=True)
    shutil.rmtree(private, ignore_errors=True)


def sync_directory(directory: Path) -> None:
    """Waits until renames in a directory are on the disk, where the file system can say so."""
    if sys.platform == "win32":
        return
    try:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def _told(error: Exception, path: Path) -> OSError:
    """The error of a failed write in one sentence about ``path``, of the class and with the number of its cause."""
    cause = _system_error(error)
    if cause is None or cause.errno is None:
        reason = str(error).partition("\n")[0].removesuffix(".") or type(error).__name__
        return OSError(f"{str(path)!r} should be written, but it could not be: {reason}.")
    reason = os.strerror(cause.errno)
    is_full = cause.errno in _FULL
    why = f"the disk is full ({reason}); make room there, or" if is_full else f"the system says: {reason};"
    told = type(cause)(f"{str(path)!r} should be written, but {why} choose another place.")
    told.errno = cause.errno
    return told


def _system_error(error: BaseException | None) -> OSError | None:
    """The error of the operating system behind another one: torch and safetensors raise errors of their own."""
    while error is not None and not isinstance(error, OSError):
        if number := re.search(r"\(os error (\d+)\)", str(error)):  # as Rust writes it
            return OSError(int(number[1]), "")
        error = error.__cause__ or error.__context__
    return error


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
    return FileExistsError(f"{str(path)!r} exists already; choose another name, or overwrite it with force (--force).")


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
