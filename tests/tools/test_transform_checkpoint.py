"""The drop-in scripts, by their documented names and flags, as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from strategy_files import strategy_file

import auto_trans

TOOLS = Path(auto_trans.__file__).parent / "tools"
HIDDEN, LAYERS, VOCABULARY = 32, 4, 64


def gpt2_weights():
    """A GPT2-like model: fused qkv, biases, and a position table."""
    rng = np.random.default_rng(5)
    shapes = {"backbone.embedding.word": (VOCABULARY, HIDDEN), "backbone.embedding.position": (16, HIDDEN)}
    for i in range(LAYERS):
        block = f"backbone.blocks.{i}"
        shapes[f"{block}.attention.qkv.weight"] = (3 * HIDDEN, HIDDEN)
        shapes[f"{block}.attention.qkv.bias"] = (3 * HIDDEN,)
        shapes[f"{block}.attention.projection.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{block}.output.mapping.weight"] = (4 * HIDDEN, HIDDEN)
        shapes[f"{block}.output.projection.weight"] = (HIDDEN, 4 * HIDDEN)
        shapes[f"{block}.layernorm.gamma"] = (HIDDEN,)
    shapes["head.weight"] = (VOCABULARY, HIDDEN)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def gpt2_strategy(folder, dp, mp, pp):
    """Strategy files of every rank; blocks are spread evenly over the stages."""
    for stage in range(pp):
        layouts = {}
        for name, array in gpt2_weights().items():
            block = int(name.split(".")[2]) if "blocks" in name else (LAYERS - 1 if name == "head.weight" else 0)
            if block * pp // LAYERS == stage:
                sliced = 0 if "qkv" in name or "mapping" in name else 1 if "projection" in name else None
                layouts[name] = ([dp, mp], [[0 if dim == sliced else -1 for dim in range(array.ndim)]])
        for rank in range(stage * dp * mp, (stage + 1) * dp * mp):
            strategy_file(folder / f"ckpt_strategy_rank_{rank}.ckpt", layouts, stage)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    oracle.write_raw(folder / "gpt2.ckpt", {name: oracle.raw(array) for name, array in gpt2_weights().items()})
    gpt2_strategy(folder / "dp2mp2pp2", 2, 2, 2)
    gpt2_strategy(folder / "mp2pp2", 1, 2, 2)
    return folder


def python(*arguments, code=0, module=False):
    script = ["-m", "auto_trans.tools.transform_checkpoint"] if module else [str(TOOLS / "transform_checkpoint.py")]
    command = [sys.executable, *script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def bash(*arguments, code=0):
    environ = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(TOOLS / "transform_checkpoint.sh"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.ckpt"))}


def test_there_and_back_by_one_process_and_by_two(gpt2, tmp_path):
    """Complete -> 8 (dp2 mp2 pp2) -> 4 (mp2 pp2) -> complete; the processes of the shell script change nothing."""
    eight, four = gpt2 / "dp2mp2pp2", gpt2 / "mp2pp2"
    done = python("--src_checkpoint", gpt2 / "gpt2.ckpt", "--dst_checkpoint", tmp_path / "one", "--dst_strategy", eight)
    assert done.stdout.splitlines()[-1] == f"load_checkpoint: {tmp_path / 'one' / 'gpt2'}"
    done = bash(gpt2 / "gpt2.ckpt", "None", tmp_path / "two", eight, 8, 2)
    assert done.stdout.splitlines()[-1] == f"load_checkpoint: {tmp_path / 'two' / 'gpt2'}"
    assert sorted(p.name for p in (tmp_path / "two_logs").iterdir()) == ["rank_0.log", "rank_4.log"]
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert set(files(tmp_path / "one")) == {f"gpt2/rank_{r}/checkpoint_{r}.ckpt" for r in range(8)}

    source = tmp_path / "one" / "gpt2"
    python(
        "--src_checkpoint", source, "--dst_checkpoint_dir", tmp_path / "four", "--src_strategy", eight,
        "--dst_strategy", four, "--world_size", 4, "--prefix", "net_", module=True,
    )  # fmt: skip
    bash(source, eight, tmp_path / "four_by_two", four, 4, 2, "net_")
    assert files(tmp_path / "four") == files(tmp_path / "four_by_two")
    assert set(files(tmp_path / "four")) == {f"gpt2/rank_{r}/net_{r}.ckpt" for r in range(4)}

    python(
        "--src_checkpoint", tmp_path / "four" / "gpt2", "--dst_checkpoint", tmp_path / "back", "--src_strategy", four
    )
    back = oracle.read_raw(tmp_path / "back" / "gpt2" / "rank_0" / "checkpoint_0.ckpt")
    assert back == oracle.read_raw(gpt2 / "gpt2.ckpt")


def test_a_process_converts_only_its_share(gpt2, tmp_path):
    arguments = ["--src_checkpoint", gpt2 / "gpt2.ckpt", "--dst_checkpoint", tmp_path / "out"]
    arguments += ["--dst_strategy", gpt2 / "dp2mp2pp2", "--world_size", 8, "--transform_process_num", 2]
    python(*arguments, "--rank_id", 4, "--transform_by_rank", "False")
    assert set(files(tmp_path / "out")) == {f"gpt2/rank_{r}/checkpoint_{r}.ckpt" for r in range(4, 8)}
    before = files(tmp_path / "out")
    assert "rank_id 1 converts nothing; the processes are rank_id 0, 4" in python(*arguments, "--rank_id", 1).stderr
    assert files(tmp_path / "out") == before
    python(*arguments)  # a late process destroys nothing of the other
    assert {k: v for k, v in files(tmp_path / "out").items() if k in before} == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dst_strategy", "dp2mp2pp2", "--world_size", 4], "world_size 4 is not that of the target: "),
        (["--dst_strategy", "dp2mp2pp2", "--rank_id", 9], "rank_id 9 is not from 0 to 7"),
        (["--dst_strategy", "dp2mp2pp2", "--transform_process_num", 3], "set it to one of 1, 2, 4, 8"),
        (["--dst_strategy", "nowhere"], "nowhere is not found"),
        ([], "cannot both be None"),
    ],
)
def test_wrong_arguments_are_told(gpt2, tmp_path, arguments, message):
    arguments = [gpt2 / a if a == "dp2mp2pp2" else a for a in arguments]
    done = python("--src_checkpoint", gpt2 / "gpt2.ckpt", "--dst_checkpoint", tmp_path / "out", *arguments, code=1)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_transform_by_rank_is_a_real_boolean(gpt2, tmp_path):
    done = python("--src_checkpoint", "a", "--dst_checkpoint", "b", "--transform_by_rank", "maybe", code=2)
    assert "must be True or False, not 'maybe'" in done.stderr


def test_failing_process_is_named_with_its_log(gpt2, tmp_path):
    (tmp_path / "broken.ckpt").write_bytes((gpt2 / "gpt2.ckpt").read_bytes()[:-10])
    done = bash(tmp_path / "broken.ckpt", "None", tmp_path / "out", gpt2 / "dp2mp2pp2", 8, 2, code=1)
    assert f"the process of rank 4 failed; see {tmp_path / 'out_logs' / 'rank_4.log'}" in done.stderr
    assert "is not a complete MindSpore checkpoint" in done.stderr


@pytest.mark.parametrize("numbers", [(8, 3), (8, 0), (8, 16), ("eight", 2)])
def test_shell_script_refuses_wrong_numbers(gpt2, tmp_path, numbers):
    done = bash(gpt2 / "gpt2.ckpt", "None", tmp_path / "out", gpt2 / "dp2mp2pp2", *numbers, code=2)
    assert "PROCESS_NUM" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_shell_script_tells_its_usage(gpt2):
    assert "transform_checkpoint.sh SRC SRC_STRATEGY|None DST" in bash("only", code=2).stderr


def test_what_the_target_folder_holds_is_not_deleted(gpt2, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    bash(gpt2 / "gpt2.ckpt", "None", tmp_path / "out", gpt2 / "dp2mp2pp2", 8, 1)
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_nothing_of_mindformers_is_imported(gpt2, tmp_path):
    code = f"""
import sys
sys.argv = ["x", "--src_checkpoint", {str(gpt2 / "gpt2.ckpt")!r}, "--dst_checkpoint", {str(tmp_path)!r},
            "--dst_strategy", {str(gpt2 / "mp2pp2")!r}]
from auto_trans.tools.transform_checkpoint import main
assert main() == 0
print({{"mindspore", "mindformers"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
