"""The two formats of ``torch.save``: a zip archive, and the stream of pickles that torch wrote before 1.6.

Tensors are views of the file, which is mapped into memory, or of memory that is no larger than the file. Everything
that a file says of sizes is checked against the file first.
"""

import io
import math
import mmap
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from .memory import REPEATED
from .unpickling import Builders, ForeignObject, Name, Unpickler, plain_builders

__all__ = ["DTYPES", "MOST_DIMENSIONS", "Damaged", "NotTorch", "Verify", "read_legacy", "read_zip"]

Verify = Callable[[Tensor], None]  # raises Damaged unless the memory of a tensor is as it was written

_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.storage.UntypedStorage": torch.uint8,
}
DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
MOST_DIMENSIONS = 64
_ALIGNMENT = 16  # bytes, of the widest number; torch itself writes at multiples of 64
_SMALL = 2**12  # bytes: storages up to this size, such as counts, are verified at once


class NotTorch(ValueError):
    """A file is of another kind; the message goes on behind "should be a file of torch.save, but it"."""


class Damaged(ValueError):
    """An entry of an archive, which the message is, has changed since it was written."""


@dataclass(frozen=True)
class _Storage:
    """Memory of one storage, as bytes, and the type that the file says it has."""

    memory: Tensor
    dtype: torch.dtype


