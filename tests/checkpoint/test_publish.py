from __future__ import annotations

import errno
import os

import pytest
import xxhash

from auto_trans.checkpoint import publish
from auto_trans.checkpoint.publish import new_file, replicate
from auto_trans.errors import InsufficientDiskError, OutputError


def test_file_appears_only_complete_and_is_digested(tmp_path):
    path = tmp_path / "rank_0" / "x.ckpt"
    with new_file(path) as out:
        out.write(b"abc")
        assert not path.exists()
        assert list(path.parent.glob("*.ckpt")) == [], "no glob for checkpoints finds the temporary file"
        out.write(memoryview(b"def"))
    assert path.read_bytes() == b"abcdef"
    assert out.digest == xxhash.xxh3_128_hexdigest(b"abcdef")
    assert [f.name for f in path.parent.iterdir()] == ["x.ckpt"]


def test_failure_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half-way"), new_file(path) as out:
        out.write(b"new")
        raise RuntimeError("half-way")
    assert path.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["x.ckpt"]


def test_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(fd, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(publish.os, "write", full)
    message = r"x\.ckpt cannot be written: No space left"
    with pytest.raises(InsufficientDiskError, match=message), new_file(tmp_path / "x.ckpt") as out:
        out.write(b"new")
    assert not list(tmp_path.iterdir())


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be written"), new_file(tmp_path / "file" / "x.ckpt"):
        pass


def test_replica_is_a_link(tmp_path):
    (tmp_path / "a").write_bytes(b"weights")
    replicate(tmp_path / "a", tmp_path / "rank_1" / "b")
    assert os.path.samefile(tmp_path / "a", tmp_path / "rank_1" / "b")
    replicate(tmp_path / "a", tmp_path / "rank_1" / "b")
    assert [f.name for f in (tmp_path / "rank_1").iterdir()] == ["b"]


def test_replica_is_a_copy_where_links_do_not_work(tmp_path, monkeypatch):
    def no_links(*args, **kwargs):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(publish.os, "link", no_links)
    (tmp_path / "a").write_bytes(b"weights")
    replicate(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"weights"
    assert not os.path.samefile(tmp_path / "a", tmp_path / "b")
