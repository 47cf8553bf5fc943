"""Writes files of tensors: whole or not at all, and nothing over what is there unless asked."""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from .memory import compact
from .safe_load import safetensors_for

__all__ = ["check_target", "save_file", "whole_file"]

_SUFFIXES = (".pt", ".pth", ".safetensors")


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
            safetensors_for(path).save_file(_alone(tensors), temporary, metadata={"format": "pt"})
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
