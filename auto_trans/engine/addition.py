"""The arithmetic of edits: B @ A * scaling is added to parts of W, in float32, and rounded once to the type of W."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Union

import numpy as np

from auto_trans.core.plan import Addition, TensorPlan
from auto_trans.core.tensor import Box, Shape
from auto_trans.engine.gather import Gatherer

__all__ = ["Adder"]

_NUMPY: Mapping[str, Any] = {"Float16": np.float16, "Float32": np.float32, "Float64": np.float64}


class Adder:
    """Adds a product to the parts of a tensor.

    Only the two small matrices are held in memory, the big one never. They are read when this is made: before the first part
    of the tensor, for a gatherer has one buffer.

    Args:
        tensor: The slice of W.
        added: The product.
        gatherer: Reads the matrices.
    """

    def __init__(self, tensor: TensorPlan, added: Addition, gatherer: Gatherer) -> None:
        self._tensor, self._scaling = tensor, added.scaling
        self._wide: Any = np.float64 if tensor.dtype == "Float64" else np.float32
        self._a, self._b = (
            _to_float(gatherer.whole(matrix), matrix.shape, matrix.dtype, self._wide) for matrix in (added.a, added.b)
        )

    def add(self, box: Box, part: memoryview) -> memoryview:
        """A part of W plus its part of the product.

        Args:
            box: Which part of the slice.
            part: Its bytes.

        Returns:
            The bytes to be written instead.
        """
        tensor = self._tensor
        rows, columns = Box(tuple(o + p for o, p in zip(tensor.box.offset, box.offset)), box.size).slices()
        weight = _to_float(part, box.size, tensor.dtype, self._wide)
        weight += (self._b[rows] @ self._a[:, columns]) * self._wide(self._scaling)
        if tensor.dtype == "BFloat16":
            return _round_to_bfloat16(weight).data.cast("B")
        return np.ascontiguousarray(weight.astype(_NUMPY[tensor.dtype])).data.cast("B")


def _to_float(content: Union[bytes, memoryview], shape: Shape, dtype: str, wide: Any) -> np.ndarray:
    """Stored numbers as an array of float32 or float64 that may be written to."""
    if dtype == "BFloat16":  # the upper half of a float32
        return (np.frombuffer(content, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape).astype(wide)
    return np.frombuffer(content, _NUMPY[dtype]).reshape(shape).astype(wide)


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 of float32 numbers, to even where two are as near, as uint16."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(values), (bits >> 16) | 0x40, rounded)
    return np.ascontiguousarray(rounded.astype(np.uint16))
