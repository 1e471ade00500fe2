from __future__ import annotations

import errno
import os

import pytest
import xxhash

from auto_trans.core.plan import FilePlan, TensorPlan
from auto_trans.core.tensor import Box, Tensor
from auto_trans.errors import InsufficientDiskError, OutputError
from auto_trans.storage import files as publish
from auto_trans.storage.files import NewFile, Publisher, new_file, replicate
from auto_trans.storage.formats import FORMATS
from auto_trans.storage.targets import RankFolders


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


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_file_that_cannot_be_published_leaves_nothing(tmp_path, monkeypatch, call):
    def broken(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    out = NewFile(tmp_path / "x.ckpt")
    out.write(b"new")
    monkeypatch.setattr(publish.os, call, broken)
    with pytest.raises(OutputError, match=r"x\.ckpt cannot be written: .*Input/output error"):
        out.publish()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_or_quota_is_named_and_leaves_nothing(tmp_path, monkeypatch, code):
    def full(fd, data):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(publish.os, "write", full)
    message = rf"x\.ckpt cannot be written: {os.strerror(code)}; free space there"
    with pytest.raises(InsufficientDiskError, match=message), new_file(tmp_path / "x.ckpt") as out:
        out.write(b"new")
    assert not list(tmp_path.iterdir())


def test_what_the_system_writes_in_pieces_is_whole(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(publish.os, "write", lambda fd, data: write(fd, data[:3]))
    with new_file(tmp_path / "x.ckpt") as out:
        out.write(b"weights")
    assert (tmp_path / "x.ckpt").read_bytes() == b"weights"


def test_state_that_is_recorded_is_that_of_the_last_write(tmp_path):
    with new_file(tmp_path / "x.ckpt") as out:
        out.write(b"weights")
        out.sync()
        out.write(b"more")
        assert out.sync().st_size == 11


def test_file_that_is_not_durable_appears_only_complete_and_is_never_synced(tmp_path, monkeypatch):
    monkeypatch.setattr(publish.os, "fsync", lambda fd: pytest.fail("synced"))
    monkeypatch.setattr(publish, "start_writing_out", lambda *extent: pytest.fail("written out"))
    monkeypatch.setattr(publish, "_FLUSH_BYTES", 4)
    with new_file(tmp_path / "x.ckpt", durable=False) as out:
        out.write(b"weights")
        assert not (tmp_path / "x.ckpt").exists()
        state = out.sync()
    assert (tmp_path / "x.ckpt").read_bytes() == b"weights"
    assert (tmp_path / "x.ckpt").stat().st_mtime_ns == state.st_mtime_ns
    assert [f.name for f in tmp_path.iterdir()] == ["x.ckpt"]


def test_writing_out_begins_while_the_file_is_written_and_no_page_is_dropped(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(publish.os, "posix_fadvise", lambda *advice: pytest.fail("the loader reads these pages"))
    monkeypatch.setattr(publish, "_FLUSH_BYTES", 6)
    monkeypatch.setattr(publish, "start_writing_out", lambda fd, offset, nbytes: begun.append((offset, nbytes)))
    with new_file(tmp_path / "x.ckpt") as out:
        for part in (b"abc", b"defg", b"h", b"ijklmn", b"o"):
            out.write(part)
    assert begun == [(0, 7), (7, 7)]


def test_place_that_is_reserved_is_no_part_of_the_file(tmp_path):
    for written in (b"", b"weights", b"w" * 3_000_000):
        with NewFile(tmp_path / "x.ckpt", least_bytes=1_000_000) as out:
            out.write(written)
            assert out.sync().st_size == len(written)
            out.publish()
        assert (tmp_path / "x.ckpt").read_bytes() == written


def test_place_that_cannot_be_reserved_is_no_error(tmp_path):
    """The file may become smaller, and what cannot be written is told when it is."""
    with NewFile(tmp_path / "x.ckpt", least_bytes=2**62) as out:
        out.write(b"weights")
        out.publish()
    assert (tmp_path / "x.ckpt").read_bytes() == b"weights"


def test_place_of_a_target_file_is_reserved_before_it_is_written(tmp_path, monkeypatch):
    reserved = []
    monkeypatch.setattr(publish, "reserve", lambda fd, nbytes: reserved.append((os.fstat(fd).st_size, nbytes)))
    tensor = Tensor("w", "Float32", (3, 4), 4)
    with target_of(tmp_path).open(FilePlan((0,), (TensorPlan(tensor, Box.whole((3, 4)), ()),))) as out:
        out.discard()
    assert reserved == [(0, 48)]


def test_writing_out_changes_nothing_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "_FLUSH_BYTES", 1)
    with new_file(tmp_path / "x.ckpt") as out:
        for _ in range(3):
            out.write(b"weights" * 1000)
    assert (tmp_path / "x.ckpt").read_bytes() == b"weights" * 3000
    publish.start_writing_out(-1, 0, 1)  # what cannot be started is no error: syncing tells


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


def test_copy_that_is_not_durable_is_never_synced(tmp_path, monkeypatch):
    def no_links(*args, **kwargs):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(publish.os, "link", no_links)
    monkeypatch.setattr(publish.os, "fsync", lambda fd: pytest.fail("synced"))
    (tmp_path / "a").write_bytes(b"weights")
    replicate(tmp_path / "a", tmp_path / "b", durable=False)
    assert (tmp_path / "b").read_bytes() == b"weights"


def target_of(folder):
    return RankFolders(folder, FORMATS["ckpt"], "request", 2, prefix="checkpoint_")


FILE = FilePlan((0, 1), ())


def test_file_is_on_record_before_it_bears_its_name(tmp_path, monkeypatch):
    """Killed between the two, it would be refused as a foreign file when the conversion is started again."""
    named = []

    def name_and_die(temporary, path, **options):
        os.replace(temporary, path)
        named.append(path.name)
        if path.name == "checkpoint_0.ckpt":
            raise KeyboardInterrupt

    monkeypatch.setattr(publish, "_commit", name_and_die)
    out = NewFile(tmp_path / "rank_0" / "checkpoint_0.ckpt")
    out.write(b"weights")
    with pytest.raises(KeyboardInterrupt):
        target_of(tmp_path).publish(out, FILE)
    assert named == ["pending_rank_0_checkpoint_0.ckpt.json", "checkpoint_0.ckpt"]
    again = target_of(tmp_path)
    again.check([FILE])
    assert again.done(0) is not None and again.done(1) is None


def test_replicas_have_the_record_of_their_original_link_or_copy(tmp_path, monkeypatch):
    def no_links(*args, **kwargs):
        raise OSError(errno.EPERM, "no links here")

    for folder in (tmp_path / "linked", tmp_path / "copied"):
        out = NewFile(folder / "rank_0" / "checkpoint_0.ckpt")
        out.write(b"weights")
        records = target_of(folder).publish(out, FILE)
        assert [(r.rank, r.file) for r in records] == [(n, f"rank_{n}/checkpoint_{n}.ckpt") for n in (0, 1)]
        again = target_of(folder)
        assert [again.done(0), again.done(1)] == records
        assert again.finish() and sorted(p.name for p in folder.iterdir())[1:] == ["rank_0", "rank_1"]
        monkeypatch.setattr(publish.os, "link", no_links)


def test_publisher_raises_soon_and_finishes_what_is_complete():
    done = []

    def fail():
        raise OutputError("no")

    with pytest.raises(OutputError), Publisher() as publisher:
        publisher.submit(lambda: done.append(1))
        publisher.submit(fail)
        publisher.submit(lambda: done.append(2))
        pytest.fail("the third was submitted after the second had failed")
    assert done == [1, 2]
