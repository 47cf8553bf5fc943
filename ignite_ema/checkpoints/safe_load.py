"""Reads files of tensors without running anything that they hold: the one place that opens them."""

import mmap
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .memory import is_dense
from .naming import quoted
from .torch_files import Damaged, NotTorch, Verify, read_legacy, read_zip

__all__ = ["OpenFile", "load_file", "open_file", "safetensors_for"]

_CONTAINERS = (dict, list, tuple)
_HEAD = 512  # bytes, by which a file of another kind is told


@dataclass(frozen=True)
class OpenFile:
    """What a file holds, still mapped to it.

    Attributes:
        path: of the file.
        content: what was saved.
    """

    path: Path
    content: Any
    _verify: Verify | None = None

    def verify(self, tensors: Iterable[tuple[Any, Tensor]]) -> None:
        """Compares the bytes of named tensors with the checksums of the file, where it has some.

        A zip archive, which ``torch.save`` writes, has a CRC-32 for each storage. Older torch files and safetensors
        have none: what was changed in them goes unnoticed. Each storage is read once, at about the speed of the disk.

        Raises:
            ValueError: where a tensor has changed since the file was written, with its name.
        """
        if self._verify is None:
            return
        for place, tensor in tensors:
            if not is_dense(tensor) or tensor.is_meta:
                continue  # a sparse one was verified when it was made
            try:
                self._verify(tensor)
            except Damaged:
                name = place if isinstance(place, str) else _dotted(place)
                raise ValueError(
                    f"{quoted(self.path)} should hold what was written, but the bytes of {quoted(name)} have changed "
                    "since (their checksum differs); take another copy of the file."
                ) from None


def load_file(path: str | os.PathLike[str]) -> Any:
    """What a file of ``torch.save``, or a ``.safetensors`` file, holds, on the CPU.

    Nothing in the file is imported or run. Objects of other classes than torch's own (an ``argparse.Namespace``, an
    entry of a log) are replaced by empty ones. Parameters and tensors of other classes come back as plain tensors.

    Time and memory are bounded by the size of the file. Tensors stay mapped to it where its format allows: clone what
    should outlive a file that is overwritten in place. Their checksums are verified, where the file has some.

    Raises:
        FileNotFoundError, ValueError: for what is no such file, or has changed since it was written, in one sentence.
        ImportError: for a ``.safetensors`` file where safetensors is not installed.
    """
    opened = open_file(path)
    opened.verify(_tensors_in(opened.content))
    return opened.content


def open_file(path: str | os.PathLike[str]) -> OpenFile:
    """As `load_file`, but tensors of more than 4 KiB are verified on request alone."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{quoted(path)} should be a file, but there is none; check the path.")
    if path.is_dir():
        raise ValueError(
            f"{quoted(path)} should be a file, got a directory; name the file in it that holds the weights."
        )
    if not path.is_file():
        raise ValueError(f"{quoted(path)} should be a file, got a device or a pipe; save it as a file first.")
    if not path.stat().st_size:
        raise ValueError(f"{quoted(path)} should hold weights, but it is empty; take another checkpoint.")
    try:
        return _opened(path)
    except (ImportError, MemoryError, OSError):
        raise
    except NotTorch as error:
        raise ValueError(
            f"{quoted(path)} should be a file that torch.save or safetensors wrote, but it {error}."
        ) from None
    except Damaged as error:
        raise ValueError(
            f"{quoted(path)} should hold what was written, but its entry {quoted(error)} has changed since (its "
            "checksum differs); take another copy of the file."
        ) from None
    except Exception as error:  # of a broken file nearly anything can come
        raise ValueError(
            f"{quoted(path)} should be a file that torch.save or safetensors wrote, but it cannot be read as one; it "
            "is cut short or damaged, take another copy of the file."
        ) from error


def _opened(path: Path) -> OpenFile:
    with path.open("rb") as file:
        head = file.read(_HEAD)
        size = os.fstat(file.fileno()).st_size
        if path.suffix == ".safetensors" or _is_safetensors(head, size):
            return OpenFile(path, safetensors_for(path).load_file(path))
        file.seek(0)
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if zipfile.is_zipfile(file):
            return OpenFile(path, *read_zip(file, content))
        for text, is_such in _OTHER_KINDS.items():
            if is_such(head):
                raise NotTorch(text)
        return OpenFile(path, read_legacy(content))


def safetensors_for(path: Path) -> Any:
    """The module ``safetensors.torch``; where it is not installed, raises ImportError that names ``path``."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{quoted(path)} needs the package safetensors; pip install safetensors.") from error
    return safetensors.torch


def _is_safetensors(head: bytes, size: int) -> bool:
    """The length of a JSON header, and its brace."""
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8


def _starts(*magic: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(magic)


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3 or len(head) < _HEAD:  # else a letter that the head cuts in two
            return False
        text = head[: error.start].decode("utf-8")
    return all(one.isprintable() or one in "\r\n\t" for one in text)


# Files of other kinds: what to say of one, and how its beginning tells it; the first that fits.
_OTHER_KINDS: dict[str, Callable[[bytes], bool]] = {
    "begins with zeros, as a file does that was never written to its end; take another copy": (
        lambda head: not head.strip(b"\0")
    ),
    "is a pointer of Git LFS; get the file itself with git lfs pull": _starts(b"version https://git-lfs"),
    "is cut short: a zip archive without its end; take another copy": _starts(b"PK\3\4"),
    "is a tar archive; unpack it, and name the file in it": lambda head: head[257:262] == b"ustar",
    "was compressed; decompress it first": _starts(b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"),
    "is an HDF5 file; convert it first": _starts(b"\x89HDF"),
    "is an array of NumPy; convert it first": _starts(b"\x93NUMPY"),
    "is an HTML page, as a download leaves that needed a login; download it again": (
        lambda head: head.lstrip().lower().startswith((b"<!doctype", b"<html"))
    ),
    "is text; name the file that holds the weights": _is_text,
}


def _tensors_in(content: Any) -> Iterator[tuple[Any, Tensor]]:
    """All tensors in mappings, lists and tuples, each with the place where it lies: the place above, and a name."""
    seen: set[int] = set()
    left: list[tuple[Any, Any]] = [((), content)]
    while left:
        place, value = left.pop()
        if isinstance(value, Tensor):
            yield place, value
        elif isinstance(value, _CONTAINERS) and id(value) not in seen:
            seen.add(id(value))
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            left.extend(((place, name), one) for name, one in inner if isinstance(one, (Tensor, *_CONTAINERS)))


def _dotted(place: Any) -> str:
    names = []
    while place:
        place, name = place
        names.append(str(name))
    return ".".join(reversed(names))
