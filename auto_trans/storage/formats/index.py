"""What a checkpoint file holds, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import xxhash

from auto_trans.core.layout import Shape
from auto_trans.errors import CorruptCheckpointError

__all__ = ["ITEM_BYTES", "CheckpointIndex", "Record", "StoredTensor", "TensorHead", "content_digest"]

# Bytes per element of the tensor types that MindSpore writes; "str" and "Int4" (two to a byte) are moved as a whole.
ITEM_BYTES = {
    "Bool": 1, "Int8": 1, "UInt8": 1, "Int16": 2, "UInt16": 2, "Float16": 2, "BFloat16": 2,
    "Int32": 4, "UInt32": 4, "Float32": 4, "Int64": 8, "UInt64": 8, "Float64": 8, "Complex64": 8, "Complex128": 16,
}  # fmt: skip
_READ_BYTES = 4 * 1024 * 1024


class TensorHead(Protocol):
    """What a file says of a tensor besides its contents."""

    @property
    def name(self) -> str:
        """The parameter."""

    @property
    def dtype(self) -> str:
        """MindSpore's name of the type."""

    @property
    def dims(self) -> Shape:
        """The dims as stored."""

    @property
    def nbytes(self) -> int:
        """Bytes of the contents."""


T = TypeVar("T", bound=TensorHead)


class Record(NamedTuple):
    """A part of a file: bytes of the format itself, and how many bytes of contents follow them."""

    head: bytes
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        dtype: MindSpore's name of the type as stored, e.g. ``Float32``.
        dims: The dims as stored; MindSpore stores those of some scalars as ``(0,)``.
        segments: Where the contents lie, as (offset, bytes) in the file; several for chunked tensors.
    """

    dtype: str
    dims: Shape
    segments: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the contents."""
        return sum(n for _, n in self.segments)

    @property
    def shape(self) -> Shape:
        """The shape; that of an opaque tensor (strings, packed integers) is one indivisible element."""
        if self.item_bytes is None or (self.dims == (0,) and self.nbytes):
            return ()
        return self.dims

    @property
    def item_bytes(self) -> int | None:
        """Bytes of an element, or None where elements are no whole bytes."""
        return ITEM_BYTES.get(self.dtype)


@dataclass(frozen=True)
class CheckpointIndex:
    """What a checkpoint file holds.

    Attributes:
        path: The file.
        tensors: The tensors by name, in file order.
        size: Bytes of the file when it was scanned.
        mtime_ns: Its modification time when it was scanned.
        crc: The crc32 stored in the file, or None.
        redundancy_removed: Whether MindSpore's ``remove_redundancy`` left out what other ranks hold; None = not told.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    size: int
    mtime_ns: int
    crc: int | None = None
    redundancy_removed: bool | None = None


def content_digest(index: CheckpointIndex, name: str) -> str:
    """xxh3 digest of a tensor's contents."""
    digest = xxhash.xxh3_128()
    with open(index.path, "rb") as f:
        for offset, nbytes in index.tensors[name].segments:
            f.seek(offset)
            while nbytes:
                part = f.read(min(nbytes, _READ_BYTES))
                if not part:
                    raise CorruptCheckpointError(f"{index.path} became shorter while parameter {name} was read")
                digest.update(part)
                nbytes -= len(part)
    return digest.hexdigest()
