from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import oracle
import pytest
from builders import every_dtype, every_raw
from hypothesis import given
from hypothesis import strategies as st
from strategy_files import field

import auto_trans.storage.formats.ckpt as ckpt
from auto_trans import convert
from auto_trans.errors import (
    CheckpointError,
    CorruptCheckpointError,
    EncryptedCheckpointError,
    UnsupportedCheckpointError,
)
from auto_trans.storage.formats import FORMATS, encoded_size, scan
from auto_trans.storage.formats.ckpt import encode
from auto_trans.storage.readers import digest_extents


class Head(NamedTuple):
    """What is encoded of a tensor besides its contents."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    nbytes: int


RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return oracle.write_raw(tmp_path_factory.mktemp("ckpt") / "all.ckpt", every_raw())


@pytest.fixture(scope="module")
def saved_file(tmp_path_factory):
    """The same, saved by MindSpore."""
    import mindspore

    path = tmp_path_factory.mktemp("ckpt") / "all.ckpt"
    mindspore.save_checkpoint(every_dtype(), str(path), append_dict={"note": "text", "epoch_num": 3})
    return path


@pytest.mark.mindspore
def test_scan_finds_what_mindspore_saved(saved_file):
    check_scan(saved_file)


def test_scan_finds_every_type(saved):
    check_scan(saved)


def check_scan(saved):
    index = scan(saved)
    expected = oracle.read_raw(saved)
    assert list(index.tensors) == list(expected)
    content = saved.read_bytes()
    for name, tensor in index.tensors.items():
        found = b"".join(content[offset : offset + n] for offset, n in tensor.segments)
        assert (tensor.dtype, tensor.dims, found) == expected[name]


@pytest.mark.mindspore
def test_copy_of_a_complete_checkpoint_is_byte_identical_to_mindspores(saved_file, tmp_path):
    convert(saved_file, tmp_path)
    assert (tmp_path / "rank_0" / "checkpoint_0.ckpt").read_bytes() == saved_file.read_bytes()


def test_copy_of_a_complete_checkpoint_is_byte_identical(saved, tmp_path):
    convert(saved, tmp_path)
    assert (tmp_path / "rank_0" / "checkpoint_0.ckpt").read_bytes() == saved.read_bytes()


def test_bit_patterns_that_are_no_numbers_survive(tmp_path):
    patterns = np.arange(65536, dtype=np.uint16).tobytes()
    raws = {t: oracle.Raw(t, (256, 256), patterns) for t in ("BFloat16", "Float16")}
    source = oracle.write_raw(tmp_path / "nan.ckpt", raws)
    convert(source, tmp_path / "out")
    assert oracle.read_raw(tmp_path / "out" / "rank_0" / "checkpoint_0.ckpt") == raws


@pytest.mark.mindspore
def test_chunked_tensors_are_written_and_read_as_mindspore_does(tmp_path, monkeypatch):
    import mindspore
    from mindspore.train import serialization

    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)  # KiB
    monkeypatch.setattr(ckpt, "CHUNK_BYTES", 1024)
    array = RNG.standard_normal((37, 33)).astype(np.float32)
    source = tmp_path / "chunked.ckpt"
    mindspore.save_checkpoint([{"name": "w", "data": mindspore.Tensor(array)}], str(source))
    assert len(scan(source).tensors["w"].segments) == 5
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "rank_0" / "checkpoint_0.ckpt").read_bytes() == source.read_bytes()


@pytest.mark.mindspore
def test_tensor_beyond_512_mib_is_byte_identical_to_mindspores(tmp_path):
    import mindspore

    source = tmp_path / "large.ckpt"
    array = np.arange(520 * 1024 * 256, dtype=np.int32).reshape(-1, 1024)
    mindspore.save_checkpoint([{"name": "w", "data": mindspore.Tensor(array)}], str(source))
    assert len(scan(source).tensors["w"].segments) == 2
    convert(source, tmp_path / "out")
    target = tmp_path / "out" / "rank_0" / "checkpoint_0.ckpt"
    with open(source, "rb") as a, open(target, "rb") as b:
        while part := a.read(1 << 24):
            assert part == b.read(1 << 24)
        assert not b.read(1)
    source.unlink()
    target.unlink()


@pytest.mark.mindspore
def test_crc_trailer_is_accepted(saved, tmp_path):
    import mindspore

    path = tmp_path / "crc.ckpt"
    mindspore.save_checkpoint(every_dtype(), str(path), crc_check=True)
    index = scan(path)
    assert index.crc is not None
    assert list(index.tensors)[-1] == "naïve.名前"
    assert scan(saved).crc is None


@pytest.mark.mindspore
@given(
    st.text(min_size=1, max_size=200).filter(lambda t: t.encode(errors="ignore").decode() == t),
    st.lists(st.integers(1, 2**40), max_size=5),
    st.integers(0, 2**32),
)
def test_records_parse_as_protobuf(name, dims, nbytes):
    from mindspore.train import serialization

    tensor = Head(name, "Float32", tuple(dims), nbytes)
    ((_, heads),) = encode([tensor])
    assert sum(length for _, length in heads) == nbytes
    assert encoded_size(FORMATS["ckpt"], [tensor]) == nbytes + sum(len(head) for head, _ in heads)
    head, length = heads[-1]
    if length < 10_000:
        value = serialization.Checkpoint.FromString(head + b"x" * length).value[0]
        assert (value.tag, list(value.tensor.dims), value.tensor.tensor_type) == (name, dims, "Float32")


def test_every_truncation_is_noticed(saved, tmp_path):
    content = saved.read_bytes()
    ends = {0}
    for tensor in scan(saved).tensors.values():
        ends.add(sum(tensor.segments[-1]))
    path = tmp_path / "cut.ckpt"
    for length in range(len(content)):
        if length not in ends:  # there a whole parameter is missing, which only the plan can notice
            path.write_bytes(content[:length])
            with pytest.raises(CorruptCheckpointError, match=r"cut\.ckpt"):
                scan(path)


@given(st.binary(min_size=1, max_size=200))
def test_any_other_bytes_are_refused_or_scanned_never_crash(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "garbage.ckpt"
    path.write_bytes(content)
    try:
        scan(path)
    except (CorruptCheckpointError, UnsupportedCheckpointError, EncryptedCheckpointError) as e:
        assert "garbage.ckpt" in str(e)


def test_missing_chunk_is_noticed(tmp_path):
    path = oracle.write_raw(tmp_path / "w.ckpt", {"w": oracle.Raw("Float32", (4,), b"\0" * 12)})
    with pytest.raises(CorruptCheckpointError, match="needs 16 bytes and has 12"):
        scan(path)


def test_parameter_that_comes_twice_is_refused(tmp_path):
    one = oracle.write_raw(
        tmp_path / "a.ckpt", {"w": oracle.raw(np.ones(2, np.float32)), "v": oracle.raw(np.ones(1, np.float32))}
    )
    twice = tmp_path / "b.ckpt"
    twice.write_bytes(one.read_bytes() * 2)
    with pytest.raises(CorruptCheckpointError, match="w twice"):
        scan(twice)


@pytest.mark.mindspore
@pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC", "SM4-CBC"])
def test_encrypted_checkpoint_is_named(tmp_path, mode):
    import mindspore

    path = tmp_path / "secret.ckpt"
    mindspore.save_checkpoint(every_dtype(), str(path), enc_key=b"0123456789abcdef", enc_mode=mode)
    with pytest.raises(EncryptedCheckpointError, match=r"secret\.ckpt is encrypted"):
        scan(path)


@pytest.mark.mindspore
def test_map_parameter_is_named(tmp_path):
    from mindspore.train import serialization

    message = serialization.Checkpoint()
    tensor = message.value.add(tag="table").maptensor.tensor.add()
    tensor.tensor_type, tensor.tensor_content = "int32", b"1234"
    path = tmp_path / "map.ckpt"
    path.write_bytes(message.SerializeToString())
    with pytest.raises(UnsupportedCheckpointError, match="table is a MapParameter"):
        scan(path)


def test_content_digest_tells_tensors_apart(tmp_path):
    raws = {"a": oracle.raw(np.arange(9)), "b": oracle.raw(np.arange(9)), "c": oracle.raw(np.arange(9) + 1)}
    index = scan(oracle.write_raw(tmp_path / "x.ckpt", raws))
    a, b, c = (digest_extents(index.path, index.tensors[name].segments) for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    "tensor, message",
    [
        (field(1, -1) + field(2, "str"), "the number"),
        (field(1, b"\1" * 65) + field(2, "str"), "more than 64 numbers"),
        (field(1, 1) + field(2, 7), "wire type 0 instead of 2"),
        (field(1, 1) + field(2, b"x" * 70_000), "a text of 70000 bytes"),
        (field(1, 1) + field(2, "str") + field(3, 7), "wire type 0 instead of 2"),
    ],
)
def test_malformed_tensors_are_refused(tmp_path, tensor, message):
    path = tmp_path / "bad.ckpt"
    path.write_bytes(field(1, field(1, "w") + field(2, tensor)))
    with pytest.raises(CorruptCheckpointError, match=rf"bad\.ckpt.*{message}"):
        scan(path)


def test_unknown_record_is_refused(tmp_path):
    path = tmp_path / "bad.ckpt"
    path.write_bytes(field(2, field(1, "w") + field(2, field(1, 1) + field(2, "Int8") + field(3, b"1"))))
    with pytest.raises(CorruptCheckpointError, match=r"bad\.ckpt .*an unknown record"):
        scan(path)


def test_unknown_fields_and_packed_dims_are_read(tmp_path):
    path = tmp_path / "w.ckpt"
    tensor = field(9, "new") + field(1, b"\2\3") + field(2, "Int8") + field(3, b"123456") + field(10, 5)
    path.write_bytes(field(1, field(12, 7) + field(1, "w") + field(2, tensor)))
    assert scan(path).tensors["w"].dims == (2, 3)


def test_file_that_becomes_shorter_while_it_is_scanned(saved, monkeypatch):
    monkeypatch.setattr(os, "pread", lambda fd, n, at, pread=os.pread: b"" if at > 500 else pread(fd, n, at))
    with pytest.raises(CorruptCheckpointError, match=r"all\.ckpt .*unexpected end"):
        scan(saved)


def test_disk_that_fails_is_told(saved, monkeypatch):
    def fail(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(CheckpointError, match=r"all\.ckpt cannot be read.*Input/output error"):
        scan(saved)
