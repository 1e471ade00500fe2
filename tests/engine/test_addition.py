"""B @ A * scaling is added in float32 (float64) and rounded once."""

from __future__ import annotations

import struct

import numpy as np
import oracle
import pytest
from builders import gatherer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from auto_trans.core.plan import Addition, Copy, TensorPlan
from auto_trans.core.tensor import ITEM_BYTES, Box, Shard, SourceFile, Tensor, split_box
from auto_trans.engine.addition import Adder


def added(weight, a, b, scaling, dtype="", box=None, limit=1000):
    """A slice of W plus its part of the product, in parts of some elements; W may be the bits of bfloat16 numbers."""
    planned = []
    for name, matrix in (("a", a), ("b", b)):
        tensor = Tensor(name, oracle.NAMES[matrix.dtype.name], matrix.shape, matrix.itemsize)
        whole = Box.whole(matrix.shape)
        shard = Shard(tensor, whole, SourceFile(name, 0, 0), ((0, matrix.nbytes),))
        planned.append(TensorPlan(tensor, whole, (Copy(shard, whole.offset, whole),)))
    dtype, box = dtype or oracle.NAMES[weight.dtype.name], box or Box.whole(weight.shape)
    plan = TensorPlan(Tensor("w", dtype, weight.shape, ITEM_BYTES[dtype]), box, ())
    with gatherer(1 << 16, {"a": a.tobytes(), "b": b.tobytes()}) as reading:
        adder = Adder(plan, Addition(*planned, scaling), reading)
        wanted = weight[box.slices()]
        content = b"".join(
            bytes(adder.add(part, memoryview(wanted[part.slices()].tobytes())))
            for part in split_box(Box.whole(box.size), limit)
        )
    return np.frombuffer(content, weight.dtype).reshape(box.size)


def as_float32(bits):
    return struct.unpack("<f", struct.pack("<I", bits))[0]


ONE = np.ones((1, 1), np.float32)


@given(st.integers(0, 2**32 - 1))
@example(0x3F808000)  # half-way, to the even one below
@example(0x3F818000)  # half-way, to the even one above
@example(0x7F7FFFFF)  # to infinity
@example(0x00008001)
@settings(max_examples=300)
def test_any_float32_is_rounded_to_the_nearest_bfloat16_and_to_even_between_two(bits):
    number = np.array([[bits]], np.uint32).view(np.float32)
    (got,) = added(np.zeros((1, 1), np.uint16), number, ONE, 1.0, "BFloat16")[0]
    if np.isnan(number[0, 0]):
        assert np.isnan(as_float32(int(got) << 16))
        return
    sign, upper, lower = bits >> 31, (bits & 0x7FFFFFFF) >> 16, bits & 0xFFFF
    upper += lower > 0x8000 or (lower == 0x8000 and upper % 2 == 1)
    assert int(got) == (sign << 15 | upper if number[0, 0] else 0)  # 0 + -0 is 0


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000])
def test_what_is_no_number_stays_none(bits):
    number = np.array([[bits]], np.uint32).view(np.float32)
    (got,) = added(np.zeros((1, 1), np.uint16), number, ONE, 1.0, "BFloat16")[0]
    assert np.isnan(as_float32(int(got) << 16))


def test_float64_is_added_in_float64():
    weight, tiny = np.ones((1, 1)), np.full((1, 1), 1e-12)
    assert added(weight, tiny, np.ones((1, 1)), 0.5)[0, 0] == 1 + 5e-13


def test_sum_is_rounded_once_not_the_product_first():
    """The product alone would be rounded to half of the last bit of 1, and the sum then to 1."""
    product = np.full((1, 1), 2**-11 * (1 + 2**-12), np.float32)
    assert added(np.ones((1, 1), np.float16), product, ONE, 1.0)[0, 0] == 1 + 2**-10


@pytest.mark.parametrize("limit", [3, 5, 100])
def test_slice_gets_its_own_part_of_the_product(limit):
    rng = np.random.default_rng(5)
    weight, a, b = (rng.integers(-9, 9, shape).astype(np.float32) for shape in ((6, 5), (2, 5), (6, 2)))
    box = Box((2, 1), (3, 4))
    expected = (weight + b @ a * 2)[box.slices()]
    assert np.array_equal(added(weight, a, b, 2.0, box=box, limit=limit), expected)
