from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategy_files import dims, field, layout_item, strategy_file, strategy_item, to_json

from auto_trans.core.layout import Layout
from auto_trans.core.strategy import Strategy, describe_difference, same_slices
from auto_trans.errors import ConfigError, LayoutError, OutputExistsError, StrategyError, StrategyNotFoundError
from auto_trans.storage import strategies
from auto_trans.storage.strategies import merge_strategies, read_strategy, remerge_strategies

LLAMA = oracle.DATA / "mf_llama"
PIPELINE = LLAMA / "dp2mp2pp2" / "strategy"


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


def test_path_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", str(oracle.DATA / "mf_llama" / "dp2mp2"))
    assert read_strategy("~/strategy") == read_strategy(oracle.DATA / "mf_llama" / "dp2mp2" / "strategy")


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
    with pytest.raises(StrategyError, match=r"both kinds.*rank_0\.ckpt and ckpt_strategy_rank_1\.json"):
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


@pytest.mark.parametrize("extra", [{"field": 8}, {"param_split_shape": [3, 5], "indices_offset": [0, 3]}])
def test_uneven_slicing_is_refused_where_it_is_needed(tmp_path, extra):
    file = strategy_file(tmp_path / "s_rank_0.ckpt", {"even": ([2], [[0, -1]])})
    uneven = strategy_file(tmp_path / "u_rank_0.ckpt", {"table": ([2], [[0, -1]])}, **extra)
    file.write_bytes(file.read_bytes() + uneven.read_bytes())
    strategy = read_strategy(file)
    assert strategy.layout("even", 0) is not None
    with pytest.raises(LayoutError, match=r"table.*sliced unevenly"):
        strategy.layout("table", 0)


def test_shape_in_the_strategy_of_a_stand_alone_job_is_no_uneven_slicing():
    """MindFormers 1.7 wrote this file for a job of four ranks with parallel_mode STAND_ALONE."""
    strategy = read_strategy(oracle.DATA.parent / "stand_alone" / "ckpt_strategy_rank_0.ckpt")
    assert strategy.world_size == 4 and not strategy.refused
    layout = strategy.layout("model.tok_embeddings.embedding_weight", 0)
    assert layout.slice_shape((128, 64)) == (128, 64) and layout.owners((0, 0)) == (0, 1, 2, 3)


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


