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
import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from auto_trans.core.tensor import Shape
from auto_trans.errors import CorruptCheckpointError, EncryptedCheckpointError, UnsupportedCheckpointError
from auto_trans.storage.formats.head import FileHead, Record, StoredTensor, T
from auto_trans.storage.formats.wire import WireError, WireReader, bytes_field, bytes_head, number_field
from auto_trans.storage.readers import LocalReader, Reader

__all__ = ["CHUNK_BYTES", "compute_crc", "encode", "scan"]

CHUNK_BYTES = 512 * 1024 * 1024

_READ_BYTES = 4 * 1024 * 1024
_CRC_MARK, _CRC_BYTES = b"crc_num", 17
# First bytes of an encrypted block: AES-GCM, AES-CBC, SM4-CBC.
_ENCRYPTED = (b"\xd8\x5e\x3a\x7f", b"\xd9\x5e\x3a\x7f", b"\xda\x5e\x3a\x7f")
_DIM = (0, 2**63 - 1)


def scan(reader: Reader) -> FileHead:
    """Finds the tensors of a ``.ckpt`` file without reading their contents.

    Raises:
        CheckpointError: The file cannot be read.
        EncryptedCheckpointError: The file is encrypted.
        CorruptCheckpointError: It is truncated, empty or no checkpoint.
        UnsupportedCheckpointError: It holds a MapParameter.
    """
    path = Path(reader.path)
    if reader.read(0, 4).tobytes() in _ENCRYPTED:
        raise EncryptedCheckpointError(f"{path} is encrypted; decrypt it first (load and save it with dec_key)")
    tail = reader.read(max(0, reader.size - _CRC_BYTES), _CRC_BYTES).tobytes()
    crc = int.from_bytes(tail[-10:], "big") if tail.startswith(_CRC_MARK) and len(tail) == _CRC_BYTES else None
    end = reader.size - (_CRC_BYTES if crc is not None else 0)
    wire = WireReader(lambda position, length: reader.read(position, length).tobytes(), end)
    try:
        return FileHead(path, _scan_values(wire, path), reader.size, reader.version, crc)
    except WireError as e:
        raise CorruptCheckpointError(
            f"{path} is not a complete MindSpore checkpoint: {e}; it is truncated, damaged or of another format; copy or "
            f"save it again"
        ) from e


def compute_crc(head: FileHead) -> int:
    """The crc32 that the trailer of a file with ``crc_check`` should hold; reads the whole file.

    Raises:
        CheckpointError: The file cannot be read.
    """
    crc, offset, end = 0, 0, head.size - _CRC_BYTES
    with contextlib.closing(LocalReader(head.path)) as reader:
        while offset < end and (part := reader.read(offset, min(end - offset, _READ_BYTES))).nbytes:
            crc = binascii.crc32(part.data, crc)
            offset += part.nbytes
    return crc


def _scan_values(reader: WireReader, path: Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    last = None
    for field, wire_type in reader.fields(reader.end):
        if field != 1:
            raise reader.error("an unknown record")
        name, tensor = _scan_value(reader, reader.extent(wire_type), path)
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


def _scan_value(reader: WireReader, end: int, path: Path) -> tuple[str, StoredTensor]:
    name, tensor, is_map = "", None, False
    for field, wire_type in reader.fields(end):
        if field == 1:
            name = reader.text(wire_type)
        elif field == 2:
            tensor = _scan_tensor(reader, reader.extent(wire_type))
        else:
            is_map |= field == 3
            reader.skip(wire_type)
    if is_map and (tensor is None or not tensor.dtype):
        raise UnsupportedCheckpointError(
            f"{path}: parameter {name} is a MapParameter (a hash table), which cannot be sliced; remove it first"
        )
    if not name or tensor is None or not tensor.dtype:
        raise reader.error("a parameter without name or type")
    return name, tensor


def _scan_tensor(reader: WireReader, end: int) -> StoredTensor:
    dims: list[int] = []
    dtype, segment = "", (reader.position, 0)
    for field, wire_type in reader.fields(end):
        if field == 1:
            reader.extend(dims, wire_type, _DIM)
        elif field == 2:
            dtype = reader.text(wire_type)
        elif field == 3:
            stop = reader.extent(wire_type)
            segment = (reader.position, stop - reader.position)
            reader.position = stop
        else:
            reader.skip(wire_type)
    return StoredTensor(dtype, tuple(dims), (segment,))


def encode(tensors: Iterable[T]) -> Iterator[tuple[T, list[Record]]]:
    """Lays out a file as ``mindspore.save_checkpoint`` writes it: the tensors in their order, large ones in chunks."""
    return ((tensor, list(_records(tensor.name, tensor.dtype, tensor.dims, tensor.nbytes))) for tensor in tensors)


def _records(name: str, dtype: str, dims: Shape, nbytes: int) -> Iterator[Record]:
    head = b"".join(number_field(1, size) for size in dims) + bytes_field(2, dtype.encode())
    tag = bytes_field(1, name.encode())
    for start in range(0, max(nbytes, 1), CHUNK_BYTES):
        length = min(CHUNK_BYTES, nbytes - start)
        tensor = head + bytes_head(3, length)
        value = tag + bytes_head(2, len(tensor) + length) + tensor
        yield Record(bytes_head(1, len(value) + length) + value, length)
