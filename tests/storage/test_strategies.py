from __future__ import annotations

import json
import shutil

import oracle
import pytest

from auto_trans.core.strategy import Strategy, describe_difference, same_slices
from auto_trans.errors import LayoutError, StrategyError, StrategyNotFoundError
from auto_trans.storage.strategies import merge_strategies, read_strategy
from auto_trans.storage.strategy_pb import ParallelStrategyMap

LLAMA = oracle.DATA / "mf_llama"
PIPELINE = LLAMA / "dp2mp2pp2" / "strategy"


def strategy_file(path, layouts, stage=0, **extra):
    """Writes a strategy file: parameter -> (dev_matrix, tensor_map entries)."""
    message = ParallelStrategyMap(current_stage=2)
    message.parallel_strategy_item.add(node_name="n").parallel_strategys.stage = stage
    for name, (dev_matrix, entries) in layouts.items():
        item = message.parallel_layout_item.add(param_name=name).parallel_layouts
        item.dev_matrix.add(dim=dev_matrix)
        for entry in entries:
            item.tensor_map.add(dim=entry)
        item.field = extra.get("field", 0)
        item.opt_weight_shard_step = item.opt_weight_shard_size = 0
        item.param_split_shape.add(dim=extra.get("param_split_shape", ()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(message.SerializeToString())
    return path


def to_json(file):
    """MindSpore's JSON form of a strategy file."""
    message = ParallelStrategyMap.FromString(file.read_bytes())
    layouts = {}
    for item in message.parallel_layout_item:
        layout = item.parallel_layouts
        layouts[item.param_name] = {
            "dev_matrix": list(layout.dev_matrix[0].dim),
            "tensor_map": list(layout.tensor_map[0].dim),
            "param_split_shape": [],
            "indices_offset": [],
            "field": layout.field,
            "opt_weight_shard_size": layout.opt_weight_shard_size,
            "opt_weight_shard_step": layout.opt_weight_shard_step,
        }
    items = {i.node_name: {"stage": i.parallel_strategys.stage} for i in message.parallel_strategy_item}
    return json.dumps({"current_stage": 2, "parallel_strategy_item": items, "parallel_layout_item": layouts})


@pytest.mark.parametrize("case", ["dp2mp2_opt", "dp4mp2", "dp2mp2pp2"])
def test_json_says_the_same_as_protobuf(tmp_path, case):
    for file in (LLAMA / case / "strategy").iterdir():
        (tmp_path / file.with_suffix(".json").name).write_text(to_json(file))
    assert read_strategy(tmp_path).layouts == read_strategy(LLAMA / case / "strategy").layouts


def test_single_file_folder_and_merged_file_say_the_same(tmp_path):
    one = read_strategy(LLAMA / "dp4mp2" / "strategy" / "ckpt_strategy_rank_5.ckpt")
    assert one.layouts == read_strategy(LLAMA / "dp4mp2" / "strategy").layouts
    assert (one.stages, one.world_size) == (1, 8)
    merged = read_strategy(merge_strategies(PIPELINE, tmp_path / "m.ckpt"))
    assert merged.layouts == read_strategy(PIPELINE).layouts
    assert (merged.stages, merged.stage_devices, merged.world_size) == (2, 4, 8)


def test_folder_with_only_a_merged_file_is_read(tmp_path):
    merge_strategies(PIPELINE, tmp_path / "merged_ckpt_strategy.ckpt")
    assert read_strategy(tmp_path).world_size == 8


def test_stale_merged_file_beside_rank_files_is_ignored_and_replaced(tmp_path):
    shutil.copytree(PIPELINE, tmp_path, dirs_exist_ok=True)
    (tmp_path / "merged_ckpt_strategy.ckpt").write_bytes(b"of an earlier job")
    assert read_strategy(tmp_path).world_size == 8
    assert read_strategy(merge_strategies(tmp_path)).world_size == 8


def test_failed_merge_keeps_the_old_file(tmp_path):
    shutil.copy(PIPELINE / "ckpt_strategy_rank_0.ckpt", tmp_path)
    (tmp_path / "ckpt_strategy_rank_1.ckpt").write_bytes(b"damaged")
    (tmp_path / "merged_ckpt_strategy.ckpt").write_bytes(b"old")
    with pytest.raises(StrategyError):
        merge_strategies(tmp_path)
    assert (tmp_path / "merged_ckpt_strategy.ckpt").read_bytes() == b"old"
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "ckpt_strategy_rank_0.ckpt", "ckpt_strategy_rank_1.ckpt", "merged_ckpt_strategy.ckpt",
    ]  # fmt: skip


def test_merging_without_rank_files_never_overwrites_a_merged_one(tmp_path):
    merged = merge_strategies(PIPELINE, tmp_path / "merged_ckpt_strategy.ckpt")
    before = merged.read_bytes()
    with pytest.raises(StrategyNotFoundError, match="to merge"):
        merge_strategies(tmp_path)
    assert merged.read_bytes() == before


def test_stage_file_alone_of_a_later_stage_is_refused():
    with pytest.raises(StrategyError, match="stage 1 only; give the folder"):
        read_strategy(PIPELINE / "ckpt_strategy_rank_7.ckpt")


def test_missing_path_and_empty_folder_are_named(tmp_path):
    with pytest.raises(StrategyNotFoundError, match="nowhere"):
        read_strategy(tmp_path / "nowhere")
    with pytest.raises(StrategyNotFoundError, match="holds no"):
        read_strategy(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xff\xff not protobuf", b"", b"\n\x05\n\x01a\x12\x00"])
def test_what_is_no_strategy_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "ckpt_strategy_rank_0.ckpt").write_bytes(content)
    with pytest.raises(StrategyError, match=r"ckpt_strategy_rank_0\.ckpt"):
        read_strategy(tmp_path / "ckpt_strategy_rank_0.ckpt")


def test_broken_json_is_refused_by_name(tmp_path):
    (tmp_path / "s_rank_0.json").write_text("{")
    with pytest.raises(StrategyError, match=r"s_rank_0\.json"):
        read_strategy(tmp_path)


def test_both_kinds_in_a_folder_are_refused(tmp_path):
    shutil.copy(LLAMA / "dp1mp2" / "strategy" / "ckpt_strategy_rank_0.ckpt", tmp_path)
    (tmp_path / "ckpt_strategy_rank_1.json").write_text("{}")
    with pytest.raises(StrategyError, match="both kinds"):
        read_strategy(tmp_path)


def test_files_of_different_jobs_in_a_folder_are_refused(tmp_path):
    shutil.copy(LLAMA / "dp1mp2" / "strategy" / "ckpt_strategy_rank_0.ckpt", tmp_path)
    shutil.copy(LLAMA / "dp2mp1" / "strategy" / "ckpt_strategy_rank_1.ckpt", tmp_path)
    with pytest.raises(StrategyError, match="of different jobs"):
        read_strategy(tmp_path)


def test_file_of_a_rank_outside_its_stage_is_refused(tmp_path):
    shutil.copy(LLAMA / "dp1mp2" / "strategy" / "ckpt_strategy_rank_0.ckpt", tmp_path / "ckpt_strategy_rank_5.ckpt")
    with pytest.raises(StrategyError, match="rank 5 does not belong"):
        read_strategy(tmp_path)


@pytest.mark.parametrize("extra", [{"field": 8}, {"param_split_shape": [3, 5]}])
def test_uneven_slicing_is_refused_where_it_is_needed(tmp_path, extra):
    file = strategy_file(tmp_path / "s_rank_0.ckpt", {"even": ([2], [[0, -1]])})
    uneven = strategy_file(tmp_path / "u_rank_0.ckpt", {"table": ([2], [[0, -1]])}, **extra)
    message = ParallelStrategyMap.FromString(file.read_bytes())
    message.MergeFromString(uneven.read_bytes())
    file.write_bytes(message.SerializeToString())
    strategy = read_strategy(file)
    assert strategy.layout("even", 0) is not None
    with pytest.raises(LayoutError, match=r"table.*sliced unevenly"):
        strategy.layout("table", 0)


def test_extra_entry_of_a_one_dimensional_layout_is_no_dimension():
    strategy = read_strategy(oracle.DATA / "toy" / "dp2mp4_lay" / "strategy")
    layout = strategy.layout("layers.0.bq", 0)
    assert layout.grid(1) == (4,)
    assert layout.grid(2) == (4, 1)


def test_same_slices_sees_through_different_device_matrices(tmp_path):
    a = read_strategy(strategy_file(tmp_path / "a.ckpt", {"w": ([4], [[0, -1]]), "b": ([4], [[-1]])}))
    b = read_strategy(strategy_file(tmp_path / "b.ckpt", {"w": ([2, 2], [[1, 0], [-1]]), "b": ([1, 4], [[-1]])}))
    c = read_strategy(strategy_file(tmp_path / "c.ckpt", {"w": ([2, 2], [[0, 1], [-1]]), "b": ([1, 4], [[-1]])}))
    assert same_slices(a, b)
    assert not same_slices(a, c)
    assert same_slices(Strategy.complete(), Strategy.complete(4))
    assert not same_slices(Strategy.complete(), a)


def test_difference_is_told_by_an_example():
    text = describe_difference(read_strategy(LLAMA / "dp1mp2" / "strategy"), read_strategy(PIPELINE))
    assert text.startswith("2 ranks in 1 stage -> 8 ranks in 2 stages")
    text = describe_difference(Strategy.complete(), read_strategy(LLAMA / "dp1mp2" / "strategy"))
    assert "e.g." in text and "1 x 1 -> " in text


def test_merged_names_do_not_leak_the_stage():
    assert all(not name[0].isdigit() for name in read_strategy(PIPELINE).layouts)