def test_reading_needs_no_protobuf_library_and_leaves_the_environment_alone():
    file = PIPELINE.parent.parent / "dp2mp2" / "strategy" / "ckpt_strategy_rank_0.ckpt"
    code = f"""
import os, sys
before = dict(os.environ)
from auto_trans.storage.strategies import read_strategy
assert read_strategy({str(file)!r}).world_size == 4
assert dict(os.environ) == before
print([name for name in sys.modules if "protobuf" in name])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# folders whose files have other names


def renamed(folder, *cases):
    """Copies strategy files as strategy_0.ckpt, strategy_1.ckpt, ..."""
    folder.mkdir(exist_ok=True)
    for number, file in enumerate(cases):
        shutil.copy(file, folder / f"strategy_{number}.ckpt")
    return folder


FIRST, SECOND = PIPELINE / "ckpt_strategy_rank_0.ckpt", PIPELINE / "ckpt_strategy_rank_4.ckpt"


@pytest.mark.parametrize("files", [(FIRST, SECOND), (SECOND, FIRST), (FIRST, SECOND, FIRST)])
def test_files_of_any_name_are_taken_by_the_stages_that_they_name(tmp_path, files):
    folder = renamed(tmp_path / "s", *files)
    assert read_strategy(folder).layouts == read_strategy(PIPELINE).layouts
    assert read_strategy(merge_strategies(folder)).layouts == read_strategy(PIPELINE).layouts
    assert read_strategy(folder).layouts == read_strategy(PIPELINE).layouts, "with the merged file beside them"


def test_json_files_of_any_name_are_taken(tmp_path):
    for stage, file in enumerate((SECOND, FIRST)):
        (tmp_path / f"part{stage}.json").write_text(to_json(file))
    assert read_strategy(tmp_path).layouts == read_strategy(PIPELINE).layouts
    assert read_strategy(merge_strategies(tmp_path)).layouts == read_strategy(PIPELINE).layouts


def test_merged_file_of_any_name_beside_stage_files_is_ignored_and_alone_is_used(tmp_path):
    folder = renamed(tmp_path / "s", LLAMA / "dp2mp2" / "strategy" / "ckpt_strategy_rank_0.ckpt")
    merge_strategies(PIPELINE, folder / "another.ckpt")
    assert read_strategy(folder).world_size == 4
    (folder / "strategy_0.ckpt").unlink()
    assert read_strategy(folder).world_size == 8


def test_one_file_for_the_whole_job_is_found_or_made(tmp_path):
    scratch = tmp_path / "scratch.ckpt"
    one = renamed(tmp_path / "one", LLAMA / "dp2mp2" / "strategy" / "ckpt_strategy_rank_0.ckpt")
    assert strategies.single_file(one, scratch) == one / "strategy_0.ckpt"
    assert strategies.single_file(FIRST, scratch) == FIRST
    assert not scratch.exists()
    assert strategies.single_file(renamed(tmp_path / "two", FIRST, SECOND), scratch) == scratch
    assert read_strategy(scratch).world_size == 8
    (tmp_path / "merged").mkdir()
    merged = merge_strategies(PIPELINE, tmp_path / "merged" / "m.ckpt")
    assert strategies.single_file(tmp_path / "merged", tmp_path / "none") == merged


def test_merged_file_is_written_anew_only_from_the_files_of_several_stages(tmp_path):
    two = renamed(tmp_path / "two", FIRST, SECOND)
    (two / "merged_ckpt_strategy.ckpt").write_bytes(b"of an earlier job")
    remerge_strategies(two)
    assert read_strategy(two / "merged_ckpt_strategy.ckpt").world_size == 8
    for file in two.glob("strategy_*"):
        file.unlink()
    before = (two / "merged_ckpt_strategy.ckpt").stat()
    for path in (two, FIRST, None, "None"):
        remerge_strategies(path)
    assert (two / "merged_ckpt_strategy.ckpt").stat() == before
    one = renamed(tmp_path / "one", FIRST)
    remerge_strategies(one)
    assert [file.name for file in one.iterdir()] == ["strategy_0.ckpt"]


def test_two_merged_files_alone_must_say_the_same(tmp_path):
    merge_strategies(PIPELINE, tmp_path / "a.ckpt")
    merge_strategies(PIPELINE, tmp_path / "merged_ckpt_strategy.ckpt")
    assert read_strategy(tmp_path).world_size == 8
    merge_strategies(LLAMA / "dp1mp2pp2" / "strategy", tmp_path / "merged_ckpt_strategy.ckpt")
    with pytest.raises(StrategyError, match=r"a\.ckpt and .*merged_ckpt_strategy\.ckpt are merged .*different jobs"):
        read_strategy(tmp_path)


def test_merged_file_under_the_name_of_a_rank_is_refused(tmp_path):
    merge_strategies(PIPELINE, tmp_path / "s_rank_0.ckpt")
    with pytest.raises(StrategyError, match=r"s_rank_0\.ckpt is a merged"):
        read_strategy(tmp_path)


def test_two_files_that_describe_a_stage_differently_are_named(tmp_path):
    folder = renamed(tmp_path / "s", FIRST, LLAMA / "dp2mp2" / "strategy" / "ckpt_strategy_rank_0.ckpt", SECOND)
    with pytest.raises(StrategyError, match=r"strategy_0\.ckpt and .*strategy_1\.ckpt both describe stage 0"):
        read_strategy(folder)


def test_two_files_of_a_rank_are_named(tmp_path):
    for name in ("a_rank_0.ckpt", "b_rank_0.ckpt"):
        shutil.copy(FIRST, tmp_path / name)
    with pytest.raises(StrategyError, match=r"two strategy files of rank 0: a_rank_0\.ckpt, b_rank_0\.ckpt"):
        read_strategy(tmp_path)


def test_both_kinds_under_other_names_are_refused(tmp_path):
    folder = renamed(tmp_path / "s", FIRST)
    (folder / "second.json").write_text(to_json(SECOND))
    with pytest.raises(StrategyError, match=r"both kinds.*second\.json.*strategy_0\.ckpt"):
        read_strategy(folder)


@pytest.mark.parametrize("name", ["model.ckpt", "notes.json"])
def test_other_files_among_them_are_named(tmp_path, name):
    folder = renamed(tmp_path / "s", FIRST, SECOND)
    (folder / name).write_bytes(b"\x0a\x03abc")
    with pytest.raises(StrategyError, match=rf"{name} is not a strategy file.*keep other files out"):
        read_strategy(folder)


def test_large_checkpoint_in_the_place_of_a_strategy_is_not_read(tmp_path):
    with open(tmp_path / "model.ckpt", "wb") as f:
        f.truncate(1 << 40)
    with pytest.raises(StrategyError, match=r"model\.ckpt is larger than any strategy file"):
        read_strategy(tmp_path)


def count_calls(monkeypatch, name):
    """The files that a function of the module is called with from now on."""
    calls, function = [], getattr(strategies, name)

    def counting(file, *arguments):
        calls.append(file)
        return function(file, *arguments)

    monkeypatch.setattr(strategies, name, counting)
    return calls


def test_every_file_is_read_once_and_equal_ones_are_parsed_once(tmp_path, monkeypatch):
    for rank in range(32):
        strategy_file(tmp_path / f"s_rank_{rank}.ckpt", {"w": ([8], [[0, -1]])}, stage=rank // 8)
    read, parsed = count_calls(monkeypatch, "_read_bytes"), count_calls(monkeypatch, "parse")
    assert merge_strategies(tmp_path, tmp_path / "out" / "m.ckpt")
    assert (len(read), len(set(read)), len(parsed)) == (32, 32, 4)


# what the files do not tell


def test_missing_stages_are_named_with_their_ranks(tmp_path):
    for stage in (1, 4):
        strategy_file(tmp_path / f"{stage}.ckpt", {"w": ([8], [[0]])}, stage)
    with pytest.raises(
        StrategyError, match=r"stage 1, 4 only.*stage 0 \(ranks 0 to 7\), stages 2 to 3 \(ranks 16 to 31\)"
    ):
        read_strategy(tmp_path)


def test_gap_of_any_width_is_an_error(tmp_path):
    with pytest.raises(StrategyError, match="stages 0 to 4294967294"):
        read_strategy(strategy_file(tmp_path / "s.ckpt", {"w": ([8], [[0]])}, stage=2**32 - 1))


def test_number_that_is_no_stage_is_part_of_the_name(tmp_path):
    name = "1" * 5000 + "-w"
    assert list(read_strategy(strategy_file(tmp_path / "s.ckpt", {name: ([8], [[0]])})).layouts) == [name]


def test_one_stage_that_looks_like_part_of_a_pipeline_is_warned_of(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    merge_strategies(renamed(tmp_path / "whole", FIRST, SECOND))
    merge_strategies(LLAMA / "dp2mp2" / "strategy", tmp_path / "m.ckpt")
    assert not caplog.records
    merge_strategies(renamed(tmp_path / "half", FIRST))
    (record,) = caplog.records
    assert "half holds one pipeline stage, but lists accu_grads" in record.getMessage()


def test_ranks_in_the_names_are_told(tmp_path):
    shutil.copy(FIRST, tmp_path / "s_rank_2.ckpt")
    shutil.copy(FIRST, tmp_path / "other.ckpt")
    (tmp_path / "merged_rank_5.ckpt").write_bytes(b"")
    assert strategies.named_ranks(tmp_path) == {2}


# what is merged


def test_merging_copies_what_it_does_not_know(tmp_path):
    unknown = field(99, b"of a later MindSpore")
    layouts = field(1, dims([2])) + field(5, 0) + field(6, 0) + field(7, 0) + unknown

    def item(name):
        return field(3, unknown + field(1, name) + field(2, layouts))

    (tmp_path / "s_rank_0.ckpt").write_bytes(field(1, 2) + strategy_item(0) + item("w") + unknown)
    assert merge_strategies(tmp_path).read_bytes() == field(1, 1) + strategy_item(0) + item("0-w") + unknown


def test_merged_file_cannot_be_named_json(tmp_path):
    with pytest.raises(ConfigError, match=r"m\.json is written as protobuf"):
        merge_strategies(PIPELINE, tmp_path / "m.json")


# strictness


UNSLICED = field(1, dims([2])) + field(5, 0) + field(6, 0) + field(7, 0)


@pytest.mark.parametrize(
    "content, message",
    [
        (layout_item("w", [2], [[0]]) * 2, "parameter w for the second time"),
        (field(3, field(1, "w") + field(2, field(1, dims([2])))), "w without field, opt_weight_shard_step"),
        (field(3, field(2, b"")), "without"),
        (field(3, field(1, "w") + field(2, UNSLICED) + field(2, UNSLICED)), "parameter w with two layouts"),
        (field(2, field(1, "n")) + layout_item("w", [2], [[0]]), "an operator without stage"),
        (layout_item("w", [2**32], [[0]]), "the number 4294967296"),
        (layout_item("w", [2], [[2**31]]), "the number 2147483648"),
        (layout_item("w", [2] * 65, [[0]]), "more than 64 numbers"),
        (layout_item("w", [2], [[0]] * 65), "more than 64 dimensions"),
        (field(1, b"x"), "wire type 2 instead of 0"),
        (field(3, 7), "wire type 0 instead of 2"),
        (layout_item("w", [2], [[0]]) + b"\x1a\xff\xff\xff\xff\x0f", "a record that ends at byte"),
        (field(3, b"\x0a\x40" + b"w" * 8) + b"w" * 99, "a field that exceeds its message"),
        (b"\x08" + b"\xff" * 10 + b"\x01", "more than ten bytes"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "more than 64 bits"),
        (strategy_item(0) + field(2, field(2, field(1, 1))) + layout_item("w", [2], [[0]]), "several stages"),
    ],
)
def test_malformed_protobuf_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "s.ckpt").write_bytes(content)
    with pytest.raises(StrategyError, match=rf"s\.ckpt.*{message}"):
        read_strategy(tmp_path / "s.ckpt")


def test_unknown_fields_are_skipped_and_packed_numbers_accepted(tmp_path):
    unknown = field(77, 5) + field(78, b"abc") + b"\xf9\x04" + b"8" * 8 + b"\xfd\x04" + b"4" * 4
    layouts = field(1, unknown + field(1, b"\x02\x04")) + field(2, field(1, b"\x00" + b"\xff" * 9 + b"\x01"))
    layouts += unknown + field(5, 0) + field(6, 0) + field(7, 0)
    (tmp_path / "s.ckpt").write_bytes(unknown + field(3, unknown + field(1, "w") + field(2, layouts)))
    assert read_strategy(tmp_path / "s.ckpt").layouts == {"w": {0: Layout((2, 4), ((0,), ()), 0, 0, (2,))}}


LAYOUT = {
    "dev_matrix": [2], "tensor_map": [0, -1], "field": 0, "opt_weight_shard_size": 0, "opt_weight_shard_step": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dev_matrix": [True]}, "dev_matrix holds True"),
        ({"dev_matrix": [2.0]}, r"dev_matrix holds 2\.0"),
        ({"dev_matrix": ["2"]}, "dev_matrix holds '2'"),
        ({"dev_matrix": [-2]}, "dev_matrix holds -2"),
        ({"dev_matrix": 2}, "dev_matrix is 2 instead of a list"),
        ({"dev_matrix": None}, "dev_matrix is None"),
        ({"tensor_map": [[0], -1]}, "tensor_map holds a list"),
        ({"tensor_map": [[[0]], [-1]]}, "tensor_map holds a list"),
        ({"tensor_map": [2**31]}, "tensor_map holds 2147483648"),
        ({"tensor_map": {"dim": [0]}}, "tensor_map is an object"),
        ({"field": False}, "field holds False"),
        ({"opt_weight_shard_size": 1.0}, r"opt_weight_shard_size holds 1\.0"),
        ({"opt_weight_shard_step": "x" * 1000}, "opt_weight_shard_step holds 'xxx"),
        ({"param_split_shape": [None]}, "param_split_shape holds None"),
    ],
)
def test_json_of_wrong_types_is_refused_by_file_and_parameter(tmp_path, changes, message):
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"parallel_layout_item": {"w": LAYOUT}}))
    assert read_strategy(file).world_size == 2
    file.write_text(json.dumps({"parallel_layout_item": {"w": {**LAYOUT, **changes}}}))
    with pytest.raises(StrategyError, match=rf"s\.json.*parameter w: {message}"):
        read_strategy(file)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"parallel_layout_item": {"w": 1, "w": 2}}', "parallel_layout_item holds 'w' twice"),
        ('{"parallel_layout_item": {"w": {"field": 1, "field": 1}}}', "parameter w holds 'field' twice"),
        ('{"parallel_layout_item": {"w": {}}}', "parameter w has no dev_matrix, tensor_map, field"),
        ('{"parallel_layout_item": {"\\ud800": {}}}', "no valid text"),
        ('{"parallel_layout_item": []}', "parallel_layout_item holds a list"),
        ('{"parallel_strategy_item": {"n": {}}}', "operator n has no stage"),
        ('{"parallel_strategy_item": {"n": {"stage": true}}}', "operator n: stage holds True"),
        ('{"current_stage": 1e3}', "current_stage holds"),
        ("[" * 100_000, "lists within lists"),
        ("1" * 5000, "not a strategy file"),
        ("[]", "the file holds a list"),
    ],
)
def test_json_of_wrong_structure_is_refused(tmp_path, text, message):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(StrategyError, match=rf"s\.json.*{message}"):
        read_strategy(tmp_path / "s.json")


def test_json_with_an_entry_for_every_dimension_says_the_same_as_protobuf(tmp_path):
    layout = {**LAYOUT, "dev_matrix": [2, 2], "tensor_map": [[1, 0], [-1]]}
    (tmp_path / "s.json").write_text(json.dumps({"parallel_layout_item": {"w": layout}}))
    expected = read_strategy(strategy_file(tmp_path / "s.ckpt", {"w": ([2, 2], [[1, 0], [-1]])}))
    assert read_strategy(tmp_path / "s.json").layouts == expected.layouts


GENUINE, GENUINE_JSON = FIRST.read_bytes(), to_json(FIRST).encode()


@given(st.binary(max_size=200), st.sampled_from(["s.ckpt", "s.json"]))
def test_random_bytes_raise_nothing_but_strategy_errors(tmp_path_factory, content, name):
    check_only_strategy_errors(tmp_path_factory.getbasetemp() / name, content)


@given(
    st.integers(0, len(GENUINE) - 1), st.binary(max_size=4), st.integers(0, 4), st.sampled_from(["s.ckpt", "s.json"])
)
def test_damaged_files_raise_nothing_but_strategy_errors(tmp_path_factory, position, inserted, removed, name):
    content = GENUINE if name == "s.ckpt" else GENUINE_JSON
    position %= len(content)
    damaged = content[:position] + inserted + content[position + removed :]
    check_only_strategy_errors(tmp_path_factory.getbasetemp() / name, damaged)


def check_only_strategy_errors(file: Path, content: bytes):
    file.write_bytes(content)
    try:
        read_strategy(file)
    except StrategyError as e:
        assert file.name in str(e)


numbers = st.lists(st.integers(0, 8), max_size=4)
random_layouts = st.fixed_dictionaries(
    {
        "dev_matrix": st.lists(numbers, min_size=1, max_size=2),
        "tensor_map": st.lists(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 3), max_size=4), max_size=3),
        "param_split_shape": st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=2), max_size=2),
        "indices_offset": st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=2), max_size=2),
        "single": st.tuples(st.just(0) | st.integers(-(2**31), 2**31 - 1), st.integers(-1, 8), st.integers(-1, 8)),
    }
)
random_names = st.text(min_size=1, max_size=20).filter(str.isprintable)


@pytest.mark.mindspore
@given(st.dictionaries(random_names, random_layouts, min_size=1), st.integers(0, 2**32 - 1))
def test_what_mindspores_schema_writes_is_read_alike(items, stage):
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    from auto_trans.storage.formats import strategy
    from auto_trans.storage.formats.wire import WireReader

    message = ParallelStrategyMap(current_stage=2)
    strategys = message.parallel_strategy_item.add(node_name="n").parallel_strategys
    strategys.stage = stage
    strategys.parallel_strategy.add(dim=[1, 2**32 - 1])
    for name, layout in items.items():
        added = message.parallel_layout_item.add(param_name=name).parallel_layouts
        for key in ("dev_matrix", "tensor_map", "param_split_shape", "indices_offset"):
            for entry in layout[key]:
                getattr(added, key).add(dim=entry)
        added.field, added.opt_weight_shard_step, added.opt_weight_shard_size = layout["single"]
    content = message.SerializeToString()
    stages, read = strategy._read_map(WireReader.of_bytes(content))
    assert stages == {stage} and list(read) == list(items)
    for name, layout in items.items():
        expected = [layout[key] for key in ("dev_matrix", "tensor_map", "param_split_shape", "indices_offset")]
        assert list(read[name].repeated.values()) == expected
        assert tuple(read[name].single[number] for number in (5, 6, 7)) == layout["single"]
    with_prefix = ParallelStrategyMap.FromString(
        b"".join(strategy.merge([(3, strategy.StrategyFile((), False, content))]))
    )
    for item in message.parallel_layout_item:
        item.param_name = f"3-{item.param_name}"
    message.current_stage = 1
    assert with_prefix == message


def test_merged_file_that_describes_more_stages_than_those_beside_it_is_used(tmp_path):
    """As in a folder to which one node's files were copied."""
    whole = merge_strategies(PIPELINE, tmp_path / "merged_ckpt_strategy.ckpt")
    for rank in range(4):
        shutil.copy(PIPELINE / f"ckpt_strategy_rank_{rank}.ckpt", tmp_path)
    assert read_strategy(tmp_path).world_size == 8
    before = whole.read_bytes()
    with pytest.raises(StrategyNotFoundError, match="would add to"):
        merge_strategies(tmp_path)
    assert whole.read_bytes() == before, "a merged file of more stages is not replaced by one of fewer"
    shutil.copy(LLAMA / "dp2mp2" / "strategy" / "ckpt_strategy_rank_0.ckpt", tmp_path)
    with pytest.raises(StrategyError, match="differ"):
        read_strategy(tmp_path)


