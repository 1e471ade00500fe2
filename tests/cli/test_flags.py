"""Flags that would be ignored, empty arguments, and messages in the user's words."""

from __future__ import annotations

import json
import shutil

import numpy as np
import oracle
import pytest

from auto_trans.cli.parsers import empty_argument

STRATEGIES = oracle.DATA / "mf_llama"
STRATEGY = STRATEGIES / "dp1mp2" / "strategy"


@pytest.fixture
def complete(genuine):
    return genuine.complete("mf_llama")


@pytest.fixture
def sliced(genuine):
    """Slices, and the flag that gives their strategy."""
    return genuine.source("mf_llama", "dp1mp2"), "--src-strategy", STRATEGY


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["convert", "a", "b", "--measure"], "--measure: only allowed with --dry-run"),
        (["convert", "a", "b", "--npu-num-per-node", "8"], "--npu-num-per-node: only allowed with --dry-run"),
        (["convert", "a", "b", "--dry-run", "--verify"], "--verify: only allowed without --dry-run"),
        (["inspect", STRATEGY, "--crc"], "--crc"),
        (["inspect", STRATEGY, "--html", "x", "--json"], "--json: not allowed with argument --html"),
        (["inspect", STRATEGY, "--diff", STRATEGY, "--weights", "x"], "--weights: not allowed with argument --diff"),
        (["verify", "a", "--step", "1_1"], "--step: only allowed with --against"),
        (["verify", "a", "--allow-extra", "x"], "--allow-extra: only allowed with --against"),
        (["doctor", "--world-size", "2"], "--world-size: only allowed with CONFIG.yaml"),
        (["doctor", "x.yaml", "--world-size", "0"], "--world-size: must be at least 1"),
    ],
)
def test_flag_that_would_be_ignored_is_refused(auto_trans, arguments, message):
    done = auto_trans(*arguments, code=2)
    assert message in done.stderr and f"usage: auto-trans {arguments[0]}" in done.stderr


@pytest.mark.parametrize("flag", ["--html", "--diff", "--weights"])
def test_flags_of_a_strategy_are_refused_for_a_checkpoint(auto_trans, complete, tmp_path, flag):
    done = auto_trans("inspect", complete, flag, "x", code=2)
    assert f"argument {flag}: {complete} is a checkpoint" in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "argv, told",
    [
        (["convert", "a", "b"], None),
        (["convert", "", "b"], "an argument"),
        (["convert", "a", "b", "--src-strategy", ""], "argument --src-strategy"),
        (["convert", "a", "b", "--src-strategy="], "argument --src-strategy"),
        (["inspect", "a", "--param=x="], None),
        ([], None),
    ],
)
def test_empty_arguments_are_found(argv, told):
    assert empty_argument(argv) == told


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "", "out"],
        ["convert", "a", "out", "--dst-strategy", ""],
        ["inspect", ""],
        ["verify", ""],
        ["verify", "a", "--against="],
        ["merge-strategy", "a", ""],
        ["merge-lora", "a", "", "--scaling", "2"],
        ["merge-safetensors", "a", "b", "--src-strategy", "s", "--filter-out-param-prefix", ""],
        ["doctor", ""],
    ],
)
def test_empty_argument_is_refused_by_every_subcommand(auto_trans, arguments):
    done = auto_trans(*arguments, code=2)
    assert "is empty: is a variable of the shell not set?" in done.stderr


def test_pattern_that_matches_nothing_is_told(auto_trans, complete):
    for arguments in ([complete], [STRATEGY], [STRATEGY, "--diff", STRATEGY]):
        done = auto_trans("inspect", *arguments, "--param", "*.nothing", code=1)
        assert "no parameter of" in done.stderr and "matches --param '*.nothing'" in done.stderr
        assert not done.stdout


def test_json_of_several_checkpoints_is_one_list(auto_trans, complete, tmp_path):
    (tmp_path / "src").mkdir()
    for name in ("base", "tuned"):
        shutil.copy(complete, tmp_path / "src" / f"{name}.ckpt")
    arguments = ["convert", "src", "out", "--dst-strategy", STRATEGY, "--json"]
    plans = json.loads(auto_trans(*arguments, "--dry-run").stdout)
    reports = json.loads(auto_trans(*arguments, "--verify").stdout)
    for found in (plans, reports):
        assert [one["target"] for one in found] == ["out/base", "out/tuned"]


def test_plan_that_would_fail_is_told_in_the_words_of_the_command(auto_trans, complete, tmp_path):
    (tmp_path / "out" / "rank_0").mkdir(parents=True)
    (tmp_path / "out" / "rank_0" / "mine.ckpt").write_bytes(b"")
    arguments = ["convert", complete, "out", "--dst-strategy", STRATEGY, "--dry-run"]
    assert "(DST)" in auto_trans(*arguments, code=1).stdout
    assert "(DST)" in json.loads(auto_trans(*arguments, "--json", code=1).stdout)["problem"]


def test_messages_name_the_words_of_the_subcommand(auto_trans, complete, sliced, tmp_path):
    def told(*arguments):
        return auto_trans(*arguments, code=1).stderr

    assert "(PATH)" in told("inspect", "nowhere")
    assert "(--weights)" in told("inspect", STRATEGY, "--weights", "nowhere")
    (tmp_path / "file").write_text("")
    assert "(--html)" in told("inspect", STRATEGY, "--html", "file/page.html")
    assert "(OUT)" in told("merge-strategy", STRATEGY, "file/merged.ckpt")
    assert "(--file-suffix)" in told("merge-safetensors", sliced[0], "out", *sliced[1:], "--file-suffix", "7_7")
    assert "(--step)" in told("convert", sliced[0], "out", *sliced[1:], "--step", "7_7")
    assert "(DIR)" in told("verify", "nowhere", "--against", complete)
    assert "(--against)" in told("verify", sliced[0], "--against", "nowhere")
    assert "--memory must be" in told("convert", complete, "out", "--memory", "1")


