"""Write files so that none ever bears its final name before it is complete."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union

import xxhash

from auto_trans.errors import InsufficientDiskError, OutputError

__all__ = ["DigestWriter", "new_file", "replicate", "write_json"]


class DigestWriter:
    """Writes to a file descriptor and digests what it writes.

    Attributes:
        written: Bytes written so far.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._hash = xxhash.xxh3_128()
        self.written = 0

    def write(self, data: Union[bytes, memoryview]) -> None:
        """Writes all of ``data``."""
        self._hash.update(data)
        rest = memoryview(data)
        self.written += len(rest)
        while rest:
            rest = rest[os.write(self._fd, rest) :]

    @property
    def digest(self) -> str:
        """xxh3 digest of what was written."""
        return self._hash.hexdigest()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[DigestWriter]:
    """A file that appears under its name only once it is complete and on the disk.

    It is written under a temporary name in the same folder, which is made if missing, and removed on failure.

    Raises:
        InsufficientDiskError: The disk is full.
        OutputError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with _output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
            try:
                writer = DigestWriter(fd)
                yield writer
                os.fsync(fd)
            finally:
                os.close(fd)
            _commit(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def replicate(file: Path, replica: Path) -> None:
    """Makes ``replica`` the same file by a hard link, or a copy where the file system has no links."""
    temporary = replica.with_name(f".{replica.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with _output_errors(replica):
            replica.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, temporary)
            except OSError:
                shutil.copyfile(file, temporary)
                with open(temporary, "rb") as f:
                    os.fsync(f.fileno())
            _commit(temporary, replica)
    finally:
        # rename() of two links to the same file does nothing, so the temporary name may be left
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, content: Any) -> None:
    """Writes a small file atomically."""
    with new_file(path) as out:
        out.write(json.dumps(content, indent=1).encode())


def _commit(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
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
                f"{path} cannot be written: {e.strerror}; free space there or set another output directory"
            ) from e
        raise OutputError(f"{path} cannot be written: {e}; set an output directory that is writable") from e
