"""Tensors, boxes and shards: what a plan is made of.

A tensor is a name, a type and a full shape. A box is a part of it. A shard is a box that lies in a file. Pure data: no
files are opened here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Optional

__all__ = ["FLOAT_TYPES", "ITEM_BYTES", "Box", "Extent", "Shape", "Shard", "SourceFile", "Tensor", "split_box"]

Shape = tuple[int, ...]
# (offset, bytes) in a file
Extent = tuple[int, int]

# Bytes per element of the tensor types that MindSpore writes; "str" and "Int4" (two to a byte) are moved as a whole.
ITEM_BYTES = {
    "Bool": 1, "Int8": 1, "UInt8": 1, "Int16": 2, "UInt16": 2, "Float16": 2, "BFloat16": 2,
    "Int32": 4, "UInt32": 4, "Float32": 4, "Int64": 8, "UInt64": 8, "Float64": 8, "Complex64": 8, "Complex128": 16,
}  # fmt: skip
FLOAT_TYPES = ("Float16", "BFloat16", "Float32", "Float64")


class Box(NamedTuple):
    """A part of a tensor: per dimension an offset and a size, in elements.

    A tuple, for a plan of thousands of ranks holds millions of boxes and looks them up by value.
    """

    offset: Shape
    size: Shape

    @classmethod
    def whole(cls, shape: Shape) -> Box:
        """The box that covers a tensor of ``shape``."""
        return cls((0,) * len(shape), shape)

    @property
    def volume(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.size)

    def relative_to(self, origin: Shape) -> Box:
        """The same box in the coordinates of a tensor that begins at ``origin``."""
        return Box(tuple(a - b for a, b in zip(self.offset, origin)), self.size)

    def slices(self) -> tuple[slice, ...]:
        """The box as an index for numpy."""
        return tuple(slice(o, o + s) for o, s in zip(self.offset, self.size))

    def intersect(self, other: Box) -> Optional[Box]:
        """The common part, or None."""
        low = tuple(max(a, b) for a, b in zip(self.offset, other.offset))
        high = tuple(min(a + s, b + t) for a, s, b, t in zip(self.offset, self.size, other.offset, other.size))
        if any(h <= o for o, h in zip(low, high)):
            return None
        return Box(low, tuple(h - o for o, h in zip(low, high)))


def split_box(box: Box, limit: int) -> Iterator[Box]:
    """Cuts a box into boxes of at most ``limit`` elements that follow each other in row-major order.

    Cutting along the first dimension longer than 1 keeps every part contiguous in the box, so that parts can be
    written one after the other.
    """
    if box.volume <= limit:
        if box.volume:
            yield box
        return
    axis = next(i for i, n in enumerate(box.size) if n > 1)
    rows = max(1, limit // math.prod(box.size[axis + 1 :]))
    for start in range(0, box.size[axis], rows):
        offset, size = list(box.offset), list(box.size)
        offset[axis] += start
        size[axis] = min(rows, box.size[axis] - start)
        yield from split_box(Box(tuple(offset), tuple(size)), limit)


@dataclass(frozen=True)
class Tensor:
    """A full tensor.

    Attributes:
        name: The parameter.
        dtype: MindSpore's name of its type, e.g. ``BFloat16``.
        shape: Full shape. That of an opaque tensor (strings, packed integers) is (), one indivisible element.
        item_bytes: Bytes of an element.
        whole_dims: The dims under which a file stores the tensor as a whole, where they are not the shape: MindSpore
            stores those of some scalars as ``(0,)``.
    """

    name: str
    dtype: str
    shape: Shape
    item_bytes: int
    whole_dims: Optional[Shape] = None

    def nbytes(self, box: Box) -> int:
        """Bytes of a box of the tensor."""
        return self.item_bytes * box.volume

    def dims(self, box: Box) -> Shape:
        """The dims under which a file stores a box of the tensor."""
        return self.whole_dims if self.whole_dims is not None and box.size == self.shape else box.size


@dataclass(frozen=True)
class SourceFile:
    """A source file as it was when its head was read.

    Attributes:
        path: Where it lies.
        size: Its bytes.
        mtime_ns: Its modification time.
        rank: The rank whose slices it holds; 0 for a complete checkpoint.
        contents: What is read in place of its bytes: the numbers in a text.
    """

    path: str
    size: int
    mtime_ns: int
    rank: int = 0
    contents: Optional[bytes] = None


class Shard(NamedTuple):
    """A box of a source tensor, and where it lies.

    Attributes:
        tensor: The full tensor.
        box: Which part of it.
        file: The file that holds it.
        extents: Where its bytes lie in the file, in row-major order; several for chunked tensors.
    """

    tensor: Tensor
    box: Box
    file: SourceFile
    extents: tuple[Extent, ...]