def test_ranks_of_a_node_are_verified(auto_trans, complete, tmp_path):
    auto_trans("convert", complete, "out", "--dst-strategy", STRATEGY, "--ranks", "1")
    done = auto_trans("verify", "out", code=1)
    assert "the conversion is not finished, 1 file compared with the records" in done.stderr
    assert "1 file of rank 1: every file has its digest" in auto_trans("verify", "out", "--ranks", "1").stdout
    assert "is not on record" in auto_trans("verify", "out", "--ranks", "0-1", code=1).stdout
    against = ["--against", complete, "--dst-strategy", STRATEGY]
    assert "rank_0: is missing" in auto_trans("verify", "out", *against, code=1).stdout
    assert "are equal to the source" in auto_trans("verify", "out", *against, "--ranks", "1").stdout


def test_source_copy_that_differs_is_named_by_verify_and_convert(auto_trans, genuine, tmp_path):
    """dp2: the conversion reads one of the two copies, and both are compared."""
    shutil.copytree(genuine.source("mf_llama", "dp2mp2"), tmp_path / "src")
    (file,) = (tmp_path / "src" / "rank_2").iterdir()
    held = oracle.read_raw(file)
    raw = held["lm_head.weight"]
    file.chmod(0o644)
    file.unlink()
    oracle.write_raw(file, {**held, "lm_head.weight": raw._replace(content=raw.content[:-1] + b"\x7f")})
    strategy = STRATEGIES / "dp2mp2" / "strategy"
    done = auto_trans(
        "convert", "src", "out", "--src-strategy", strategy, "--dst-strategy", STRATEGY, "--verify", code=1
    )
    assert f"parameter lm_head.weight: differs from src/rank_2/{file.name}" in done.stdout


def test_prefixes_add_up_and_one_of_nothing_is_told(auto_trans, sliced, tmp_path):
    flag = "--filter-out-param-prefix"
    done = auto_trans("merge-safetensors", sliced[0], "out", *sliced[1:], flag, "lm_", flag, "adam_", "nothing.")
    names = json.loads((tmp_path / "out" / "param_name_map.json").read_text())
    names = names.get("weight_map", names)
    assert names and not [name for name in names if name.startswith(("lm_", "adam_"))]
    assert "no parameter of the source begins with 'nothing.'" in done.stderr and "'lm_'" not in done.stderr


def test_files_there_already_are_not_more_than_there_are(auto_trans, sliced):
    arguments = ["merge-safetensors", sliced[0], "out", *sliced[1:], "--max-shard-size", "300KB"]
    assert "there already" not in auto_trans(*arguments).stdout
    (line,) = auto_trans(*arguments).stdout.splitlines()
    files, kept = line.rsplit(" in ", 1)[1].split(" files, ")
    assert kept == f"{files} of them there already"


@pytest.fixture
def lora(tmp_path):
    """Complete weights with two LoRA pairs."""
    held = {}
    for layer in range(2):
        held[f"l{layer}.weight"] = oracle.raw(np.ones((4, 4), np.float32))
        held[f"l{layer}.weight_lora_a"] = oracle.raw(np.ones((2, 4), np.float32))
        held[f"l{layer}.weight_lora_b"] = oracle.raw(np.ones((4, 2), np.float32))
    return oracle.write_raw(tmp_path / "tuned.ckpt", held)


def test_merge_lora_tells_what_was_merged(auto_trans, lora):
    done = auto_trans("merge-lora", lora, "out", "--scaling", "16/8")
    assert "2 LoRA weights merged with scaling 2" in done.stdout
    report = json.loads(auto_trans("merge-lora", lora, "other", "--scaling", "0.5", "--json").stdout)
    assert (report["merged"], report["scaling"]) == (["l0.weight", "l1.weight"], 0.5)
    assert report["converted"] == [0]
    assert "--scaling must not be 0" in auto_trans("merge-lora", lora, "zero", "--scaling", "0/8", code=1).stderr


def test_merge_lora_takes_ranks_and_step(auto_trans, lora, tmp_path):
    from strategy_files import strategy_file

    names = [f"l{layer}.weight{end}" for layer in range(2) for end in ("", "_lora_a", "_lora_b")]
    strategy_file(tmp_path / "s_rank_0.ckpt", {name: ([2], [[-1, -1]]) for name in names})
    content = oracle.read_raw(lora)
    for rank in range(2):
        for step in ("1_1", "1_2"):
            oracle.write_raw(tmp_path / "src" / f"rank_{rank}" / f"n_rank_{rank}-{step}.ckpt", content)
    both = ["--src-strategy", "s_rank_0.ckpt", "--dst-strategy", "s_rank_0.ckpt", "--scaling", "1"]
    out = auto_trans("merge-lora", "src", "out", *both, "--ranks", "1", "--step", "1_1").stdout
    assert "1 converted" in out and "of 1 file," in out
    assert [f.name for f in (tmp_path / "out").rglob("*.ckpt")] == ["checkpoint_1.ckpt"]
    assert "(--step)" in auto_trans("merge-lora", "src", "x", *both, "--step", "3_3", code=1).stderr
