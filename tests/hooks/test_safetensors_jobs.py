"""Jobs with load_ckpt_format: safetensors in the real MindFormers Trainer, beside what MindFormers itself makes of them.

``parallel_mode: STAND_ALONE`` with ``use_parallel: True`` is the one mode in which MindFormers' own path runs on a CPU.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from auto_trans.merge_safetensors import merge_safetensors
from auto_trans.together import REPORT_NAME

pytestmark = pytest.mark.trainer

ALONE = {"AUTO_TRANS_DISABLE": "1"}
STAND_ALONE = "parallel.parallel_mode=STAND_ALONE"
DIRECT = "auto_trans={load: direct}"
# a name of LLaMA in MindFormers -> that of HuggingFace
HUGGINGFACE = {
    ".tok_embeddings.embedding_weight": ".embed_tokens.weight", ".attention.w": ".self_attn.w", ".wq.": ".q_proj.",
    ".wk.": ".k_proj.", ".wv.": ".v_proj.", ".wo.": ".o_proj.", ".feed_forward.w1.": ".mlp.gate_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.", ".feed_forward.w3.": ".mlp.up_proj.",
    ".attention_norm.": ".input_layernorm.", ".ffn_norm.": ".post_attention_layernorm.", ".norm_out.": ".norm.",
}  # fmt: skip


def job(source, *settings):
    return (f"load_checkpoint={source}", "load_ckpt_format=safetensors", "auto_trans_ckpt=True", STAND_ALONE, *settings)


@pytest.fixture(scope="module")
def stock(llama):
    """Four ranks, from rank folders, with MindFormers alone: it merges on rank 0, and every rank slices."""
    run = llama.train("sf_stock", *job(llama.safetensors), ranks=4, environ=ALONE)
    assert run.code == 0, run.logs[0][-3000:]
    assert all(len(losses) == 4 for losses in run.losses)
    return run


def test_four_ranks_convert_load_and_train_as_with_mindformers_and_as_directly_from_ckpt(llama, stock):
    run = llama.train("sf", *job(llama.safetensors, "transform_process_num=2"), ranks=4)
    assert run.code == 0, run.logs[0][-3000:]
    assert run.losses == stock.losses
    report = json.loads((llama.folder / "sf" / REPORT_NAME).read_text())
    assert [(c["rank"], c["slices"]) for c in report["converters"]] == [(0, [0, 1]), (2, [2, 3])]
    assert not any((llama.folder / "sf" / "unified_checkpoint").iterdir())
    converted = load_file(
        llama.folder / "sf" / "transformed_checkpoint" / "checkpoint" / "rank_3" / "checkpoint_3.safetensors"
    )
    unified = {}
    for file in (llama.folder / "sf_stock" / "unified_checkpoint").glob("*.safetensors"):
        unified.update(load_file(file))
    weights = {name: array for name, array in unified.items() if not name.startswith("adam_")}
    assert weights.keys() == converted.keys()
    assert all(np.array_equal(converted[name], array) for name, array in weights.items())
    settings = (f"load_checkpoint={llama.distributed}", f"src_strategy_path_or_dir={llama.strategy}")
    ckpt = llama.train("sf_ckpt", *settings, "auto_trans_ckpt=True", STAND_ALONE, DIRECT, ranks=4)
    assert ckpt.losses == stock.losses


def test_converters_merge_where_unify_is_set(llama, stock):
    run = llama.train(
        "sf_unify", *job(llama.safetensors, "transform_process_num=2", "auto_trans={unify: True}"), ranks=4
    )
    assert run.code == 0, run.logs[0][-3000:]
    assert run.losses == stock.losses
    unified = llama.folder / "sf_unify" / "unified_checkpoint"
    assert (unified / "param_name_map.json").is_file() and (unified / "hyper_param.safetensors").is_file()


def test_resumed_training_goes_on_as_with_mindformers(llama):
    """The step, the moments and the learning rate of the rank folders; the step is chosen by name. Loaded directly."""
    settings = job(llama.safetensors, "resume_training=tiny_rank_0-1_8.safetensors", "runner_config.epochs=3")
    runs = [
        llama.train("sf_resume_stock", *settings, ranks=4, environ=ALONE),
        llama.train("sf_resume_ours", *settings, DIRECT, ranks=4),
    ]
    for run in runs:
        assert run.code == 0, run.logs[0][-3000:]
    assert runs[0].losses == runs[1].losses and len(runs[0].losses[0]) > 4


@pytest.mark.pairs
def test_data_parallel_ranks_load_whole_weights(llama, four):
    """Where MindFormers itself fails, for want of a strategy to merge."""
    run = llama.train("sf_dp", *job(llama.safetensors, "parallel.parallel_mode=0"), ranks=4)
    assert run.code == 0, run.logs[0][-3000:]
    assert run.losses == four.losses


def test_one_rank_under_msrun_loads_all_rank_folders(llama, alone):
    run = llama.train("sf_one", *job(llama.safetensors), ranks=1, msrun=True)
    assert run.code == 0, run.logs[0][-3000:]
    assert run.losses == alone.losses


def test_complete_weights_are_checked_and_sliced_by_mindformers(llama, stock, tmp_path):
    merge_safetensors(llama.safetensors, tmp_path / "whole", llama.strategy)
    run = llama.train("sf_whole", *job(tmp_path / "whole"), ranks=4)
    assert run.code == 0, run.logs[0][-3000:]
    assert run.losses == stock.losses
    assert "the weights are complete, and MindFormers slices them while it loads: MindFormers' own" in run.logs[0]


def test_every_rank_reads_its_slices_of_weights_with_the_names_of_huggingface(llama, stock, tmp_path, snapshot):
    """By the model's own map; MindFormers itself writes another index beside them."""
    merge_safetensors(llama.safetensors, tmp_path / "whole", llama.strategy, filter_out_param_prefix=["adam_"])
    (tmp_path / "hf").mkdir()
    files: dict[str, dict[str, np.ndarray]] = {}
    for i, (name, array) in enumerate(load_file(tmp_path / "whole" / "model-00001-of-00001.safetensors").items()):
        for ours, theirs in HUGGINGFACE.items():
            name = name.replace(ours, theirs)
        files.setdefault(f"model-0000{1 + i % 2}-of-00002.safetensors", {})[name] = array
    for file, tensors in files.items():
        save_file(tensors, tmp_path / "hf" / file)
    index = {"weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    before = snapshot(tmp_path)
    run = llama.train("sf_hf", *job(tmp_path / "hf", DIRECT), ranks=4)
    assert run.code == 0, run.logs[0][-3000:]
    assert run.losses == stock.losses
    assert snapshot(tmp_path) == before
    assert "21 parameters" in run.logs[0] and "of 2 files" in run.logs[0]


def test_evaluation_and_inference_load_what_they_load_with_mindformers(llama):
    settings = {"script": Path(__file__).with_name("load_only.py"), "mode": "eval,predict", "ranks": 2}
    runs = [
        llama.train(f"sf_load_{name}", *job(llama.safetensors), environ=environ, **settings)
        for name, environ in (("stock", ALONE), ("ours", None))
    ]
    digests = {mode: set() for mode in ("eval", "predict")}
    for log in (log for run in runs for log in run.logs):
        for mode, digest in re.findall(r"^(eval|predict) digest (\w+)$", log, re.MULTILINE):
            digests[mode].add(digest)
    assert all(len(found) == 1 for found in digests.values()), runs[1].logs[0][-3000:]
    assert runs[1].logs[0].count("do not match the strategy of this job") == 2


def test_source_that_lacks_a_rank_is_told_on_every_rank_before_anything_is_built(llama, tmp_path):
    shutil.copytree(llama.safetensors.parent, tmp_path / "mp4")
    shutil.rmtree(tmp_path / "mp4" / "checkpoint" / "rank_2")
    run = llama.train("sf_bad", *job(tmp_path / "mp4" / "checkpoint"), ranks=4)
    assert run.code != 0
    for log in run.logs:
        assert "is held by source rank 2 only" in log and "Starting Init Train Model" not in log
