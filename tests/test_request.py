"""What a conversion is known by: all that decides what the target files hold, and nothing else."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from builders import strategy

from auto_trans.core.edits import AddLora, Drop
from auto_trans.core.layout import Layout
from auto_trans.core.rules import Allowed
from auto_trans.core.strategy import Strategy
from auto_trans.errors import ConfigError
from auto_trans.request import Request
from auto_trans.storage.sources import Checkpoint

MP2, MP2_COLUMNS = Layout((2,), ((0,), ())), Layout((2,), ((), (0,)))
SOURCE, TARGET = strategy({"w": MP2, "v": MP2}), strategy({"w": MP2_COLUMNS, "v": MP2_COLUMNS})

DECIDES = {
    "from_strategy": strategy({"w": MP2, "v": MP2_COLUMNS}),
    "to_strategy": strategy({"w": MP2_COLUMNS, "v": MP2}),
    "edits": (Drop(("adam_",)),),
    "allowed": Allowed(("*.freqs",)),
    "prefix": "other_",
    "format": "safetensors",
    "shard_size": 1000,
    "engine": "mindspore",
}
DOES_NOT = {
    "src": Path("elsewhere"),
    "dst": Path("elsewhere"),
    "ranks": (1,),
    "step": "1_1",
    "file_suffix": "1_1",
    "resume_file": "net_rank_0-1_1.ckpt",
    "by_rank": True,
    "processes": 4,
    "memory_limit": 1 << 20,
    "reuse": False,
    "durable": False,
    "check_replicas": True,
    "network": {"w": (2, 2)},
}


@pytest.fixture
def files(tmp_path):
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / name).write_bytes(b"weights")
        os.utime(tmp_path / name, ns=(10**9, 10**9))
    return tmp_path / "a.ckpt", tmp_path / "b.ckpt"


@pytest.fixture
def request_(tmp_path):
    return Request(tmp_path, tmp_path / "out", SOURCE, TARGET)


def checkpoint(files, ranks=(0, 1)):
    return Checkpoint("net", files[0].parent, {rank: (file,) for rank, file in zip(ranks, files)}, True)


def test_every_setting_decides_or_does_not():
    assert {item.name for item in dataclasses.fields(Request)} == DECIDES.keys() | DOES_NOT.keys()


@pytest.mark.parametrize("name", DECIDES)
def test_what_decides_makes_another_digest(request_, files, name):
    other = dataclasses.replace(request_, **{name: DECIDES[name]})
    assert other.digest(checkpoint(files)) != request_.digest(checkpoint(files))


@pytest.mark.parametrize("name", DOES_NOT)
def test_what_changes_nothing_in_the_files_makes_the_same_digest(request_, files, name):
    other = dataclasses.replace(request_, **{name: DOES_NOT[name]})
    assert other.digest(checkpoint(files)) == request_.digest(checkpoint(files))


@pytest.mark.parametrize(
    "one, other",
    [
        ({"edits": (AddLora(1.0),)}, {"edits": (AddLora(2.0),)}),
        ({"edits": (Drop(("a",)), Drop(("b",)))}, {"edits": (Drop(("b",)), Drop(("a",)))}),
        ({"allowed": Allowed(("*.a",))}, {"allowed": Allowed((), ("*.a",))}),
        ({"shard_size": 1000}, {"shard_size": 1001}),
    ],
)
def test_digest_tells_edits_and_what_is_allowed_apart(request_, files, one, other):
    digests = {dataclasses.replace(request_, **changes).digest(checkpoint(files)) for changes in (one, other)}
    assert len(digests) == 2


def test_format_of_the_source_may_be_named(request_, files):
    named = dataclasses.replace(request_, format="ckpt")
    assert named.digest(checkpoint(files)) == request_.digest(checkpoint(files))


def test_digest_changes_with_the_time_and_the_size_of_every_source_file(request_, files):
    digests = [request_.digest(checkpoint(files))]
    for file in files:
        os.utime(file, ns=(10**9, 10**9 + 1))
        digests.append(request_.digest(checkpoint(files)))
        file.write_bytes(b"longer weights")
        os.utime(file, ns=(10**9, 10**9 + 1))
        digests.append(request_.digest(checkpoint(files)))
    assert len(set(digests)) == 5


def test_digest_changes_with_the_source_files_and_with_whose_they_are(request_, files):
    a, b = files
    chosen = [
        checkpoint((a, b)), checkpoint((b, a)), checkpoint((a,)), checkpoint((b,)), checkpoint((a, b), (0, 2)),
        Checkpoint("net", a.parent, {0: (a, b)}, False),
    ]  # fmt: skip
    assert len({request_.digest(one) for one in chosen}) == len(chosen)


def test_source_files_are_the_same_under_another_name(request_, files, tmp_path):
    (tmp_path / "links").mkdir()
    links = [tmp_path / "links" / file.name for file in files]
    for link, file in zip(links, files):
        link.symlink_to(file)
    assert request_.digest(checkpoint(links)) == request_.digest(checkpoint(files))


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": 2, "stage_devices": 1},
        {"stage_devices": 4},
        {"layouts": {"w": {0: MP2}}},
        {"layouts": {"w": {0: MP2}, "other": {0: MP2}}},
        {"layouts": {"w": {0: MP2}, "v": {1: MP2}}},
        {"layouts": {"w": {0: MP2}, "v": {0: Layout((2,), ((0,), ()), ndims=(2,))}}},
        {"refused": {"w": "uneven"}},
        {"otherwise": Layout((2,))},
    ],
)
def test_strategies_that_differ_in_anything_have_different_digests(changes):
    assert dataclasses.replace(SOURCE, **changes).digest != SOURCE.digest


def test_where_a_strategy_was_read_and_in_which_order_does_not_count():
    reordered = Strategy(1, 2, dict(reversed(SOURCE.layouts.items())), origin="somewhere")
    assert reordered.digest == SOURCE.digest


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prefix": ""}, "prefix"),
        ({"prefix": "a/b"}, "prefix"),
        ({"format": "npz"}, "format must be one of ckpt, safetensors"),
        ({"engine": "magic"}, "engine must be one of native, mindspore"),
        ({"processes": 0}, "must be at least 1"),
    ],
)
def test_values_that_cannot_be_are_refused(request_, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(request_, **changes)


def test_target_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Request(tmp_path, Path("~/out"), SOURCE, TARGET).dst == tmp_path / "out"