def test_merged_file_of_another_job_beside_stage_files_is_stale(tmp_path):
    merge_strategies(PIPELINE, tmp_path / "merged_ckpt_strategy.ckpt")
    for file in (LLAMA / "dp2mp2" / "strategy").iterdir():
        shutil.copy(file, tmp_path)
    assert read_strategy(tmp_path).world_size == 4


@pytest.mark.parametrize("name", ["weights.ckpt", "ckpt_strategy_rank_0.ckpt", "notes.ckpt"])
def test_merging_never_overwrites_what_is_no_merged_strategy(tmp_path, name):
    shutil.copytree(PIPELINE, tmp_path, dirs_exist_ok=True)
    if name != "ckpt_strategy_rank_0.ckpt":
        (tmp_path / "elsewhere").mkdir()
        output = oracle.write_raw(tmp_path / "elsewhere" / name, {"w": oracle.Raw("Int8", (1,), b"x")})
    else:
        output = tmp_path / name
    before = output.read_bytes()
    with pytest.raises(OutputExistsError, match="is no merged strategy file"):
        merge_strategies(tmp_path, output)
    assert output.read_bytes() == before
    merged = merge_strategies(tmp_path, tmp_path / "elsewhere" / "m.ckpt")
    assert merge_strategies(tmp_path, merged) == merged
