"""Emptying the output directory at the start of a job."""

from __future__ import annotations

import json
import shutil

import numpy as np
import oracle
import pytest
from builders import hold, strategy
from safetensors.numpy import load_file, save_file
from strategy_files import strategy_file

from auto_trans.coordination.lock import OutputLock
from auto_trans.core.layout import Layout
from auto_trans.errors import AutoTransError, ConfigError, OutputBusyError
from auto_trans.hooks.clear import check_and_empty, clear_auto_trans_output
from auto_trans.hooks.job import Job, Running
from auto_trans.jobs import Load


def stock(*args):
    pytest.fail("MindFormers' own function would not spare the source")


def kept(job):
    """Whether another job is kept out of the output directory."""
    other = OutputLock(job.output / ".auto_trans" / "output.lock", timeout=0.1)
    try:
        other.acquire()
    except OutputBusyError:
        return True
    other.release()
    return False


def test_output_is_kept_until_the_end_of_a_load_that_is_ours(job, tmp_path):
    source = oracle.write_raw(tmp_path / "llama.ckpt", {"w": oracle.Raw("Int8", (1,), b"x")})
    clear_auto_trans_output(stock, str(source), None, "ckpt")
    assert kept(job)
    job.release()
    assert not kept(job)


def test_output_of_a_load_that_is_not_ours_is_free_at_once(job, tmp_path):
    """Nobody tells when it ends: a second job would be kept out for the whole training."""
    (tmp_path / "whole").mkdir()
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "whole" / "model.safetensors")
    load = Load.of(settings(tmp_path / "whole"))
    assert load.left
    check_and_empty(job, load)
    assert not kept(job) and not any(job.strategy_dir.iterdir())


def test_safetensors_job_is_looked_at_once(job):
    """By the wrapper of the Trainer's check, whether MindFormers' own clears or not."""
    clear_auto_trans_output(stock, "/nowhere", None, "safetensors")


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_output_of_a_job_that_reshards_itself_is_emptied_as_ever(job, tmp_path, form):
    """Its source is no matter of ours, but that it survives."""
    job.strategy_dir.mkdir(parents=True)
    (job.strategy_dir / "old").write_text("of an earlier job")
    with Job.knowing(Running({}, reshards=True)):
        clear_auto_trans_output(stock, str(tmp_path), None, form)
        assert not any(job.strategy_dir.iterdir()) and not kept(job)
        (job.strategy_dir / "precious").write_text("weights")
        with pytest.raises(AutoTransError, match="lies in"):
            clear_auto_trans_output(stock, str(job.strategy_dir / "precious"), None, form)
    assert (job.strategy_dir / "precious").exists()


def test_folders_are_emptied_and_made(job, tmp_path):
    source = oracle.write_raw(tmp_path / "llama.ckpt", {"w": oracle.Raw("Int8", (1,), b"x")})
    for folder in (job.strategy_dir, job.transformed_dir):
        folder.mkdir(parents=True)
        (folder / "old").write_text("of an earlier job")
    clear_auto_trans_output(stock, str(source))
    assert not any(job.strategy_dir.iterdir()) and not any(job.transformed_dir.iterdir())
    assert source.exists()


SAVED = oracle.DATA.parent / "checkpoint2"
FULL = {"model.w": np.arange(32.0, dtype=np.float32).reshape(4, 8), "model.v": np.arange(8, dtype=np.float32)}
STEP = {"global_step": np.array([8], np.int32)}


def settings(path, **changes):
    """Those of a safetensors job."""
    return {
        "auto_trans_ckpt": True, "use_parallel": True, "load_ckpt_format": "safetensors", "load_checkpoint": str(path),
        **changes,
    }  # fmt: skip


