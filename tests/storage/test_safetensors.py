from __future__ import annotations

import json
import os

import numpy as np
import oracle
import pytest
import safetensors
import safetensors.numpy
from builders import every_dtype, every_raw
from hypothesis import given
from hypothesis import strategies as st

from auto_trans import convert
from auto_trans.errors import CorruptCheckpointError, UnsupportedCheckpointError
from auto_trans.storage.formats import scan


def read(path):
    """Name -> (type, shape, bytes), through the safetensors library."""
    found = safetensors.deserialize(path.read_bytes())
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in found}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    tensors = {name: raw for name, raw in every_raw().items() if raw.dtype != "str"}
    return oracle.write_safetensors_raw(tmp_path_factory.mktemp("safetensors") / "all.safetensors", tensors)


@pytest.fixture(scope="module")
def saved_file(tmp_path_factory):
    """The same, saved by MindSpore."""
    import mindspore

    path = tmp_path_factory.mktemp("safetensors") / "all.safetensors"
    mindspore.save_checkpoint(every_dtype(), str(path), format="safetensors")
    return path


@pytest.mark.mindspore
def test_scan_finds_what_mindspore_saved(saved_file):
    check_scan(saved_file)


def test_scan_finds_every_type(saved):
    check_scan(saved)


def check_scan(saved):
    content, expected = saved.read_bytes(), read(saved)
    index = scan(saved)
    assert index.tensors.keys() == expected.keys()
    for name, tensor in index.tensors.items():
        ((offset, nbytes),) = tensor.segments
        assert (tensor.dims, content[offset : offset + nbytes]) == expected[name][1:]


@pytest.mark.parametrize("source", ["ckpt", "safetensors"])
@pytest.mark.parametrize("target", ["ckpt", "safetensors"])
def test_every_type_is_bit_identical_in_all_four_directions(saved, tmp_path, source, target):
    original = saved
    if source == "ckpt":
        tensors = {name: raw for name, raw in every_raw().items() if raw.dtype != "str"}
        original = oracle.write_raw(tmp_path / "all.ckpt", tensors)
    convert(original, tmp_path / "out", format=target)
    convert(tmp_path / "out", tmp_path / "back", format="safetensors")
    got = read(tmp_path / "back" / "rank_0" / "checkpoint_0.safetensors")
    if source == "ckpt":  # random numbers differ between the two files
        loaded = oracle.read_raw(original)
        assert {n: (s, b) for n, (_, s, b) in got.items()} == {n: (r.dims, r.content) for n, r in loaded.items()}
    else:
        assert got == read(original)


@pytest.mark.mindspore
def test_mindspore_and_the_library_load_what_we_write(saved_file, tmp_path):
    import mindspore

    convert(saved_file, tmp_path)
    path = tmp_path / "rank_0" / "checkpoint_0.safetensors"
    theirs = mindspore.load_checkpoint(str(saved_file), format="safetensors")
    ours = mindspore.load_checkpoint(str(path), format="safetensors")
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert ours[name].dtype == parameter.dtype and ours[name].shape == parameter.shape
        assert ours[name].get_bytes() == parameter.get_bytes()
    with safetensors.safe_open(path, framework="np") as f:
        # MindSpore's own key: a rank finds all that it needs, whatever remove_redundancy the YAML of its job says
        assert f.metadata() == {"format": "ms", "remove_redundancy": "False"}
        assert np.array_equal(f.get_tensor("layer.float32"), ours["layer.float32"].asnumpy())


@pytest.mark.parametrize("target", ["dp2mp2_opt", "dp2mp2pp2"])
def test_slices_equal_the_boxes_of_the_full_weights(genuine, tmp_path, target):
    weights = genuine.model("mf_llama")
    convert(
        genuine.complete("mf_llama"), tmp_path / "st", dst_strategy=weights.strategy("dp2mp2"), format="safetensors"
    )
    convert(tmp_path / "st", tmp_path / "out", weights.strategy("dp2mp2"), weights.strategy(target))
    for rank, boxes in weights.slices(target).items():
        got = read(tmp_path / "out" / f"rank_{rank}" / f"checkpoint_{rank}.safetensors")
        for name, box in boxes.items():
            if weights.dtypes[name] == "Float32" and name in got:
                assert got[name] == ("F32", box.shape, box.tobytes()), name


def test_elements_begin_at_multiples_of_their_size(saved, tmp_path):
    convert(saved, tmp_path)
    for tensor in scan(tmp_path / "rank_0" / "checkpoint_0.safetensors").tensors.values():
        assert tensor.segments[0][0] % tensor.item_bytes == 0


def test_every_truncation_is_noticed(saved, tmp_path):
    content = saved.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content)
    for length in reversed(range(len(content))):
        os.truncate(path, length)
        with pytest.raises(CorruptCheckpointError, match=r"cut\.safetensors"):
            scan(path)


@given(st.binary(max_size=300))
def test_any_other_bytes_are_refused_by_name(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "garbage.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"garbage\.safetensors"):
        scan(path)


@pytest.mark.parametrize(
    "entry",
    [{"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}],
)
def test_header_that_contradicts_the_contents_is_refused(tmp_path, entry):
    raw = json.dumps({"w": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 8)
    with pytest.raises(CorruptCheckpointError, match=r"parameter w"):
        scan(path)


def test_types_that_the_other_format_lacks_are_named(tmp_path):
    path = oracle.write_raw(tmp_path / "x.ckpt", {"note": oracle.Raw("str", (1,), "text".encode("utf-32-le"))})
    with pytest.raises(UnsupportedCheckpointError, match=r"note is of type str.*write \.ckpt files"):
        convert(path, tmp_path / "out", format="safetensors")
    raw = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "f8.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0")
    with pytest.raises(UnsupportedCheckpointError, match="w is of type F8_E4M3"):
        scan(path)


def test_bytes_after_the_last_parameter_are_refused(saved, tmp_path):
    (tmp_path / "longer.safetensors").write_bytes(saved.read_bytes() + b"x")
    with pytest.raises(CorruptCheckpointError, match=r"longer\.safetensors is not a complete safetensors file"):
        scan(tmp_path / "longer.safetensors")
