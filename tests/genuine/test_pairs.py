"""Every pair of genuine strategies of a model, against the boxes of the full weights and against MindSpore's own tool."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import oracle
import pytest

from auto_trans import convert, merge_strategies, read_strategy

PAIRS = [(model, a, b) for model, cases in oracle.CASES.items() for a, b in product(cases, cases)]


@pytest.mark.parametrize(("model", "source", "target"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_pair_equals_boxes_of_full_weights(genuine, tmp_path, model, source, target):
    check_pair(genuine, tmp_path / "ours", model, source, target)


@pytest.mark.mindspore
@pytest.mark.parametrize(("model", "source", "target"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_pair_equals_what_mindspore_makes_of_its_own_files(saved_by_mindspore, tmp_path, model, source, target):
    converted = check_pair(saved_by_mindspore, tmp_path / "ours", model, source, target)
    weights = saved_by_mindspore.model(model)
    theirs = mindspore_transform(
        saved_by_mindspore.source(model, source), tmp_path, weights.strategy(source), weights.strategy(target)
    )
    for rank, got in converted.items():
        for name, tensor in oracle.read_raw(theirs / f"rank_{rank}" / f"checkpoint_{rank}.ckpt").items():
            assert name not in got or got[name] == tensor, (rank, name)


def check_pair(sources, folder: Path, model: str, source: str, target: str) -> dict[int, dict[str, oracle.Raw]]:
    """Converts, and compares every rank with the boxes of its full weights: rank -> parameter -> what was written."""
    weights = sources.model(model)
    report = convert(sources.source(model, source), folder, weights.strategy(source), weights.strategy(target))
    expected = weights.slices(target)
    assert len(report.files) == len(expected)
    converted = {}
    for rank, boxes in expected.items():
        converted[rank] = got = oracle.read_raw(folder / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
        assert set(got) == set(boxes)
        assert_same_as_boxes(got, boxes, weights.dtypes)
    return converted


@pytest.mark.parametrize(("model", "case"), [(m, c) for m, cases in oracle.CASES.items() for c in cases])
def test_complete_to_case_and_back(genuine, tmp_path, model, case):
    weights = genuine.model(model)
    complete = genuine.complete(model)
    convert(complete, tmp_path / "sliced", dst_strategy=weights.strategy(case))
    for rank, boxes in weights.slices(case).items():
        got = oracle.read_raw(tmp_path / "sliced" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
        assert_same_as_boxes(got, {n: b for n, b in boxes.items() if n in weights.slices("dp1mp1")[0]}, weights.dtypes)
    convert(tmp_path / "sliced", tmp_path / "whole", src_strategy=weights.strategy(case))
    whole = oracle.read_raw(tmp_path / "whole" / "rank_0" / "checkpoint_0.ckpt")
    original = oracle.read_raw(complete)
    assert whole == original


@pytest.mark.mindspore
@pytest.mark.parametrize("target", ["dp1mp1", "dp2mp2_opt", "dp2mp2pp2"])
def test_mindspore_loads_what_we_write(genuine, tmp_path, target):
    import mindspore

    weights = genuine.model("mf_llama")
    convert(genuine.complete("mf_llama"), tmp_path, dst_strategy=weights.strategy(target))
    for rank, boxes in weights.slices(target).items():
        loaded = mindspore.load_checkpoint(str(tmp_path / f"rank_{rank}" / f"checkpoint_{rank}.ckpt"))
        for name, parameter in loaded.items():
            assert parameter.shape == boxes[name].shape
            assert (parameter.astype(mindspore.float32).asnumpy() == boxes[name]).all()


@pytest.mark.mindspore
def test_mindspore_reads_the_strategy_that_we_merge(genuine, tmp_path):
    import mindspore

    folder = genuine.model("mf_llama").strategy("dp2mp2pp2")
    merged = merge_strategies(folder, tmp_path / "merged.ckpt")
    mindspore.merge_pipeline_strategys(str(folder), str(tmp_path / "theirs.ckpt"))
    ours = mindspore.build_searched_strategy(str(merged))
    theirs = mindspore.build_searched_strategy(str(tmp_path / "theirs.ckpt"))
    assert {n: v.SerializeToString() for n, v in ours.items()} == {n: v.SerializeToString() for n, v in theirs.items()}
    assert read_strategy(merged).layouts == read_strategy(folder).layouts


def assert_same_as_boxes(got, boxes, dtypes):
    for name, box in boxes.items():
        assert got[name] == oracle.raw(box, dtypes[name]), name


def mindspore_transform(source: Path, scratch: Path, source_strategy: Path, target_strategy: Path) -> Path:
    import mindspore

    files = []
    for side, folder in (("source", source_strategy), ("target", target_strategy)):
        merged = scratch / f"{side}_strategy.ckpt"
        stages = read_strategy(folder).stages
        files.append(merge_strategies(folder, merged) if stages > 1 else folder / "ckpt_strategy_rank_0.ckpt")
    mindspore.transform_checkpoints(str(source), str(scratch / "theirs"), "checkpoint_", *map(str, files))
    return scratch / "theirs"
