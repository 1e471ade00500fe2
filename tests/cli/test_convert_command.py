"""``auto-trans convert`` through the real command."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time

import numpy as np
import oracle
import pytest

from auto_trans.cli.parsers import parse_ranks
from auto_trans.errors import ConfigError
from auto_trans.storage.manifest import MANIFEST_NAME

SOURCE, TARGET = "dp2mp2pp2", "dp2mp2_opt"


@pytest.fixture
def sides(genuine):
    weights = genuine.model("mf_llama")
    strategies = ["--src-strategy", weights.strategy(SOURCE), "--dst-strategy", weights.strategy(TARGET)]
    return [genuine.source("mf_llama", SOURCE), *strategies]


def command(auto_trans, sides, dst, *more, **options):
    return auto_trans("convert", sides[0], dst, *sides[1:], *more, **options)


def content(folder, suffix="ckpt"):
    return {f.parent.name: f.read_bytes() for f in sorted(folder.rglob(f"*.{suffix}"))}


def test_plain(auto_trans, sides, tmp_path):
    done = command(auto_trans, sides, "out")
    assert "out: 4 converted, 0 linked, 0 reused of 4 files" in done.stdout
    assert "carried over as they are, in no strategy: global_step, scale_sense" in done.stderr
    assert len(content(tmp_path / "out")) == 4


def test_processes_give_the_same_files(auto_trans, sides, tmp_path):
    command(auto_trans, sides, "one")
    done = command(auto_trans, sides, "three", "--processes", 3, "--quiet")
    assert "4 converted" in done.stdout and not done.stderr
    assert content(tmp_path / "one") == content(tmp_path / "three")
    assert (tmp_path / "three" / MANIFEST_NAME).exists()


def test_replicas_are_linked_by_workers_too(auto_trans, genuine, tmp_path):
    strategy = genuine.model("mf_llama").strategy("dp4mp2")
    done = auto_trans("convert", genuine.complete("mf_llama"), "out", "--dst-strategy", strategy, "--processes", 2)
    assert "2 converted, 6 linked" in done.stdout
    assert len({f.stat().st_ino for f in (tmp_path / "out").rglob("*.ckpt")}) == 2


def test_ranks_of_two_nodes_without_a_shared_disk(auto_trans, genuine, tmp_path):
    """Every node converts its own ranks from the complete file; together they are what one node makes of all."""
    strategy = genuine.model("mf_llama").strategy("dp2mp2pp2")
    for name, ranks in (("node0", "0-3"), ("node1", "4-7"), ("all", "0-7")):
        auto_trans("convert", genuine.complete("mf_llama"), name, "--dst-strategy", strategy, "--ranks", ranks)
    assert {**content(tmp_path / "node0"), **content(tmp_path / "node1")} == content(tmp_path / "all")
    assert not (tmp_path / "node0" / MANIFEST_NAME).exists()


@pytest.mark.parametrize("first", ["ckpt", "safetensors"])
def test_formats(auto_trans, sides, tmp_path, first):
    command(auto_trans, sides, "a", "--format", first)
    assert len(content(tmp_path / "a", first)) == 4
    auto_trans(
        "convert", "a", "b", "--src-strategy", sides[4], "--dst-strategy", sides[4], "--format", "ckpt", "--verify"
    )
    command(auto_trans, sides, "c")
    for rank in range(4):
        name = f"rank_{rank}/checkpoint_{rank}.ckpt"
        assert oracle.read_raw(tmp_path / "b" / name) == oracle.read_raw(tmp_path / "c" / name)


def test_verify_after_conversion(auto_trans, sides):
    assert "verified: 2.5 MiB equal to the source" in command(auto_trans, sides, "out", "--verify").stdout


def test_dry_run_shows_the_plan_and_does_nothing(auto_trans, sides, tmp_path):
    out = command(auto_trans, sides, "out", "--dry-run").stdout
    assert "target ranks" in out and "0, 4" in out and "free there" in out
    assert not (tmp_path / "out").exists()
    plan = json.loads(command(auto_trans, sides, "out", "--dry-run", "--json").stdout)
    command(auto_trans, sides, "out")
    written = {tuple(f["ranks"]): f["bytes"] for f in plan["files"]}
    assert written == {(r,): (tmp_path / "out" / f"rank_{r}" / f"checkpoint_{r}.ckpt").stat().st_size for r in range(4)}
    assert plan["bytes_written"] == sum(written.values())
    again = json.loads(command(auto_trans, sides, "out", "--dry-run", "--json").stdout)
    assert again["bytes_written"] == 0 and all(f["reused"] for f in again["files"])


def test_dry_run_tells_what_transform_process_num_brings(auto_trans, genuine):
    """dp4 mp2: two distinct files, needed by four ranks each."""
    arguments = ["convert", genuine.complete("mf_llama"), "out", "--dry-run"]
    arguments += ["--dst-strategy", genuine.model("mf_llama").strategy("dp4mp2")]
    out = auto_trans(*arguments).stdout
    assert "transform_process_num" in out and "more than 2 would not be faster" in out
    plan = json.loads(auto_trans(*arguments, "--json").stdout)
    advice = plan["transform_process_num"]
    assert [entry["transform_process_num"] for entry in advice] == [1, 2, 4, 8]
    assert [entry["writing"] for entry in advice] == [1, 2, 2, 2]
    assert len({entry["all_write"] for entry in advice}) == 1
    assert advice[1]["busiest_writes"] == advice[3]["busiest_writes"] == advice[0]["all_write"] / 2
    assert advice[0]["busiest_reads"] == plan["bytes_read"] < advice[0]["all_write"]
    assert "transform_process_num" not in auto_trans(*arguments, "--ranks", "0-1").stdout


def test_dry_run_tells_what_a_direct_load_reads(auto_trans, genuine):
    """dp4 mp2: two distinct slices; a node of two ranks reads both, one of one rank only its own."""
    arguments = ["convert", genuine.complete("mf_llama"), "out", "--dry-run"]
    arguments += ["--dst-strategy", genuine.model("mf_llama").strategy("dp4mp2"), "--npu-num-per-node"]
    assert "load: direct}, which writes nothing (tensors, 2 devices a node)" in auto_trans(*arguments, "2").stdout
    one, two = (json.loads(auto_trans(*arguments, number, "--json").stdout) for number in ("1", "2"))
    assert one["direct"]["rank"] == one["direct"]["node"] == two["direct"]["rank"] < two["direct"]["node"]
    assert two["direct"]["node"] == one["bytes_read"] and two["direct"]["nodes"] == 4 * one["bytes_read"]
    assert one["direct"]["ranks"] == one["direct"]["nodes"] == 8 * one["direct"]["rank"]
    refused = auto_trans(*arguments, "3", code=1)
    assert "npu_num_per_node must be a power of 2, but got 3" in refused.stderr


def test_dry_run_writes_nothing_unless_asked_to_measure(auto_trans, sides, tmp_path):
    before = sorted(tmp_path.rglob("*")), tmp_path.stat().st_mtime_ns
    done = command(auto_trans, sides, "out", "--dry-run")
    assert "not measured; --measure writes 32 MiB beside DST" in done.stdout
    assert (sorted(tmp_path.rglob("*")), tmp_path.stat().st_mtime_ns) == before, (
        "nothing was made, not even for a moment"
    )
    assert "by a short measured copy" in command(auto_trans, sides, "out", "--dry-run", "--measure").stdout
    assert sorted(tmp_path.rglob("*")) == before[0]


def test_dry_run_fails_where_the_run_would(auto_trans, sides, tmp_path):
    (tmp_path / "out" / "rank_0").mkdir(parents=True)
    (tmp_path / "out" / "rank_0" / "mine.ckpt").write_bytes(b"precious")
    assert "it could not succeed" in command(auto_trans, sides, "out", "--dry-run", code=1).stdout
    assert "mine.ckpt is there already" in command(auto_trans, sides, "out", code=1).stderr


def test_reuse_and_no_reuse(auto_trans, sides):
    command(auto_trans, sides, "out")
    assert "0 converted, 0 linked, 4 reused" in command(auto_trans, sides, "out").stdout
    assert "4 converted" in command(auto_trans, sides, "out", "--no-reuse").stdout


def test_step(auto_trans, tmp_path):
    for rank in (0, 1):
        for step in ("1_9", "1_10"):
            raws = {"w": oracle.raw(np.full(2, int(step[2:]), np.int32))}
            oracle.write_raw(tmp_path / "src" / f"rank_{rank}" / f"n_rank_{rank}-{step}.ckpt", raws)
    from strategy_files import strategy_file

    strategy_file(tmp_path / "s_rank_0.ckpt", {"w": ([2], [[0]])})
    for arguments, value in (((), 10), (("--step", "1_9"), 9)):
        auto_trans("convert", "src", f"out{value}", "--src-strategy", "s_rank_0.ckpt", *arguments)
        got = oracle.read_raw(tmp_path / f"out{value}" / "rank_0" / "checkpoint_0.ckpt")["w"]
        assert np.frombuffer(got.content, np.int32).tolist() == [value] * 4
    assert (
        "holds no file of step 3_3"
        in auto_trans("convert", "src", "x", "--src-strategy", "s_rank_0.ckpt", "--step", "3_3", code=1).stderr
    )


def test_folder_of_complete_files_gets_a_folder_for_each(auto_trans, genuine, tmp_path):
    (tmp_path / "src").mkdir()
    for name in ("base", "lora"):
        shutil.copy(genuine.complete("mf_llama"), tmp_path / "src" / f"{name}.ckpt")
    auto_trans("convert", "src", "out", "--dst-strategy", genuine.model("mf_llama").strategy("dp1mp2"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["base", "lora"]
    assert (tmp_path / "out" / "lora" / "rank_1" / "checkpoint_1.ckpt").exists()


def test_json_report(auto_trans, sides):
    done = command(auto_trans, sides, "out", "--json")
    report = json.loads(done.stdout)
    assert report["converted"] == [0, 1, 2, 3] and len(report["files"]) == 4 and not done.stderr


@pytest.mark.parametrize(
    "more, message",
    [
        (["--ranks", "0-9"], "not in the target, which has ranks 0 to 3"),
        (["--ranks", "a"], "--ranks must be a list such as 0-7,12"),
        (["--processes", "0"], "--processes must be at least 1"),
        (["--memory", "much"], "--memory must be a size"),
        (["--src-strategy", "/nowhere"], "/nowhere is not found"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(auto_trans, sides, more, message):
    done = command(auto_trans, sides, "out", *more, code=1)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in auto_trans("--debug", "convert", sides[0], "out", *sides[1:], *more, code=1).stderr


def test_prefix_and_memory(auto_trans, sides, tmp_path):
    command(auto_trans, sides, "out", "--prefix", "net_", "--memory", "1MiB")
    command(auto_trans, sides, "plain")
    assert [f.name for f in sorted((tmp_path / "out").rglob("*.ckpt"))] == [f"net_{r}.ckpt" for r in range(4)]
    assert content(tmp_path / "out") == content(tmp_path / "plain")


def test_destination_that_cannot_be_written(auto_trans, sides, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = command(auto_trans, sides, "file/out", code=1)
    assert "set an output directory that is writable" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_wrong_usage_is_code_2(auto_trans):
    auto_trans("convert", "only_one", code=2)
    auto_trans("unknown", code=2)
    auto_trans("convert", "a", "b", "--format", "npz", code=2)


@pytest.mark.parametrize(
    "command", ["convert", "inspect", "verify", "merge-strategy", "merge-lora", "merge-safetensors", "doctor"]
)
def test_help_has_examples(auto_trans, command):
    out = auto_trans(command, "--help").stdout
    assert "examples:" in out and f"auto-trans {command}" in out


@pytest.mark.slow
def test_interrupt_leaves_what_can_be_resumed(auto_trans, bin_folder, tmp_path):
    from builders import large_source
    from strategy_files import strategy_file

    large_source(tmp_path, mib=1200)
    strategy_file(tmp_path / "s_rank_0.ckpt", {f"w{i}": ([8], [[0, -1]]) for i in range(8)})
    arguments = ["convert", tmp_path / "large.ckpt", "out", "--dst-strategy", tmp_path / "s_rank_0.ckpt"]
    process = subprocess.Popen(
        [str(bin_folder / "auto-trans"), *map(str, arguments)], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        # a shell has what it starts in the background, and all its children, ignore the interrupt
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not list(tmp_path.glob("out/.auto_trans_records/*.json")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, "a shell ends its loop"
    assert "start it again to go on where it stopped" in stderr
    assert not list(tmp_path.glob("out/**/*.tmp")), "nothing half-written is left"
    out = auto_trans(*arguments).stdout
    assert "8 files" in out and "0 reused" not in out


@pytest.mark.parametrize("text, ranks", [(None, None), ("3", (3,)), ("0-2,12", (0, 1, 2, 12)), (" 1 , 4-4", (1, 4))])
def test_rank_lists(text, ranks):
    assert parse_ranks(text) == ranks


@pytest.mark.parametrize("text", ["", "1-", "3-1", "x", "1,,2"])
def test_wrong_rank_lists(text):
    with pytest.raises(ConfigError, match="ranks must be a list"):
        parse_ranks(text)
