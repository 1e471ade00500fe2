"""The head of a checkpoint file: what it holds and where, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional, Protocol, TypeVar

from auto_trans.core.tensor import ITEM_BYTES, Extent, Shape

__all__ = ["FileHead", "Record", "StoredTensor", "TensorHead"]


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
    segments: tuple[Extent, ...]

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
    def item_bytes(self) -> Optional[int]:
        """Bytes of an element, or None where elements are no whole bytes."""
        return ITEM_BYTES.get(self.dtype)


@dataclass(frozen=True)
class FileHead:
    """What a checkpoint file holds.

    Attributes:
        path: The file.
        tensors: The tensors by name, in file order.
        size: Bytes of the file when it was scanned.
        mtime_ns: Its modification time when it was scanned.
        crc: The crc32 stored in the file, or None.
        redundancy_removed: Whether MindSpore's ``remove_redundancy`` left out what other ranks hold; None = not told.
        contents: What is read in place of its bytes: the numbers in a text.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    size: int
    mtime_ns: int
    crc: Optional[int] = None
    redundancy_removed: Optional[bool] = None
    contents: Optional[bytes] = None
