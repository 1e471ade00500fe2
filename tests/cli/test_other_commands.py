"""``auto-trans`` inspect, verify, merge-strategy and doctor through the real command."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import oracle
import pytest
import yaml

from auto_trans import convert, read_strategy

STRATEGIES = oracle.DATA / "mf_llama"


def test_inspect_strategy_with_shapes_and_totals(auto_trans, genuine):
    weights = genuine.source("mf_llama", "dp2mp2_opt")
    out = auto_trans(
        "inspect", STRATEGIES / "dp2mp2_opt" / "strategy", "--weights", weights, "--param", "*layers.0.*w2*"
    ).stdout
    assert "4 ranks in 1 stage" in out
    (row,) = [line for line in out.splitlines() if line.startswith("model.layers.0")]
    assert row.split("  ")[0] == "model.layers.0.feed_forward.w2.weight"
    assert "32 x 88" in row and "64 x 176" in row and "dim 1 over axis 0 (2), optimizer shard 2 on [2, 2]" in row
    heads = out.splitlines()[2]
    assert row.index("dim 1") == heads.index("sliced"), "columns align"
    facts = json.loads(
        auto_trans("inspect", STRATEGIES / "dp2mp2_opt" / "strategy", "--weights", weights, "--json").stdout
    )
    slices = genuine.model("mf_llama").slices("dp2mp2_opt")
    expected = [sum(a.nbytes for n, a in slices[r].items() if a.size > 1) for r in range(4)]
    assert facts["bytes_per_rank"] == expected


def test_inspect_differences(auto_trans):
    a, b = STRATEGIES / "dp1mp2" / "strategy", STRATEGIES / "dp1mp2pp2" / "strategy"
    out = auto_trans("inspect", a, "--diff", b, "--param", "model.layers.3.*w1*").stdout
    assert "dim 0 over axis 0 (2) on [2], stage 1" in out
    assert "no parameter is sliced differently" in auto_trans("inspect", a, "--diff", a).stdout


def test_inspect_checkpoint(auto_trans, genuine, tmp_path):
    out = auto_trans("inspect", genuine.source("mf_llama", "dp1mp2"), "--param", "*layers.1.*wq*").stdout
    assert "model.layers.1.attention.wq.weight" in out and "32 x 64" in out and "0-1" in out
    path = oracle.write_raw(tmp_path / "crc.ckpt", {"w": oracle.raw(np.ones(4))}, crc=True)
    assert "present" in auto_trans("inspect", path).stdout
    assert "right" in auto_trans("inspect", path, "--crc").stdout
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert "wrong" in auto_trans("inspect", path, "--crc", code=1).stdout


def test_inspect_tells_what_is_neither(auto_trans, tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"\xff\xff\xff")
    assert "x.ckpt is not a strategy file" in auto_trans("inspect", "x.ckpt", code=1).stderr
    assert "nowhere is not found" in auto_trans("inspect", "nowhere", code=1).stderr


@pytest.fixture
def converted(genuine, tmp_path):
    """A converted folder, and the arguments that name its source."""
    weights = genuine.model("mf_llama")
    source = genuine.source("mf_llama", "dp2mp2pp2")
    sides = weights.strategy("dp2mp2pp2"), weights.strategy("dp2mp2_opt")
    convert(source, tmp_path / "out", *sides)
    return tmp_path / "out", ["--against", source, "--src-strategy", sides[0], "--dst-strategy", sides[1]]


def damage(path, name):
    """Changes one byte of a parameter."""
    from auto_trans.storage.formats import scan

    offset, nbytes = scan(path).tensors[name].segments[0]
    content = bytearray(path.read_bytes())
    content[offset + nbytes - 1] ^= 1
    path.write_bytes(content)


def test_verify_digests(auto_trans, converted):
    folder, _ = converted
    assert "every file has its digest" in auto_trans("verify", folder).stdout
    damage(folder / "rank_2" / "checkpoint_2.ckpt", "lm_head.weight")
    (folder / "rank_1" / "checkpoint_1.ckpt").unlink()
    out = auto_trans("verify", folder, code=1).stdout
    assert "rank 1" in out and "is missing" in out
    assert "rank 2" in out and "differs from its digest" in out


def test_verify_against_the_source_names_what_differs(auto_trans, converted):
    folder, against = converted
    assert "are equal to the source" in auto_trans("verify", folder, *against).stdout
    damage(folder / "rank_3" / "checkpoint_3.ckpt", "model.layers.2.attention.wo.weight")
    done = auto_trans("verify", folder, *against, "--json", code=1)
    (difference,) = json.loads(done.stdout)
    assert difference["rank"] == 3 and difference["parameter"] == "model.layers.2.attention.wo.weight"
    assert difference["file"].endswith("checkpoint_3.ckpt")


def test_verify_notices_a_wrong_target_strategy(auto_trans, converted):
    folder, against = converted
    against = [*against[:-1], STRATEGIES / "dp4mp2" / "strategy"]
    out = auto_trans("verify", folder, *against, code=1).stdout
    assert "as a whole, but" in out or "is missing" in out


def test_verify_without_manifest(auto_trans, converted):
    folder, _ = converted
    (folder / "auto_trans_manifest.json").unlink()
    assert "(--against)" in auto_trans("verify", folder, code=1).stderr


def test_merge_strategy_of_two_nodes(auto_trans, tmp_path):
    """Each node has the strategy files of its own ranks; gathered they are one job."""
    source = STRATEGIES / "dp2mp2pp2" / "strategy"
    (tmp_path / "all").mkdir()
    for rank in range(4):
        shutil.copy(source / f"ckpt_strategy_rank_{rank}.ckpt", tmp_path / "all")
    assert read_strategy(tmp_path / "all").world_size == 4
    done = auto_trans("merge-strategy", "all", "half/m.ckpt")
    assert "stage 0; the files do not tell whether there are more" in done.stdout
    assert "lists accu_grads" in done.stderr and "gather the strategy files of all nodes" in done.stderr
    for rank in range(4, 8):
        shutil.copy(source / f"ckpt_strategy_rank_{rank}.ckpt", tmp_path / "all")
    out = auto_trans("merge-strategy", "all", "merged.ckpt").stdout
    assert "merged.ckpt: 8 ranks in 2 stages" in out
    assert "stages 0 to 1; the files do not tell whether there are more" in out and "not there" not in out
    (tmp_path / "all" / "ckpt_strategy_rank_6.ckpt").unlink()
    out = auto_trans("merge-strategy", "all", "merged.ckpt").stdout
    assert "the files of 1 of 8 ranks are not there (rank 6 is the first)" in out
    assert read_strategy(tmp_path / "merged.ckpt").layouts == read_strategy(source).layouts
    assert "holds no" in auto_trans("merge-strategy", tmp_path, code=1).stderr


@pytest.mark.mindspore
def test_doctor_of_the_environment(auto_trans):
    out = auto_trans("doctor").stdout
    assert "ok       the hook is active in this environment" in out
    assert "ok       MindFormers 1.7.0 with MindSpore 2.7.1: tested" in out
    out = auto_trans("doctor", env={**os.environ, "AUTO_TRANS_DISABLE": "1"}).stdout
    assert "warning  the hook is turned off by AUTO_TRANS_DISABLE" in out and "-> unset it" in out


@pytest.fixture
def job(genuine, tmp_path):
    settings = {
        "auto_trans_ckpt": True,
        "use_parallel": True,
        "output_dir": str(tmp_path / "output"),
        "load_checkpoint": str(genuine.source("mf_llama", "dp2mp2pp2")),
        "src_strategy_path_or_dir": str(STRATEGIES / "dp2mp2pp2" / "strategy"),
        "transform_process_num": 2,
        "parallel_config": {"data_parallel": 2, "model_parallel": 4, "pipeline_stage": 1},
    }

    def write(**changes):
        (tmp_path / "job.yaml").write_text(yaml.safe_dump({**settings, **changes}))
        return "job.yaml"

    return write


def test_doctor_of_a_job_that_is_ready(auto_trans, job):
    out = auto_trans("doctor", job()).stdout
    assert "error" not in out
    assert "ok       the settings are valid" in out
    assert "source strategy: 8 ranks in 2 stages" in out
    assert "8 files readable and complete" in out
    assert "exclude other processes" in out and "is seen whole after" in out
    assert "rank 4     4-7" in out, "the election table"
    assert "2 converters of 64.0 MiB of memory each" in out and "2 of 8 ranks will convert" in out


def test_doctor_of_a_job_that_loads_directly(auto_trans, job):
    out = auto_trans("doctor", job(auto_trans={"load": "direct"})).stdout
    assert "of weights are read, and none are written" in out and "converters of" not in out
    assert "8 ranks will load straight from the source, and nothing will be converted" in out


def test_doctor_of_an_output_that_is_a_file(auto_trans, job, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    out = auto_trans("doctor", job(output_dir=str(tmp_path / "file")), code=1)
    assert "file cannot be used" in out.stdout + out.stderr and "Traceback" not in out.stderr


def test_doctor_leaves_nothing_behind(auto_trans, job, tmp_path):
    config = job(output_dir=str(tmp_path / "deep" / "output"))
    before = sorted(tmp_path.rglob("*"))
    out = auto_trans("doctor", config).stdout
    assert sorted(tmp_path.rglob("*")) == before
    assert f"{tmp_path / 'deep' / 'output'} is not there yet; what follows is tried in {tmp_path}" in out


def test_doctor_says_where_the_number_of_ranks_contradicts_the_yaml(auto_trans, job):
    told = "warning  the job is to have 16 ranks, but its YAML makes 8"
    assert told in auto_trans("doctor", job(), "--world-size", 16).stdout
    assert "its YAML makes" not in auto_trans("doctor", job(), "--world-size", 8).stdout
    assert "makes 1" in auto_trans("doctor", job(use_parallel=False), "--world-size", 8).stdout
    out = auto_trans("doctor", job(parallel_config=None)).stdout
    assert "does not tell the number of ranks" in out and "will convert" not in out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"load_checkpoint": "/nowhere"}, "/nowhere is not found"),
        ({"src_strategy_path_or_dir": str(STRATEGIES / "dp2mp2" / "strategy")}, "8 rank folders"),
        ({"src_strategy_path_or_dir": None}, "no source strategy is given"),
        ({"transform_process_num": 3}, "set it to one of 1, 2, 4, 8"),
        ({"transform_process_num": "two"}, "must be a whole number"),
        ({"output_dir": "/proc/none"}, "/proc/none"),
        ({"auto_trans": {"load": "directly"}}, "auto_trans: {load: ...} must be one of files, direct, not 'directly'"),
        ({"auto_trans": {"load": "direct", "engine": "mindspore"}}, "goes with auto_trans: {engine: ...} native only"),
        ({"auto_trans": {"load": "direct", "unify": True}}, "leave auto_trans: {unify: True} out"),
        ({"auto_trans": {"memory": "1GiB"}}, "auto_trans has no setting memory; it has engine, load"),
        ({"use_parallel": "maybe"}, "use_parallel must be True or False, not 'maybe'"),
        ({"npu_num_per_node": True}, "npu_num_per_node must be a power of 2, not True"),
        ({"parallel_config": {"data_parallel": "two"}}, "data_parallel must be a whole number of at least 1"),
    ],
)
def test_doctor_of_a_job_that_would_fail(auto_trans, job, changes, message):
    out = auto_trans("doctor", job(**changes), code=1).stdout
    assert "error" in out and message in out and "will convert" not in out
    invalid = changes.keys() & {"auto_trans", "use_parallel", "npu_num_per_node", "parallel_config"}
    assert not (invalid and "the settings are valid" in out)


def test_doctor_of_a_yaml_that_is_none(auto_trans, tmp_path):
    (tmp_path / "x.yaml").write_text("- 1\n- 2\n")
    assert "holds no settings" in auto_trans("doctor", "x.yaml", code=1).stdout
