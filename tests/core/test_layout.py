from __future__ import annotations

import math

import numpy as np
import pytest
from builders import layouts
from hypothesis import given
from hypothesis import strategies as st

from auto_trans.core.layout import Layout
from auto_trans.core.tensor import Box, split_box
from auto_trans.errors import LayoutError


def naive_box(layout: Layout, rank: int, full: np.ndarray) -> np.ndarray:
    """The slice of a rank, by cutting the tensor as the definition says and listing all ranks."""

    def before_shard(r: int) -> np.ndarray:
        part = full
        coordinate = np.unravel_index(r, layout.dev_matrix)
        for dim, entry in enumerate(layout.tensor_map):
            for axis in entry:
                part = np.split(part, layout.dev_matrix[-1 - axis], dim)[coordinate[-1 - axis]]
        return part

    own = before_shard(rank)
    if layout.opt_shards > 1:
        same = [r for r in range(layout.devices) if np.array_equal(before_shard(r), own)]
        own = np.split(own, layout.opt_shards)[same.index(rank) % layout.opt_shards]
    return own


@st.composite
def layout_and_tensor(draw):
    layout = draw(layouts())
    grid = layout.grid(len(layout.tensor_map))
    shape = tuple(n * draw(st.integers(1, 2)) for n in grid)
    return layout, np.arange(math.prod(shape)).reshape(shape)


@given(layout_and_tensor())
def test_box_is_the_slice_that_the_definition_gives(case):
    layout, full = case
    for rank in range(layout.devices):
        box = layout.box(rank, full.shape)
        assert np.array_equal(full[box.slices()], naive_box(layout, rank, full))


@given(layout_and_tensor())
def test_owners_are_exactly_the_ranks_of_a_cell(case):
    layout, full = case
    cells = {}
    for rank in range(layout.devices):
        cells.setdefault(layout.cell(rank, full.ndim), []).append(rank)
    assert len(cells) == math.prod(layout.grid(full.ndim))
    for cell, ranks in cells.items():
        assert layout.owners(cell) == tuple(ranks)


@given(layout_and_tensor(), st.data())
def test_overlapping_covers_any_box_exactly_once(case, data):
    layout, full = case
    offset = tuple(data.draw(st.integers(0, n - 1)) for n in full.shape)
    size = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(full.shape, offset))
    box = Box(offset, size)
    covered = np.zeros(full.shape, int)
    slice_shape = layout.slice_shape(full.shape)
    for cell, part in layout.overlapping(full.shape, box):
        covered[part.slices()] += 1
        assert tuple(o // n for o, n in zip(part.offset, slice_shape)) == cell
    expected = np.zeros(full.shape, int)
    expected[box.slices()] = 1
    assert np.array_equal(covered, expected)


@given(layout_and_tensor())
def test_full_shape_restores_slice_shape(case):
    layout, full = case
    assert layout.full_shape(layout.slice_shape(full.shape)) == full.shape


@given(st.lists(st.integers(1, 7), max_size=4), st.integers(1, 50))
def test_split_box_yields_small_parts_in_row_major_order(shape, limit):
    tensor = np.arange(math.prod(shape)).reshape(shape)
    parts = list(split_box(Box.whole(tensor.shape), limit))
    assert all(part.volume <= limit for part in parts)
    joined = np.concatenate([tensor[part.slices()].ravel() for part in parts])
    assert np.array_equal(joined, tensor.ravel())


def test_first_of_several_axes_on_a_dimension_is_the_major_one():
    layout = Layout((2, 4), ((1, 0),))
    assert [layout.cell(rank, 1) for rank in range(8)] == [(i,) for i in range(8)]
    layout = Layout((2, 4), ((0, 1),))
    assert [layout.cell(rank, 1)[0] for rank in range(8)] == [0, 2, 4, 6, 1, 3, 5, 7]


def test_optimizer_shard_splits_among_replicas_in_ascending_order():
    layout = Layout((4, 2), ((0,), ()), 2, 2)
    assert layout.grid(2) == (4, 1)
    assert [layout.cell(rank, 2)[0] for rank in range(8)] == [0, 2, 1, 3, 0, 2, 1, 3]


def test_step_of_optimizer_shard_is_the_mean_distance_of_ranks_that_are_not_evenly_spaced():
    """As MindSpore writes it: the sliced axis lies between two that are not."""
    layout = Layout((2, 4, 2), ((1,), ()), opt_shard_size=-1, opt_shard_step=3)
    begins = {rank: layout.box(rank, (64, 2)).offset[0] for rank in range(16)}
    assert sorted(begins, key=begins.__getitem__)[:5] == [0, 1, 8, 9, 2]
    assert [begins[rank] for rank in (0, 1, 8, 9, 2)] == [0, 4, 8, 12, 16]
    with pytest.raises(LayoutError, match="are 3 apart on average"):
        Layout((2, 4, 2), ((1,), ()), opt_shard_size=-1, opt_shard_step=1)


@pytest.mark.parametrize("size, step", [(0, 2), (2, 0)])
def test_size_or_step_of_zero_means_not_sharded(size, step):
    assert Layout((4, 2), ((0,), ()), size, step).grid(2) == (2, 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (((2, 2), ((2,),)), "every axis must be from 0 to 1"),
        (((2, 2), ((0,), (0,))), "be used once"),
        (((), ()), "dev_matrix"),
        (((2, 2), ((0,),), 3, 2), "cannot be split into optimizer shard groups of 3"),
        (((2, 2), ((0,),), 2, 1), "opt_weight_shard_step is 1"),
        (((2, 2), ((0,),), -2, 1), "invalid"),
    ],
)
def test_contradictory_layouts_are_refused(arguments, message):
    with pytest.raises(LayoutError, match=message):
        Layout(*arguments)


def test_shape_that_does_not_divide_is_refused():
    with pytest.raises(LayoutError, match=r"\[7, 4\] does not divide evenly into \[2, 1\]"):
        Layout((2,), ((0,), ())).slice_shape((7, 4))


def test_layout_of_other_number_of_dimensions_is_refused():
    with pytest.raises(LayoutError, match="2 dimensions"):
        Layout((2,), ((0,), ()), ndims=(2,)).grid(3)
    with pytest.raises(LayoutError, match="at least 2 dimensions"):
        Layout((2,), ((), (0,))).grid(1)


def test_optimizer_shard_of_a_single_number_is_refused():
    assert Layout((2,), ()).grid(0) == ()
    with pytest.raises(LayoutError, match="cannot be that of a tensor with 0"):
        Layout((2,), (), -1, 1).grid(0)


def test_boxes_that_touch_have_nothing_in_common():
    assert Box((0, 0), (2, 4)).intersect(Box((2, 0), (2, 4))) is None
    assert Box((0, 0), (2, 4)).intersect(Box((1, 3), (5, 5))) == Box((1, 3), (1, 1))
    assert Box((), ()).intersect(Box((), ())) == Box((), ())
    assert Box((0,), (0,)).intersect(Box((0,), (4,))) is None