class _Tensors:
    """Builders of tensors. What they make by repeating memory is bounded in sum.

    Args:
        size: in bytes, of the file.
        verify: called with a tensor whose values are looked at here.
    """

    def __init__(self, size: int, verify: Verify) -> None:
        self._left = 2 * size + REPEATED
        self._views: dict[Any, Tensor] = {}
        self._verify = verify

    def builders(self) -> dict[str, Callable[..., Any]]:
        """Builders by the names that torch gives them in a file."""
        return {
            **plain_builders(),
            "torch._utils._rebuild_tensor": self._strided,
            "torch._utils._rebuild_tensor_v2": lambda storage, offset, size, stride, *others: self._strided(
                storage, offset, size, stride, None, *others[2:]
            ),
            "torch._utils._rebuild_tensor_v3": lambda storage, offset, size, stride, *others: self._strided(
                storage, offset, size, stride, *others[2:]
            ),
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
            "torch._tensor._rebuild_from_type_v2": self._without_class,
            "torch._utils._rebuild_sparse_tensor": self._sparse,
            "torch._utils._rebuild_meta_tensor_no_storage": lambda dtype, size, stride, *_: torch.empty_strided(
                _sizes(size), _sizes(stride), dtype=DTYPES[dtype.text], device="meta"
            ),
            "torch.serialization._get_layout": Name,
            "torch.Size": lambda size=(): _sizes(size),
        }

    def _without_class(self, function: Name, _class: Any, arguments: Any, _attributes: Any) -> Any:
        """A tensor of a class of its own, or with attributes, as a plain one."""
        if not function.text.startswith("torch._utils._rebuild_"):
            raise ValueError(f"a tensor is made by {function.text}")
        builder = self.builders().get(function.text)
        return ForeignObject(function.text) if builder is None else builder(*arguments)

    def _strided(
        self, storage: _Storage, offset: int, size: Any, stride: Any, dtype: Any = None, bits: Any = None
    ) -> Tensor:
        dtype = storage.dtype if dtype is None else DTYPES[dtype.text]
        size, stride, (offset,) = _sizes(size), _sizes(stride), _sizes((offset,))
        place = (storage.memory.data_ptr(), dtype, offset, size, stride)
        if place not in self._views:
            self._views[place] = self._view(storage, dtype, offset, size, stride)
        view = self._views[place].detach()
        bits = bits or {}
        view = view.conj() if bits.get("conj") else view
        return view.neg() if bits.get("neg") else view

    def _view(
        self, storage: _Storage, dtype: torch.dtype, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> Tensor:
        held = storage.memory.nbytes // dtype.itemsize
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if all(size) and last >= held:
            raise ValueError(f"a tensor of the shape {size} goes beyond its memory")
        self._spend(size, dtype, storage.memory.nbytes)
        return torch.empty(0, dtype=dtype).set_(storage.memory.untyped_storage(), offset, size, stride)

    def _spend(self, size: tuple[int, ...], dtype: torch.dtype, held: int) -> None:
        self._left -= dtype.itemsize * math.prod(size)
        if self._left < 0:
            raise NotTorch(
                f"has a tensor that should have memory for its shape, {size}, got {held} bytes that are repeated; take "
                "another checkpoint"
            )

    def _sparse(self, layout: Name, data: Any) -> Tensor:
        """Checked by torch: indices that lie beyond the shape would be read as addresses."""
        *parts, size = data[: 3 if layout.text == "torch.sparse_coo" else 4]
        for part in parts:
            self._verify(part)
            if part.nbytes > part.untyped_storage().nbytes():
                raise ValueError("a sparse tensor repeats memory")
            self._spend(tuple(part.shape), part.dtype, part.nbytes)
        if layout.text == "torch.sparse_coo":
            coalesced = data[3] if len(data) > 3 else None
            indices, values = parts
            return torch.sparse_coo_tensor(indices, values, _sizes(size), check_invariants=True, is_coalesced=coalesced)
        kind = getattr(torch, layout.text.removeprefix("torch."))
        compressed, plain, values = parts
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, that these layouts are in beta: an error where warnings are
            return torch.sparse_compressed_tensor(
                compressed, plain, values, _sizes(size), layout=kind, check_invariants=True
            )


def _sizes(values: Any) -> tuple[int, ...]:
    if len(values) > MOST_DIMENSIONS or not all(type(one) is int and 0 <= one < 2**63 for one in values):
        raise ValueError("a tensor has a shape that is none")
    return tuple(values)


def _check_byte_order(is_little: bool) -> None:
    if is_little != (sys.byteorder == "little"):
        raise NotTorch("was written on a machine of another byte order; save it again there as .safetensors")


# --- zip archives ---


class _Archive:
    """The entries of a zip archive that is mapped into memory, and their checksums."""

    def __init__(self, file: IO[bytes], content: mmap.mmap) -> None:
        self._content = content
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        self._entries = {entry.filename: entry for entry in entries}
        self._unverified: dict[int, str] = {}
        self._memory: dict[str, Tensor] = {}
        if any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in self._entries):
            raise NotTorch("is a TorchScript archive, a program; save the state_dict() of the module instead")
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
            raise NotTorch("was compressed; unzip it, and zip it again without compression")
        if len(self._entries) < len(entries) or sum(entry.file_size for entry in entries) > len(content):
            raise ValueError("entries of a zip archive overlap")
        pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise NotTorch("is a zip archive of another kind; unzip it, and name the file in it that holds the weights")
        self.root = pickles[0].removesuffix("data.pkl")
        if (order := self._entries.get(f"{self.root}byteorder")) is not None:
            _check_byte_order(self.bytes_of(order.filename) == b"little")

    def _span(self, name: str) -> slice:
        """Where the bytes of an entry lie, by its local header."""
        entry = self._entries[name]
        magic, name_length, extra_length = struct.unpack_from("<4s22xHH", self._content, entry.header_offset)
        start = entry.header_offset + 30 + name_length + extra_length
        if magic != b"PK\3\4" or start + entry.file_size > len(self._content):
            raise ValueError("an entry of a zip archive lies beyond its end")
        return slice(start, start + entry.file_size)

    def bytes_of(self, name: str) -> bytes:
        """The verified bytes of a small entry."""
        self._check(name)
        return self._content[self._span(name)]

    def memory_of(self, key: str) -> Tensor:
        """A storage as bytes: mapped, so that what is never looked at is never read."""
        name = f"{self.root}data/{key}"
        if name not in self._memory:
            memory = _mapped(self._content, self._span(name))
            self._memory[name] = memory
            self._unverified[memory.data_ptr()] = name
            if memory.nbytes <= _SMALL:
                self.verify(memory)
        return self._memory[name]

    def verify(self, tensor: Tensor) -> None:
        """Raises Damaged unless the memory behind a tensor has the bytes that were written."""
        name = self._unverified.get(tensor.untyped_storage().data_ptr())
        if name is not None:
            self._check(name)
            del self._unverified[tensor.untyped_storage().data_ptr()]

    def _check(self, name: str) -> None:
        with memoryview(self._content) as whole, whole[self._span(name)] as part:
            if zlib.crc32(part) != self._entries[name].CRC:
                raise Damaged(name)