@pytest.fixture
def ranks(tmp_path):
    """Rank folders of four ranks that slice w and v, saved at step 8, and the strategy beside them."""
    sliced = {"model.w": Layout((4,), ((0,), ())), "model.v": Layout((4,), ((0,),))}
    for rank, held in hold({**FULL, **STEP}, strategy(sliced)).items():
        folder = tmp_path / "run" / "checkpoint" / f"rank_{rank}"
        folder.mkdir(parents=True)
        save_file({n: np.ascontiguousarray(a) for n, a in held.items()}, folder / f"net_rank_{rank}-1_8.safetensors")
        layouts = {"model.w": ([4], [[0, -1]]), "model.v": ([4], [[0]])}
        strategy_file(tmp_path / "run" / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt", layouts)
    return tmp_path / "run" / "checkpoint"


def test_distributed_safetensors_are_checked_and_the_output_kept(job, ranks):
    for folder in (job.strategy_dir, job.transformed_dir, job.unified_dir):
        folder.mkdir(parents=True)
        (folder / "old").write_text("of an earlier job")
    check_and_empty(job, Load.of(settings(ranks)))
    assert not any(
        child for folder in (job.strategy_dir, job.transformed_dir, job.unified_dir) for child in folder.iterdir()
    )
    assert kept(job)


@pytest.mark.parametrize("changes", [{"load": "direct"}, {"loader": "mindspore"}, {"unify": True}], ids=str)
def test_ranks_that_would_load_in_other_ways_do_not_meet(job, ranks, monkeypatch, changes):
    """They would wait for each other in different places, for hours."""
    seen, session = set(), Job.session

    def noted(self, purpose, common, timing):
        seen.add(common)
        return session(self, purpose, common, timing)

    monkeypatch.setattr(Job, "session", noted)
    for more in ({}, changes):
        check_and_empty(job, Load.of(settings(ranks, auto_trans=more)))
        job.release()
    assert len(seen) == 2


def test_ckpt_job_may_load_an_iteration_of_checkpoint2(job, tmp_path):
    """Its metadata.json is its strategy; a safetensors job is told what to do instead."""
    shutil.copytree(SAVED / "dp2mp2_unique", tmp_path / "saved")
    root = next(path.parent for path in (tmp_path / "saved").rglob("latest_checkpointed_iteration.txt"))
    check_and_empty(job, Load.of(settings(root, load_ckpt_format="ckpt")))
    for path in (root, next(root.glob("iteration_*"))):
        with pytest.raises(
            ConfigError, match=r"is a Checkpoint 2\.0; MindFormers 1.9 and later loads it with checkpoint"
        ):
            Load.of(settings(path))
    (root / "latest_checkpointed_iteration.txt").write_text("77")
    with pytest.raises(AutoTransError, match="names iteration 77, but"):
        check_and_empty(job, Load.of(settings(root, load_ckpt_format="ckpt")))


def missing_rank(ranks):
    shutil.rmtree(ranks / "rank_2")


def other_step(ranks):
    file = ranks / "rank_3" / "net_rank_3-1_8.safetensors"
    file.rename(file.with_name("net_rank_3-1_6.safetensors"))


def truncated(ranks):
    file = ranks / "rank_1" / "net_rank_1-1_8.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def other_shape(ranks):
    file = ranks / "rank_1" / "net_rank_1-1_8.safetensors"
    held = load_file(file)
    save_file({**held, "model.w": np.zeros((2, 8), np.float32)}, file)


def other_model(ranks):
    for rank in range(4):
        file = ranks / f"rank_{rank}" / f"net_rank_{rank}-1_8.safetensors"
        save_file({f"gpt.{name}": array for name, array in load_file(file).items()}, file)


def no_strategy(ranks):
    shutil.rmtree(ranks.parent / "strategy")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing_rank, r"is held by source rank 2 only.*copy the missing rank folders"),
        (other_step, r"no step is there for all ranks.*net_rank_3-1_6"),
        (truncated, r"net_rank_1-1_8.safetensors is not a complete safetensors file"),
        (other_shape, r"model.w is .*\[2, 8\].*rank_1|rank_1.*\[2, 8\]"),
        (other_model, r"of another model"),
        (no_strategy, r"no source strategy is given; set src_strategy_path_or_dir"),
    ],
)
def test_source_that_cannot_be_converted_is_told_before_anything_is_built(job, ranks, spoil, message):
    spoil(ranks)
    job.strategy_dir.mkdir(parents=True)
    (job.strategy_dir / "old").write_text("of an earlier job")
    with pytest.raises(AutoTransError, match=f"(?s){message}"):
        check_and_empty(job, Load.of(settings(ranks)))
    assert (job.strategy_dir / "old").exists() and not kept(job)


