"""What the tests compare with: full weights, boxes cut from them, and checkpoint files read by MindSpore's own schema.

Nothing here uses auto_trans. Boxes are cut by ``compiled_layout.json``, what MindSpore's compiler itself reported, not by
the strategy files that auto_trans reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

DATA = Path(__file__).parent / "genuine" / "data"
CASES = {model.name: sorted(case.name for case in model.iterdir()) for model in sorted(DATA.iterdir())}


class Raw(NamedTuple):
    """A tensor as it lies in a file."""

    dtype: str
    dims: tuple[int, ...]
    content: bytes


def read_raw(path: Path) -> dict[str, Raw]:
    """Every tensor of a .ckpt file, parsed by MindSpore's own protobuf schema."""
    from mindspore.train.serialization import Checkpoint

    content = path.read_bytes()
    if content[-17:-10] == b"crc_num":
        content = content[:-17]
    found: dict[str, Raw] = {}
    for value in Checkpoint.FromString(content).value:
        before = found[value.tag].content if value.tag in found else b""
        tensor = value.tensor
        found[value.tag] = Raw(tensor.tensor_type, tuple(tensor.dims), before + tensor.tensor_content)
    return found


def write_raw(path: Path, tensors: Mapping[str, Raw]) -> Path:
    """Writes a .ckpt file by MindSpore's own protobuf schema."""
    from mindspore.train.serialization import Checkpoint

    message = Checkpoint()
    for name, raw in tensors.items():
        value = message.value.add(tag=name)
        value.tensor.dims.extend(raw.dims)
        value.tensor.tensor_type = raw.dtype
        value.tensor.tensor_content = raw.content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(message.SerializeToString())
    return path


def raw(array: np.ndarray, dtype: str = "") -> Raw:
    """The file form of an array; BFloat16 keeps the upper half of float32."""
    names = {
        "float32": "Float32",
        "float16": "Float16",
        "int32": "Int32",
        "int64": "Int64",
        "uint8": "UInt8",
        "int8": "Int8",
    }
    dtype = dtype or names[array.dtype.name]
    if dtype == "BFloat16":
        array = (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return Raw(dtype, array.shape, array.tobytes())


class Genuine:
    """A model's full weights and, for each of its cases, what every rank holds."""

    def __init__(self, model: str) -> None:
        self.model = model
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
