"""Write files so that none ever bears its final name before it is complete."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Generic, Optional, TypeVar, Union

import xxhash

from auto_trans.errors import InsufficientDiskError, OutputError
from auto_trans.storage.hints import reserve, start_writing_out
from auto_trans.storage.temporary import lock, temporary_name

__all__ = ["NewFile", "Publisher", "make_folder", "new_file", "replicate", "write_json", "write_new"]

T = TypeVar("T")

_FLUSH_BYTES = 32 * 1024 * 1024
_COPY_BYTES = 4 * 1024 * 1024


class NewFile:
    """A file under a temporary name in its final folder, which is made if missing.

    It is digested while it is written. If it is durable the disk is kept busy meanwhile, so that little is left to wait for
    in the end. As a context it removes itself if an exception leaves it; without one it stays as it is, published or yet to
    be.

    Args:
        path: Its final name, which it gets from `publish`, once complete.
        durable: Whether it must be on the disk before it gets its name. What is made anew after a power loss need not be.
        least_bytes: How large it will be at least, where that is known.

    Raises:
        InsufficientDiskError: The disk is full (any method).
        OutputError: The file cannot be written (any method).
    """

    def __init__(self, path: Path, *, durable: bool = True, least_bytes: int = 0) -> None:
        self.path = path
        self._durable = durable
        self._temporary = temporary_name(path)
        self._hash = xxhash.xxh3_128()
        self._written = self._flushed = 0
        self._synced: Optional[os.stat_result] = None
        with _output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
        lock(self._fd)
        reserve(self._fd, least_bytes)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, exc_type: Any, *exc: object) -> None:
        if exc_type is not None:
            self.discard()

    @property
    def digest(self) -> str:
        """xxh3 digest of what was written."""
        return self._hash.hexdigest()

    def write(self, data: Union[bytes, memoryview]) -> None:
        """Writes all of ``data``."""
        self._synced = None
        self._hash.update(data)
        rest = memoryview(data)
        self._written += len(rest)
        with _output_errors(self.path):
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        if self._durable and self._written - self._flushed >= _FLUSH_BYTES:
            start_writing_out(self._fd, self._flushed, self._written - self._flushed)
            self._flushed = self._written

    def sync(self) -> os.stat_result:
        """Has what was written on the disk if it is to be durable; returns the state that the file keeps under its name."""
        with _output_errors(self.path):
            if self._synced is None:
                if self._durable:
                    os.fsync(self._fd)
                self._synced = os.fstat(self._fd)
            return self._synced

    def publish(self) -> None:
        """Gives the file its name, synced if it is to be durable; if that fails, nothing is left of it."""
        with self:
            self.sync()
            with _output_errors(self.path):
                self._close()
                _commit(self._temporary, self.path, durable=self._durable)

    def discard(self) -> None:
        """Removes the file, unless it is published."""
        self._close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()  # not there if it is published

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


@contextlib.contextmanager
def new_file(path: Path, *, durable: bool = True) -> Iterator[NewFile]:
    """A file that appears under its name once it is complete, see `NewFile`; on failure nothing is left of it.

    Raises:
        InsufficientDiskError: The disk is full.
        OutputError: The file cannot be written.
    """
    with NewFile(path, durable=durable) as out:
        yield out
        out.publish()


class Publisher(Generic[T]):
    """Publishes files in a thread of its own, one after the other, while the next one is written.

    No more than one file waits while another is written, so that a failure is soon known. Left by an exception or not, it
    first finishes what was submitted: that is complete.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "auto_trans-publish")
        self._pending: list[Future[T]] = []
        self.results: list[T] = []

    def __enter__(self) -> Publisher[T]:
        return self

    def __exit__(self, exc_type: Any, *exc: object) -> None:
        with self._pool:
            self._wait(0 if exc_type is None else len(self._pending))

    def submit(self, publish: Callable[[], T]) -> None:
        """Has ``publish`` called; raises what an earlier one raised."""
        self._pending.append(self._pool.submit(publish))
        self._wait(1)

    def _wait(self, left: int) -> None:
        while len(self._pending) > left:
            self.results.append(self._pending.pop(0).result())


def make_folder(path: Path) -> None:
    """Makes a folder unless it is there.

    Raises:
        OutputError: It cannot be made.
    """
    with _output_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def replicate(file: Path, replica: Path, *, durable: bool = True) -> None:
    """Makes ``replica`` the same file by a hard link, or a copy as old as it where the file system has no links.

    Args:
        file: A published file.
        replica: The name that it gets, too.
        durable: Whether it must be on the disk first, see `NewFile`.
    """
    temporary = temporary_name(replica)
    try:
        with _output_errors(replica):
            replica.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, temporary)
            except OSError:
                with open(file, "rb") as original, open(temporary, "wb") as copy:
                    lock(copy.fileno())
                    shutil.copyfileobj(original, copy, _COPY_BYTES)
                    copy.flush()
                    stat = os.fstat(original.fileno())
                    os.utime(temporary, ns=(stat.st_atime_ns, stat.st_mtime_ns))
                    if durable:
                        os.fsync(copy.fileno())
            _commit(temporary, replica, durable=durable)
    finally:
        # rename() of two links to the same file does nothing, so the temporary name may be left
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_new(path: Path, content: bytes) -> bool:
    """Writes a small file unless there is one; returns whether it was written. Of several at once one wins."""
    with _output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        try:
            temporary.write_bytes(content)
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # no links here
            return _write_exclusively(path, content)
        finally:
            temporary.unlink(missing_ok=True)
    return True


def _write_exclusively(path: Path, content: bytes) -> bool:
    try:
        with open(path, "xb") as f:
            f.write(content)
    except FileExistsError:
        return False
    return True


def write_json(path: Path, content: Any, *, durable: bool = True) -> None:
    """Writes a small file atomically, see `NewFile`."""
    with new_file(path, durable=durable) as out:
        out.write(json.dumps(content, indent=1).encode())


def _commit(temporary: Path, path: Path, *, durable: bool) -> None:
    os.replace(temporary, path)
    if not durable:
        return
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:  # not every file system syncs folders
        pass
    finally:
        os.close(fd)


@contextlib.contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InsufficientDiskError(
                f"{path} cannot be written: {e.strerror}; free space there or set another output directory («dst»)"
            ) from e
        raise OutputError(f"{path} cannot be written: {e}; set an output directory that is writable («dst»)") from e
