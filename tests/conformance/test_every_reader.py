"""What every reader of source files must do. To add one, subclass `ReaderTests`."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from auto_trans.core.tensor import SourceFile
from auto_trans.errors import CheckpointError, CorruptCheckpointError, SourceChangedError
from auto_trans.storage.readers import LocalReader, MappedFile, PositionedFile, _is_remote, digest_extents, open_reader

CONTENT = bytes(range(256)) * 40


class ReaderTests(ABC):
    """Open, read, look again."""

    @abstractmethod
    def open(self, path):
        """Opens a file as it is now."""

    @pytest.fixture
    def path(self, tmp_path):
        (tmp_path / "x.ckpt").write_bytes(CONTENT)
        return tmp_path / "x.ckpt"

    @pytest.fixture
    def reader(self, path):
        with contextlib.closing(self.open(path)) as reader:
            yield reader

    def test_state_is_that_of_the_file(self, reader, path):
        stat = path.stat()
        assert (reader.path, reader.size, reader.version) == (str(path), len(CONTENT), stat.st_mtime_ns)

    @pytest.mark.parametrize(
        "begin, end", [(0, 0), (0, 1), (5, 300), (0, len(CONTENT)), (len(CONTENT) - 1, len(CONTENT))]
    )
    def test_what_is_asked_for_is_read(self, reader, begin, end):
        got = reader.read(begin, end - begin)
        assert got.dtype == np.uint8 and got.ndim == 1
        assert got.tobytes() == CONTENT[begin:end] and got.data.nbytes == end - begin

    def test_there_is_less_where_the_file_ends(self, reader):
        assert reader.read(len(CONTENT) - 3, 10).tobytes() == CONTENT[-3:]
        assert reader.read(len(CONTENT), 10).nbytes == 0
        assert reader.read(len(CONTENT) + 5, 10).nbytes == 0

    @pytest.mark.parametrize("begin, end", [(0, 0), (5, 300), (0, len(CONTENT))])
    def test_array_is_filled(self, reader, begin, end):
        out = np.zeros((1, end - begin), np.uint8)
        reader.read_into(begin, out)
        assert out.tobytes() == CONTENT[begin:end]

    def test_array_that_is_longer_than_the_file_is_not_filled_in_part(self, reader):
        with pytest.raises(CorruptCheckpointError, match=r"x\.ckpt became shorter"):
            reader.read_into(len(CONTENT) - 3, np.zeros(10, np.uint8))

    def test_all_is_read_by_a_system_that_gives_less_than_is_asked_for(self, path, monkeypatch):
        pread, preadv = os.pread, os.preadv
        monkeypatch.setattr(os, "pread", lambda fd, nbytes, offset: pread(fd, -(-nbytes // 2), offset))
        monkeypatch.setattr(
            os, "preadv", lambda fd, parts, offset: preadv(fd, [parts[0][: -(-len(parts[0]) // 2)]], offset)
        )
        out = np.zeros(5000, np.uint8)
        with contextlib.closing(self.open(path)) as reader:
            assert reader.read(3, 5000).tobytes() == CONTENT[3:5003]
            reader.read_into(100, out)
        assert out.tobytes() == CONTENT[100:5100]

    def test_view_is_what_is_read_or_nothing(self, reader):
        view = reader.view(5, 300)
        assert view is None or (view.tobytes() == CONTENT[5:305] and np.shares_memory(view, reader.view(0, 6)))

    def test_what_was_read_cannot_be_written_to(self, reader):
        with pytest.raises(ValueError, match="read-only"):
            reader.read(0, 4)[0] = 1

    def test_what_was_read_stays(self, path):
        reader = self.open(path)
        first, second = reader.read(0, 100), reader.read(50, 100)
        reader.close()
        assert (first.tobytes(), second.tobytes()) == (CONTENT[:100], CONTENT[50:150])

    def test_it_may_be_closed_twice(self, path):
        reader = self.open(path)
        reader.close()
        reader.close()

    def test_closing_gives_the_file_back(self, path):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            self.open(path).close()
        assert len(os.listdir("/proc/self/fd")) == before

    def test_unchanged_file_passes(self, reader):
        reader.read(0, 10)
        reader.check_unchanged()

    def test_change_of_size_is_noticed(self, reader, path):
        stat = path.stat()
        with path.open("ab") as file:
            file.write(b"more")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(SourceChangedError, match=r"x\.ckpt was written to"):
            reader.check_unchanged()

    def test_change_of_time_is_noticed(self, reader, path):
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        with pytest.raises(SourceChangedError, match=r"x\.ckpt was written to"):
            reader.check_unchanged()

    def test_other_file_in_its_place_is_noticed(self, reader, path):
        other = path.with_name("other")
        other.write_bytes(CONTENT[::-1])
        os.utime(other, ns=(0, 0))
        other.replace(path)
        with pytest.raises(SourceChangedError):
            reader.check_unchanged()
        assert reader.read(0, 9).tobytes() == CONTENT[:9], "what is open is still the old one"

    def test_file_that_is_gone_is_noticed(self, reader, path):
        path.unlink()
        with pytest.raises(SourceChangedError, match=r"x\.ckpt is gone"):
            reader.check_unchanged()

    def test_file_that_is_not_there_is_named(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"nowhere\.ckpt cannot be read: .*No such file"):
            self.open(tmp_path / "nowhere.ckpt")

    def test_folder_is_named(self, tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"), contextlib.closing(self.open(tmp_path)) as reader:
            reader.read(0, 1)


class TestLocalReader(ReaderTests):
    def open(self, path):
        return LocalReader(path)

    def test_disk_that_fails_is_told(self, reader, monkeypatch):
        def fail(*arguments):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "pread", fail)
        with pytest.raises(CheckpointError, match=r"x\.ckpt cannot be read: .*Input/output error"):
            reader.read(0, 1)

    def test_empty_file_is_read(self, tmp_path):
        (tmp_path / "empty").write_bytes(b"")
        with contextlib.closing(self.open(tmp_path / "empty")) as reader:
            assert (reader.size, reader.read(0, 8).nbytes) == (0, 0)


class OpenedSourceTests(ReaderTests):
    kind: type[PositionedFile]

    def open(self, path):
        stat = path.stat() if path.exists() else os.stat_result(range(10))
        return self.kind(SourceFile(str(path), stat.st_size, stat.st_mtime_ns))

    @pytest.mark.parametrize("size, mtime", [(1, 0), (-1, 0), (0, 1), (0, -1)])
    def test_change_before_it_was_opened_is_noticed(self, path, size, mtime):
        stat, before = path.stat(), len(os.listdir("/proc/self/fd"))
        with pytest.raises(SourceChangedError, match=r"x\.ckpt was written to"):
            self.kind(SourceFile(str(path), stat.st_size + size, stat.st_mtime_ns + mtime))
        assert len(os.listdir("/proc/self/fd")) == before


class TestPositionedFile(OpenedSourceTests):
    kind = PositionedFile

    def test_small_reads_that_follow_each_other_are_made_by_one(self, path, monkeypatch):
        calls, preadv = [], os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, parts, offset: calls.append(offset) or preadv(fd, parts, offset))
        monkeypatch.setattr("auto_trans.storage.readers._AHEAD_BYTES", 1000)
        with contextlib.closing(self.open(path)) as reader:
            for begin, end in [(0, 10), (10, 300), (290, 700), (990, 5000), (5000, 5001), (20, 40)]:
                out = np.zeros(end - begin, np.uint8)
                reader.read_into(begin, out)
                assert out.tobytes() == CONTENT[begin:end]
        assert calls == [0, 1000, 5000, 20]

    @given(st.lists(st.tuples(st.integers(0, len(CONTENT)), st.integers(0, 3000)), max_size=12))
    def test_reads_in_any_order_give_what_is_there(self, tmp_path_factory, places):
        path = tmp_path_factory.getbasetemp() / "any.ckpt"
        path.write_bytes(CONTENT) if not path.exists() else None
        with contextlib.closing(self.open(path)) as reader:
            for begin, nbytes in places:
                out = np.zeros(min(nbytes, len(CONTENT) - begin), np.uint8)
                reader.read_into(begin, out)
                assert out.tobytes() == reader.read(begin, nbytes).tobytes() == CONTENT[begin : begin + nbytes]

    def test_large_array_is_filled_by_several_calls(self, path, monkeypatch):
        monkeypatch.setattr("auto_trans.storage.readers._PREAD_BYTES", 1000)
        out = np.zeros(len(CONTENT) - 7, np.uint8)
        with contextlib.closing(self.open(path)) as reader:
            reader.read_into(7, out)
        assert out.tobytes() == CONTENT[7:]


class TestMappedFile(OpenedSourceTests):
    kind = MappedFile

    def test_nothing_is_copied(self, reader):
        whole = reader.read(0, len(CONTENT))
        assert np.shares_memory(whole, reader.read(10, 100))

    def test_empty_file_is_told(self, tmp_path):
        (tmp_path / "empty.ckpt").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"empty\.ckpt cannot be read"):
            self.open(tmp_path / "empty.ckpt")


def test_digest_is_that_of_the_extents(tmp_path):
    import xxhash

    path = tmp_path / "x.ckpt"
    path.write_bytes(CONTENT)
    assert digest_extents(path, [(0, 10), (20, 30)]) == xxhash.xxh3_128_hexdigest(CONTENT[:10] + CONTENT[20:50])
    with pytest.raises(CorruptCheckpointError, match=r"x\.ckpt became shorter"):
        digest_extents(path, [(len(CONTENT) - 5, 6)])
    with pytest.raises(CheckpointError, match=r"nowhere cannot be read"):
        digest_extents(tmp_path / "nowhere", [(0, 1)])


@pytest.mark.parametrize(
    "kind, remote",
    [("nfs4", True), ("nfs", True), ("fuse.sshfs", True), ("lustre", True), ("smb3", True), ("ext4", False),
     ("overlay", False), ("tmpfs", False), ("fusectl", False)],
)  # fmt: skip
def test_network_file_systems_are_known_by_their_type(tmp_path, kind, remote):
    device = tmp_path.stat().st_dev
    mount = f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw,noatime shared:1 - {kind} server:/x rw\n"
    (tmp_path / "mounts").write_text(f"25 1 250:99 / /other rw - nfs4 server:/y rw\n{mount}")
    assert _is_remote(str(tmp_path), str(tmp_path / "mounts")) is remote


def test_system_that_does_not_tell_its_mounts_has_local_files(tmp_path):
    assert not _is_remote(str(tmp_path), str(tmp_path / "mounts"))


def test_local_file_is_mapped_and_one_of_a_network_file_system_is_not(tmp_path, monkeypatch):
    (tmp_path / "x.ckpt").write_bytes(CONTENT)
    stat = (tmp_path / "x.ckpt").stat()
    file = SourceFile(str(tmp_path / "x.ckpt"), stat.st_size, stat.st_mtime_ns)
    for remote, kind in ((False, MappedFile), (True, PositionedFile)):
        monkeypatch.setattr("auto_trans.storage.readers._is_remote", lambda path, remote=remote: remote)
        with contextlib.closing(open_reader(file)) as reader:
            assert type(reader) is kind
