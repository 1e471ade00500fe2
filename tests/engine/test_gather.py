"""Target tensors are put together from files in memory: any boxes, any chunks, any buffer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from builders import MemoryFile, gatherer
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_trans.core.plan import Copy, TensorPlan
from auto_trans.core.tensor import Box, Shard, SourceFile, Tensor
from auto_trans.engine.gather import Gatherer


def chunked(draw, content):
    """A file that holds bytes in several chunks with something else between them, and where they lie."""
    borders = sorted(draw(st.sets(st.integers(1, len(content) - 1), max_size=3))) if len(content) > 1 else []
    file, extents = b"", []
    for begin, end in zip([0, *borders], [*borders, len(content)]):
        file += b"\xff" * draw(st.integers(0, 3))
        extents.append((len(file), end - begin))
        file += content[begin:end]
    return file, tuple(extents)


@st.composite
def gathered(draw):
    """A tensor that lies in two files, each in chunks; a box of it and the copies that make it up."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    item = draw(st.sampled_from([1, 2, 4, 8]))
    full = np.random.default_rng(1).integers(0, 250, (*shape, item), dtype=np.uint8)
    axis = draw(st.integers(0, len(shape) - 1))
    cut = draw(st.integers(0, shape[axis]))
    offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
    box = Box(offset, tuple(draw(st.integers(1, n - o)) for o, n in zip(offset, shape)))
    tensor = Tensor("w", "any", shape, item)
    files, copies = {}, []
    for begin, end in ((0, cut), (cut, shape[axis])):
        held = Box(
            tuple(begin if n == axis else 0 for n in range(len(shape))),
            tuple(end - begin if n == axis else size for n, size in enumerate(shape)),
        )
        common = held.intersect(box)
        if common is None:
            continue
        path = f"from_{begin}"
        files[path], extents = chunked(draw, full[held.slices()].tobytes())
        shard = Shard(tensor, held, SourceFile(path, 0, 0), extents)
        copies.append(Copy(shard, common.relative_to(held.offset).offset, common.relative_to(box.offset)))
    return TensorPlan(tensor, box, tuple(copies)), files, full[box.slices()], draw(st.integers(item, 64))


@given(gathered(), st.booleans())
@settings(max_examples=300)
def test_parts_are_the_box_in_row_major_order_and_fit_the_buffer(case, mapped):
    plan, files, expected, buffer_bytes = case
    found, covered = b"", []
    with gatherer(buffer_bytes, files, mapped) as it:
        for box, part in it.parts(plan):
            assert part.nbytes == box.volume * plan.tensor.item_bytes <= buffer_bytes
            assert bytes(part) == expected[box.slices()].tobytes()
            covered.append(box.volume)
            found += bytes(part)
        assert it.whole(plan) == expected.tobytes()
    assert found == expected.tobytes() and sum(covered) == math.prod(plan.box.size)


@given(gathered(), st.booleans())
@settings(max_examples=300)
def test_tensor_is_filled_where_it_is_to_stay(case, mapped):
    plan, files, expected, buffer_bytes = case
    out = np.full(plan.nbytes, 0xEE, np.uint8)
    with gatherer(buffer_bytes, files, mapped) as it:
        it.fill(plan, out)
    assert out.tobytes() == expected.tobytes()


def test_nothing_is_filled_by_copies_that_leave_a_gap():
    tensor = Tensor("w", "UInt8", (8, 8), 1)
    shard = Shard(tensor, Box.whole((8, 8)), SourceFile("f", 0, 0), ((0, 64),))
    plan = TensorPlan(tensor, Box.whole((8, 8)), (Copy(shard, (0, 0), Box.whole((7, 8))),))
    out = np.full(64, 0xEE, np.uint8)
    with gatherer(64, {"f": bytes(64)}) as it, pytest.raises(RuntimeError, match="the plan of w covers 56"):
        it.fill(plan, out)
    assert (out == 0xEE).all()


