"""What is particular to each target; what all of them must do is in ``tests/conformance``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import oracle
import pytest
from builders import plan_of, request, strategy

from auto_trans import convert
from auto_trans.core.layout import Layout
from auto_trans.core.plan import FilePlan
from auto_trans.core.strategy import Strategy
from auto_trans.errors import ConfigError, OutputError, OutputExistsError
from auto_trans.storage.files import write_json
from auto_trans.storage.formats import FORMATS
from auto_trans.storage.manifest import MANIFEST_NAME, RECORDS_NAME, FileRecord, Manifest, read_manifest
from auto_trans.storage.names import HYPER_PARAMETERS, INDEX_NAMES, rank_file
from auto_trans.storage.targets import RankFolders, SafetensorsSet

SLICED = strategy({name: Layout((1,)) for name in ("a", "b", "c", "d")})


def plan(shapes, carried=()):
    full = {name: np.zeros(shape) for name, shape in shapes.items()}
    return plan_of(SLICED, Strategy.complete(), {0: {**full, **{name: np.zeros(1) for name in carried}}})


def arranged(folder, shapes, shard_size, carried=()):
    target = SafetensorsSet(folder, "request", shard_size=shard_size)
    files = target.arrange(plan(shapes, carried))
    return target, {target.name(0, file.part): [tensor.name for tensor in file.tensors] for file in files}


def write(target, file):
    with target.open(file) as out:
        for _, records in target.format.encode(file.tensors):
            for record in records:
                out.write(record.head + bytes(record.length))
    return target.publish(out, file)


def rank_folders(folder, request="request", world_size=2, format="ckpt"):
    return RankFolders(folder, FORMATS[format], request, world_size, prefix="checkpoint_")


FILE = FilePlan((0, 1), ())


def test_rank_file_is_where_mindformers_expects_it():
    assert rank_file(Path("out"), "checkpoint_", 12) == Path("out/rank_12/checkpoint_12.ckpt")
    assert rank_folders(Path("out"), format="safetensors").name(3) == "rank_3/checkpoint_3.safetensors"


@pytest.mark.parametrize(
    "size, expected",
    [
        (4 * 118, [["a", "b", "c", "d"]]),
        (4 * 9, [["a", "b"], ["c"], ["d"]]),
        (4 * 8, [["a"], ["b"], ["c"], ["d"]]),
        (1, [["a"], ["b"], ["c"], ["d"]]),
    ],
)
def test_set_is_split_by_size(tmp_path, size, expected):
    """A tensor goes with those before it as long as they fit; one that is too large has a file of its own."""
    target, files = arranged(tmp_path, {"a": (4,), "b": (5,), "c": (9,), "d": (100,)}, size)
    names = [f"model-{i:05d}-of-{len(expected):05d}.safetensors" for i in range(1, len(expected) + 1)]
    assert files == dict(zip(names, expected))
    assert target.weight_map == {name: file for file, held in files.items() for name in held}
    assert target.total_size == 4 * 118


def test_what_no_strategy_lists_goes_to_a_file_of_its_own_that_no_index_names(tmp_path):
    target, files = arranged(tmp_path, {"a": (4,)}, 100, carried=("global_step",))
    assert files == {"model-00001-of-00001.safetensors": ["a"], HYPER_PARAMETERS: ["global_step"]}
    for file in target.arrange(plan({"a": (4,)}, ("global_step",))):
        write(target, file)
    assert target.finish()
    for name in INDEX_NAMES:
        index = json.loads((tmp_path / name).read_text())
        assert index == {"metadata": {"total_size": 16}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}


def test_indices_come_before_the_manifest(tmp_path, monkeypatch):
    """The manifest says that the set is complete, so it is the last."""
    target = SafetensorsSet(tmp_path, "request", shard_size=100)
    (file,) = target.arrange(plan({"a": (4,)}))
    write(target, file)
    written = []
    for module in ("targets", "manifest"):
        monkeypatch.setattr(
            f"auto_trans.storage.{module}.write_json",
            lambda path, content, **options: (written.append(path.name), write_json(path, content, **options)),
        )
    assert target.finish() and written == [*INDEX_NAMES, MANIFEST_NAME]


@pytest.mark.parametrize("name", [*INDEX_NAMES, MANIFEST_NAME])
def test_index_beside_the_records_of_another_is_not_overwritten(tmp_path, name):
    """Records alone do not make an index ours: it is written last, when the files are there."""
    (tmp_path / RECORDS_NAME).mkdir()
    (tmp_path / name).write_text("precious")
    target, _ = arranged(tmp_path, {"a": (4,)}, 100)
    with pytest.raises(OutputExistsError, match=f"{name} is there already"):
        target.check(())
    assert (tmp_path / name).read_text() == "precious"


def test_place_that_is_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "out").write_bytes(b"precious")
    for target in (rank_folders(tmp_path / "out"), arranged(tmp_path / "out", {"a": (4,)}, 100)[0]):
        with pytest.raises(OutputError, match=r"/out is a file and no folder"):
            target.check([FILE])
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "rank_1").write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"/dst/rank_1 is a file and no folder"):
        rank_folders(tmp_path / "dst").check([FILE])


def test_place_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    def fail(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", fail)
    for target in (rank_folders(tmp_path), arranged(tmp_path, {"a": (4,)}, 100)[0]):
        with pytest.raises(OutputError, match=r"cannot be read: .*Permission denied.* set an output directory"):
            target.check([FILE])


def test_only_the_ranks_of_the_files_are_looked_at(tmp_path):
    """Each of several converters checks what it writes."""
    (tmp_path / "rank_1").mkdir()
    (tmp_path / "rank_1" / "old.ckpt").write_bytes(b"precious")
    rank_folders(tmp_path).check([FilePlan((0,), ())])
    with pytest.raises(OutputExistsError, match=r"rank_1/old\.ckpt"):
        rank_folders(tmp_path).check([FILE])


def test_finished_needs_every_rank_of_the_world(tmp_path):
    target = rank_folders(tmp_path, world_size=3)
    write(target, FILE)
    assert not target.finish() and not (tmp_path / MANIFEST_NAME).exists()
    write(target, FilePlan((2,), ()))
    assert target.finish()
    assert [record.rank for record in read_manifest(tmp_path)] == [0, 1, 2]


RECORD = {"rank": 0, "file": "rank_0/checkpoint_0.ckpt", "size": 1, "mtime_ns": 1, "xxh3_128": "0"}


@pytest.mark.parametrize(
    "files",
    [
        [{**RECORD, "file": 1}],
        [{**RECORD, "size": "1"}],
        [{**RECORD, "mtime_ns": 1.0}],
        [{**RECORD, "rank": True}],
        [{**RECORD, "more": 1}],
        [{"rank": 0}],
        [[]],
        "abc",
        7,
        None,
    ],
)
def test_damaged_records_are_as_if_they_were_not_there(tmp_path, files):
    content = {"version": 2, "request": "request", "files": files}
    for path in (tmp_path / MANIFEST_NAME, tmp_path / RECORDS_NAME / "x.json"):
        write_json(path, content)
    assert read_manifest(tmp_path) is None
    assert Manifest(tmp_path, "request", 1).done(RECORD["file"]) is None
    (tmp_path / MANIFEST_NAME).write_text("[" * 100_000)
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("version", [1, 3, None, "2"])
def test_records_of_another_version_are_not_believed(tmp_path, version):
    (tmp_path / "x").write_bytes(b"weights")
    stat = (tmp_path / "x").stat()
    record = {**RECORD, "file": "x", "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    for number, done in ((2, FileRecord(**record)), (version, None)):
        write_json(tmp_path / MANIFEST_NAME, {"version": number, "request": "request", "files": [record]})
        assert Manifest(tmp_path, "request", 1).done("x") == done


def test_home_is_the_users_in_source_and_target(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    oracle.write_raw(tmp_path / "model.ckpt", {"w": oracle.raw(np.ones(3, np.float32))})
    report = convert("~/model.ckpt", "~/out")
    assert report.target == tmp_path / "out" and not (tmp_path / "~").exists()
    assert (tmp_path / "out" / "rank_0" / "checkpoint_0.ckpt").exists()
    with pytest.raises(ConfigError, match="~nobody_of_that_name/out is nowhere"):
        request("~/model.ckpt", "~nobody_of_that_name/out")
