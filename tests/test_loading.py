"""The slices of one rank in memory: `load` and `load_each`, without MindSpore."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import types
import weakref
from pathlib import Path

import numpy as np
import oracle
import pytest
from builders import conversions, every_raw, hold, read_file, save, strategy
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_trans import load, load_each, loading
from auto_trans.core.layout import Layout
from auto_trans.core.strategy import Strategy
from auto_trans.errors import (
    AutoTransError,
    CheckpointNotFoundError,
    ConfigError,
    ConfigTypeError,
    CorruptCheckpointError,
    MissingSliceError,
    PlanError,
    SourceChangedError,
)
from auto_trans.loading import Loaded, assemble, file_of_rank
from auto_trans.planned import Planned
from auto_trans.storage.sources import find_source

MIB = 1024 * 1024
ROWS, COLUMNS = Layout((2,), ((0,), ())), Layout((2,), ((), (0,)))
FULL = {
    "layer.w": np.arange(16).reshape(4, 4),
    "layer.v": np.arange(8).reshape(4, 2),
    "adam_m.layer.w": np.ones((4, 4)),
}


@pytest.fixture
def sliced(tmp_path):
    """A source of two ranks by rows, and the strategies of it and of a target by columns."""
    source, target = (strategy(dict.fromkeys(FULL, layout)) for layout in (ROWS, COLUMNS))
    return save(tmp_path / "net", hold(FULL, source)), source, target


def written(folder, arrays):
    """A complete file of arrays of any types."""
    return oracle.write_raw(folder / "net.ckpt", {name: oracle.raw(array) for name, array in arrays.items()})


def equal(got, expected):
    return list(got) == list(expected) and all(np.array_equal(got[name], array) for name, array in expected.items())


# which rank gets what


@given(conversions(), st.data())
@settings(max_examples=40)
def test_every_rank_gets_its_box(conversion, data):
    source, target, full = conversion
    full, from_strategy, to_strategy = {"w": full}, strategy({"w": source}), strategy({"w": target})
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), hold(full, from_strategy), np.int64)
        ranks = range(to_strategy.world_size)
        for rank in {ranks[0], ranks[-1], data.draw(st.sampled_from(ranks))}:
            got = load(folder, rank, from_strategy, to_strategy)
            assert equal(got, hold(full, to_strategy)[rank]) and got["w"].dtype == np.int64


def test_complete_target_is_the_whole_and_complete_source_is_sliced(sliced, tmp_path):
    folder, source, target = sliced
    assert equal(load(folder, src_strategy=source), FULL)
    complete = written(tmp_path, FULL)
    for rank, held in hold(FULL, target).items():
        assert equal(load(complete, rank, dst_strategy=target), held)
        assert equal(load(str(folder), rank, source, target), held)


def test_nothing_is_written_and_the_source_is_untouched(sliced, tmp_path, snapshot):
    before = snapshot(tmp_path)
    load(sliced[0], 1, *sliced[1:])
    assert snapshot(tmp_path) == before


def test_step_is_taken_as_asked_for(sliced):
    folder, source, target = sliced
    for rank in range(2):
        shutil.copy(
            folder / f"rank_{rank}" / f"net_rank_{rank}-1_1.ckpt", folder / f"rank_{rank}" / f"net_rank_{rank}-1_2.ckpt"
        )
    (folder / "rank_0" / "net_rank_0-1_2.ckpt").write_bytes(b"damaged")
    with pytest.raises(CorruptCheckpointError):
        load(folder, 0, source, target)
    assert equal(load(folder, 0, source, target, step="1_1"), hold(FULL, target)[0])


def test_arrays_may_be_written_to_and_share_no_element(sliced):
    got = load(sliced[0], 0, *sliced[1:])
    for number, array in enumerate(got.values()):
        array[:] = number
    assert all((array == number).all() for number, array in enumerate(got.values()))


# which parameters


@pytest.mark.parametrize(
    "choice, chosen",
    [
        ({"names": ["layer.v"]}, ["layer.v"]),
        ({"names": (name for name in ("adam_m.layer.w", "layer.w"))}, ["layer.w", "adam_m.layer.w"]),
        ({"only_prefix": "layer."}, ["layer.w", "layer.v"]),
        ({"only_prefix": ["layer.v", "adam"]}, ["layer.v", "adam_m.layer.w"]),
        ({"skip_prefix": "adam_m."}, ["layer.w", "layer.v"]),
        ({"skip_prefix": ("adam_m.", "layer.w", "nothing")}, ["layer.v"]),
        ({"only_prefix": "layer.", "skip_prefix": "layer.w"}, ["layer.v"]),
        ({"names": ["layer.w", "layer.v"], "skip_prefix": "layer.w"}, ["layer.v"]),
        ({}, list(FULL)),
    ],
)
def test_chosen_parameters_come_in_file_order(sliced, choice, chosen):
    assert list(load(sliced[0], 0, *sliced[1:], **choice)) == chosen


@pytest.mark.parametrize(
    "choice, error, message",
    [
        (
            {"names": ["layer.w", "other", "another"]},
            PlanError,
            r"another, other is asked for .* has layer\.w, layer\.v",
        ),
        ({"names": []}, PlanError, "no parameter is left"),
        ({"only_prefix": "other."}, PlanError, "no parameter is left"),
        ({"only_prefix": "layer.", "skip_prefix": "layer."}, PlanError, "change names, only_prefix or skip_prefix"),
        ({"names": "layer.w"}, ConfigTypeError, "several names"),
        ({"names": 3}, ConfigTypeError, "several names"),
        ({"names": [["layer.w"]]}, ConfigTypeError, "names must be"),
        ({"names": b"layer.w"}, ConfigTypeError, "names must be"),
        ({"names": [""]}, ConfigTypeError, "names must be"),
        ({"only_prefix": 3}, ConfigTypeError, "only_prefix must be"),
        ({"only_prefix": ["layer.", None]}, ConfigTypeError, "only_prefix must be"),
        ({"only_prefix": ""}, ConfigTypeError, "only_prefix must be"),
        ({"skip_prefix": None}, ConfigTypeError, "skip_prefix must be"),
        ({"allow_extra": [1]}, ConfigTypeError, "allow_extra"),
        ({"bfloat16": np.float32}, ConfigTypeError, "bfloat16 must be numpy.uint16, for the bits"),
        ({"bfloat16": "uint16"}, ConfigTypeError, "bfloat16 must be"),
        ({"step": "9_9"}, AutoTransError, "9_9"),
    ],
)
def test_wrong_choice_is_told_before_anything_is_loaded(sliced, choice, error, message):
    with pytest.raises(error, match=message):
        load_each(sliced[0], 0, *sliced[1:], **choice)  # nobody has asked for the first yet


# errors


@pytest.mark.parametrize(
    "rank, error", [(2, ConfigError), (-1, ConfigError), ("0", ConfigTypeError), (True, ConfigTypeError)]
)
def test_rank_that_the_target_does_not_have_is_refused(sliced, rank, error):
    with pytest.raises(error, match="rank"):
        load_each(sliced[0], rank, *sliced[1:])


@pytest.mark.parametrize("given", [b"strategy", "", ["strategy"], 3])
def test_strategy_that_is_no_path_is_refused(sliced, given):
    for strategies in ((given, sliced[2]), (sliced[1], given)):
        with pytest.raises(ConfigTypeError, match="a strategy must be a path"):
            load(sliced[0], 0, *strategies)


@pytest.mark.parametrize("step", [(1, 1), 1, b"1_1"])
def test_step_that_is_no_text_is_refused(sliced, step):
    with pytest.raises(ConfigError, match="must be an epoch and a step"):
        load(*sliced[:1], 0, *sliced[1:], step=step)


@pytest.mark.parametrize("rank", [0, 1, 7, np.int64(3)])
def test_without_a_target_strategy_every_rank_has_all_weights_whole(sliced, rank):
    whole, own = load(sliced[0], 0, sliced[1]), load(sliced[0], rank, sliced[1])
    assert whole.keys() == own.keys() and all(np.array_equal(own[name], array) for name, array in whole.items())


def test_file_that_becomes_shorter_while_it_is_read_is_an_error(tmp_path):
    """A mapped one would end the process without a word."""
    path = written(tmp_path, {f"w{i}": np.full(MIB, i, np.uint8) for i in range(4)})
    slices = load_each(path)
    next(slices)
    os.truncate(path, 1000)
    with pytest.raises((CorruptCheckpointError, SourceChangedError), match=path.name):
        list(slices)


def test_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="nowhere"):
        load_each(tmp_path / "nowhere")
    with pytest.raises(ConfigTypeError, match="must be a path"):
        load_each(None)


def test_slice_that_is_missing_is_named_where_the_rank_needs_it(tmp_path):
    """Parameters of four rows on four ranks; rank 0 of the target needs the first half."""
    full = {"w": np.arange(8).reshape(4, 2)}
    source, target = strategy({"w": Layout((4,), ((0,), ()))}), strategy({"w": ROWS})
    folder = save(tmp_path / "net", hold(full, source))
    shutil.rmtree(folder / "rank_3")
    assert equal(load(folder, 0, source, target), {"w": full["w"][:2]})
    with pytest.raises(MissingSliceError, match="held by source rank 3 only"):
        load_each(folder, 1, source, target)


def test_files_of_different_jobs_are_refused_though_the_rank_reads_one_of_them(tmp_path):
    """What only the other file holds would be missing without a word."""
    source = strategy({"layer.w": ROWS})
    held = hold({"layer.w": FULL["layer.w"]}, source)
    held[1]["bias"] = np.arange(3)
    folder = save(tmp_path / "net", held)
    with pytest.raises(PlanError, match=r"parameter bias is in .*rank_1"):
        load_each(folder, 1, source, source, allow_extra=["bias"])


def test_array_in_no_strategy_that_differs_between_ranks_is_refused(tmp_path):
    source = strategy({"layer.w": ROWS})
    held = hold({"layer.w": FULL["layer.w"], "table": np.arange(4)}, source)
    folder = save(tmp_path / "net", held)
    assert equal(load(folder, 1, source, source, allow_extra="table"), held[1])
    held[1]["table"] = np.arange(4) + 1
    save(folder, held)
    with pytest.raises(PlanError, match="differs between source rank 0 and 1"):
        load_each(folder, 1, source, source, allow_extra="table")


def test_damaged_file_is_named_before_anything_is_loaded(sliced):
    file = sliced[0] / "rank_1" / "net_rank_1-1_1.ckpt"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError, match="net_rank_1-1_1"):
        load_each(sliced[0], 0, *sliced[1:])


@pytest.mark.parametrize("change", ["touched", "replaced", "gone"])
def test_source_that_changes_while_it_is_streamed_ends_with_an_error(sliced, change):
    folder, source, target = sliced
    file = folder / "rank_1" / "net_rank_1-1_1.ckpt"
    slices = load_each(folder, 0, source, target)
    assert next(slices)[0] == "layer.w"
    if change == "touched":
        os.utime(file, ns=(0, 0))
    elif change == "replaced":
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content + content)
    else:
        file.unlink()
    with pytest.raises(SourceChangedError, match="net_rank_1-1_1"):
        list(slices)


def test_source_that_changes_before_the_first_is_asked_for_is_noticed(sliced):
    slices = load_each(sliced[0], 0, *sliced[1:])
    os.utime(sliced[0] / "rank_0" / "net_rank_0-1_1.ckpt", ns=(0, 0))
    with pytest.raises(SourceChangedError, match="net_rank_0-1_1"):
        next(slices)


def test_file_that_the_chosen_parameters_do_not_need_may_change(sliced):
    slices = load_each(sliced[0], 0, sliced[1], sliced[1])
    os.utime(sliced[0] / "rank_1" / "net_rank_1-1_1.ckpt", ns=(0, 0))
    assert len(list(slices)) == 3


# types

TYPES = {name: kind for kind, name in oracle.NAMES.items()}


def test_every_type_is_an_array_of_the_same_bytes(tmp_path):
    extra = {
        "complex": oracle.Raw("Complex64", (2,), np.array([1 + 2j, 3]).astype(np.complex64).tobytes()),
        "long": oracle.Raw("Complex128", (1,), np.array([1 - 2j]).tobytes()),
        "scalar of dims 0": oracle.Raw("Float16", (0,), np.float16(1.5).tobytes()),
        "empty": oracle.raw(np.zeros((2, 0), np.float32)),
        "packed": oracle.Raw("Int4", (3, 2), b"\x12\x34\x56"),
        "padded": oracle.Raw("str", (0,), "ab\0".encode("utf-32-le")),
        "nothing": oracle.Raw("str", (0,), b""),
    }
    raws = {**every_raw(), **extra}
    got = load(oracle.write_raw(tmp_path / "net.ckpt", raws), bfloat16=np.uint16)
    assert list(got) == list(raws)
    numpy = {**TYPES, "Complex64": "complex64", "Complex128": "complex128", "BFloat16": "uint16", "Int4": "uint8"}
    for name, raw in raws.items():
        if raw.dtype != "str":
            assert got[name].tobytes() == raw.content and got[name].dtype == numpy[raw.dtype], name
    shapes = {name: raw.dims for name, raw in raws.items() if raw.dtype not in ("str", "Int4")}
    assert {name: got[name].shape for name in shapes} == {**shapes, "scalar of dims 0": ()}
    assert got["packed"].shape == (3,) and got["scalar of dims 0"] == 1.5 and got["empty"].shape == (2, 0)
    assert {name: (str(got[name]), got[name].shape) for name in ("note", "padded", "nothing")} == {
        "note": ("text", ()), "padded": ("ab", ()), "nothing": ("", ())
    }  # fmt: skip
    assert all(array.ctypes.data % 64 == 0 for name, array in got.items() if array.size and raws[name].dtype != "str")


def test_slices_are_told_with_the_dims_under_which_they_are_stored(tmp_path):
    raws = {
        "packed": oracle.Raw("Int4", (3, 2), b"\x12\x34\x56"),
        "note": oracle.Raw("str", (0,), "ab".encode("utf-32-le")),
        "scalar": oracle.Raw("Float16", (0,), np.float16(1.5).tobytes()),
    }
    got = {one.name: one for one in read_file(oracle.write_raw(tmp_path / "net.ckpt", raws))}
    assert {name: (one.dtype, one.shape) for name, one in got.items()} == {
        "packed": ("Int4", (3, 2)), "note": ("str", (0,)), "scalar": ("Float16", ())
    }  # fmt: skip
    assert {name: one.data.tobytes() for name, one in got.items()} == {name: raw.content for name, raw in raws.items()}


@pytest.mark.parametrize("content", [b"abc", b"\xff\xff\xff\xff"])
def test_string_that_is_no_text_is_a_damaged_checkpoint(tmp_path, content):
    path = oracle.write_raw(tmp_path / "net.ckpt", {"note": oracle.Raw("str", (0,), content)})
    with pytest.raises(CorruptCheckpointError, match="parameter note is no text"):
        load(path)


BFLOAT16 = {"w": oracle.raw(np.arange(4), "BFloat16"), "v": oracle.raw(np.arange(4, dtype=np.float32))}


def test_bfloat16_without_a_type_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    path = oracle.write_raw(tmp_path / "net.ckpt", BFLOAT16)
    with pytest.raises(ConfigError, match=r"parameter w .*install ml_dtypes, or give bfloat16=numpy.uint16"):
        load_each(path)
    assert load(path, names=["v"])["v"].dtype == np.float32, "who does not need the type needs no package"
    assert load(path, bfloat16=np.uint16)["w"].tobytes() == BFLOAT16["w"].content
    assert load(path, bfloat16=np.dtype("uint16"))["w"].shape == (4,)


def test_bfloat16_has_the_type_of_ml_dtypes_if_there_is_one(tmp_path, monkeypatch):
    """Stands in for the package, of which only the type is used."""
    stand_in = types.ModuleType("ml_dtypes")
    stand_in.bfloat16 = np.int16
    monkeypatch.setitem(sys.modules, "ml_dtypes", stand_in)
    got = load(oracle.write_raw(tmp_path / "net.ckpt", BFLOAT16))
    assert got["w"].dtype == np.int16 and got["w"].tobytes() == BFLOAT16["w"].content


# memory


class Held:
    """Counts the memory for slices that is held, by what is taken and given back of it."""

    def __init__(self, monkeypatch):
        self.now = self.most = 0
        take = loading._aligned

        def aligned(nbytes):
            memory = take(nbytes)
            owner = memory if memory.base is None else memory.base
            self.now += owner.nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(owner, self._give_back, owner.nbytes)
            return memory

        monkeypatch.setattr(loading, "_aligned", aligned)

    def _give_back(self, nbytes):
        self.now -= nbytes


def streamed(path):
    """Streams a file, and lets each array go before the next."""
    for name, array in load_each(path):
        assert array.flat[0] == array.flat[-1] == int(name[1:])
        del array


@pytest.mark.parametrize("sizes, most", [([40, 48, 40], 48), ([1, 20, 15, 40, 3, 30, 2], 32 + 40), ([12] * 9, 32)])
def test_who_lets_each_go_needs_a_slab_and_the_largest(tmp_path, monkeypatch, sizes, most):
    """In MiB."""
    path = written(tmp_path, {f"w{i}": np.full(mib * MIB, i, np.uint8) for i, mib in enumerate(sizes)})
    held = Held(monkeypatch)
    streamed(path)
    assert 0 < held.most <= most * MIB + 1024 and held.now == 0


def test_what_is_held_as_a_whole_lies_in_few_pieces(tmp_path, monkeypatch):
    """Of the last huge page of each piece a part is for nothing."""
    path = written(tmp_path, {f"w{i}": np.full(17 * MIB, i, np.uint8) for i in range(12)})
    pieces = []
    monkeypatch.setattr(loading, "_aligned", lambda nbytes: pieces.append(nbytes) or np.empty(nbytes, np.uint8))
    load(path)
    assert pieces == [12 * 17 * MIB]


def test_small_slices_share_their_memory(tmp_path, monkeypatch):
    path = written(tmp_path, {f"w{i}": np.full(1000, i % 100, np.uint8) for i in range(1000)})
    held = Held(monkeypatch)
    got = load(path)
    assert held.most <= 1000 * 1024 + 64 and all((array == i % 100).all() for i, array in enumerate(got.values()))
    del got
    assert held.now == 0


def test_slices_are_counted_as_they_are_taken(tmp_path):
    """Told of a slice that is done, and of all in the end."""
    counted = []
    path = written(tmp_path, {"w": np.arange(6), "v": np.arange(3)})
    slices = read_file(path)
    assert isinstance(next(slices), Loaded)
    slices.close()
    complete = Strategy.complete()
    file = file_of_rank(Planned(find_source(path, complete), complete, complete), 0)
    for number, _ in enumerate(assemble(file.tensors, counted.append)):
        assert len(counted) == number
    assert counted == [48, 24]
