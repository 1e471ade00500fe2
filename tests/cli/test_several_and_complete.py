"""Folders of several complete checkpoints, and complete weights where slices are expected, in inspect and verify."""

from __future__ import annotations

import json
import shutil

import oracle
import pytest

STRATEGIES = oracle.DATA / "mf_llama"


@pytest.fixture
def several(auto_trans, genuine, tmp_path):
    """Two complete checkpoints, each converted to a folder of its name."""
    (tmp_path / "src").mkdir()
    for name in ("base", "tuned"):
        shutil.copy(genuine.complete("mf_llama"), tmp_path / "src" / f"{name}.ckpt")
    auto_trans("convert", "src", "out", "--dst-strategy", STRATEGIES / "dp1mp2" / "strategy")
    return tmp_path / "out"


def damage(file):
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.chmod(0o644)
    file.unlink()
    file.write_bytes(content)


def test_verify_of_several_complete_checkpoints(auto_trans, several):
    against = ["--against", "src", "--dst-strategy", STRATEGIES / "dp1mp2" / "strategy"]
    assert "every file has its digest" in auto_trans("verify", "out").stdout
    assert "are equal to the source" in auto_trans("verify", "out", *against).stdout
    damage(several / "tuned" / "rank_1" / "checkpoint_1.ckpt")
    for arguments in ([], against):
        found = auto_trans("verify", "out", *arguments, code=1).stdout
        assert "rank 1" in found and "tuned/rank_1/checkpoint_1.ckpt" in found and "base" not in found


def test_verify_asks_for_one_of_several_complete_targets(auto_trans, genuine, tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    for name in ("a", "b"):
        shutil.copy(genuine.complete("mf_llama"), folder / f"{name}.ckpt")
    error = auto_trans("verify", "made", "--against", genuine.complete("mf_llama"), code=1).stderr
    assert "holds 2 complete checkpoints (a.ckpt, b.ckpt" in error and "Traceback" not in error
    assert "are equal" in auto_trans("verify", "made/a.ckpt", "--against", genuine.complete("mf_llama")).stdout


def test_inspect_of_a_strategy_with_complete_weights_slices_them(auto_trans, genuine):
    """The shapes of complete weights are those of the whole, not of a slice."""
    arguments = ["inspect", STRATEGIES / "dp2mp2_opt" / "strategy", "--json", "--weights"]
    complete = json.loads(auto_trans(*arguments, genuine.complete("mf_llama")).stdout)
    sliced = json.loads(auto_trans(*arguments, genuine.source("mf_llama", "dp2mp2_opt")).stdout)
    assert complete == sliced
    (wq,) = [p for p in complete["parameters"] if p["name"] == "model.layers.0.attention.wq.weight"]
    assert (wq["shape"], wq["full_shape"]) == ([16, 64], [64, 64])


@pytest.mark.parametrize("case, message", [("dp4mp2", "holds only 4 of the 8 ranks"), ("dp1mp2", "describes 2 ranks")])
def test_inspect_with_weights_of_another_number_of_ranks_is_told(auto_trans, genuine, case, message):
    """dp2mp2's four rank folders beside a strategy of eight ranks, of which half may lie elsewhere, and of two."""
    weights = genuine.source("mf_llama", "dp2mp2")
    code = 1 if case == "dp1mp2" else 0
    done = auto_trans("inspect", STRATEGIES / case / "strategy", "--weights", weights, code=code)
    assert message in done.stderr + done.stdout


def test_inspect_with_weights_of_another_slicing_or_model_is_refused(auto_trans, genuine):
    strategy = STRATEGIES / "dp2mp2_opt" / "strategy"
    error = auto_trans("inspect", strategy, "--weights", genuine.source("mf_llama", "dp2mp2"), code=1).stderr
    assert "contradict each other" in error
    error = auto_trans("inspect", strategy, "--weights", genuine.complete("toy_moe"), code=1).stderr
    assert "holds no parameter that the strategy" in error


def test_output_cut_short_by_its_reader_is_no_failure(bin_folder):
    import subprocess

    shell = f"set -o pipefail; {bin_folder}/auto-trans inspect {STRATEGIES}/dp4mp2/strategy | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert "8 ranks" in done.stdout and "Traceback" not in done.stderr