def test_number_of_converters_that_cannot_be_is_told_before_anything_is_emptied(job, ranks):
    job.strategy_dir.mkdir(parents=True)
    (job.strategy_dir / "old").write_text("of an earlier job")
    job.world_size = 4
    with pytest.raises(ConfigError, match="set it to one of 1, 2, 4"):
        check_and_empty(job, Load.of(settings(ranks, transform_process_num=3)))
    assert (job.strategy_dir / "old").exists()


def test_strategy_beside_the_checkpoint_is_not_emptied(job, ranks):
    """The job that resumes in the output directory of the one before."""
    job.output = ranks.parent
    with pytest.raises(AutoTransError, match="strategy"):
        check_and_empty(job, Load.of(settings(ranks)))
    assert any((ranks.parent / "strategy").iterdir())


@pytest.mark.parametrize("chosen", ["net_rank_1-1_6.safetensors", "net_rank_0-1_8.safetensors"])
def test_step_of_resume_training_is_looked_at(job, ranks, chosen):
    for rank in range(4):
        shutil.copy(
            ranks / f"rank_{rank}" / f"net_rank_{rank}-1_8.safetensors",
            ranks / f"rank_{rank}" / f"net_rank_{rank}-1_6.safetensors",
        )
    truncated(ranks)
    load = Load.of(settings(ranks, resume_training=chosen))
    if "1_6" in chosen:
        check_and_empty(job, load)
    else:
        with pytest.raises(AutoTransError, match=r"net_rank_1-1_8.safetensors is not a complete"):
            check_and_empty(job, load)


def test_training_is_not_resumed_without_its_step(job, ranks):
    for rank in range(4):
        file = ranks / f"rank_{rank}" / f"net_rank_{rank}-1_8.safetensors"
        save_file({name: array for name, array in load_file(file).items() if name not in STEP}, file)
    with pytest.raises(AutoTransError, match=r"holds no global_step.*resume_training: False"):
        check_and_empty(job, Load.of(settings(ranks, resume_training=True)))
    check_and_empty(job, Load.of(settings(ranks)))


@pytest.fixture
def whole(tmp_path):
    """A complete checkpoint in two shards."""
    folder = tmp_path / "whole"
    folder.mkdir()
    names = {}
    for part, (name, array) in enumerate(FULL.items(), 1):
        names[name] = f"model-{part:05d}-of-00002.safetensors"
        save_file({name: array}, folder / names[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def no_index(whole):
    (whole / "model.safetensors.index.json").unlink()


def no_shard(whole):
    (whole / "model-00002-of-00002.safetensors").unlink()


def lying_shard(whole):
    save_file({"model.u": FULL["model.v"]}, whole / "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_index, r"holds shards of a checkpoint .* but no \*.safetensors.index.json"),
        (no_shard, r"model-00002-of-00002.safetensors.*missing|names model-00002"),
        (lying_shard, r"model.v"),
    ],
)
def test_complete_source_that_mindformers_could_not_slice_is_told_before_anything_is_built(job, whole, spoil, message):
    check_and_empty(job, Load.of(settings(whole)))
    spoil(whole)
    with pytest.raises(AutoTransError, match=f"(?s){message}"):
        check_and_empty(job, Load.of(settings(whole)))


def test_complete_weights_without_their_hyper_parameters_are_not_resumed(job, whole):
    with pytest.raises(AutoTransError, match=r"holds no hyper_param.safetensors"):
        check_and_empty(job, Load.of(settings(whole, resume_training=True)))
    save_file(STEP, whole / "hyper_param.safetensors")
    check_and_empty(job, Load.of(settings(whole, resume_training=True)))
