"""Bytes of source files, by offset: local files, read or mapped; what lies elsewhere would be another reader."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Optional, Protocol, Union

import numpy as np
import xxhash

from auto_trans.core.tensor import Extent, Shard, SourceFile
from auto_trans.errors import CheckpointError, CorruptCheckpointError, SourceChangedError

__all__ = ["LocalReader", "MappedFile", "PositionedFile", "Reader", "digest_extents", "open_reader", "same_contents"]

_READ_BYTES = 4 * 1024 * 1024
_AHEAD_BYTES = 128 * 1024
_PREAD_BYTES = 256 * 1024 * 1024  # one call takes no more than 2 GiB, and a signal waits for its end
# The system fetches a mapped file page by page as it is touched, and each fetch waits for the server.
_REMOTE = re.compile(
    r"9p|afs|beegfs|ceph|cifs|fuse(blk)?(\..*)?|gfs2|glusterfs|gpfs|lustre|ncpfs|nfs4?|orangefs|panfs|pvfs2|smb\w*|virtiofs"
    r"|wekafs"
)


class Reader(Protocol):
    """An open source file: formats scan it, the engine gathers from it.

    Any method raises CheckpointError where the file cannot be read.
    """

    @property
    def path(self) -> str:
        """Where it lies, for messages, too."""

    @property
    def size(self) -> int:
        """Its bytes when it was opened."""

    @property
    def version(self) -> int:
        """What changes whenever its contents do; of a local file the modification time in ns."""

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """Bytes from ``offset`` on, as an array of uint8 that must not be written to; fewer where the file ends."""

    def view(self, offset: int, nbytes: int) -> Optional[np.ndarray]:
        """What `read` gives, where that costs no memory; else None."""

    def read_into(self, offset: int, out: np.ndarray) -> None:
        """Fills a contiguous array of uint8 with the bytes from ``offset`` on.

        Raises:
            CorruptCheckpointError: The file ends before.
        """

    def check_unchanged(self) -> None:
        """Raises SourceChangedError if the file was written to since it was opened, or is gone."""

    def close(self) -> None:
        """Lets the file go."""


class LocalReader:
    """A file of the file system, of which only what is asked for is read.

    Args:
        path: The file.

    Raises:
        CheckpointError: It cannot be read (any method).
    """

    def __init__(self, path: Union[str, Path]) -> None:
        self.path = str(path)
        self._fd = -1
        try:
            self._fd = os.open(self.path, os.O_RDONLY)
            self.size, self.version = _state(os.fstat(self._fd))
        except OSError as e:
            self.close()
            raise self._unreadable(e) from e

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """Bytes from an offset on, see `Reader`."""
        found = b""
        try:
            while part := os.pread(
                self._fd, nbytes - len(found), offset + len(found)
            ):  # it may give less than there is
                found = found + part if found else part
        except OSError as e:
            raise self._unreadable(e) from e
        return np.frombuffer(found, np.uint8)

    def view(self, offset: int, nbytes: int) -> Optional[np.ndarray]:
        """Nothing: what is read takes memory, see `Reader`."""
        return None

    def read_into(self, offset: int, out: np.ndarray) -> None:
        """Fills an array with the bytes from an offset on, see `Reader`."""
        rest = out.reshape(-1).data
        try:
            while rest:
                nbytes = os.preadv(self._fd, [rest[:_PREAD_BYTES]], offset)
                if not nbytes:
                    raise self._short()
                rest, offset = rest[nbytes:], offset + nbytes
        except OSError as e:
            raise self._unreadable(e) from e

    def check_unchanged(self) -> None:
        """Raises SourceChangedError, see `Reader`."""
        try:
            now = _state(os.stat(self.path))
        except OSError as e:
            raise SourceChangedError(f"{self.path} is gone since its head was read: {e}") from e
        if now != (self.size, self.version):
            raise self._changed()

    def close(self) -> None:
        """Lets the file go, see `Reader`."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"checkpoint {self.path} cannot be read: {error}")

    def _short(self) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{self.path} became shorter while it was read; copy or save it again")

    def _changed(self) -> SourceChangedError:
        return SourceChangedError(
            f"{self.path} was written to while it was being read; start again once the weights are saved"
        )


