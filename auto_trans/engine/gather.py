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
from auto_trans.storage.readers import MappedFile, Reader

__all__ = ["Gatherer"]


class Gatherer:
    """Yields the bytes of target tensors; keeps the source files open between them.

    Args:
        buffer_bytes: Size of the buffer in which strided parts are gathered.
        open_reader: Opens a source file.
    """

    def __init__(self, buffer_bytes: int, open_reader: Callable[[SourceFile], Reader] = MappedFile) -> None:
        self._buffer = np.empty(buffer_bytes, np.uint8)
        self._open = open_reader
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
        _gather_rows(self._reader(shard.file), shard.extents, 0, shape, _bytes_box(box, item), out)

    def _opaque(self, shard: Shard) -> Iterator[memoryview]:
        for offset, nbytes in shard.extents:
            yield self._reader(shard.file).read(offset, nbytes).data

    def _reader(self, file: SourceFile) -> Reader:
        if file.path not in self._readers:
            self._readers[file.path] = self._open(file)
        return self._readers[file.path]


def _in_shard(copy: Copy, common: Box) -> Box:
    """The box in the shard of a part of the box that it is copied to."""
    return Box(tuple(c - t + s for c, t, s in zip(common.offset, copy.box.offset, copy.start)), common.size)


def _gather_rows(reader: Reader, extents: Sequence[Extent], base: int, shape: Shape, box: Box, out: np.ndarray) -> None:
    """Copies a box of a tensor of bytes that begins ``base`` bytes into the chunks of ``extents``.

    Rows that lie within one chunk are copied together; a row that straddles two is taken apart.
    """
    row = math.prod(shape[1:])
    done, begin = 0, base + box.offset[0] * row
    while done < box.size[0]:
        start = 0
        chunk = 0
        while begin >= start + extents[chunk][1]:
            start += extents[chunk][1]
            chunk += 1
        offset, nbytes = extents[chunk]
        rows = min(box.size[0] - done, (start + nbytes - begin) // row)
        if rows:
            source = reader.read(offset + begin - start, rows * row).reshape((rows, *shape[1:]))
            columns = (slice(None), *box.slices()[1:])
            out[done : done + rows] = source[columns]
        else:
            rows = 1
            inner = Box(box.offset[1:], box.size[1:])
            _gather_rows(reader, extents, begin, shape[1:], inner, out[done])
        done += rows
        begin += rows * row


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
