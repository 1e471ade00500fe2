"""Files are written whole or not at all: no elements, holes, and sources that change."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import oracle
import pytest
from builders import hold, planned, save, strategy

from auto_trans.core.layout import Layout
from auto_trans.core.tensor import Box
from auto_trans.engine.native import NativeEngine
from auto_trans.errors import SourceChangedError

MP2 = Layout((2,), ((0,),))
EMPTY = {
    "none": oracle.Raw("Float32", (0,), b""),
    "no.rows": oracle.Raw("Float32", (0, 4), b""),
    "no.columns": oracle.Raw("Int32", (4, 0), b""),
    "scalar": oracle.Raw("Float32", (0,), b"\0\0\x80\x3f"),
    "w": oracle.raw(np.arange(8, dtype=np.float32)),
}


@pytest.mark.parametrize("order", [list(EMPTY), list(reversed(EMPTY))])
def test_parameters_without_elements_are_kept(tmp_path, order):
    source = oracle.write_raw(tmp_path / "a.ckpt", {name: EMPTY[name] for name in order})
    planned(source, tmp_path / "same").run(quiet=True)
    assert (tmp_path / "same" / "rank_0" / "checkpoint_0.ckpt").read_bytes() == source.read_bytes()


def test_parameters_without_elements_are_sliced(tmp_path):
    source = oracle.write_raw(tmp_path / "a.ckpt", EMPTY)
    sliced = {"none": MP2, "no.rows": MP2, "no.columns": MP2, "w": MP2}
    planned(source, tmp_path / "out", None, strategy(sliced)).run(quiet=True)
    found = oracle.read_raw(tmp_path / "out" / "rank_1" / "checkpoint_1.ckpt")
    assert {name: raw.dims for name, raw in found.items()} == {
        "none": (0,), "no.rows": (0, 4), "no.columns": (2, 0), "scalar": (0,), "w": (4,)
    }  # fmt: skip
    assert found["scalar"] == EMPTY["scalar"] and found["w"].content == EMPTY["w"].content[16:]


def test_parameters_without_elements_are_kept_by_the_other_format(tmp_path):
    from safetensors.numpy import load_file

    source = oracle.write_raw(tmp_path / "a.ckpt", EMPTY)
    planned(source, tmp_path / "there", format="safetensors").run(quiet=True)
    there = tmp_path / "there" / "rank_0" / "checkpoint_0.safetensors"
    assert {name: array.shape for name, array in load_file(there).items()} == {
        "none": (0,), "no.rows": (0, 4), "no.columns": (4, 0), "scalar": (), "w": (8,)
    }  # fmt: skip
    planned(there, tmp_path / "back", format="ckpt").run(quiet=True)
    back = oracle.read_raw(tmp_path / "back" / "rank_0" / "checkpoint_0.ckpt")
    assert {name: raw.content for name, raw in back.items()} == {name: raw.content for name, raw in EMPTY.items()}


def test_plan_with_a_hole_makes_no_file(tmp_path):
    conversion = planned(oracle.write_raw(tmp_path / "a.ckpt", EMPTY), tmp_path / "out")
    (file,) = conversion.files
    wider = [t._replace(box=Box((0,), (9,))) if t.name == "w" else t for t in file.tensors]
    task = conversion._task([replace(file, tensors=tuple(wider))])
    with pytest.raises(RuntimeError, match="plan of w covers 8 of 9 elements"):
        NativeEngine().write(task, lambda nbytes: None)
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]


def test_less_than_a_tensor_makes_no_file(tmp_path, monkeypatch):
    """Whatever a reader gives: the digest would vouch for what was written."""
    from auto_trans.engine.gather import Gatherer

    parts = Gatherer.parts
    monkeypatch.setattr(Gatherer, "parts", lambda *args: ((box, part[:-1]) for box, part in parts(*args)))
    conversion = planned(oracle.write_raw(tmp_path / "a.ckpt", EMPTY), tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"\d+ of the \d+ bytes of a tensor were written to .*checkpoint_0"):
        conversion.run(quiet=True)
    assert not list((tmp_path / "out").rglob("checkpoint_0*"))


@pytest.fixture
def conversion(tmp_path):
    """Two ranks that each read both source files."""
    a, b = strategy({"w": Layout((2,), ((0,), ()))}), strategy({"w": Layout((2,), ((), (0,)))})
    save(tmp_path / "src", hold({"w": np.arange(64).reshape(8, 8)}, a))
    return planned(tmp_path / "src", tmp_path / "out", a, b)


@pytest.mark.parametrize("rank", [0, 1])
def test_source_that_changes_while_it_is_read_makes_no_file(conversion, tmp_path, rank):
    (file,) = conversion.checkpoint.files[rank]

    def change(done, total):
        if done:  # all that is needed is mapped
            os.utime(file, ns=(1, 1))

    with pytest.raises(SourceChangedError, match=rf"{file.name} was written to while"):
        conversion.run(quiet=True, listener=change)
    assert not list((tmp_path / "out").rglob("*.ckpt"))


def test_source_that_is_removed_while_it_is_read_makes_no_file(conversion, tmp_path):
    (file,) = conversion.checkpoint.files[1]
    with pytest.raises(SourceChangedError, match="is gone since its head was read"):
        conversion.run(quiet=True, listener=lambda done, total: file.unlink(missing_ok=True) if done else None)
    assert not list((tmp_path / "out").rglob("*.ckpt"))