class PositionedFile(LocalReader):
    """A file as it was when its head was read, read in large pieces: what network file systems are good at.

    Small reads that follow each other are made by one.

    Args:
        file: The file.

    Raises:
        CheckpointError: It cannot be read (any method).
        SourceChangedError: It was written to since its head was read.
    """

    def __init__(self, file: SourceFile) -> None:
        super().__init__(file.path)
        self._ahead, self._ahead_at = np.empty(0, np.uint8), 0
        if (self.size, self.version) != (file.size, file.mtime_ns):
            self.close()
            raise self._changed()

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """Bytes from an offset on, see `Reader`."""
        found = np.empty(max(min(nbytes, self.size - offset), 0), np.uint8)
        self.read_into(offset, found)
        found.flags.writeable = False
        return found

    def read_into(self, offset: int, out: np.ndarray) -> None:
        """Fills an array with the bytes from an offset on, see `Reader`."""
        out = out.reshape(-1)
        there = self._ahead[offset - self._ahead_at :][: out.size] if offset >= self._ahead_at else self._ahead[:0]
        out[: there.size] = there
        out, offset = out[there.size :], offset + there.size
        if 0 < out.size < _AHEAD_BYTES and self.size - offset >= out.size:
            ahead = np.empty(min(_AHEAD_BYTES, self.size - offset), np.uint8)
            super().read_into(offset, ahead)
            self._ahead, self._ahead_at = ahead, offset
            out[:] = ahead[: out.size]
        elif out.size:
            super().read_into(offset, out)

    def close(self) -> None:
        """Lets the file go, see `Reader`."""
        super().close()
        self._ahead = np.empty(0, np.uint8)


class MappedFile(PositionedFile):
    """A local file as it was when its head was read, mapped: its pages are page cache, which can be reclaimed at any time.

    What is read is a view of the mapping; nothing is copied.

    Args:
        file: The file.

    Raises:
        CheckpointError: It cannot be opened.
        SourceChangedError: It was written to since its head was read.
    """

    def __init__(self, file: SourceFile) -> None:
        # a mapped file that has become shorter would end the process with SIGBUS: its state is compared first
        super().__init__(file)
        try:
            whole = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ) if file.contents is None else file.contents
            self._bytes = np.frombuffer(whole, np.uint8)
        except (OSError, ValueError) as e:  # ValueError: there is nothing to map in an empty file
            raise CheckpointError(f"checkpoint {self.path} cannot be read: {e}") from e
        finally:
            super().close()

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """Bytes from an offset on, see `Reader`."""
        return self._bytes[offset : offset + nbytes]

    def view(self, offset: int, nbytes: int) -> Optional[np.ndarray]:
        """Bytes from an offset on, see `Reader`."""
        return self.read(offset, nbytes)

    def read_into(self, offset: int, out: np.ndarray) -> None:
        """Fills an array with the bytes from an offset on, see `Reader`."""
        part = self._bytes[offset : offset + out.size]
        if part.size != out.size:
            raise self._short()
        out.reshape(-1)[:] = part

    def close(self) -> None:
        """Lets the mapping go, once nothing refers to it."""
        super().close()
        self._bytes = np.empty(0, np.uint8)


def open_reader(file: SourceFile, *, mapped: bool = True) -> Reader:
    """Opens a source file: mapped, or read in large pieces.

    Args:
        file: The file.
        mapped: Whether it may be mapped, unless it lies on a network file system. Columns cost less CPU then, but a file
            that becomes shorter meanwhile ends the process.
    """
    if file.contents is None and (not mapped or _is_remote(file.path)):
        return PositionedFile(file)
    return MappedFile(file)


def _is_remote(path: str, mounts: str = "/proc/self/mountinfo") -> bool:
    """Whether a file lies on a network file system; where the system does not tell, it does not."""
    try:
        return _is_remote_device(os.stat(path).st_dev, mounts)
    except OSError:
        return False


@functools.lru_cache(maxsize=64)
def _is_remote_device(device: int, mounts: str) -> bool:
    with open(mounts, encoding="utf-8", errors="surrogateescape") as f:
        number = f" {os.major(device)}:{os.minor(device)} "
        mount = next((line for line in f if number in line), "")
    return bool(_REMOTE.fullmatch(mount.partition(" - ")[2].partition(" ")[0]))


def digest_extents(path: Union[str, Path], extents: Sequence[Extent]) -> str:
    """xxh3 digest of what lies in some extents of a file.

    Raises:
        CheckpointError: The file cannot be read.
        CorruptCheckpointError: It is too short.
    """
    digest = xxhash.xxh3_128()
    with contextlib.closing(LocalReader(path)) as reader:
        for offset, nbytes in extents:
            end = offset + nbytes
            while offset < end:
                part = reader.read(offset, min(end - offset, _READ_BYTES))
                if not part.nbytes:
                    raise CorruptCheckpointError(f"{path} became shorter while it was read; copy or save it again")
                digest.update(part.data)
                offset += part.nbytes
    return digest.hexdigest()


def same_contents(one: Shard, other: Shard) -> bool:
    """Whether two shards hold the same type, shape and bytes; reads both."""
    alike = (one.tensor.dtype, one.box.size) == (other.tensor.dtype, other.box.size)
    return alike and _digest(one) == _digest(other)


def _digest(shard: Shard) -> str:
    if shard.file.contents is None:
        return digest_extents(shard.file.path, shard.extents)
    return xxhash.xxh3_128_hexdigest(b"".join(shard.file.contents[o : o + n] for o, n in shard.extents))


def _state(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns
