"""Checkpoint 2.0 of MindFormers through the real command."""

from __future__ import annotations

import json
import shutil

import oracle
import pytest
from checkpoint2_files import GENUINE

ROOT = GENUINE / "dp2mp2_unique"
ITERATION = ROOT / "iteration_00000007"


@pytest.fixture
def job(genuine):
    """Rank folders, and the flags that tell their strategy and that of the target."""
    weights = genuine.model("mf_llama")
    strategies = ["--src-strategy", weights.strategy("dp2mp2pp2"), "--dst-strategy", weights.strategy("dp2mp2_opt")]
    return [genuine.source("mf_llama", "dp2mp2pp2"), *strategies]


def test_there_and_back_is_the_conversion_itself(auto_trans, job, tmp_path):
    source, *strategies = job
    done = auto_trans("convert", source, "new", *strategies, "--format", "checkpoint2", "--prefix", "llama", "--verify")
    assert "new: 8 converted" in done.stdout and "verified: " in done.stdout
    folder = tmp_path / "new" / "iteration_00000001"
    assert (folder / "llama-opt-0000003-0000004.safetensors").is_file()
    auto_trans("convert", "new", "back", *strategies[2:], "--format", "ckpt", "--verify", "--processes", 2)
    auto_trans("convert", source, "direct", *strategies)
    for rank in range(4):
        file = f"rank_{rank}/checkpoint_{rank}.ckpt"
        got, expected = oracle.read_raw(tmp_path / "back" / file), oracle.read_raw(tmp_path / "direct" / file)
        assert {name: got[name] for name in expected} == expected


def test_metadata_tells_verify_the_strategy(auto_trans, job, tmp_path):
    source, *strategies = job
    auto_trans("convert", source, "new", *strategies, "--format", "checkpoint2")
    assert "are equal to the source" in auto_trans("verify", "new", "--against", source, *strategies[:2]).stdout
    assert "are equal to the source" in auto_trans("verify", "new", "--against", source, *strategies).stdout
    shutil.copytree(ROOT, tmp_path / "copy")
    out = auto_trans("verify", "copy", "--against", ROOT).stdout
    assert "are equal to the source" in out, "redundancy was removed: what a rank lacks another has"


def test_worker_processes_write_the_same(auto_trans, job, tmp_path):
    for processes, folder in ((1, "one"), (3, "three")):
        auto_trans("convert", job[0], folder, *job[1:], "--format", "checkpoint2", "--processes", processes)
    one, three = (
        {file.name: file.read_bytes() for file in (tmp_path / folder / "iteration_00000001").iterdir()}
        for folder in ("one", "three")
    )
    assert one == three and {"metadata.json", "common.json"} < set(one)


def test_finished_one_is_kept(auto_trans, job):
    auto_trans("convert", job[0], "new", *job[1:], "--format", "checkpoint2")
    again = auto_trans("convert", job[0], "new", *job[1:], "--format", "checkpoint2")
    assert "0 converted, 0 linked, 8 reused of 8 files" in again.stdout
    assert "every file has its digest" in auto_trans("verify", "new").stdout


def test_plan_of_it_is_shown_and_nothing_written(auto_trans, job, tmp_path):
    done = auto_trans("convert", job[0], "new", *job[1:], "--format", "checkpoint2", "--dry-run", "--json")
    files = {file["file"].rsplit("/", 1)[-1] for file in json.loads(done.stdout)["files"]}
    assert {"model-0000000-0000004.safetensors", "opt-0000003-0000004.safetensors"} <= files
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("path", [ROOT, ITERATION])
def test_inspect_says_what_it_is(auto_trans, path):
    first = auto_trans("inspect", path).stdout.splitlines()[0]
    assert first.endswith("Checkpoint 2.0 of MindFormers, iteration 7, 4 ranks, 30 of 33 parameters sliced")
    (facts,) = json.loads(auto_trans("inspect", path, "--json", "--param", "*wq*").stdout)
    assert [p["ranks"] for p in facts["parameters"] if p["name"] == "model.layers.0.attention.wq.weight"] == [[2, 3]]
    assert len(facts["files"]) == 8


def test_inspect_of_one_rank(auto_trans):
    first = auto_trans("inspect", GENUINE / "one_rank").stdout.splitlines()[0]
    assert first.endswith("Checkpoint 2.0 of MindFormers, iteration 16, complete")


def test_merged_and_verified_against_it(auto_trans):
    auto_trans("merge-safetensors", ROOT, "merged")
    auto_trans("convert", ITERATION, "whole", "--format", "ckpt")
    assert "are equal to the source" in auto_trans("verify", "whole", "--against", ROOT).stdout


def test_what_differs_from_it_is_found(auto_trans, tmp_path):
    auto_trans("convert", ROOT, "whole", "--format", "ckpt")
    copy = shutil.copytree(ROOT, tmp_path / "copy")
    file = copy / "iteration_00000007" / "tiny-opt-0000003-0000004.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = auto_trans("verify", "whole", "--against", "copy", code=1)
    assert "differs from" in done.stdout and file.name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            [ITERATION / "tiny-model-0000000-0000004.safetensors", "x"],
            "is a file of a Checkpoint 2.0 of MindFormers, one part",
        ),
        ([ROOT, "x", "--step", "1_7"], "has iterations; give the folder of one (SRC) and leave --step out"),
        ([ROOT, "x", "--engine", "mindspore"], "the mindspore engine does not know; use --engine native"),
        ([ROOT, "x", "--format", "checkpoint2", "--ranks", "0"], "is one for all ranks (--format); leave --ranks out"),
        (
            [ROOT, "x", "--format", "checkpoint2", "--engine", "mindspore"],
            "the mindspore engine cannot write a Checkpoint 2.0 (--format)",
        ),
    ],
)
def test_what_cannot_be_is_told_in_the_words_of_the_command(auto_trans, tmp_path, arguments, text):
    done = auto_trans("convert", *arguments, code=1)
    assert text in done.stderr
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").iterdir())


def test_strategy_for_it_is_refused_in_the_words_of_the_command(auto_trans, job):
    done = auto_trans("convert", ROOT, "x", "--src-strategy", job[2], code=1)
    assert "its metadata.json tells how it is sliced; leave the source strategy" in done.stderr
    assert "(--src-strategy)" in done.stderr
