"""Runs a plan: the bytes of every target tensor are gathered from the source files and written in file order.

Target files are written strictly sequentially, so that each is hashed and chunked in one pass. The source is
mapped, never read as a whole: where a part of the target is one run of source bytes it goes straight from the mapping to
the file, else numpy gathers it into one buffer that is used again and again. The buffer is all the memory that a
conversion needs, whatever the checkpoint's size; mapped pages are page cache and can be reclaimed at any time.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Callable, Optional

import numpy as np

from auto_trans.core.layout import Box, Shape, split_box
from auto_trans.core.plan import FilePlan, TensorPlan
from auto_trans.errors import SourceChangedError
from auto_trans.storage.files import NewFile
from auto_trans.storage.formats import Format
from auto_trans.storage.formats.index import CheckpointIndex, Record, StoredTensor

__all__ = ["DEFAULT_BUFFER_BYTES", "Adapt", "Executor", "Progress"]

DEFAULT_BUFFER_BYTES = 8 * 1024 * 1024

# called with the bytes of tensors that were written since the last call
Progress = Callable[[int], None]
# called with a tensor, a box of it and the bytes of the box; returns the bytes to be written instead
Adapt = Callable[[TensorPlan, Box, memoryview], memoryview]


class Executor:
    """Writes target files; keeps the source files mapped between them.

    Args:
        sources: Source rank -> its scanned file.
        buffer_bytes: Size of the buffer in which strided parts are gathered.
        progress: Told of the bytes written.
        adapt: Changes parts of tensors on their way; by default every byte stays as it is.
    """

    def __init__(
        self,
        sources: Mapping[int, CheckpointIndex],
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        progress: Optional[Progress] = None,
        adapt: Optional[Adapt] = None,
    ) -> None:
        self._sources = sources
        self._buffer = np.empty(buffer_bytes, np.uint8)
        self._progress = progress or (lambda nbytes: None)
        self._adapt = adapt or (lambda tensor, box, part: part)
        self._maps: dict[int, np.ndarray] = {}

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *exc: object) -> None:
        self._maps.clear()

    def write(self, plan: FilePlan, path: Path, format: Format) -> NewFile:
        """Writes a target file; it is complete, but has still to be synced and published.

        Args:
            plan: Its contents.
            path: Where it goes.
            format: How it is written.

        Raises:
            SourceChangedError: A source file was written to since it was scanned.
            OutputError: The file cannot be written.
        """
        with NewFile(path) as out:
            for tensor, records in format.encode(plan.tensors):
                writer = _RecordWriter(out, tensor, records)
                for box, part in self.parts(tensor):
                    writer.write(self._adapt(tensor, box, part))
                    self._progress(part.nbytes)
                writer.close()
            self._check_unchanged({copy.rank for tensor in plan.tensors for copy in tensor.copies})
        return out

    def parts(self, tensor: TensorPlan) -> Iterator[tuple[Box, memoryview]]:
        """The contents of a tensor in order, in parts that fit the buffer; each is overwritten by the next.

        Yields:
            The box of the target slice, and its bytes.
        """
        item = tensor.nbytes // max(math.prod(tensor.shape), 1)
        for box in split_box(Box.whole(tensor.shape), max(1, self._buffer.nbytes // max(item, 1))):
            found = [(copy, common) for copy in tensor.copies if (common := copy.target.intersect(box))]
            if len(found) == 1 and item * box.volume > self._buffer.nbytes:  # an opaque element beyond the buffer
                yield from ((box, part) for part in self._opaque(found[0][0].rank, tensor.name))
                continue
            out = None
            for copy, common in found:
                source = Box(
                    tuple(c - t + s for c, t, s in zip(common.offset, copy.target.offset, copy.source)), common.size
                )
                stored = self._sources[copy.rank].tensors[tensor.name]
                if len(found) == 1:
                    run = self._contiguous(copy.rank, stored, source, item)
                    if run is not None:
                        yield box, run
                        break
                if out is None:
                    out = self._buffer[: item * box.volume].reshape(_bytes_shape(box.size, item))
                part = common.relative_to(box.offset)
                self._gather(copy.rank, stored, source, item, out[_bytes_box(part, item).slices()])
            else:
                if out is not None:
                    yield box, out.reshape(-1).data

    def _contiguous(self, rank: int, stored: StoredTensor, box: Box, item: int) -> Optional[memoryview]:
        """The box as it lies in the file, if it is one run of bytes there."""
        lead = next((i for i, n in enumerate(box.size) if n > 1), len(box.size))
        if box.size[lead + 1 :] != stored.shape[lead + 1 :]:
            return None
        begin = item * _flat(box.offset, stored.shape)
        length = item * box.volume
        for offset, nbytes in stored.segments:
            if begin + length <= nbytes:
                return self._map(rank)[offset + begin : offset + begin + length].data if begin >= 0 else None
            begin -= nbytes
        return None

    def _gather(self, rank: int, stored: StoredTensor, box: Box, item: int, out: np.ndarray) -> None:
        """Copies a box of a stored tensor, which may lie in several chunks, to an array of bytes."""
        flat = self._map(rank)
        parts = _bytes_box(box, item)
        _gather_rows(flat, stored.segments, 0, _bytes_shape(stored.shape, item), parts, out)

    def _opaque(self, rank: int, name: str) -> Iterator[memoryview]:
        for offset, nbytes in self._sources[rank].tensors[name].segments:
            yield self._map(rank)[offset : offset + nbytes].data

    def _map(self, rank: int) -> np.ndarray:
        if rank not in self._maps:
            source = self._sources[rank]
            with open(source.path, "rb") as f:
                # a mapped file that has become shorter would end the process with SIGBUS
                self._check(source, os.fstat(f.fileno()))
                mapping = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[rank] = np.frombuffer(mapping, np.uint8)
        return self._maps[rank]

    def _check_unchanged(self, ranks: set[int]) -> None:
        for rank in ranks:
            self._check(self._sources[rank], os.stat(self._sources[rank].path))

    @staticmethod
    def _check(source: CheckpointIndex, stat: os.stat_result) -> None:
        if (stat.st_size, stat.st_mtime_ns) != (source.size, source.mtime_ns):
            raise SourceChangedError(
                f"{source.path} was written to while it was being converted; start again once the weights are saved"
            )


class _RecordWriter:
    """Writes the contents of a tensor as records of a file format."""

    def __init__(self, out: NewFile, tensor: TensorPlan, records: list[Record]) -> None:
        self._out, self._tensor = out, tensor
        self._records = iter(records)
        self._room = 0
        self._written = 0

    def write(self, part: memoryview) -> None:
        while part.nbytes:
            if not self._room:
                head, self._room = next(self._records)
                self._out.write(head)
            now = part[: self._room]
            self._out.write(now)
            self._room -= now.nbytes
            self._written += now.nbytes
            part = part[now.nbytes :]

    def close(self) -> None:
        if not self._tensor.nbytes:
            self._out.write(next(self._records).head)
        if self._written != self._tensor.nbytes:
            raise RuntimeError(f"plan of {self._tensor.name} covers {self._written} of {self._tensor.nbytes} bytes")


def _gather_rows(
    flat: np.ndarray, segments: tuple[tuple[int, int], ...], base: int, shape: Shape, box: Box, out: np.ndarray
) -> None:
    """Copies a box of a tensor of bytes that begins ``base`` bytes into the chunks of ``segments``.

    Rows that lie within one chunk are copied together; a row that straddles two is taken apart.
    """
    row = math.prod(shape[1:])
    done, begin = 0, base + box.offset[0] * row
    while done < box.size[0]:
        start = 0
        chunk = 0
        while begin >= start + segments[chunk][1]:
            start += segments[chunk][1]
            chunk += 1
        offset, nbytes = segments[chunk]
        rows = min(box.size[0] - done, (start + nbytes - begin) // row)
        if rows:
            source = flat[offset + begin - start :][: rows * row].reshape((rows, *shape[1:]))
            columns = (slice(None), *box.slices()[1:])
            out[done : done + rows] = source[columns]
        else:
            rows = 1
            inner = Box(box.offset[1:], box.size[1:])
            _gather_rows(flat, segments, begin, shape[1:], inner, out[done])
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
