"""One rank's file given as complete weights is told from a data parallel job's, which is complete."""

from __future__ import annotations

import shutil

import numpy as np
import oracle
import pytest

from auto_trans import convert
from auto_trans.errors import ConfigError


@pytest.mark.parametrize("case", ["dp1mp2", "dp2mp1_opt", "dp1mp2pp2"])
def test_slice_given_as_complete_weights_is_refused(genuine, tmp_path, case):
    source = genuine.source("mf_llama", case)
    (file,) = (source / "rank_0").iterdir()
    for src in (file, source / "rank_0"):
        with pytest.raises(
            ConfigError, match=r"is given as complete weights, but is one rank's slice: parameter model\."
        ):
            convert(src, tmp_path / "out", None, genuine.model("mf_llama").strategy("dp2mp2"))
    assert not (tmp_path / "out").exists()


def test_any_rank_of_a_data_parallel_job_is_complete(genuine, tmp_path):
    source = genuine.source("mf_llama", "dp2mp1")
    (file,) = (source / "rank_0").iterdir()
    convert(file, tmp_path / "out", None, genuine.model("mf_llama").strategy("dp1mp2"))
    assert (tmp_path / "out" / "rank_1" / "checkpoint_1.ckpt").exists()


def test_lone_rank_folder_and_other_steps_tell_nothing(genuine, tmp_path):
    shutil.copytree(genuine.source("mf_llama", "dp1mp1") / "rank_0", tmp_path / "src" / "rank_0")
    (file,) = (tmp_path / "src" / "rank_0").iterdir()
    convert(file, tmp_path / "a")
    for name in ("x-1_2.ckpt", "x-1_3.ckpt"):
        oracle.write_raw(tmp_path / "src" / "rank_1" / name, {"w": oracle.Raw("Int8", (1,), b"x")})
    convert(file, tmp_path / "b")


def test_slice_of_experts_in_a_late_layer_is_noticed(tmp_path):
    """All that comes before them every rank holds whole."""
    dense = {f"layers.{n}.w{k}.weight": oracle.raw(np.full((4, 4), n)) for n in range(6) for k in range(5)}
    for rank in range(2):
        held = {**dense, "layers.6.experts.w1": oracle.raw(np.full((2, 4, 4), rank))}
        oracle.write_raw(tmp_path / f"rank_{rank}" / f"x_rank_{rank}-1_1.ckpt", held)
    with pytest.raises(ConfigError, match=r"parameter layers\.6\.experts\.w1 differs"):
        convert(tmp_path / "rank_0" / "x_rank_0-1_1.ckpt", tmp_path / "out")


def test_another_model_beside_it_tells_nothing(tmp_path):
    oracle.write_raw(tmp_path / "rank_0" / "llama.ckpt", {"llama.weight": oracle.raw(np.ones((2, 2)))})
    oracle.write_raw(tmp_path / "rank_1" / "qwen.ckpt", {"qwen.weight": oracle.raw(np.ones((2, 2)))})
    convert(tmp_path / "rank_0" / "llama.ckpt", tmp_path / "out")
