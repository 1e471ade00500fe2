"""Which shards a source is made of, and what it refuses."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from builders import Index, Meta, conversions, hold, plan_of, source_of, strategy
from hypothesis import given
from hypothesis import strategies as st

from auto_trans.core.layout import Layout
from auto_trans.core.tensor import Box
from auto_trans.errors import MissingSliceError, PlanError

MP2 = Layout((2,), ((0,),))
DP2 = Layout((2,), ((),))


class Typed(Index):
    """A source in memory whose arrays have their own types."""

    def tensors(self, rank):
        return {name: Meta(array.shape, oracle.NAMES[array.dtype.name]) for name, array in self.held[rank].items()}


def test_slices_of_another_type_are_refused():
    index = Typed({0: {"w": np.zeros(2, np.float32)}, 1: {"w": np.zeros(2, np.int32)}})
    with pytest.raises(PlanError, match=r"w is \[2\] Int32 in rank_1/x\.ckpt but \[2\] Float32 in rank_0/x\.ckpt"):
        plan_of(strategy({"w": MP2}), strategy({"w": DP2}), index)


@pytest.mark.parametrize("last", [2, 3])
def test_rank_beyond_the_strategy_is_refused(last):
    index = Index({rank: {"w": np.arange(2)} for rank in (0, 1, last)})
    with pytest.raises(PlanError, match=rf"up to rank_{last}.*describes 2 ranks"):
        source_of(strategy({"w": MP2}), index)


def test_last_rank_of_the_strategy_may_be_there_alone():
    assert source_of(strategy({"w": DP2}), {1: {"w": np.arange(2)}}).names == ("w",)


def test_parameter_in_the_files_of_another_stage_only_is_refused():
    pp2 = strategy({"a": {0: MP2}, "b": {1: MP2}}, stages=2)
    held = hold({"a": np.arange(4), "b": np.arange(4)}, pp2)
    for rank in (0, 1):
        held[rank]["b"] = np.arange(2)
    for rank in (2, 3):
        held[rank] = {"c": np.arange(2)}
    with pytest.raises(MissingSliceError, match=r"parameter b is in rank_0/x\.ckpt, but .* lists it for stage 1"):
        source_of(pp2, held)


@pytest.mark.parametrize("holder, missing", [(0, 1), (1, 0)])
def test_parameter_of_which_one_slice_is_there_is_an_error_whichever_it_is(holder, missing):
    a = strategy({"w": MP2, "v": MP2})
    held = hold({"w": np.arange(4), "v": np.arange(4)}, a)
    del held[missing]["v"]
    with pytest.raises(MissingSliceError, match=rf"parameter v is held by source rank {missing} only"):
        plan_of(a, strategy({"w": DP2, "v": DP2}), held)


def test_parameter_that_no_strategy_lists_comes_from_another_rank_where_the_same_one_lacks_it():
    a = strategy({"w": DP2, "v": DP2})
    source = source_of(a, {0: {"w": np.arange(2), "step": np.array([1])}, 1: {"v": np.arange(2)}})
    assert [source.at("step", place).file.rank for place in (0, 1)] == [0, 0]


@given(conversions(), st.data())
def test_tensor_of_no_elements_is_made_of_nothing_and_keeps_its_shape(case, data):
    source, target, full = case
    dim = data.draw(st.integers(0, full.ndim - 1))
    empty = np.empty([0 if n == dim else size for n, size in enumerate(full.shape)])
    a, b = strategy({"w": source}), strategy({"w": target})
    plan = plan_of(a, b, hold({"w": empty, "extra": np.empty(0)}, a))
    for file in plan.files:
        assert file.nbytes == 0
        for tensor in file.tensors:
            expected = empty if tensor.name == "w" else np.empty(0)
            assert tensor.tensor.shape == expected.shape and tensor.tensor.item_bytes == 0
    assert source_of(a, hold({"w": empty}, a)).shards("w", Box.whole(empty.shape)) == []


def test_copies_of_a_slice_are_paired_with_the_lowest_rank():
    a = strategy({"w": Layout((2, 2), ((0,),))})
    source = source_of(a, hold({"w": np.arange(4)}, a))
    assert [(one.file.rank, other.file.rank) for one, other in source.copies()] == [(0, 2), (1, 3)]