def test_what_is_not_needed_of_long_rows_takes_no_memory():
    """A row longer than the buffer is taken apart: only what is needed of it is read."""
    content = np.random.default_rng(0).integers(0, 250, (4, 3, 40), np.uint8)
    tensor, reads = Tensor("w", "UInt8", (4, 3, 40), 1), []
    shard = Shard(tensor, Box.whole((4, 3, 40)), SourceFile("f", 0, 0), ((0, 480),))

    class Counted(MemoryFile):
        def read_into(self, offset, out):
            reads.append(out.nbytes)
            super().read_into(offset, out)

    plan = TensorPlan(tensor, Box((0, 1, 0), (4, 1, 40)), (Copy(shard, (0, 1, 0), Box.whole((4, 1, 40))),))
    out = np.empty(160, np.uint8)
    with Gatherer(64, lambda file: Counted(content.tobytes(), mapped=False)) as it:
        it.fill(plan, out)
    assert out.tobytes() == content[:, 1].tobytes() and reads == [40] * 4


def test_columns_far_apart_are_read_alone_where_nothing_is_mapped(monkeypatch):
    content, reads = np.arange(400, dtype=np.uint8).reshape(4, 100), []

    class Counted(MemoryFile):
        def read_into(self, offset, out):
            reads.append(out.nbytes)
            super().read_into(offset, out)

    tensor = Tensor("w", "UInt8", (4, 100), 1)
    shard = Shard(tensor, Box.whole((4, 100)), SourceFile("f", 0, 0), ((0, 400),))
    plan, out = (
        TensorPlan(tensor, Box((0, 30), (4, 10)), (Copy(shard, (0, 30), Box.whole((4, 10))),)),
        np.empty(40, np.uint8),
    )
    for gap, expected in ((90, [10] * 4), (91, [400])):
        monkeypatch.setattr("auto_trans.engine.gather._GAP_BYTES", gap)
        reads.clear()
        with Gatherer(1000, lambda file: Counted(content.tobytes(), mapped=False)) as it:
            it.fill(plan, out)
        assert out.tobytes() == content[:, 30:40].tobytes() and reads == expected


def test_no_more_than_some_hundreds_of_files_are_open_at_once():
    tensor, most, opened = Tensor("w", "UInt8", (600,), 1), 0, []

    class Counted(MemoryFile):
        def close(self):
            opened.remove(self)

    def open_file(file):
        opened.append(Counted(bytes([int(file.path) % 250])))
        return opened[-1]

    copies = tuple(
        Copy(Shard(tensor, Box((i,), (1,)), SourceFile(str(i), 0, 0), ((0, 1),)), (0,), Box((i,), (1,)))
        for i in range(600)
    )
    plan, out = TensorPlan(tensor, Box.whole((600,)), copies), np.empty(600, np.uint8)
    with Gatherer(64, open_file) as it:
        it.fill(plan, out)
        most = len(opened)
        it.check_unchanged([SourceFile("0", 0, 0), SourceFile("599", 0, 0)])
    assert out.tolist() == [i % 250 for i in range(600)]
    assert 100 < most <= 256 and not opened


def test_run_of_bytes_is_passed_on_without_a_copy():
    content = np.arange(64, dtype=np.uint8)
    tensor = Tensor("w", "UInt8", (8, 8), 1)
    shard = Shard(tensor, Box.whole((8, 8)), SourceFile("f", 0, 0), ((0, 64),))
    rows = TensorPlan(tensor, Box((2, 0), (3, 8)), (Copy(shard, (2, 0), Box.whole((3, 8))),))
    reader = MemoryFile(content.tobytes())
    with Gatherer(1024, lambda file: reader) as it:
        ((_, part),) = it.parts(rows)
        assert np.shares_memory(np.frombuffer(part, np.uint8), reader.read(0, 64))


@pytest.mark.parametrize("buffer_bytes", [8, 200])
def test_opaque_element_may_be_larger_than_the_buffer_and_lie_in_chunks(buffer_bytes):
    content = bytes(range(100))
    tensor = Tensor("note", "str", (), 100, (0,))
    file = content[:40] + b"\xff\xff" + content[40:]
    shard = Shard(tensor, Box.whole(()), SourceFile("f", 0, 0), ((0, 40), (42, 60)))
    plan = TensorPlan(tensor, Box.whole(()), (Copy(shard, (), Box.whole(())),))
    out = np.empty(100, np.uint8)
    with gatherer(buffer_bytes, {"f": file}) as it:
        assert it.whole(plan) == content
        it.fill(plan, out)
    assert out.tobytes() == content


def test_tensor_of_no_elements_has_no_parts():
    with gatherer(8, {}) as it:
        assert list(it.parts(TensorPlan(Tensor("w", "Float32", (0, 4), 4), Box.whole((0, 4)), ()))) == []
