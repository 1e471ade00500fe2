"""What the tests compare with: full weights, boxes cut from them, and the tensors of checkpoint files.

Nothing here uses auto_trans, and only `save_with_mindspore` starts MindSpore. Boxes are cut by ``compiled_layout.json``,
what MindSpore's compiler itself reported, not by the strategy files that auto_trans reads.
"""

from __future__ import annotations

import binascii
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

DATA = Path(__file__).parent / "genuine" / "data"
CASES = {model.name: sorted(case.name for case in model.iterdir()) for model in sorted(DATA.iterdir())}


# numpy's name -> MindSpore's
NAMES = {
    "bool": "Bool",
    "float64": "Float64",
    "float32": "Float32",
    "float16": "Float16",
    "int8": "Int8",
    "int16": "Int16",
    "int32": "Int32",
    "int64": "Int64",
    "uint8": "UInt8",
    "uint16": "UInt16",
    "uint32": "UInt32",
    "uint64": "UInt64",
}


class Raw(NamedTuple):
    """A tensor as it lies in a file."""

    dtype: str
    dims: tuple[int, ...]
    content: bytes


def read_raw(path: Path) -> dict[str, Raw]:
    """Every tensor of a .ckpt file; ``tests/genuine/test_oracle.py`` shows that MindSpore's own schema says the same."""
    content = memoryview(path.read_bytes())
    if content[-17:-10] == b"crc_num":
        content = content[:-17]
    found: dict[str, Raw] = {}
    for number, value in _fields(content):
        assert number == 1, f"{path} holds field {number}"
        fields = dict(_fields(value))
        name, dims, dtype, data = str(fields[1], "utf-8"), [], "", b""
        for part, field in _fields(fields[2]):
            if part == 1:
                dims.append(field)
            elif part == 2:
                dtype = str(field, "utf-8")
            else:
                data = bytes(field)
        before = found[name].content if name in found else b""
        found[name] = Raw(dtype, tuple(dims), before + data)
    return found


def write_raw(path: Path, tensors: Mapping[str, Raw], *, crc: bool = False) -> Path:
    """Writes a .ckpt file, the very bytes that MindSpore makes of it; ``crc``: with its trailer, as ``crc_check``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for name, raw in tensors.items():
            dims = b"".join(b"\x08" + _varint(n) for n in raw.dims)
            data = b"\x1a" + _varint(len(raw.content))
            tensor = dims + _field(2, raw.dtype.encode()) + data
            value = _field(1, name.encode()) + b"\x12" + _varint(len(tensor) + len(raw.content)) + tensor
            file.write(b"\x0a" + _varint(len(value) + len(raw.content)) + value)
            file.write(raw.content)
    if crc:
        trailer = b"crc_num" + binascii.crc32(path.read_bytes()).to_bytes(10, "big")
        with path.open("ab") as file:
            file.write(trailer)
    return path


def _fields(content: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of every field of a protobuf message: a number or what is delimited by a length."""
    position = 0
    while position < len(content):
        key, position = _number(content, position)
        value, position = _number(content, position)
        if key & 7 == 2:
            end = position + value
            assert end <= len(content), "truncated"
            yield key >> 3, content[position:end]
            position = end
        else:
            assert key & 7 == 0, f"wire type {key & 7}"
            yield key >> 3, value


