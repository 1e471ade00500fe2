"""Slices as Checkpoint 2.0 numbers them, and what its ranks hold."""

from __future__ import annotations

import numpy as np
import pytest
from builders import layouts
from hypothesis import assume, given

from auto_trans.core.layout import Layout
from auto_trans.core.saved import Place, SavedTensor, arrange_saved, slice_numbers, with_axes
from auto_trans.errors import CorruptCheckpointError, LayoutError, MissingSliceError

HALVES = Layout((2,), ((0,),))


@given(layout=layouts())
def test_axes_make_the_same_slices_as_optimizer_shard(layout):
    try:
        plain = with_axes(layout)
    except LayoutError:
        assume(False)
    assert plain.opt_shards == 1 and plain.devices == layout.devices
    ndim = len(layout.tensor_map)
    assert plain.grid(ndim) == layout.grid(ndim)
    assert [plain.cell(r, ndim) for r in range(layout.devices)] == [layout.cell(r, ndim) for r in range(layout.devices)]


def test_optimizer_shard_among_a_part_of_an_axis_splits_the_axis():
    assert with_axes(Layout((4, 2), ((0,),), 2, 2)) == Layout((2, 2, 2), ((0, 1),))


def test_optimizer_shard_that_no_axes_make_is_refused():
    with pytest.raises(LayoutError, match=r"in groups of 4 ranks.*cannot be written as axes"):
        with_axes(Layout((2, 6), ((),), 4, 1))


@given(layout=layouts())
def test_slices_are_numbered_in_row_major_order(layout):
    ndim = len(layout.tensor_map)
    cells = [layout.cell(rank, ndim) for rank in range(layout.devices)]
    assert slice_numbers(layout, ndim) == [int(np.ravel_multi_index(cell, layout.grid(ndim))) for cell in cells]


def saved_tensor(places, layout=HALVES, first=0, name="w"):
    ranks = tuple(range(first, first + layout.devices)) if layout else ()
    found = [[Place(f"model-{rank}", rank) for rank in slice_] for slice_ in places]
    return SavedTensor(name, "Float32", (4,), layout, ranks, found)


def test_stages_are_those_of_the_rank_lists():
    saved = arrange_saved([saved_tensor([[0], [1]], name="a"), saved_tensor([[4], [5]], first=4, name="b")], "metadata")
    assert (saved.strategy.stages, saved.strategy.stage_devices) == (3, 2)
    assert [saved.strategy.stages_of(name) for name in "ab"] == [(0,), (2,)]
    assert saved.held == {0: {"a": "model-0"}, 1: {"a": "model-1"}, 4: {"b": "model-4"}, 5: {"b": "model-5"}}


def test_slice_that_another_stage_alone_has_saved_is_that_of_the_first_rank_that_has_it():
    saved = arrange_saved([saved_tensor([[0], [3]])], "metadata")
    assert saved.held == {0: {"w": "model-0"}, 1: {"w": "model-3"}}
    assert saved.strategy.stages == 2 and saved.writers == {"model-0": 0, "model-3": 3}


def test_parameter_without_layout_is_whole_in_the_stages_of_its_ranks():
    saved = arrange_saved([saved_tensor([[0], [1]], name="a"), saved_tensor([[2, 3]], None, name="b")], "metadata")
    assert saved.strategy.layouts["b"] == {1: Layout.whole(2)}
    assert saved.held[2] == {"b": "model-2"} and saved.held[3] == {"b": "model-3"}


@pytest.mark.parametrize(
    ("tensors", "error", "text"),
    [
        ([saved_tensor([[0], []])], MissingSliceError, "parameter w: slice 1 is in no file"),
        (
            [saved_tensor([[1], [0]])],
            CorruptCheckpointError,
            "rank 1 should hold slice 0, but by the layout .* slice 1",
        ),
        ([saved_tensor([[0], [1]], first=1)], LayoutError, "parameter w lies on rank 1, 2, which is no pipeline stage"),
        (
            [saved_tensor([[0], [1]]), saved_tensor([[0]] * 4, Layout((4,), ((0,),)), name="v")],
            LayoutError,
            "parameter v lies on rank 0, 1, 2, 3, which is no pipeline stage of 2",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(tensors, error, text):
    with pytest.raises(error, match=text):
        arrange_saved(tensors, "metadata")


def test_file_of_two_ranks_is_refused():
    places = [[Place("same", 0)], [Place("same", 1)]]
    with pytest.raises(CorruptCheckpointError, match="same is a file of rank 1, and of rank 0 by another"):
        arrange_saved([saved_tensor([[0], [1]])._replace(places=places)], "metadata")


def test_slice_in_two_files_of_one_rank_is_refused():
    places = [[Place("one", 0), Place("other", 0)], [Place("x", 1)]]
    with pytest.raises(CorruptCheckpointError, match="parameter w: rank 0 has it in one and in other"):
        arrange_saved([saved_tensor([[0], [1]])._replace(places=places)], "metadata")
