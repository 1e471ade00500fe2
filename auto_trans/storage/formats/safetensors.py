"""``.safetensors`` files at rest: find the tensors without reading them, lay out files to be written as a stream.

The format is eight bytes with the length of a JSON header, the header, and the contents one after the other
(https://github.com/huggingface/safetensors). The ``safetensors`` library is not used for writing: it wants every tensor in
memory, and its version 0.8.0 writes wrong values for arrays that are not contiguous.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from auto_trans.core.tensor import ITEM_BYTES
from auto_trans.errors import CheckpointError, CorruptCheckpointError, UnsupportedCheckpointError
from auto_trans.storage.formats.head import FileHead, Record, StoredTensor, T
from auto_trans.storage.readers import Reader

__all__ = ["encode", "scan"]

_TYPES = {
    "BOOL": "Bool", "I8": "Int8", "U8": "UInt8", "I16": "Int16", "U16": "UInt16", "F16": "Float16", "BF16": "BFloat16",
    "I32": "Int32", "U32": "UInt32", "F32": "Float32", "I64": "Int64", "U64": "UInt64", "F64": "Float64", "C64": "Complex64",
}  # fmt: skip
_NAMES = {mindspore: safetensors for safetensors, mindspore in _TYPES.items()}
_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # the library's own limit


def scan(reader: Reader) -> FileHead:
    """Finds the tensors of a ``.safetensors`` file without reading their contents.

    Raises:
        CheckpointError: The file cannot be read.
        CorruptCheckpointError: It is truncated, damaged or of another format.
        UnsupportedCheckpointError: It holds a type that MindSpore's checkpoints do not have.
    """
    path = Path(reader.path)
    length = int.from_bytes(reader.read(0, _LENGTH_BYTES).tobytes(), "little")
    if length > min(reader.size - _LENGTH_BYTES, _LONGEST_HEADER):
        raise _corrupt(path, f"its header would be {length} bytes long")
    begin = _LENGTH_BYTES + length
    try:
        header = json.loads(reader.read(_LENGTH_BYTES, length).tobytes())
        metadata = _metadata(header.pop(_METADATA, None) or {})
        tensors = {name: _tensor(path, name, entry, metadata, begin) for name, entry in header.items()}
        crc = int(metadata["crc_num"]) if metadata.get("crc_num") else None
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise _corrupt(path, f"its header cannot be read ({type(e).__name__}: {e})") from e
    end = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].segments):
        if tensor.segments[0][0] != end:
            raise _corrupt(path, f"parameter {name} does not begin where the one before it ends")
        end += tensor.nbytes
    if end != reader.size:
        raise _corrupt(path, f"it should have {end} bytes and has {reader.size}")
    if not tensors:
        raise _corrupt(path, "it holds no parameters")
    removed = {"True": True, "False": False}.get(metadata.get("remove_redundancy", ""))
    return FileHead(path, tensors, reader.size, reader.version, crc, removed)


def encode(tensors: Iterable[T]) -> Iterator[tuple[T, list[Record]]]:
    """Lays out a file that the ``safetensors`` library and ``mindspore.load_checkpoint`` read.

    As the library does it, tensors are ordered by the size of their elements, so that each begins at a multiple of it.

    Raises:
        UnsupportedCheckpointError: A tensor has a type that the format does not know, or a name that it keeps for itself.
    """
    tensors = list(tensors)
    for tensor in tensors:
        if tensor.dtype not in _NAMES:
            raise UnsupportedCheckpointError(
                f"parameter {tensor.name} is of type {tensor.dtype}, which safetensors files cannot hold; write .ckpt files"
            )
        if tensor.name == _METADATA:
            raise UnsupportedCheckpointError(
                f"parameter {tensor.name} bears a name that safetensors files keep for themselves; write .ckpt files"
            )
    tensors.sort(key=lambda tensor: (-ITEM_BYTES[tensor.dtype], tensor.name))
    header: dict[str, Any] = {_METADATA: {"format": "ms", "remove_redundancy": "False"}}
    offset = 0
    for tensor in tensors:
        # MindSpore stores some scalars of .ckpt files with dims (0,)
        shape = [] if tensor.dims == (0,) and tensor.nbytes else list(tensor.dims)
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _LENGTH_BYTES)
    head = len(raw).to_bytes(_LENGTH_BYTES, "little") + raw
    for tensor in tensors:
        yield tensor, [Record(head, tensor.nbytes)]
        head = b""


def _metadata(entry: Any) -> dict[str, str]:
    if any(not isinstance(text, str) for text in entry.values()):
        raise ValueError("its metadata are no texts")
    return dict(entry)


def _tensor(path: Path, name: str, entry: Any, metadata: Mapping[str, str], begin: int) -> StoredTensor:
    name.encode()  # JSON can hold half a character, which no file that we write can
    if entry["dtype"] not in _TYPES or name in metadata:
        raise UnsupportedCheckpointError(
            f"{path}: parameter {name} is of type {metadata.get(name, entry['dtype'])}, which cannot be converted"
        )
    dtype, dims = _TYPES[entry["dtype"]], tuple(map(_number, entry["shape"]))
    first, last = map(_number, entry["data_offsets"])
    if last - first != math.prod(dims) * ITEM_BYTES[dtype]:
        raise _corrupt(path, f"parameter {name} of shape {list(dims)} {dtype} has {last - first} bytes")
    return StoredTensor(dtype, dims, ((begin + first, last - first),))


def _number(value: Any) -> int:
    """A size or an offset."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is no size")
    return value


def _corrupt(path: Path, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{path} is not a complete safetensors file: {what}; it is truncated, damaged or of another format; copy or save it "
        f"again"
    )