def _mapped(content: mmap.mmap, span: slice) -> Tensor:
    count = span.stop - span.start
    if not count:
        return torch.empty(0, dtype=torch.uint8)
    memory = torch.frombuffer(content, dtype=torch.uint8, count=count, offset=span.start)
    return memory.clone() if span.start % _ALIGNMENT else memory


def read_zip(file: IO[bytes], content: mmap.mmap) -> tuple[Any, Verify]:
    """What an archive holds, and what verifies its tensors."""
    archive = _Archive(file, content)

    def storage(identity: Any) -> _Storage:
        kind, storage_type, key, _, count = identity
        dtype = _STORAGES.get(storage_type.text)
        if kind != "storage" or dtype is None:
            raise NotTorch(f"has tensors of the type {storage_type.text!r}, which is not known; convert them first")
        memory = archive.memory_of(key)
        if count * dtype.itemsize > memory.nbytes:
            raise ValueError("a storage is larger than its entry")
        return _Storage(memory, dtype)

    pickled = archive.bytes_of(f"{archive.root}data.pkl")
    tensors = _Tensors(len(content), archive.verify)
    value = Unpickler(tensors.builders(), storage, len(pickled)).load(io.BytesIO(pickled))
    return value, archive.verify


# --- the format before torch 1.6 ---

_MAGIC = 0x1950A86A20F9469CFC6C


def read_legacy(content: mmap.mmap) -> Any:
    """What a stream of pickles holds: a magic number, a version, the machine, the value, and then the storages.

    The value is read twice: for its storages, and for its tensors once the storages are there.
    """

    def load(builders: Builders, storage: Callable[[Any], Any]) -> Any:
        return Unpickler(builders, storage, len(content)).load(content)  # type: ignore[arg-type]

    if load({}, lambda identity: None) != _MAGIC:
        raise NotTorch(
            "is a pickle that torch.save did not write; load it where it comes from, and save its state dict"
        )
    _, machine = (load({}, lambda identity: None) for _ in range(2))  # the version has never changed
    _check_byte_order(bool(machine["little_endian"]))
    storages = _Storages(len(content))
    start = content.tell()
    load({}, storages.claimed)
    for key in load({}, lambda identity: None):
        storages.fill(key, content)
    content.seek(start)
    return load(_Tensors(len(content), lambda tensor: None).builders(), storages.claimed)


class _Storages:
    """Memory of the storages of a stream, no more in all than the file has bytes."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._known: dict[str, _Storage] = {}

    def claimed(self, identity: Any) -> Any:
        """The storage of a persistent id, with its values once it is filled."""
        if identity[0] == "module":
            return identity[1]
        _, storage_type, key, _, count, view = identity
        if key not in self._known:
            dtype = _STORAGES[storage_type.text]
            self._left -= count * dtype.itemsize
            if view is not None or count < 0 or self._left < 0:
                raise ValueError("storages are larger than the file")
            self._known[key] = _Storage(torch.zeros(count * dtype.itemsize, dtype=torch.uint8), dtype)
        return self._known[key]

    def fill(self, key: str, content: mmap.mmap) -> None:
        """Reads the number of items, then the items, from where the stream stands."""
        memory, dtype = self._known[key].memory, self._known[key].dtype
        (count,) = struct.unpack("<q", content.read(8))
        data = content.read(memory.nbytes)
        if count * dtype.itemsize != memory.nbytes or len(data) != memory.nbytes:
            raise ValueError("a storage has another size")
        if data:
            memory.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
