"""The ``native`` engine: target files are written as a stream.

They are written strictly sequentially, so that each is hashed and chunked in one pass.
"""

from __future__ import annotations

from functools import partial

from auto_trans.core.plan import FilePlan
from auto_trans.engine.addition import Adder
from auto_trans.engine.base import ConversionTask, Progress
from auto_trans.engine.gather import Gatherer
from auto_trans.storage.files import NewFile, Publisher
from auto_trans.storage.formats.head import Record
from auto_trans.storage.manifest import FileRecord
from auto_trans.storage.targets import Target

__all__ = ["DEFAULT_BUFFER_BYTES", "NativeEngine"]

DEFAULT_BUFFER_BYTES = 8 * 1024 * 1024
# float32 copies of a part that is added to take several times the part
_ADDING_SHARE = 8
_LEAST_BUFFER_BYTES = 64 * 1024


class NativeEngine:
    """Copies boxes of bytes."""

    name = "native"
    tells_progress = True

    def write(self, task: ConversionTask, progress: Progress) -> list[FileRecord]:
        """Writes the files of a task, see `auto_trans.engine.base.Engine`."""
        adds = any(tensor.added is not None for file in task.files for tensor in file.tensors)
        with (
            Gatherer(_buffer_bytes(task.memory_limit, adds=adds)) as gatherer,
            Publisher[list[FileRecord]]() as publisher,
        ):
            for file in task.files:
                out = _write(task.target, file, gatherer, progress)
                publisher.submit(partial(task.target.publish, out, file))
        return [record for records in publisher.results for record in records]


def _buffer_bytes(memory_limit: int, *, adds: bool) -> int:
    """Bytes of the buffer, of which there are two where a part is gathered and hashed beside the published file."""
    share = max(memory_limit // _ADDING_SHARE, _LEAST_BUFFER_BYTES) if adds else memory_limit
    return min(DEFAULT_BUFFER_BYTES, share // 2)


def _write(target: Target, file: FilePlan, gatherer: Gatherer, progress: Progress) -> NewFile:
    """Writes a target file; it is complete, but has still to be synced and published.

    Raises:
        SourceChangedError: A source file was written to since its head was read.
        OutputError: The file cannot be written.
    """
    with target.open(file) as out:
        for tensor, records in target.format.encode(file.tensors):
            writer = _RecordWriter(out, tensor.nbytes, records)
            adder = Adder(tensor, tensor.added, gatherer) if tensor.added is not None else None
            for box, part in gatherer.parts(tensor):
                nbytes = part.nbytes
                writer.write(part if adder is None else adder.add(box, part))
                progress(nbytes)
            writer.close()
        gatherer.check_unchanged(list({shard.file.path: shard.file for shard in file.shards}.values()))
    return out


class _RecordWriter:
    """Writes the contents of a tensor as records of a file format."""

    def __init__(self, out: NewFile, nbytes: int, records: list[Record]) -> None:
        self._out, self._nbytes = out, nbytes
        self._records = iter(records)
        self._room = self._written = 0

    def write(self, part: memoryview) -> None:
        self._written += part.nbytes
        while part.nbytes:
            if not self._room:
                head, self._room = next(self._records)
                self._out.write(head)
            now = part[: self._room]
            self._out.write(now)
            self._room -= now.nbytes
            part = part[now.nbytes :]

    def close(self) -> None:
        """Ends the tensor; raises RuntimeError unless all of it was written."""
        if not self._nbytes:
            self._out.write(next(self._records).head)
        if self._written != self._nbytes:
            raise RuntimeError(
                f"{self._written} of the {self._nbytes} bytes of a tensor were written to {self._out.path}"
            )