def _number(content: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position


def _varint(value: int) -> bytes:
    groups = [value & 127]
    while value := value >> 7:
        groups[-1] |= 128
        groups.append(value & 127)
    return bytes(groups)


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def read_safetensors_raw(path: Path) -> dict[str, Raw]:
    """Every tensor of a .safetensors file, read by the safetensors library; dtypes have safetensors' names."""
    import safetensors

    found = safetensors.deserialize(path.read_bytes())
    return {name: Raw(t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in found}


def write_safetensors_raw(path: Path, tensors: Mapping[str, Raw]) -> Path:
    """Writes a .safetensors file, with the metadata that MindSpore gives it."""
    short = {"BFloat": "BF", "Float": "F", "UInt": "U", "Int": "I", "Bool": "BOOL"}
    header: dict[str, dict] = {"__metadata__": {"format": "ms"}}
    end = 0
    # large elements first, so that all begin at multiples of their size
    for name, raw in sorted(tensors.items(), key=lambda item: -len(item[1].content) // max(1, math.prod(item[1].dims))):
        kind = raw.dtype.rstrip("0123456789")
        begin, end = end, end + len(raw.content)
        dtype = short[kind] + raw.dtype[len(kind) :]
        header[name] = {"dtype": dtype, "shape": list(raw.dims), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = [tensors[name].content for name in list(header)[1:]]
    path.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *contents]))
    return path


def raw(array: np.ndarray, dtype: str = "") -> Raw:
    """The file form of an array, in ``dtype`` (MindSpore's name) if given; BFloat16 keeps the upper half of float32."""
    dtype = dtype or NAMES[array.dtype.name]
    if dtype == "BFloat16":
        array = (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        array = array.astype(dtype.lower(), copy=False)
    return Raw(dtype, array.shape, array.tobytes())


class Genuine:
    """A model's full weights and, for each of its cases, what every rank holds."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._slices: dict[str, dict[int, dict[str, np.ndarray]]] = {}
        rng = np.random.default_rng(7)
        self.dtypes: dict[str, str] = {}
        self.full: dict[str, np.ndarray] = {}
        for case in CASES[model]:
            for name, facts in self.meta(case)["params"].items():
                if name not in self.full:
                    self.dtypes[name] = facts["dtype"]
                    # small whole numbers: every dtype holds them exactly, so that a float32 array can stand for all
                    self.full[name] = rng.integers(-128, 128, facts["shape"]).astype(np.float32)

    def meta(self, case: str) -> dict:
        return json.loads((DATA / self.model / case / "meta.json").read_text())

    def strategy(self, case: str) -> Path:
        return DATA / self.model / case / "strategy"

    def slices(self, case: str) -> dict[int, dict[str, np.ndarray]]:
        """Rank -> parameter -> the box that the compiler gave it, cut from the full tensor."""
        if case not in self._slices:
            self._slices[case] = self._cut(case)
        return {rank: dict(held) for rank, held in self._slices[case].items()}

    def _cut(self, case: str) -> dict[int, dict[str, np.ndarray]]:
        compiled = json.loads((DATA / self.model / case / "compiled_layout.json").read_text())
        params = self.meta(case)["params"]
        listed = {name for rank in compiled.values() for name in rank["layout"]}
        found: dict[int, dict[str, np.ndarray]] = {}
        for rank, facts in compiled.items():
            groups = {**facts["groups"], "hccl_world_group": list(range(len(compiled)))}
            held = {
                name: self._box(name, layout, int(rank), groups)
                for name, layout in facts["layout"].items()
                if not name.startswith("accu_grads.")
            }
            held.update({name: self.full[name] for name in params if name not in listed})
            found[int(rank)] = held
        return found

    def _box(self, name: str, layout: list, rank: int, groups: dict) -> np.ndarray:
        dev_matrix, tensor_map, slice_shape, _, _, group, _, expanded_slice = layout[:8]
        counts = [1 if axis == -1 else dev_matrix[-1 - axis] for axis in tensor_map]
        coordinate = np.unravel_index(rank % int(np.prod(dev_matrix)), dev_matrix)
        full = self.full[name].reshape([n * k for n, k in zip(expanded_slice, counts)])
        for dim, (axis, count) in enumerate(zip(tensor_map, counts)):
            if axis != -1:
                full = np.split(full, count, dim)[coordinate[-1 - axis]]
        box = full.reshape(slice_shape)
        if group:
            box = np.split(box, len(groups[group]))[groups[group].index(rank)]
        return box


def save_genuine(folder: Path, slices: Mapping[int, Mapping[str, np.ndarray]], dtypes: Mapping[str, str]) -> Path:
    """Saves rank folders as `save_with_mindspore` does, byte for byte, without MindSpore."""
    for rank, held in slices.items():
        tensors = {name: raw(array, dtypes[name]) for name, array in held.items()}
        write_raw(folder / f"rank_{rank}" / f"net_rank_{rank}-1_1.ckpt", tensors)
    return folder


def save_with_mindspore(
    folder: Path, slices: Mapping[int, Mapping[str, np.ndarray]], dtypes: Mapping[str, str]
) -> Path:
    """Saves rank folders with mindspore.save_checkpoint."""
    import mindspore

    for rank, held in slices.items():
        (folder / f"rank_{rank}").mkdir(parents=True)
        tensors = [
            {"name": name, "data": mindspore.Tensor(np.array(a, order="C"), getattr(mindspore, dtypes[name].lower()))}
            for name, a in held.items()
        ]
        mindspore.save_checkpoint(tensors, str(folder / f"rank_{rank}" / f"net_rank_{rank}-1_1.ckpt"))
    return folder
