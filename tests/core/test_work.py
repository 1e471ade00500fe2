from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from builders import Index, hold, plan_of, strategy
from hypothesis import given
from hypothesis import strategies as st

from auto_trans.coordination.election import elect
from auto_trans.core.layout import Layout
from auto_trans.core.plan import FilePlan, TensorPlan
from auto_trans.core.tensor import Box, Tensor
from auto_trans.core.work import DirectReads, assign_writers, direct_reads, process_nums, share_out, split_files

REPLICATED = {"w": Layout((4, 2), ((0,), ())), "norm": Layout((4, 2), ((),))}  # dp4 mp2
DISTINCT = {"w": Layout((4, 2), ((0,), ()), 4, 2), "norm": Layout((4, 2), ((),))}  # its optimizer shard
FULL = {"w": np.arange(64).reshape(16, 4), "norm": np.arange(4)}


def planned(layouts):
    source = strategy({name: Layout((1,)) for name in layouts})
    return plan_of(source, strategy(layouts), Index(hold(FULL, source)))


@st.composite
def groups_and_shares(draw):
    """Groups of replicas of up to 24 ranks, and the equal shares of converters."""
    world = draw(st.sampled_from([1, 2, 4, 6, 8, 12, 24]))
    contents = draw(st.lists(st.integers(0, 5), min_size=world, max_size=world))
    groups = {}
    for rank, content in enumerate(contents):
        groups.setdefault(content, []).append(rank)
    number = draw(st.sampled_from([n for n in range(1, world + 1) if world % n == 0]))
    return list(groups.values()), [assignment.slices for assignment in elect(world, number)]


@given(groups_and_shares())
def test_every_file_is_written_by_one_converter_that_needs_it(case):
    groups, shares = case
    writers = assign_writers(groups, shares)
    for group in groups:
        (writer,) = {writers[rank] for rank in group}
        assert set(group) & set(shares[writer])


def test_converters_that_need_the_same_files_write_as_many_each():
    groups = [[rank, *range(rank + 8, 512, 8)] for rank in range(8)]  # dp64 mp8
    writers = assign_writers(groups, [assignment.slices for assignment in elect(512, 4)])
    assert Counter(writers[group[0]] for group in groups) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_ranks_that_nobody_converts_have_no_writer():
    assert assign_writers([[0, 2], [1], [3]], [[1, 2]]) == {0: 0, 2: 0, 1: 0}


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([REPLICATED, DISTINCT]))
def test_loads_add_up_to_the_plan(number, layouts):
    plan = planned(layouts)
    found = share_out(plan, [assignment.slices for assignment in elect(8, number)])
    assert len(found) == number
    assert sum(load.written for load in found) == plan.nbytes
    assert sum(load.linked for load in found) == 8 - len(plan.files)
    assert all(load.read <= load.written for load in found)


def test_what_several_files_of_a_converter_need_is_read_once():
    (one,) = share_out(planned(DISTINCT), [range(8)])
    assert one.read == FULL["w"].size * 4 + FULL["norm"].size * 4
    assert one.written == FULL["w"].size * 4 + 8 * FULL["norm"].size * 4


def test_node_reads_once_what_its_ranks_need_and_every_rank_what_it_holds():
    weights, norm = 64 * 4, 4 * 4
    plan, rank = planned(REPLICATED), weights // 2 + norm
    assert direct_reads(plan, 1) == DirectReads(rank, 8 * rank, rank, 8 * rank)
    assert direct_reads(plan, 4) == DirectReads(rank, 8 * rank, weights + norm, 2 * (weights + norm))
    plan, rank = planned(DISTINCT), weights // 8 + norm
    assert direct_reads(plan, 2) == DirectReads(rank, 8 * rank, 2 * weights // 8 + norm, weights + 4 * norm)


def test_processes_get_whole_groups_of_replicas_and_even_work():
    assert [[file.ranks for file in files] for files in split_files(planned(REPLICATED).files, 3)] == [
        [(0, 2, 4, 6)],
        [(1, 3, 5, 7)],
    ]
    assert [len(files) for files in split_files(planned(DISTINCT).files, 4)] == [2, 2, 2, 2]


def files_of(sizes):
    tensors = [TensorPlan(Tensor("w", "Int8", (n,), 1), Box.whole((n,)), ()) for n in sizes]
    return [FilePlan((rank,), (tensor,)) for rank, tensor in enumerate(tensors)]


def test_one_large_file_is_as_much_work_as_many_small_ones():
    shares = split_files(files_of([1, 1, 6, 1, 1, 1, 1]), 2)
    assert sorted([file.ranks[0] for file in files] for files in shares) == [[0, 1, 3, 4, 5, 6], [2]]


@given(st.lists(st.integers(0, 100), min_size=1, max_size=20), st.integers(1, 8))
def test_processes_get_about_as_many_bytes_each(sizes, processes):
    """As a list is filled, the largest share exceeds the smallest by one file at most."""
    shares = split_files(files_of(sizes), processes)
    assert sorted(file.ranks[0] for files in shares for file in files) == list(range(len(sizes)))
    assert len(shares) <= processes and all(shares)
    nbytes = [sum(file.nbytes for file in files) for files in shares]
    nbytes += [0] * (processes - len(shares))
    assert max(nbytes) - min(nbytes) <= max(sizes)


@pytest.mark.parametrize("world_size, numbers", [
    (1, [1]),
    (2, [1, 2]),
    (12, [1, 2, 4, 12]),
    (7, [1, 7]),
    (4096, [1, 2, 4, 8, 16, 32, 64, 128, 4096]),
])  # fmt: skip
def test_numbers_of_processes_to_choose_from(world_size, numbers):
    assert process_nums(world_size) == numbers
