"""The strategy of one pipeline stage, given for the whole model: every door refuses it, and nothing is written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest

import auto_trans
from auto_trans import convert, merge_strategies
from auto_trans.errors import PlanError
from auto_trans.merge_lora import merge_lora

PIPELINE = oracle.DATA / "mf_llama" / "dp2mp2pp2" / "strategy"
TOOLS = Path(auto_trans.__file__).parent / "tools"
REFUSED = r"does not list parameter model\.layers\.2\..*describes stage 0 only"


@pytest.fixture
def one_file():
    return PIPELINE / "ckpt_strategy_rank_0.ckpt"


@pytest.fixture
def one_node(tmp_path):
    """The strategy folder of the first of two nodes that share no disk."""
    folder = tmp_path / "node0"
    folder.mkdir()
    for rank in range(4):
        shutil.copy(PIPELINE / f"ckpt_strategy_rank_{rank}.ckpt", folder)
    return folder


@pytest.fixture(params=["one_file", "one_node", "merged"])
def stage(request, tmp_path):
    """One stage of two, in each of the ways in which a strategy is given."""
    if request.param == "merged":
        return merge_strategies(request.getfixturevalue("one_node"), tmp_path / "merged.ckpt")
    return request.getfixturevalue(request.param)


def run(*command, code=1):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr


def test_library(genuine, tmp_path, stage):
    with pytest.raises(PlanError, match=REFUSED):
        convert(genuine.complete("mf_llama"), tmp_path / "out", None, stage)
    assert not (tmp_path / "out").exists()


def test_command(genuine, tmp_path, stage, bin_folder):
    command = [
        bin_folder / "auto-trans",
        "convert",
        genuine.complete("mf_llama"),
        tmp_path / "out",
        "--dst-strategy",
        stage,
    ]
    error = run(*command)
    assert (
        "does not list parameter model.layers.2." in error
        and "--allow-extra GLOB" in error
        and "--dst-strategy" in error
    )
    assert not (tmp_path / "out").exists()
    run(*command, "--allow-extra", "*", code=0)


def test_drop_in_script(genuine, tmp_path, stage):
    error = run(
        sys.executable, TOOLS / "transform_checkpoint.py", "--src_checkpoint", genuine.complete("mf_llama"),
        "--dst_checkpoint", tmp_path / "out", "--dst_strategy", stage,
    )  # fmt: skip
    assert "does not list parameter model.layers.2." in error and "--dst_strategy" in error and "--allow_extra" in error
    assert not (tmp_path / "out").exists()


def test_lora_merge(genuine, tmp_path, stage):
    held = oracle.read_raw(genuine.complete("mf_llama"))
    base = "model.layers.0.attention.wq"
    rows, columns = held[f"{base}.weight"].dims
    held[f"{base}.mindpet_delta_lora_a"] = oracle.raw(np.ones((2, columns), np.float32))
    held[f"{base}.mindpet_delta_lora_b"] = oracle.raw(np.ones((rows, 2), np.float32))
    tuned = oracle.write_raw(tmp_path / "tuned.ckpt", held)
    with pytest.raises(PlanError, match=REFUSED):
        merge_lora(tuned, tmp_path / "out", None, stage, scaling=2)
    assert not (tmp_path / "out").exists()


def test_verification_does_not_call_it_equal(genuine, tmp_path, stage, bin_folder):
    convert(genuine.complete("mf_llama"), tmp_path / "out", None, stage, allow_extra=["*"])
    command = [bin_folder / "auto-trans", "verify", tmp_path / "out", "--against", genuine.complete("mf_llama")]
    assert "does not list parameter model.layers.2." in run(*command, "--dst-strategy", stage)


def test_source_whose_other_stages_lie_elsewhere(genuine, tmp_path, one_node):
    """The rank folders and strategy files of one node, for a job that lists all layers."""
    held = genuine.model("mf_llama").slices("dp2mp2pp2")
    source = oracle.save_genuine(tmp_path / "src", {r: held[r] for r in range(4)}, genuine.model("mf_llama").dtypes)
    with pytest.raises(
        PlanError, match=r"lacks parameter model\.layers\.2\.\S+, .*though it holds the same parameter of other"
    ):
        convert(source, tmp_path / "out", one_node, genuine.model("mf_llama").strategy("dp2mp2"))


def test_source_of_a_complete_target_is_at_least_said(genuine, tmp_path, one_node, caplog):
    """Nothing in these files tells that there is more: only the accumulated gradients hint at it."""
    held = genuine.model("mf_llama").slices("dp2mp2pp2")
    source = oracle.save_genuine(tmp_path / "src", {r: held[r] for r in range(4)}, genuine.model("mf_llama").dtypes)
    convert(source, tmp_path / "out", one_node)
    assert "lists accumulated gradients, as pipeline jobs do, but describes one stage only" in caplog.text
