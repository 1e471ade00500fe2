"""Gathers the contents of target tensors from the shards that a plan copies.

Where a part of the target is one run of source bytes it is passed on as it lies in the file, else numpy gathers it into one
buffer that is used again and again. The buffer is all the memory that a conversion needs, whatever the checkpoint's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Callable, Optional

import numpy as np

from auto_trans.core.plan import Copy, TensorPlan
from auto_trans.core.tensor import Box, Extent, Shape, Shard, SourceFile, split_box
from auto_trans.storage.readers import Reader, open_reader

__all__ = ["Gatherer"]

_OPEN_FILES = 256  # a process may have some hundreds of files open, and a source has thousands
_GAP_BYTES = 128 * 1024  # what is not needed is read through up to here: a read of its own would take longer
_ROWS_BYTES = 1024 * 1024  # large enough for a disk, small enough for the cache of a processor


class Gatherer:
    """Yields the bytes of target tensors; keeps the source files open between them.

    Args:
        buffer_bytes: Size of the buffer in which strided parts are gathered.
        open_file: Opens a source file.
    """

    def __init__(self, buffer_bytes: int, open_file: Callable[[SourceFile], Reader] = open_reader) -> None:
        self._buffer = np.empty(buffer_bytes, np.uint8)
        self._rows = np.empty(min(buffer_bytes, _ROWS_BYTES), np.uint8)
        self._open = open_file
        self._readers: dict[str, Reader] = {}

    def __enter__(self) -> Gatherer:
        return self

    def __exit__(self, *exc: object) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def parts(self, tensor: TensorPlan) -> Iterator[tuple[Box, memoryview]]:
        """The contents of a tensor in order, in parts that fit the buffer; each is overwritten by the next.

        Yields:
            The box of the target slice, and its bytes.

        Raises:
            SourceChangedError: A source file was written to since its head was read.
            RuntimeError: The copies do not make up the tensor.
        """
        item = tensor.tensor.item_bytes
        for box in split_box(Box.whole(tensor.shape), max(1, self._buffer.nbytes // max(item, 1))):
            found = [(copy, common) for copy in tensor.copies if (common := copy.box.intersect(box))]
            covered = sum(common.volume for _, common in found)
            if covered != box.volume:  # the buffer would hold what was gathered before
                raise RuntimeError(f"the plan of {tensor.name} covers {covered} of {box.volume} elements")
            if len(found) == 1:
                copy, common = found[0]
                if item * box.volume > self._buffer.nbytes:  # an opaque element beyond the buffer
                    yield from ((box, part) for part in self._opaque(copy.shard))
                    continue
                run = self._run(copy.shard, _in_shard(copy, common), item)
                if run is not None:
                    yield box, run
                    continue
            out = self._buffer[: item * box.volume].reshape(_bytes_shape(box.size, item))
            for copy, common in found:
                into = _bytes_box(common.relative_to(box.offset), item)
                self._gather(copy.shard, _in_shard(copy, common), item, out[into.slices()])
            yield box, out.reshape(-1).data

    def fill(self, tensor: TensorPlan, out: np.ndarray) -> None:
        """Gathers the contents of a tensor where they are to stay, without a buffer between.

        Args:
            tensor: The tensor, to which nothing is added.
            out: Gets its bytes: a contiguous array of uint8.

        Raises:
            SourceChangedError: A source file was written to since its head was read.
            RuntimeError: The copies do not make up the tensor.
        """
        item, covered = tensor.tensor.item_bytes, sum(copy.box.volume for copy in tensor.copies)
        if item * covered != out.nbytes or tensor.nbytes != out.nbytes or tensor.added is not None:
            raise RuntimeError(f"the plan of {tensor.name} covers {covered} elements for {out.nbytes} bytes")
        if not covered:
            return
        out = out.reshape(_bytes_shape(tensor.shape, item))
        for copy in tensor.copies:
            part = out[_bytes_box(copy.box, item).slices()]
            self._gather(copy.shard, Box(copy.start, copy.box.size), item, part)

    def whole(self, tensor: TensorPlan) -> bytes:
        """The contents of a tensor at once; for small ones."""
        return b"".join(bytes(part) for _, part in self.parts(tensor))

    def check_unchanged(self, files: Sequence[SourceFile]) -> None:
        """Raises SourceChangedError if a file was written to since its head was read."""
        for file in files:
            self._reader(file).check_unchanged()

    def _run(self, shard: Shard, box: Box, item: int) -> Optional[memoryview]:
        """A box of a shard as it lies in the file, if it is one run of bytes there."""
        lead = next((i for i, n in enumerate(box.size) if n > 1), len(box.size))
        if box.size[lead + 1 :] != shard.box.size[lead + 1 :]:
            return None
        begin, length = item * _flat(box.offset, shard.box.size), item * box.volume
        for offset, nbytes in shard.extents:
            if begin + length <= nbytes:
                return self._reader(shard.file).read(offset + begin, length).data if begin >= 0 else None
            begin -= nbytes
        return None

    def _gather(self, shard: Shard, box: Box, item: int, out: np.ndarray) -> None:
        """Copies a box of a shard, which may lie in several chunks, to an array of bytes."""
        shape = _bytes_shape(shard.box.size, item)
        rows = _Rows(self._reader(shard.file), shard.extents, self._rows)
        rows.copy(0, shape, _bytes_box(box, item), out)

    def _opaque(self, shard: Shard) -> Iterator[memoryview]:
        for offset, nbytes in shard.extents:
            for begin in range(offset, offset + nbytes, self._buffer.nbytes):
                length = min(self._buffer.nbytes, offset + nbytes - begin)
                yield self._reader(shard.file).read(begin, length).data

    def _reader(self, file: SourceFile) -> Reader:
        reader = self._readers.pop(file.path, None) or self._open(file)
        self._readers[file.path] = reader  # the last of them
        if len(self._readers) > _OPEN_FILES:
            self._readers.pop(next(iter(self._readers))).close()
        return reader


def _in_shard(copy: Copy, common: Box) -> Box:
    """The box in the shard of a part of the box that it is copied to."""
    return Box(tuple(c - t + s for c, t, s in zip(common.offset, copy.box.offset, copy.start)), common.size)


class _Rows:
    """Copies rows of a tensor of bytes that lies in the chunks of a file.

    Args:
        reader: The file.
        extents: The chunks.
        buffer: Where rows are read of which not all is needed, unless the reader shows them as they lie.
    """

    def __init__(self, reader: Reader, extents: Sequence[Extent], buffer: np.ndarray) -> None:
        self._reader, self._extents, self._buffer = reader, extents, buffer

    def copy(self, base: int, shape: Shape, box: Box, out: np.ndarray) -> None:
        """Copies a box of a tensor that begins ``base`` bytes into the chunks.

        Rows that lie within one chunk are copied together; a row that straddles two is taken apart.
        """
        row = math.prod(shape[1:])
        direct = box.size[1:] == shape[1:] and out.flags.c_contiguous
        columns = (slice(None), *box.slices()[1:])
        done, begin = 0, base + box.offset[0] * row
        while done < box.size[0]:
            offset, nbytes = self._chunk(begin)
            rows = min(box.size[0] - done, nbytes // row)
            if direct and rows:
                self._reader.read_into(offset, out[done : done + rows])
            elif (source := self._source(offset, rows, row, math.prod(box.size[1:]))).size:
                rows = len(source)
                out[done : done + rows] = source.reshape((rows, *shape[1:]))[columns]
            else:
                rows = 1
                self.copy(begin, shape[1:], Box(box.offset[1:], box.size[1:]), out[done])
            done += rows
            begin += rows * row

    def _source(self, offset: int, rows: int, row: int, needed: int) -> np.ndarray:
        """As many of some whole rows as can be had at once, if any can, and if enough of a row is needed."""
        found = self._reader.view(offset, rows * row)
        if found is None and row - needed >= _GAP_BYTES:
            return self._buffer[:0]
        if found is None:
            found = self._buffer[: min(rows, self._buffer.nbytes // row) * row]
            if found.size:
                self._reader.read_into(offset, found)
        return found.reshape((-1, row)) if found.size else found

    def _chunk(self, begin: int) -> Extent:
        """Where in the file a byte of the tensor lies, and how many follow it in its chunk."""
        for offset, nbytes in self._extents:
            if begin < nbytes:
                return offset + begin, nbytes - begin
            begin -= nbytes
        raise IndexError(begin)


def _flat(offset: Shape, shape: Shape) -> int:
    index = 0
    for o, n in zip(offset, shape):
        index = index * n + o
    return index


def _bytes_shape(shape: Shape, item: int) -> Shape:
    """Shape of the same tensor seen as bytes: numpy need not know the type, and no byte is ever changed."""
    return (*shape[:-1], shape[-1] * item) if shape else (item,)


def _bytes_box(box: Box, item: int) -> Box:
    if not box.size:
        return Box((0,), (item,))
    return Box((*box.offset[:-1], box.offset[-1] * item), (*box.size[:-1], box.size[-1] * item))
