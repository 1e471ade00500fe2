"""Bytes of source files, by offset: mapped local files; what lies elsewhere would be another reader."""

from __future__ import annotations

import mmap
import os
from typing import Protocol

import numpy as np

from auto_trans.core.tensor import Shard, SourceFile
from auto_trans.errors import CheckpointError, SourceChangedError
from auto_trans.storage.formats.head import digest_extents

__all__ = ["MappedFile", "Reader", "same_contents"]


class Reader(Protocol):
    """Reads a source file as it was when its head was read."""

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """Bytes from ``offset`` on, as an array of uint8 that must not be written to; copied only where it must be."""

    def check_unchanged(self) -> None:
        """Raises SourceChangedError if the file was written to since its head was read."""

    def close(self) -> None:
        """Lets the file go."""


class MappedFile:
    """A local file, mapped: its pages are page cache, which can be reclaimed at any time.

    Args:
        file: The file.

    Raises:
        CheckpointError: It cannot be opened.
        SourceChangedError: It was written to since its head was read.
    """

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        try:
            with open(file.path, "rb") as f:
                # a mapped file that has become shorter would end the process with SIGBUS
                self._check(os.fstat(f.fileno()))
                mapping = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as e:
            raise CheckpointError(f"checkpoint {file.path} cannot be read: {e}") from e
        self._bytes = np.frombuffer(mapping, np.uint8)

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """Bytes from an offset on, see `Reader`."""
        return self._bytes[offset : offset + nbytes]

    def check_unchanged(self) -> None:
        """Raises SourceChangedError, see `Reader`."""
        try:
            self._check(os.stat(self._file.path))
        except OSError as e:
            raise SourceChangedError(f"{self._file.path} is gone since the conversion began: {e}") from e

    def close(self) -> None:
        """Lets the mapping go, once nothing refers to it."""
        self._bytes = np.empty(0, np.uint8)

    def _check(self, stat: os.stat_result) -> None:
        if (stat.st_size, stat.st_mtime_ns) != (self._file.size, self._file.mtime_ns):
            raise SourceChangedError(
                f"{self._file.path} was written to while it was being converted; start again once the weights are saved"
            )


def same_contents(one: Shard, other: Shard) -> bool:
    """Whether two shards hold the same type, shape and bytes; reads both."""
    alike = (one.tensor.dtype, one.box.size) == (other.tensor.dtype, other.box.size)
    return alike and digest_extents(one.file.path, one.extents) == digest_extents(other.file.path, other.extents)
