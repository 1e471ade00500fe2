"""Source files are read as they were when their heads were."""

from __future__ import annotations

import os

import numpy as np
import oracle
import pytest

from auto_trans.core.tensor import Box, Shard, SourceFile, Tensor
from auto_trans.errors import CheckpointError, SourceChangedError
from auto_trans.storage.readers import MappedFile, same_contents

CONTENT = bytes(range(64))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(CONTENT)
    os.utime(path, ns=(10**9, 10**9))
    return SourceFile(str(path), 64, 10**9)


def touch(file):
    os.utime(file.path, ns=(10**9, 10**9 + 1))


def shorten(file):
    with open(file.path, "r+b") as f:
        f.truncate(10)
    os.utime(file.path, ns=(10**9, 10**9))


def test_bytes_are_those_of_the_file(file):
    reader = MappedFile(file)
    assert reader.read(5, 7).tobytes() == CONTENT[5:12]
    reader.check_unchanged()
    reader.close()


@pytest.mark.parametrize("change", [touch, shorten])
def test_file_that_changed_before_it_is_mapped_is_noticed(file, change):
    change(file)
    with pytest.raises(SourceChangedError, match=r"x\.ckpt was written to while it was being read"):
        MappedFile(file)


@pytest.mark.parametrize("change", [touch, shorten])
def test_file_that_changes_once_it_is_mapped_is_noticed(file, change):
    reader = MappedFile(file)
    change(file)
    with pytest.raises(SourceChangedError, match=r"x\.ckpt was written to while it was being read"):
        reader.check_unchanged()


def test_file_that_is_gone_is_named(file):
    reader = MappedFile(file)
    os.unlink(file.path)
    with pytest.raises(SourceChangedError, match=r"x\.ckpt is gone"):
        reader.check_unchanged()
    with pytest.raises(CheckpointError, match=r"x\.ckpt cannot be read"):
        MappedFile(file)


def shard(path, array, extents, dtype=""):
    tensor = Tensor("w", dtype or oracle.NAMES[array.dtype.name], array.shape, array.itemsize)
    return Shard(tensor, Box.whole(array.shape), SourceFile(str(path), 0, 0), extents)


def test_shards_are_the_same_by_type_shape_and_bytes_however_they_are_chunked(tmp_path):
    array = np.arange(6, dtype=np.int32)
    content = array.tobytes()
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(b"head" + content[:10] + b"gap" + content[10:])
    one, other = shard(tmp_path / "a", array, ((0, 24),)), shard(tmp_path / "b", array, ((4, 10), (17, 14)))
    assert same_contents(one, other)
    assert not same_contents(one, shard(tmp_path / "b", array, ((0, 24),)))
    assert not same_contents(one, shard(tmp_path / "a", array, ((0, 24),), "UInt32"))
    assert not same_contents(one, shard(tmp_path / "a", array.reshape(2, 3), ((0, 24),)))
