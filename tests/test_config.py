"""The settings of a job, from its YAML and the environment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import auto_trans
from auto_trans.cli.parsers import FLAGS
from auto_trans.config import DEFAULT_MEMORY, DEFAULT_TIMING, YAML_KEYS, AutoTransConfig, Timing
from auto_trans.errors import ConfigError, ConfigTypeError


def config(settings=None, load_checkpoint="weights", **environ):
    environ = {f"AUTO_TRANS_{name.upper()}": value for name, value in environ.items()}
    return AutoTransConfig.from_settings(settings or {}, load_checkpoint, environ)


def test_defaults():
    assert config() == AutoTransConfig("weights")
    assert config({"auto_trans": None, "transform_process_num": None, "npu_num_per_node": None}) == config()
    assert (config().memory_limit, config().timing, config().engine) == (DEFAULT_MEMORY, DEFAULT_TIMING, "native")


OWN = {"engine": "mindspore", "memory_limit": "1MiB", "allow_extra": ["a", "b"], "allow_missing": "c, d", "join_timeout": 1,
       "heartbeat_timeout": "2", "stall_timeout": 3.5}  # fmt: skip


def test_settings_of_the_yaml():
    found = config({"auto_trans": OWN, "src_strategy_path_or_dir": "s", "transform_process_num": 2})
    assert (found.engine, found.memory_limit, found.src_strategy, found.transform_process_num) == (
        "mindspore", 1 << 20, "s", 2
    )  # fmt: skip
    assert (found.allow_extra, found.allow_missing) == (("a", "b"), ("c", "d"))
    assert found.timing == Timing(join_timeout=1, heartbeat_timeout=2, stall_timeout=3.5)


def test_environment_wins():
    environ = {"engine": "native", "memory_limit": "2MiB", "allow_extra": "x, y", "join_timeout": "7"}
    found = config({"auto_trans": OWN}, **environ)
    assert (found.engine, found.memory_limit, found.allow_extra) == ("native", 2 << 20, ("x", "y"))
    assert (found.timing.join_timeout, found.timing.stall_timeout) == (7, 3.5)


@pytest.mark.parametrize("strategy", [None, "", "None"])
def test_no_strategy_is_none(strategy):
    assert config({"src_strategy_path_or_dir": strategy}).src_strategy is None


def test_step_that_resume_training_names_is_that_of_a_folder(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"")
    settings = {"resume_training": "net_rank_0-1_1.ckpt"}
    assert config(settings, tmp_path).resume_file == "net_rank_0-1_1.ckpt"
    assert config(settings, tmp_path / "x.ckpt").resume_file is None
    assert config({"resume_training": True}, tmp_path).resume_file is None


def test_devices_of_a_node_are_those_of_the_launcher_unless_they_are_set():
    environ = {"DEVICE_NUM_PER_NODE": "16"}
    assert AutoTransConfig.from_settings({}, "w", environ).npu_num_per_node == 16
    assert AutoTransConfig.from_settings({"npu_num_per_node": 4}, "w", environ).npu_num_per_node == 4


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"auto_trans": ["engine"]}, ConfigTypeError, "auto_trans must be a mapping"),
        (
            {"auto_trans": {"memory": "1MiB"}},
            ConfigError,
            "no setting memory; it has engine, load, loader, memory_limit",
        ),
        ({"auto_trans": {"engine": "magic"}}, ConfigError, "one of native, mindspore"),
        ({"auto_trans": {"memory_limit": "1023KiB"}}, ConfigError, "at least 1MiB"),
        ({"auto_trans": {"join_timeout": 0}}, ConfigError, "join_timeout must be more than 0"),
        ({"auto_trans": {"stall_timeout": "long"}}, ConfigTypeError, "stall_timeout must be a number of seconds"),
        ({"auto_trans": {"allow_extra": [1]}}, ConfigTypeError, "allow_extra must be a list of patterns"),
        ({"auto_trans": {"allow_missing": [""]}}, ConfigTypeError, "allow_missing must be a list of patterns"),
        ({"src_strategy_path_or_dir": 3}, ConfigTypeError, "src_strategy_path_or_dir must be a path"),
        ({"transform_process_num": 0}, ConfigError, "should not be smaller than 1"),
        ({"transform_process_num": True}, ConfigTypeError, "whole number"),
        ({"transform_process_num": "2"}, ConfigTypeError, "whole number"),
        ({"transform_by_rank": "False"}, ConfigTypeError, "True or False"),
        ({"npu_num_per_node": 3}, ConfigError, "power of 2"),
        ({"npu_num_per_node": True}, ConfigTypeError, "power of 2"),
        ({"npu_num_per_node": 0}, ConfigError, "power of 2"),
        ({"npu_num_per_node": -8}, ConfigError, "power of 2"),
        ({"npu_num_per_node": "many"}, ConfigTypeError, "power of 2"),
    ],
)
def test_values_that_cannot_be_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        config(settings)


@pytest.mark.parametrize("path", [None, "", 3])
def test_weights_must_be_a_path(path):
    with pytest.raises(ConfigTypeError, match="must be the path of the weights"):
        config({}, path)


def test_every_setting_that_a_message_names_is_known_to_every_door():
    """A setting stands between « and » by the library's name."""
    named = {
        name
        for file in Path(auto_trans.__file__).parent.rglob("*.py")
        for name in re.findall(r"«(\w+)»", file.read_text(encoding="utf-8"))
    }
    assert "src_strategy" in named
    assert not named - FLAGS.keys() and not named - YAML_KEYS.keys()
