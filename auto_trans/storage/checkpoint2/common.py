"""common.json: the numbers that a job goes on from.

Rank folders hold the same numbers as parameters, which MindFormers' CheckpointMonitor adds to every file; here each becomes
the other.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from auto_trans.core.plan import Plan, TensorPlan
from auto_trans.core.tensor import Shape, Shard
from auto_trans.errors import CorruptCheckpointError
from auto_trans.log import logger
from auto_trans.storage.formats.head import FileHead, StoredTensor
from auto_trans.storage.readers import LocalReader

__all__ = ["Common", "common_head", "common_of", "read_common"]

_NUMPY = {
    "Int8": np.int8, "Int16": np.int16, "Int32": np.int32, "Int64": np.int64, "UInt8": np.uint8, "UInt16": np.uint16,
    "UInt32": np.uint32, "UInt64": np.uint64, "Float16": np.float16, "Float32": np.float32, "Float64": np.float64,
}  # fmt: skip


class _Kept(NamedTuple):
    """How CheckpointMonitor keeps a number in a file."""

    dtype: str
    dims: Shape = ()


_KEPT = {
    "epoch_num": _Kept("Int64"),
    "step_num": _Kept("Int64"),
    "global_step": _Kept("Int32", (1,)),
    "loss_scale": _Kept("Float32"),
    "global_batch_size": _Kept("Int64"),
    "consumed_samples": _Kept("Int64"),
}


@dataclass(frozen=True)
class Common:
    """The numbers of common.json; None where one is not known.

    Attributes:
        epoch_num: Epochs begun.
        step_num: Steps done.
        global_step: Updates that the optimizer has made.
        loss_scale: The loss scale.
        global_batch_size: Samples of a step.
        consumed_samples: Samples seen; MindFormers keeps it from 2.1 on.
    """

    epoch_num: Optional[int] = None
    step_num: Optional[int] = None
    global_step: Optional[int] = None
    loss_scale: Optional[float] = None
    global_batch_size: Optional[int] = None
    consumed_samples: Optional[int] = None

    @property
    def step(self) -> Optional[int]:
        """The step, by which MindFormers names an iteration."""
        return self.global_step if self.step_num is None else self.step_num

    def as_json(self) -> dict[str, Any]:
        """The numbers as MindFormers writes them."""
        numbers = {name: getattr(self, name) for name in _KEPT if name != "consumed_samples"}
        content = {**numbers, "ckpt_status": None}
        if self.consumed_samples is not None:  # MindFormers before 2.1 fails on a key that it does not know
            content["consumed_samples"] = self.consumed_samples
        return content


def read_common(path: Path) -> Common:
    """Reads common.json; where it is missing nothing is known.

    Raises:
        CorruptCheckpointError: It cannot be read, or holds something else than numbers.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        logger.warning("%s is not there: the number of the step, of the epoch and the loss scale are not known", path)
        return Common()
    except (OSError, ValueError, RecursionError) as e:
        raise CorruptCheckpointError(f"{path} cannot be read ({type(e).__name__}: {e}); copy it again") from e
    if not isinstance(content, dict):
        raise CorruptCheckpointError(f"{path} holds no JSON object; copy it again")
    numbers: dict[str, Any] = {name: _number(path, name, content.get(name)) for name in _KEPT}
    return Common(**numbers)


def common_head(path: Path, common: Common) -> Optional[FileHead]:
    """The numbers as parameters of a file that rank folders would have; None where there are none."""
    tensors, contents = {}, b""
    for name, kept in _KEPT.items():
        value = getattr(common, name)
        if value is not None:
            content = np.array(value, _NUMPY[kept.dtype]).tobytes()
            tensors[name] = StoredTensor(kept.dtype, kept.dims, ((len(contents), len(content)),))
            contents += content
    if not tensors:
        return None
    with contextlib.closing(LocalReader(path)) as reader:
        return FileHead(path, tensors, reader.size, reader.version, contents=contents)


def common_of(plan: Plan) -> Common:
    """The numbers among the parameters of a plan; reads them."""
    tensors = {tensor.name: tensor for tensor in plan.files[0].tensors if tensor.name in _KEPT}
    numbers: dict[str, Any] = {name: _read(tensor) for name, tensor in tensors.items()}
    return Common(**numbers)


def _number(path: Path, name: str, value: Any) -> Union[int, float, None]:
    if value is None:
        return None
    if name == "loss_scale":
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    elif type(value) is int and 0 <= value < 2 ** (31 if name == "global_step" else 63):
        return value
    raise CorruptCheckpointError(f"{path}: {name} is {value!r}, which is no such number; copy it again")


def _read(tensor: TensorPlan) -> Union[int, float, None]:
    """The number that a parameter holds; None where it can be none of common.json."""
    if tensor.tensor.dtype not in _NUMPY or tensor.box.volume != 1 or len(tensor.copies) != 1:
        return None
    values = np.frombuffer(_bytes(tensor.copies[0].shard), _NUMPY[tensor.tensor.dtype])
    if values.size != 1 or not math.isfinite(values[0]) or values[0] < 0:
        return None
    return float(values[0]) if tensor.name == "loss_scale" else int(values[0])


def _bytes(shard: Shard) -> bytes:
    if shard.file.contents is not None:
        return b"".join(shard.file.contents[o : o + n] for o, n in shard.extents)
    with contextlib.closing(LocalReader(shard.file.path)) as reader:
        return b"".join(reader.read(offset, nbytes).tobytes() for offset, nbytes in shard.extents)
