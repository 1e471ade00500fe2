"""What a job loads, and whose conversion it gets, by its settings."""

from __future__ import annotations

import pytest

from auto_trans.errors import CheckpointError, CheckpointNotFoundError, ConfigError, UnsupportedCheckpointError
from auto_trans.jobs import NOT_ASKED, RESHARDS, Load, reshards_itself


@pytest.fixture
def weights(tmp_path):
    """Kind of source -> its path."""
    for rank in range(2):
        folder = tmp_path / "run" / "checkpoint" / f"rank_{rank}"
        folder.mkdir(parents=True)
        (folder / f"net_rank_{rank}-1_8.safetensors").touch()
    (tmp_path / "run" / "strategy").mkdir()
    (tmp_path / "run" / "strategy" / "ckpt_strategy_rank_0.ckpt").touch()
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "model.safetensors").touch()
    return {
        "ranks": tmp_path / "run" / "checkpoint",
        "file of a rank": tmp_path / "run" / "checkpoint" / "rank_1" / "net_rank_1-1_8.safetensors",
        "complete": tmp_path / "whole",
        "file": tmp_path / "whole" / "model.safetensors",
    }


def settings(path, **changes):
    return {
        "auto_trans_ckpt": True, "use_parallel": True, "load_ckpt_format": "safetensors", "load_checkpoint": str(path),
        **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({}, ""),
        ({"load_ckpt_format": "ckpt"}, ""),
        ({"load_ckpt_format": None}, ""),
        ({"run_mode": "predict"}, ""),
        ({"run_mode": "predict", "use_legacy": True}, ""),
        ({"auto_trans_ckpt": False}, NOT_ASKED),
        ({"auto_trans_ckpt": None}, NOT_ASKED),
        ({"only_save_strategy": True}, "only_save_strategy is True"),
        ({"run_mode": "predict", "use_legacy": False}, "inference with use_legacy: False reads weights by itself"),
    ],
)
def test_distributed_weights_are_converted_unless_the_settings_say_otherwise(weights, changes, left):
    given = settings(weights["ranks"], **changes)
    load = Load.of(given)
    assert load.left == left and load.checked == (not left)


OLD_KEY, NEW_KEY, MAPPING = (
    {"ckpt_use_legacy_format": False},
    {"use_legacy_format": False},
    {"checkpoint": {"save_max": 3}},
)


@pytest.mark.parametrize(
    ("version", "changes", "reshards"),
    [
        ("1.6.0", OLD_KEY, False),
        ("1.6.0", MAPPING, False),
        ("1.7.0", OLD_KEY, True),
        ("1.7.0", NEW_KEY, False),
        ("1.8.0", OLD_KEY, False),
        ("1.8.0", NEW_KEY, True),
        ("1.8.0", MAPPING, False),
        ("1.9.0", MAPPING, True),
        ("2.1.0", MAPPING, True),
        ("2.1.0", NEW_KEY, True),
        ("10.0", MAPPING, True),
        ("", MAPPING, True),
        ("2.1.0", {"use_legacy_format": True}, False),
        ("2.1.0", {"checkpoint": {}}, False),
        ("2.1.0", {**NEW_KEY, "run_mode": "predict"}, False),
        ("2.1.0", {**NEW_KEY, "run_mode": "finetune"}, True),
    ],
)
def test_jobs_of_checkpoint2_are_told_by_the_keys_of_their_version(weights, version, changes, reshards):
    given = settings(weights["ranks"], **changes)
    assert reshards_itself(given, version) == reshards
    assert (Load.of(given, reshards=reshards).left == RESHARDS) == reshards


def test_nothing_is_done_on_modelarts(weights):
    load = Load.of(settings(weights["ranks"]), modelarts=True)
    assert load.left == "this is ModelArts" and not load.checked


