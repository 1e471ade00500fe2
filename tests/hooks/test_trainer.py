"""The hook in the real MindFormers Trainer, alone and with four ranks under msrun."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import numpy as np
import oracle
import pytest
import safetensors.numpy

from auto_trans.merge_safetensors import merge_safetensors
from auto_trans.together import REPORT_NAME

pytestmark = pytest.mark.trainer
DEMO = Path(__file__).parents[2] / "demo"


def distributed(llama):
    return (
        f"load_checkpoint={llama.distributed}", f"src_strategy_path_or_dir={llama.strategy}", "auto_trans_ckpt=True",
    )  # fmt: skip


def test_one_rank_with_complete_weights_just_loads(llama, alone):
    run = llama.train("one", f"load_checkpoint={llama.complete}", "auto_trans_ckpt=True")
    assert run.code == 0, run.logs[0][-3000:]
    assert len(re.findall("already match the strategy of this job: nothing is converted", run.logs[0])) == 1
    assert run.losses == alone.losses and len(run.losses[0]) == 16
    (link,) = (llama.folder / "one" / "transformed_checkpoint").rglob("*.ckpt")
    assert link.resolve() == llama.complete.resolve()


def test_multi_device_weights_are_merged_for_one_rank(llama, alone):
    run = llama.train("merged", *distributed(llama))
    assert run.code == 0, run.logs[0][-3000:]
    assert "do not match the strategy of this job (4 ranks in 1 stage -> 1 ranks in 1 stage" in run.logs[0]
    assert run.losses == alone.losses
    (merged,) = (llama.folder / "merged" / "transformed_checkpoint").rglob("*.ckpt")
    assert oracle.read_raw(merged) == oracle.read_raw(llama.complete)


def test_settings_of_our_own_are_read_from_the_yaml(llama, alone):
    run = llama.train("engine", *distributed(llama), "auto_trans={engine: mindspore, heartbeat_timeout: 30}")
    assert run.code == 0, run.logs[0][-3000:]
    assert json.loads((llama.folder / "engine" / REPORT_NAME).read_text())["engine"] == "mindspore"
    assert run.losses == alone.losses


@pytest.mark.pairs
def test_four_ranks_convert_load_and_train(llama, four):
    run = llama.train("trans", *distributed(llama), "transform_process_num=2", "compile_stand_in=4x1", ranks=4)
    assert run.code == 0, run.logs[0][-3000:]
    assert run.losses == four.losses and all(len(losses) == 4 for losses in run.losses)
    report = json.loads((llama.folder / "trans" / REPORT_NAME).read_text())
    assert [(c["rank"], c["slices"]) for c in report["converters"]] == [(0, [0, 1]), (2, [2, 3])]
    for rank in (1, 3):
        assert not re.search(rf"(?<!waiting )rank {rank}: (?!loaded )", run.logs[rank]), "it converts nothing"
    converted = oracle.read_raw(
        llama.folder / "trans" / "transformed_checkpoint" / "checkpoint" / "rank_3" / "checkpoint_3.ckpt"
    )
    assert converted == oracle.read_raw(llama.complete)


@pytest.mark.pairs
def test_four_ranks_load_directly_and_train(llama, four):
    """Each reads its slices of the four files; nothing is written but the strategy and the report."""
    direct = "auto_trans={load: direct}"
    run = llama.train("direct", *distributed(llama), direct, "compile_stand_in=4x1", ranks=4)
    assert run.code == 0, run.logs[0][-3000:]
    assert run.losses == four.losses
    report = json.loads((llama.folder / "direct" / REPORT_NAME).read_text())
    assert report["load"] == "direct" and [(rank["rank"], rank["files"]) for rank in report["ranks"]] == [
        (rank, 4) for rank in range(4)
    ]
    assert not any((llama.folder / "direct" / "transformed_checkpoint").iterdir())
    for rank, log in enumerate(run.logs):
        assert re.search(rf"rank {rank}: loaded \d+ parameters, .* of 4 files in [\d.]+ s \(.*/s\) from ", log)


@pytest.mark.pairs
@pytest.mark.skipif(
    metadata.version("mindformers").startswith("1.7"), reason="only MindFormers 1.8 and later read ahead"
)
def test_more_ranks_than_the_source_has(llama, four, tmp_path):
    llama._python(DEMO / "prepare.py", "slice", llama.complete, tmp_path / "mp2", 2)
    settings = (f"load_checkpoint={tmp_path}/mp2/checkpoint", f"src_strategy_path_or_dir={tmp_path}/mp2/strategy")
    run = llama.train(
        "more", *settings, "auto_trans_ckpt=True", "load_ckpt_format=ckpt", "compile_stand_in=4x1", ranks=4
    )
    assert run.code == 0, run.logs[3][-3000:]
    assert run.losses == four.losses


def test_two_nodes_with_a_shared_disk(llama, four):
    """Two launcher groups of two ranks each, over one output directory; one converter on each."""
    run = llama.train("nodes", *distributed(llama), "transform_process_num=2", "compile_stand_in=4x1", ranks=4, nodes=2)
    assert all("Training Over!" in log for log in run.logs), run.logs[0][-3000:]
    assert run.losses == four.losses
    report = json.loads((llama.folder / "nodes" / REPORT_NAME).read_text())
    assert [c["rank"] for c in report["converters"]] == [0, 2]


def test_strategy_is_saved_first_and_weights_are_converted_offline(llama, bin_folder, tmp_path):
    """only_save_strategy: True, then auto-trans convert, then the slices are there."""
    run = llama.train(
        "strategy_only", f"load_checkpoint={llama.complete}", "only_save_strategy=True", "compile_stand_in=1x4"
    )
    assert run.code == 0 and "system exit" in run.logs[0]
    command = [bin_folder / "auto-trans", "convert", llama.complete, tmp_path, "--verify", "--dst-strategy"]
    subprocess.run([*map(str, command), str(llama.folder / "strategy_only" / "strategy")], check=True)
    for rank in range(4):
        (saved,) = (llama.distributed / f"rank_{rank}").iterdir()
        expected = oracle.read_raw(saved)
        got = oracle.read_raw(tmp_path / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
        assert got == expected


MONITOR = "{type: CheckpointMonitor, prefix: tiny, save_checkpoint_steps: 4, integrated_save: False, async_save: False"


def test_weights_that_checkpoint_monitor_removed_redundancy_from_are_merged(llama, tmp_path):
    """Four ranks save safetensors with remove_redundancy: every parameter lies with one of them only."""
    from compile_stand_in import write_strategy_files

    monitor = (
        f"callbacks=[{{type: MFLossMonitor}}, {MONITOR}, checkpoint_format: safetensors, remove_redundancy: True}}]"
    )
    run = llama.train("removed", monitor, ranks=4)
    assert run.code == 0, run.logs[0][-3000:]
    saved = llama.folder / "removed" / "checkpoint"
    files = [safetensors.numpy.load_file(saved / f"rank_{r}" / f"tiny_rank_{r}-1_4.safetensors") for r in range(4)]
    union = {name: array for file in files for name, array in file.items()}
    assert all(len(file) < len(union) / 2 for file in files)
    weights = [(name, array.ndim) for name, array in union.items() if array.size > 1]
    write_strategy_files(tmp_path / "strategy", weights, 4, 1)
    merge_safetensors(saved, tmp_path / "out", tmp_path / "strategy", file_suffix="1_4", redundancy_removed=True)
    merged = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        merged.update(safetensors.numpy.load_file(file))
    assert merged.keys() == union.keys()
    assert all(np.array_equal(merged[name], array) for name, array in union.items())


def test_bad_source_is_told_on_every_rank_before_anything_is_built(llama, tmp_path):
    shutil.copytree(llama.distributed, tmp_path / "source")
    (file,) = (tmp_path / "source" / "rank_2").iterdir()
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-100])
    (llama.folder / "bad" / "transformed_checkpoint").mkdir(parents=True)
    (llama.folder / "bad" / "transformed_checkpoint" / "finished").write_text("earlier output")
    settings = (
        f"load_checkpoint={tmp_path / 'source'}",
        f"src_strategy_path_or_dir={llama.strategy}",
        "auto_trans_ckpt=True",
    )
    run = llama.train("bad", *settings, ranks=4)
    assert run.code != 0
    for log in run.logs:
        assert "tiny_rank_2-1_8.ckpt is not a complete MindSpore checkpoint" in log
        assert "Starting Init Train Model" not in log
    assert (llama.folder / "bad" / "transformed_checkpoint" / "finished").read_text() == "earlier output"


def bad_strategy(llama, folder, kind):
    """A strategy that does not belong to the distributed weights of the tiny LLaMA."""
    import mindspore
    from compile_stand_in import write_strategy_files

    held = mindspore.load_checkpoint(str(llama.complete))
    listed = [(name, len(p.shape)) for name, p in held.items() if p.size > 1]
    if kind == "another model":
        listed = [(f"gpt.{name}", ndim) for name, ndim in listed]
    elif kind == "one stage":
        listed = [(name, ndim) for name, ndim in listed if "layers.1." not in name]
    write_strategy_files(folder, listed, *((2, 2) if kind == "another slicing" else (1, 4)))
    return folder


@pytest.mark.parametrize(
    "kind, message",
    [
        ("another model", "they are of another model"),
        ("one stage", "does not list parameter"),
        ("missing rank", "is held by source rank 2 only"),
    ],
)
def test_wrong_strategy_and_missing_ranks_are_told_before_anything_is_built(llama, tmp_path, kind, message):
    source, strategy = llama.distributed, llama.strategy
    if kind == "missing rank":
        source = tmp_path / "source"
        shutil.copytree(llama.distributed, source)
        shutil.rmtree(source / "rank_2")
    else:
        strategy = bad_strategy(llama, tmp_path / "strategy", kind)
    settings = f"load_checkpoint={source}", f"src_strategy_path_or_dir={strategy}", "auto_trans_ckpt=True"
    run = llama.train(f"early_{kind[:3]}", *settings)
    assert run.code != 0
    assert message in run.logs[0]
    assert "Starting Init Train Model" not in run.logs[0]


def test_strategy_of_another_slicing_is_told_by_the_network(llama, tmp_path):
    strategy = bad_strategy(llama, tmp_path / "strategy", "another slicing")
    settings = f"load_checkpoint={llama.distributed}", f"src_strategy_path_or_dir={strategy}", "auto_trans_ckpt=True"
    run = llama.train("slicing", *settings)
    assert run.code != 0
    assert "in the network, but by the source strategy" in run.logs[0]
    assert "set src_strategy_path_or_dir to the one in the output of the job" in run.logs[0]
    assert not list((llama.folder / "slicing" / "transformed_checkpoint").rglob("*.ckpt"))


def test_source_in_the_folder_to_be_cleaned_is_refused_and_kept(llama, snapshot):
    inside = llama.folder / "inside" / "transformed_checkpoint" / "net"
    shutil.copytree(llama.distributed, inside)
    before = snapshot(inside)
    run = llama.train(
        "inside", f"load_checkpoint={inside}/", f"src_strategy_path_or_dir={llama.strategy}", "auto_trans_ckpt=True"
    )
    assert run.code != 0
    assert "ProtectedSourceError" in run.logs[0] and "move it to another place" in run.logs[0]
    assert snapshot(inside) == before


@pytest.mark.parametrize(
    "setting, message",
    [
        ("transform_process_num=two", "transform_process_num must be a whole number of at least 1, not 'two'"),
        ("transform_process_num=0", "transform_process_num should not be smaller than 1"),
    ],
)
def test_wrong_setting_is_told_before_the_load(llama, setting, message):
    run = llama.train("wrong", *distributed(llama), setting)
    assert run.code != 0
    assert message in run.logs[0]
    assert not (llama.folder / "wrong" / REPORT_NAME).exists()


def test_step_of_resume_training_is_followed(llama):
    settings = (f"load_checkpoint={llama.checkpoint}", "auto_trans_ckpt=True", "resume_training=tiny_rank_0-1_8.ckpt")
    run = llama.train("resumed", *settings, "runner_config.epochs=2")
    assert run.code == 0, run.logs[0][-3000:]
    (link,) = (llama.folder / "resumed" / "transformed_checkpoint").rglob("*.ckpt")
    assert link.resolve().name == "tiny_rank_0-1_8.ckpt"
    assert "initial step: 8" in run.logs[0]


def test_complete_safetensors_of_one_rank_are_left_to_mindformers(llama, alone, tmp_path):
    merge_safetensors(llama.safetensors, tmp_path, llama.strategy)
    run = llama.train("st", f"load_checkpoint={tmp_path}", "auto_trans_ckpt=True", "load_ckpt_format=safetensors")
    assert run.code == 0, run.logs[0][-3000:]
    assert "so is the model of one rank: MindFormers' own conversion is used, not that of auto_trans" in run.logs[0]
    assert run.losses == alone.losses
