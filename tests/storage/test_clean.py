from __future__ import annotations

import os

import pytest

from auto_trans.errors import CheckpointError, ProtectedSourceError
from auto_trans.storage.clean import clean_folders


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "output"
    for name in ("strategy/ckpt_strategy_rank_0.ckpt", "transformed_checkpoint/net/rank_0/checkpoint_0.ckpt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"precious")
    return folder


def folders(output):
    return [output / "strategy", output / "transformed_checkpoint"]


def test_folders_are_emptied_and_made(output):
    clean_folders(folders(output), [])
    assert [list(folder.iterdir()) for folder in folders(output)] == [[], []]
    clean_folders([output / "new" / "folder"], [])
    assert (output / "new" / "folder").is_dir()


def spellings(output, tmp_path):
    net = output / "transformed_checkpoint" / "net"
    (tmp_path / "link").symlink_to(net)
    (tmp_path / "source" / "rank_0").mkdir(parents=True)
    (tmp_path / "source" / "rank_0" / "x.ckpt").symlink_to(net / "rank_0" / "checkpoint_0.ckpt")
    return {
        "the folder": str(output / "transformed_checkpoint"),
        "trailing slash": f"{net}/",
        "relative": os.path.relpath(net),
        "dots": f"{output}/strategy/../transformed_checkpoint/net",
        "symlink": str(tmp_path / "link"),
        "a file inside": str(net / "rank_0" / "checkpoint_0.ckpt"),
        "rank folder of symlinks": str(tmp_path / "source"),
        "strategy file": str(output / "strategy" / "ckpt_strategy_rank_0.ckpt"),
    }


KINDS = [
    "the folder",
    "trailing slash",
    "relative",
    "dots",
    "symlink",
    "a file inside",
    "rank folder of symlinks",
    "strategy file",
]


@pytest.mark.parametrize("kind", KINDS)
def test_source_inside_is_never_deleted_whatever_its_spelling(output, tmp_path, snapshot, kind):
    path = spellings(output, tmp_path)[kind]
    before = snapshot(output)
    with pytest.raises(ProtectedSourceError, match="move it to another place"):
        clean_folders(folders(output), [path])
    assert snapshot(output) == before


def test_output_behind_a_symlink_protects_too(output, tmp_path):
    (tmp_path / "other_name").symlink_to(output)
    with pytest.raises(ProtectedSourceError):
        clean_folders(folders(tmp_path / "other_name"), [str(output / "strategy")])


def test_symlink_is_replaced_and_what_it_leads_to_is_left(output, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").write_bytes(b"precious")
    clean_folders([output / "strategy"], [])
    (output / "strategy").rmdir()
    (output / "strategy").symlink_to(tmp_path / "elsewhere")
    (output / "transformed_checkpoint" / "inner").symlink_to(tmp_path / "elsewhere")
    clean_folders(folders(output), [])
    assert (tmp_path / "elsewhere" / "weights").read_bytes() == b"precious"
    assert (output / "strategy").is_dir() and not (output / "strategy").is_symlink()


def test_path_that_cannot_be_followed_is_told(output, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in ("~nobody_of_that_name/model", tmp_path / "loop"):
        with pytest.raises(CheckpointError, match=f"{path} cannot be read"):
            clean_folders(folders(output), [path])
