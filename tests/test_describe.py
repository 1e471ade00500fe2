"""Facts about plans, strategies and checkpoints."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from builders import hold, planned, save, strategy

from auto_trans.advice import advise
from auto_trans.core.layout import Layout
from auto_trans.describe import (
    describe_checkpoint,
    describe_plan,
    describe_strategy,
    differences,
    read_path,
    slice_shapes,
    sliced_how,
)
from auto_trans.errors import PlanError
from auto_trans.storage.sources import find_checkpoints

A = strategy({"w": Layout((2,), ((0,), ())), "norm": Layout((2,), ((),))}, origin="a.ckpt")
B = strategy({"w": Layout((2, 2), ((), (0,))), "norm": Layout((2, 2), ((),))}, origin="b.ckpt")
FULL = {"w": np.arange(32).reshape(4, 8), "norm": np.arange(6), "step": np.array([1])}
NBYTES = 4 * 32 // 2 + 4 * 6 + 4  # of a rank under either strategy


@pytest.fixture
def source(tmp_path):
    return save(tmp_path / "src", hold(FULL, A))


@pytest.fixture
def checkpoint(source):
    (found,) = find_checkpoints(source)
    return found


@pytest.mark.parametrize(
    "layout, text",
    [
        (Layout((2,)), "whole on [2]"),
        (Layout((2, 4), ((0,), ())), "dim 0 over axis 0 (4) on [2, 4]"),
        (Layout((2, 4), ((), (1, 0))), "dim 1 over axes 1 and 0 (2 x 4) on [2, 4]"),
        (Layout((4, 2), ((0,),), 2, 2), "dim 0 over axis 0 (2), optimizer shard 2 on [4, 2]"),
    ],
)
def test_layout_in_words(layout, text):
    assert sliced_how(layout) == text


def test_plan_tells_files_bytes_and_what_is_there_already(source, tmp_path):
    conversion = planned(source, tmp_path / "out", A, B, ranks=(0, 2))
    facts = describe_plan(conversion)
    assert [(file["ranks"], file["source_ranks"], file["reused"]) for file in facts["files"]] == [
        ([0, 2], [0, 1], False)
    ]
    assert facts["files"][0]["file"] == str(tmp_path / "out" / "rank_0" / "checkpoint_0.ckpt")
    assert facts["bytes_read"] == NBYTES and facts["problem"] == "" and facts["transform_process_num"] == []
    assert facts["bytes_written"] == facts["files"][0]["bytes"] and facts["seconds"] is None
    assert facts["carried"] == ["step"]
    conversion.run(quiet=True)
    assert (tmp_path / "out" / "rank_0" / "checkpoint_0.ckpt").stat().st_size == facts["bytes_written"]
    again = describe_plan(planned(source, tmp_path / "out", A, B))
    assert [(file["ranks"], file["reused"]) for file in again["files"]] == [([0, 2], True), ([1, 3], False)]
    assert again["bytes_written"] == facts["bytes_written"]


def test_plan_that_would_fail_tells_why_and_nothing_is_measured(source, tmp_path):
    (tmp_path / "out" / "rank_1").mkdir(parents=True)
    (tmp_path / "out" / "rank_1" / "mine.ckpt").write_bytes(b"")
    facts = describe_plan(planned(source, tmp_path / "out", A, B), measure=True)
    assert "mine.ckpt is there already" in facts["problem"] and facts["seconds"] is None


def test_advice_tells_what_converters_would_read_and_write(source, tmp_path):
    assert [
        (one["transform_process_num"], one["busiest_reads"], one["busiest_writes"], one["all_write"], one["writing"])
        for one in advise(planned(source, tmp_path / "out", A, B))
    ] == [(n, reads, writes, 2 * NBYTES, min(n, 2)) for n, reads, writes in (
        (1, 2 * NBYTES - 24, 2 * NBYTES), (2, NBYTES, NBYTES), (4, NBYTES, NBYTES)
    )]  # fmt: skip


def test_strategy_with_weights_tells_shapes_and_bytes(checkpoint):
    facts = describe_strategy(A, checkpoint)
    assert (facts["world_size"], facts["stages"], facts["bytes_per_rank"]) == (2, 1, [NBYTES - 4] * 2)
    by_name = {entry["name"]: entry for entry in facts["parameters"]}
    assert (by_name["w"]["shape"], by_name["w"]["full_shape"]) == ([2, 8], [4, 8])
    assert [entry["name"] for entry in describe_strategy(A, pattern="n*")["parameters"]] == ["norm"]
    assert "bytes_per_rank" not in describe_strategy(A)


def test_bytes_are_those_of_the_ranks_of_a_stage(tmp_path):
    mp2 = Layout((2,), ((0,),))
    pp2 = strategy({"a": {0: mp2}, "b": {1: mp2}}, stages=2)
    save(tmp_path / "src", hold({"a": np.arange(4), "b": np.arange(8)}, pp2))
    (found,) = find_checkpoints(tmp_path / "src")
    assert describe_strategy(pp2, found)["bytes_per_rank"] == [8, 8, 16, 16]


def test_complete_weights_are_sliced_by_the_strategy(tmp_path):
    whole = oracle.write_raw(tmp_path / "a.ckpt", {n: oracle.raw(array) for n, array in FULL.items()})
    (found,) = find_checkpoints(whole)
    assert slice_shapes(B, found) == {"w": ((4, 4), 8), "norm": ((6,), 8)}
    with pytest.raises(PlanError, match=r"parameter w of .* does not fit the strategy c\.ckpt"):
        slice_shapes(strategy({"w": Layout((3,), ((0,), ()))}, origin="c.ckpt"), found)
    with pytest.raises(PlanError, match=r"holds no parameter that the strategy d\.ckpt lists"):
        slice_shapes(strategy({"x": Layout((3,))}, origin="d.ckpt"), found)


def test_checkpoint_tells_which_ranks_hold_what(checkpoint):
    facts = describe_checkpoint(checkpoint)
    assert [(entry["name"], entry["shape"], entry["ranks"]) for entry in facts["parameters"]] == [
        ("w", [2, 8], [0, 1]), ("norm", [6], [0, 1]), ("step", [1], [0, 1])
    ]  # fmt: skip
    assert [(file["rank"], file["parameters"], file["crc"]) for file in facts["files"]] == [
        (0, 3, "none"),
        (1, 3, "none"),
    ]


def test_crc_is_computed_when_asked(tmp_path):
    path = oracle.write_raw(tmp_path / "a.ckpt", {"w": oracle.raw(np.ones(4))}, crc=True)

    def state(**options):
        (found,) = find_checkpoints(path)
        return describe_checkpoint(found, **options)["files"][0]["crc"]

    assert (state(), state(check_crc=True)) == ("present", "right")
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert (state(), state(check_crc=True)) == ("present", "wrong")


def test_differences_are_told_by_parameter():
    found = differences(A, strategy({"w": A.layouts["w"], "extra": Layout((2,), ((),))}))
    assert [(one["name"], one["before"], one["after"]) for one in found] == [
        ("extra", "not listed", "whole on [2]"), ("norm", "whole on [2]", "not listed")
    ]  # fmt: skip
    assert differences(A, A) == []


def test_path_is_a_strategy_or_checkpoints(source, tmp_path):
    folder = oracle.DATA / "mf_llama" / "dp2mp2" / "strategy"
    assert read_path(folder).world_size == 4
    assert read_path(next(folder.iterdir())).world_size == 4
    assert [one.path for one in read_path(source)] == [source]
    file = source / "rank_0" / "net_rank_0-1_1.ckpt"
    assert [one.path for one in read_path(file)] == [file]
    assert [one.path for one in read_path(file.parent)] == [file]
