from __future__ import annotations

import pytest

from auto_trans.errors import CheckpointError, CheckpointNotFoundError, ConfigError, UnsupportedCheckpointError
from auto_trans.storage.sources import find_checkpoints


@pytest.fixture
def make(tmp_path):
    def files(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
        return tmp_path

    return files


def chosen(path, **options):
    (found,) = find_checkpoints(path, **options)
    return {rank: file.name for rank, (file,) in found.files.items()}


def test_latest_step_is_chosen_by_number(make):
    path = make(*(f"rank_{r}/net_rank_{r}-{step}.ckpt" for r in (0, 1) for step in ("1_9", "1_10", "2_2")))
    assert chosen(path) == {0: "net_rank_0-2_2.ckpt", 1: "net_rank_1-2_2.ckpt"}
    (path / "rank_0" / "net_rank_0-2_2.ckpt").unlink()
    (path / "rank_1" / "net_rank_1-2_2.ckpt").unlink()
    assert chosen(path) == {0: "net_rank_0-1_10.ckpt", 1: "net_rank_1-1_10.ckpt"}


def test_step_that_a_rank_lacks_is_not_mixed_with_others(make, caplog):
    path = make("rank_0/n_rank_0-1_9.ckpt", "rank_0/n_rank_0-1_10.ckpt", "rank_1/n_rank_1-1_9.ckpt")
    assert chosen(path) == {0: "n_rank_0-1_9.ckpt", 1: "n_rank_1-1_9.ckpt"}
    assert "1_10 is newer" in caplog.text and "rank 1 lacks it" in caplog.text


def test_no_step_in_common_is_an_error(make):
    with pytest.raises(CheckpointNotFoundError, match=r"rank 0 has n_rank_0-1_10\.ckpt; rank 1 has n_rank_1-1_9\.ckpt"):
        find_checkpoints(make("rank_0/n_rank_0-1_10.ckpt", "rank_1/n_rank_1-1_9.ckpt"))


def test_resumed_prefix_of_a_later_run_wins_at_the_same_step(make):
    path = make("rank_0/n_rank_0-1_9.ckpt", "rank_0/n_rank_0_1-1_9.ckpt", "rank_0/n_rank_0_2-1_9.ckpt")
    assert chosen(path) == {0: "n_rank_0_2-1_9.ckpt"}


def test_runs_are_counted_by_number_not_by_name(make):
    path = make(*(f"rank_0/n_rank_0_{run}-1_9.ckpt" for run in (9, 10)), "rank_0/n_rank_0-1_8.ckpt")
    assert chosen(path) == {0: "n_rank_0_10-1_9.ckpt"}


def test_same_step_of_different_runs_is_not_mixed(make):
    path = make(*(f"rank_0/n_rank_0_{run}-1_9.ckpt" for run in (1, 2)), "rank_1/n_rank_1_1-1_9.ckpt")
    assert chosen(path) == {0: "n_rank_0_1-1_9.ckpt", 1: "n_rank_1_1-1_9.ckpt"}


def test_names_without_step_fall_back_to_name_order(make, caplog):
    assert chosen(make("rank_0/a.ckpt", "rank_0/b.ckpt")) == {0: "b.ckpt"}
    assert "b.ckpt, the last by name" in caplog.text


def test_step_that_resume_training_picked_is_followed(make):
    path = make(*(f"rank_{r}/net_rank_{r}-{step}.ckpt" for r in (0, 1) for step in ("1_9", "1_10")))
    assert chosen(path, resume_file="/any/rank_5/net_rank_5-1_9.ckpt") == {
        0: "net_rank_0-1_9.ckpt",
        1: "net_rank_1-1_9.ckpt",
    }
    with pytest.raises(CheckpointNotFoundError, match=r"net_rank_0-3_3\.ckpt, the step that was chosen"):
        find_checkpoints(path, resume_file="net_rank_0-3_3.ckpt")


def test_complete_file_and_folder_of_complete_files(make):
    path = make("llama.a.ckpt", "lora.ckpt")
    (one,) = find_checkpoints(path / "lora.ckpt")
    assert (one.name, one.distributed, list(one.files)) == ("lora", False, [0])
    assert [c.name for c in find_checkpoints(path)] == ["llama.a", "lora"]


def test_path_may_begin_with_the_home_folder(make, monkeypatch):
    path = make("weights/lora.ckpt")
    monkeypatch.setenv("HOME", str(path))
    (file,) = find_checkpoints("~/weights/lora.ckpt")
    (folder,) = find_checkpoints("~/weights")
    assert file.path == folder.path == path / "weights" / "lora.ckpt"


def test_hidden_files_and_folders_are_no_checkpoints(make):
    path = make("rank_0/.a.ckpt", "rank_0/b.ckpt", "rank_1/b.ckpt/x", "rank_1/a.ckpt")
    assert chosen(path) == {0: "b.ckpt", 1: "a.ckpt"}


def test_ranks_are_ordered_by_number(make):
    (found,) = find_checkpoints(make(*(f"rank_{r}/x.ckpt" for r in range(12))))
    assert list(found.files) == list(range(12))


@pytest.mark.parametrize(
    "names, error, message",
    [
        ((), CheckpointNotFoundError, "neither rank_N folders nor checkpoint files"),
        (("rank_0/x.ckpt", "rank_1/readme.txt"), CheckpointNotFoundError, "rank_1 holds no checkpoint file"),
        (("rank_0/x.ckpt", "rank_0/x.safetensors"), UnsupportedCheckpointError, "both .ckpt and .safetensors"),
        (("rank_0/x.ckpt", "rank_1/x.safetensors"), UnsupportedCheckpointError, "files of both formats"),
    ],
)
def test_what_cannot_be_used_is_named(make, names, error, message):
    with pytest.raises(error, match=message):
        find_checkpoints(make(*names))


def test_missing_path_and_foreign_file_are_named(make):
    path = make("weights.bin")
    with pytest.raises(CheckpointNotFoundError, match="nowhere is not found"):
        find_checkpoints(path / "nowhere")
    with pytest.raises(UnsupportedCheckpointError, match=r"weights\.bin does not end with \.ckpt or \.safetensors"):
        find_checkpoints(path / "weights.bin")


def test_step_can_be_chosen(make):
    path = make(*(f"rank_{r}/net_rank_{r}-{step}.safetensors" for r in (0, 1) for step in ("1_9", "1_10")))
    assert chosen(path, step="1_9") == {0: "net_rank_0-1_9.safetensors", 1: "net_rank_1-1_9.safetensors"}
    with pytest.raises(CheckpointNotFoundError, match=r"rank_0 holds no file of step 9_9; there are net_rank_0-1_10"):
        find_checkpoints(path, step="9_9")


def test_step_is_the_whole_step(make):
    path = make("rank_0/n_rank_0-1_9.ckpt", "rank_0/n_rank_0-11_9.ckpt")
    assert chosen(path, step="1_9") == {0: "n_rank_0-1_9.ckpt"}


def test_what_is_no_step_is_the_end_of_the_names(make):
    path = make(*(f"rank_{r}/net_{r}_{kind}.ckpt" for r in (0, 1) for kind in ("best", "last")))
    assert chosen(path, suffix="best") == {0: "net_0_best.ckpt", 1: "net_1_best.ckpt"}


@pytest.mark.parametrize(
    "names, message",
    [
        (("rank_0/n_rank_0-1_1.ckpt", "rank_0/n_rank_1-1_1.ckpt"), r"n_rank_1-1_1\.ckpt is named after another rank"),
        (("rank_0/n_rank_1-1_1.ckpt", "rank_1/n_rank_0-1_1.ckpt"), "is named after another rank than its folder"),
        (("rank_0/a_rank_0-1_1.ckpt", "rank_0/b_rank_0-1_1.ckpt"), "are of the same step, 1_1"),
    ],
)
def test_mixed_up_files_are_refused(make, names, message):
    with pytest.raises(CheckpointError, match=message):
        find_checkpoints(make(*names))


def test_step_is_an_epoch_and_a_step(make):
    with pytest.raises(ConfigError, match=r"step must be an epoch and a step such as 3_200, not '200'"):
        find_checkpoints(make("rank_0/n_rank_0-1_1200.ckpt"), step="200")