@pytest.mark.parametrize(
    ("kind", "use_parallel", "checked"), [("complete", True, True), ("complete", False, False), ("file", False, False)]
)
def test_complete_safetensors_are_sliced_by_mindformers(weights, kind, use_parallel, checked):
    load = Load.of(settings(weights[kind], use_parallel=use_parallel))
    assert load.left.startswith("the weights are complete") and load.checked == checked


def test_complete_ckpt_is_converted(weights):
    assert not Load.of(settings(weights["complete"], load_ckpt_format="ckpt")).left


@pytest.mark.parametrize(
    ("kind", "use_parallel", "message"),
    [
        ("file", True, "model.safetensors is a file, which MindFormers does not load with use_parallel: True"),
        (
            "ranks",
            False,
            "checkpoint holds rank folders, which MindFormers loads as safetensors with use_parallel: True only",
        ),
    ],
)
def test_what_mindformers_would_refuse_after_it_has_built_the_network_is_refused_at_once(
    weights, kind, use_parallel, message
):
    with pytest.raises(ConfigError, match=message):
        Load.of(settings(weights[kind], use_parallel=use_parallel))


def test_complete_weights_of_the_other_format_are_refused(tmp_path):
    (tmp_path / "net.ckpt").touch()
    for path, parallel in ((tmp_path, True), (tmp_path / "net.ckpt", False)):
        with pytest.raises(
            UnsupportedCheckpointError, match=r"holds no \.safetensors files.*set load_ckpt_format: ckpt"
        ):
            Load.of(settings(path, use_parallel=parallel))


def test_path_that_is_not_there_is_told(tmp_path):
    for parallel in (True, False):
        with pytest.raises(CheckpointNotFoundError, match="nowhere is not found"):
            Load.of(settings(tmp_path / "nowhere", use_parallel=parallel))
    with pytest.raises(CheckpointError, match="cannot be read"):
        Load.of(settings("~nobody-of-this-name/x"))


def test_merge_of_a_ckpt_job_is_refused(weights):
    with pytest.raises(ConfigError, match="unify: True} is for load_ckpt_format: safetensors only"):
        Load.of(settings(weights["ranks"], load_ckpt_format="ckpt", auto_trans={"unify": True}))


def test_engine_that_cannot_convert_safetensors_is_refused_at_once(weights):
    with pytest.raises(ConfigError, match="native only, not mindspore"):
        Load.of(settings(weights["ranks"], auto_trans={"engine": "mindspore"}))
    assert Load.of(settings(weights["complete"], auto_trans={"engine": "mindspore"})).left


def test_format_that_there_is_none_of_is_refused(weights):
    with pytest.raises(ConfigError, match="load_ckpt_format must be ckpt or safetensors, not 'bin'"):
        Load.of(settings(weights["ranks"], load_ckpt_format="bin"))


def test_strategy_beside_the_checkpoint_is_found(weights):
    config = Load.of(settings(weights["ranks"])).config
    assert config.src_strategy == str(weights["ranks"].parent / "strategy")


@pytest.mark.parametrize("given", ["/elsewhere/merged_ckpt_strategy.ckpt", "/elsewhere/strategy"])
def test_strategy_that_is_given_is_used(weights, given):
    config = Load.of(settings(weights["ranks"], src_strategy_path_or_dir=given)).config
    assert config.src_strategy == given


def test_empty_strategy_folder_is_not_taken(weights):
    (weights["ranks"].parent / "strategy" / "ckpt_strategy_rank_0.ckpt").unlink()
    assert Load.of(settings(weights["ranks"])).config.src_strategy is None


def test_file_of_a_rank_says_which_step_is_loaded(weights):
    config = Load.of(settings(weights["file of a rank"])).config
    assert config.load_checkpoint == str(weights["ranks"])
    assert config.resume_file == "net_rank_1-1_8.safetensors"
    assert config.src_strategy == str(weights["ranks"].parent / "strategy")


def test_path_of_mindformers_1_9_comes_first(weights):
    given = settings("/old", checkpoint={"load_path": str(weights["ranks"])})
    assert Load.of(given).config.load_checkpoint == str(weights["ranks"])
