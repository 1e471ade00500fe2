"""What the tests compare with is right: its files are those of MindSpore's own schema and of mindspore.save_checkpoint."""

from __future__ import annotations

import oracle
import pytest
from builders import every_dtype, every_raw

pytestmark = pytest.mark.mindspore
EXTRA = {
    "large.dims": oracle.Raw("Float32", (2**40, 0, 127, 128, 16384), b""),
    "scalar": oracle.Raw("Float32", (), b"\0\0\0\0"),
    "long " + "名" * 200: oracle.Raw("UInt8", (300,), bytes(300)),
}


def of_schema(tensors):
    from mindspore.train.serialization import Checkpoint

    message = Checkpoint()
    for name, raw in tensors.items():
        value = message.value.add(tag=name)
        value.tensor.dims.extend(raw.dims)
        value.tensor.tensor_type, value.tensor.tensor_content = raw.dtype, raw.content
    return message


def read_by_schema(path):
    from mindspore.train.serialization import Checkpoint

    values = Checkpoint.FromString(path.read_bytes()).value
    return {v.tag: oracle.Raw(v.tensor.tensor_type, tuple(v.tensor.dims), v.tensor.tensor_content) for v in values}


def test_files_are_those_of_mindspores_schema_both_ways(tmp_path):
    tensors = {**every_raw(), **EXTRA}
    ours = oracle.write_raw(tmp_path / "ours.ckpt", tensors)
    assert ours.read_bytes() == of_schema(tensors).SerializeToString()
    assert read_by_schema(ours) == tensors == oracle.read_raw(ours)


def test_chunks_of_a_tensor_are_joined_and_a_crc_is_no_tensor(tmp_path):
    path = tmp_path / "chunks.ckpt"
    parts = [{"w": oracle.Raw("UInt8", (4,), b"ab")}, {"w": oracle.Raw("UInt8", (4,), b"cd")}]
    path.write_bytes(b"".join(of_schema(part).SerializeToString() for part in parts) + b"crc_num" + bytes(10))
    assert oracle.read_raw(path) == {"w": oracle.Raw("UInt8", (4,), b"abcd")}


@pytest.mark.parametrize(("model", "case"), [(m, c) for m, cases in oracle.CASES.items() for c in cases])
def test_genuine_sources_are_byte_identical_to_what_mindspore_saves(genuine, saved_by_mindspore, model, case):
    ours, theirs = genuine.source(model, case), saved_by_mindspore.source(model, case)
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("*.ckpt"))
    assert files == sorted(path.relative_to(ours) for path in ours.rglob("*.ckpt"))
    assert len(files) == len(genuine.model(model).slices(case))
    assert all((ours / file).read_bytes() == (theirs / file).read_bytes() for file in files)


def test_every_dtype_is_saved_by_mindspore_as_the_fast_tests_write_it(tmp_path):
    import mindspore

    path = tmp_path / "all.ckpt"
    mindspore.save_checkpoint(every_dtype(), str(path), append_dict={"note": "text", "epoch_num": 3})
    assert path.read_bytes() == oracle.write_raw(tmp_path / "ours.ckpt", every_raw()).read_bytes()


def test_crc_and_safetensors_are_those_of_mindspore(tmp_path):
    import mindspore

    tensors = {name: raw for name, raw in every_raw().items() if name not in ("note", "epoch_num")}
    mindspore.save_checkpoint(every_dtype(), str(tmp_path / "crc.ckpt"), crc_check=True)
    ours = oracle.write_raw(tmp_path / "ours.ckpt", tensors, crc=True)
    assert (tmp_path / "crc.ckpt").read_bytes() == ours.read_bytes()
    mindspore.save_checkpoint(every_dtype(), str(tmp_path / "all.safetensors"), format="safetensors")
    ours = oracle.write_safetensors_raw(tmp_path / "ours.safetensors", tensors)
    assert oracle.read_safetensors_raw(tmp_path / "all.safetensors") == oracle.read_safetensors_raw(ours)
