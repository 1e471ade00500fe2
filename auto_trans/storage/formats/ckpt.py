"""MindSpore's ``.ckpt`` files at rest: find the tensors without reading them, write them as a stream.

A ``.ckpt`` file is the protobuf message ``Checkpoint`` (``mindspore.train.checkpoint_pb2``)::

    Checkpoint { repeated Value value = 1; }
    Value      { string tag = 1; TensorProto tensor = 2; MapTensorProto maptensor = 3; }
    TensorProto{ repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3; }

Tensors above 512 MiB are stored as several values with the same tag and dims that follow each other. A file saved with
``crc_check`` ends with ``crc_num`` and ten bytes. Reading walks the wire format with small reads at the record heads and
skips the contents; a file of any size is scanned in milliseconds.
"""

from __future__ import annotations

import binascii
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from auto_trans.core.tensor import Shape
from auto_trans.errors import (
    CheckpointError,
    CorruptCheckpointError,
    EncryptedCheckpointError,
    UnsupportedCheckpointError,
)
from auto_trans.storage.formats.head import FileHead, Record, StoredTensor, T

__all__ = ["CHUNK_BYTES", "compute_crc", "encode", "scan"]

CHUNK_BYTES = 512 * 1024 * 1024

_READ_BYTES = 4 * 1024 * 1024
_CRC_MARK, _CRC_BYTES = b"crc_num", 17
# First bytes of an encrypted block: AES-GCM, AES-CBC, SM4-CBC.
_ENCRYPTED = (b"\xd8\x5e\x3a\x7f", b"\xd9\x5e\x3a\x7f", b"\xda\x5e\x3a\x7f")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def scan(path: Path) -> FileHead:
    """Finds the tensors of a ``.ckpt`` file without reading their contents.

    Raises:
        CheckpointError: The file cannot be read.
        EncryptedCheckpointError: The file is encrypted.
        CorruptCheckpointError: It is truncated, empty or no checkpoint.
        UnsupportedCheckpointError: It holds a MapParameter.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as e:
        raise CheckpointError(f"checkpoint {path} cannot be read: {e}") from e
    try:
        stat = os.fstat(fd)
        if os.pread(fd, 4, 0) in _ENCRYPTED:
            raise EncryptedCheckpointError(f"{path} is encrypted; decrypt it first (load and save it with dec_key)")
        tail = os.pread(fd, _CRC_BYTES, max(0, stat.st_size - _CRC_BYTES))
        crc = int.from_bytes(tail[-10:], "big") if tail.startswith(_CRC_MARK) and len(tail) == _CRC_BYTES else None
        end = stat.st_size - (_CRC_BYTES if crc is not None else 0)
        return FileHead(path, _scan_values(_Cursor(fd, path, end), path), stat.st_size, stat.st_mtime_ns, crc)
    finally:
        os.close(fd)


def compute_crc(index: FileHead) -> int:
    """The crc32 that the trailer of a file with ``crc_check`` should hold; reads the whole file."""
    crc, rest = 0, index.size - _CRC_BYTES
    with open(index.path, "rb") as f:
        while rest and (part := f.read(min(rest, _READ_BYTES))):
            crc = binascii.crc32(part, crc)
            rest -= len(part)
    return crc


class _Cursor:
    """Reads protobuf primitives at a position of a file, through a small window."""

    _WINDOW = 1024

    def __init__(self, fd: int, path: Path, end: int) -> None:
        self._fd, self._path, self.end = fd, path, end
        self.position = 0
        self._window, self._start = b"", 0

    def corrupt(self, what: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{self._path} is not a complete MindSpore checkpoint: {what} at byte {self.position} of {self.end}; it is "
            f"truncated, damaged or of another format; copy or save it again"
        )

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise self.corrupt("invalid number")

    def text(self, length: int) -> str:
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self.corrupt("invalid text") from None

    def extent(self, limit: int) -> int:
        """Reads a length and returns where what it measures ends."""
        end = self.varint() + self.position
        if end > limit:
            raise self.corrupt(f"a record that ends at byte {end}")
        return end

    def skip(self, wire_type: int, limit: int) -> None:
        if wire_type == _VARINT:
            self.varint()
        elif wire_type == _BYTES:
            self.position = self.extent(limit)
        elif wire_type in (_FIXED32, _FIXED64):
            self._take(4 if wire_type == _FIXED32 else 8)
        else:
            raise self.corrupt("invalid field")

    def _take(self, length: int) -> bytes:
        if self.position + length > self.end:
            raise self.corrupt("unexpected end")
        begin = self.position - self._start
        if begin < 0 or begin + length > len(self._window):
            self._window = os.pread(self._fd, max(length, self._WINDOW), self.position)
            self._start, begin = self.position, 0
        self.position += length
        return self._window[begin : begin + length]


def _scan_values(cursor: _Cursor, path: Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    last = None
    while cursor.position < cursor.end:
        if cursor.varint() != (1 << 3 | _BYTES):
            raise cursor.corrupt("an unknown record")
        name, tensor = _scan_value(cursor, cursor.extent(cursor.end), path)
        if name in tensors:
            before = tensors[name]
            if name != last or (before.dtype, before.dims) != (tensor.dtype, tensor.dims):
                raise CorruptCheckpointError(f"{path} holds parameter {name} twice; save the checkpoint again")
            tensor = StoredTensor(tensor.dtype, tensor.dims, before.segments + tensor.segments)
        tensors[name] = tensor
        last = name
    if not tensors:
        raise CorruptCheckpointError(f"{path} is empty; copy or save it again")
    for name, tensor in tensors.items():
        expected = math.prod(tensor.shape) * (tensor.item_bytes or 0)
        if tensor.item_bytes is not None and tensor.nbytes != expected:
            raise CorruptCheckpointError(
                f"{path}: parameter {name} of shape {list(tensor.dims)} {tensor.dtype} needs {expected} bytes and has "
                f"{tensor.nbytes}: the file is truncated or damaged; copy or save it again"
            )
    return tensors


def _scan_value(cursor: _Cursor, end: int, path: Path) -> tuple[str, StoredTensor]:
    name, tensor, is_map = "", None, False
    while cursor.position < end:
        field, wire_type = divmod(cursor.varint(), 8)
        if (field, wire_type) == (1, _BYTES):
            stop = cursor.extent(end)
            name = cursor.text(stop - cursor.position)
        elif (field, wire_type) == (2, _BYTES):
            tensor = _scan_tensor(cursor, cursor.extent(end))
        else:
            is_map |= field == 3
            cursor.skip(wire_type, end)
    if is_map and (tensor is None or not tensor.dtype):
        raise UnsupportedCheckpointError(
            f"{path}: parameter {name} is a MapParameter (a hash table), which cannot be sliced; remove it first"
        )
    if not name or tensor is None or not tensor.dtype:
        raise cursor.corrupt("a parameter without name or type")
    return name, tensor


def _scan_tensor(cursor: _Cursor, end: int) -> StoredTensor:
    dims: list[int] = []
    dtype, segment = "", (cursor.position, 0)
    while cursor.position < end:
        field, wire_type = divmod(cursor.varint(), 8)
        if (field, wire_type) == (1, _VARINT):
            dims.append(cursor.varint())
        elif (field, wire_type) == (1, _BYTES):
            stop = cursor.extent(end)
            while cursor.position < stop:
                dims.append(cursor.varint())
        elif (field, wire_type) == (2, _BYTES):
            stop = cursor.extent(end)
            dtype = cursor.text(stop - cursor.position)
        elif (field, wire_type) == (3, _BYTES):
            stop = cursor.extent(end)
            segment = (cursor.position, stop - cursor.position)
            cursor.position = stop
        else:
            cursor.skip(wire_type, end)
    return StoredTensor(dtype, tuple(dims), (segment,))


def encode(tensors: Iterable[T]) -> Iterator[tuple[T, list[Record]]]:
    """Lays out a file as ``mindspore.save_checkpoint`` writes it: the tensors in their order, large ones in chunks."""
    return ((tensor, list(_records(tensor.name, tensor.dtype, tensor.dims, tensor.nbytes))) for tensor in tensors)


def _records(name: str, dtype: str, dims: Shape, nbytes: int) -> Iterator[Record]:
    head = b"".join(b"\x08" + _varint(n) for n in dims) + _field(2, dtype.encode())
    tag = _field(1, name.encode())
    for start in range(0, max(nbytes, 1), CHUNK_BYTES):
        length = min(CHUNK_BYTES, nbytes - start)
        tensor = head + b"\x1a" + _varint(length)
        value = tag + b"\x12" + _varint(len(tensor) + length) + tensor
        yield Record(b"\x0a" + _varint(len(value) + length) + value, length)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | _BYTES]) + _varint(len(content)) + content
