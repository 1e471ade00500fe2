"""What every target must do. To add one, subclass `TargetTests`."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from builders import hold, plan_of, strategy

from auto_trans.core.layout import Layout
from auto_trans.core.plan import FilePlan, Plan
from auto_trans.core.strategy import Strategy
from auto_trans.errors import OutputExistsError
from auto_trans.process import Process
from auto_trans.storage.checkpoint2.common import Common
from auto_trans.storage.checkpoint2.target import Iteration
from auto_trans.storage.formats import FORMATS, scan
from auto_trans.storage.manifest import MANIFEST_NAME, RECORDS_NAME, Manifest, read_manifest
from auto_trans.storage.names import INDEX_NAMES, TRACKER_NAME
from auto_trans.storage.targets import RankFolders, SafetensorsSet, Target
from auto_trans.storage.temporary import temporary_name

FULL = {
    "layer.1": np.arange(16.0).reshape(4, 4),
    "layer.0": np.arange(8.0).reshape(2, 4),
    "norm": np.arange(4.0),
    "global_step": np.array([7.0]),
}
SLICED = strategy(
    {
        "layer.1": Layout((2, 2), ((0,),)),
        "layer.0": Layout((2, 2), ((0,),)),
        "norm": Layout((2, 2)),
    }
)


class Killed(BaseException):
    """The process is gone: nothing that it would do happens any more."""


class Killer:
    """Ends the process at one of the calls by which it changes what lies on the disk."""

    CALLS = ("open", "write", "fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir")

    def __init__(self, patched: pytest.MonkeyPatch, at: int) -> None:
        self.count, self._at = 0, at
        for name in self.CALLS:
            patched.setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, original):
        def call(*arguments, **options):
            self.count += 1
            if self.count > self._at:
                raise Killed
            return original(*arguments, **options)

        return call


@pytest.fixture
def disk(monkeypatch):
    """What was synced, and what got its name, in order, by the names that count in the end."""
    calls, fsync, replace = [], os.fsync, os.replace

    def name_of(path):
        hidden = re.match(r"\.(.+)\.[0-9a-f]{16}-\d+-\d+-[0-9a-f]{8}\.tmp$", path.name)
        return path.with_name(hidden[1]) if hidden else path

    def sync(fd):
        calls.append(("sync", name_of(Path(os.readlink(f"/proc/self/fd/{fd}")))))
        fsync(fd)

    def name(old, new):
        replace(old, new)
        calls.append(("name", Path(new)))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", name)
    return calls


class TargetTests(ABC):
    """Arrange, check, begin, write, finish."""

    @abstractmethod
    def plan(self) -> Plan:
        """A plan of several files."""

    @abstractmethod
    def target(self, folder: Path, request: str = "request", **options: bool) -> Target:
        """A target with options that all have; two of one request have the same digest."""

    @abstractmethod
    def foreign(self) -> list[str]:
        """Names of files that must not lie in the folder before a conversion."""

    @abstractmethod
    def welcome(self) -> list[str]:
        """Names of files that may."""

    def opened(self, folder, request="request", **options) -> tuple[Target, tuple[FilePlan, ...]]:
        target = self.target(folder, request, **options)
        return target, target.arrange(self.plan())

    def content(self, target, file) -> bytes:
        """The bytes of a file: of each tensor other ones, so that no two files are alike."""
        parts = []
        for tensor, records in target.format.encode(file.tensors):
            for record in records:
                parts += [record.head, (f"{tensor.name}{tensor.box.offset}".encode() * record.length)[: record.length]]
        return b"".join(parts)

    def write(self, target, file):
        with target.open(file) as out:
            out.write(self.content(target, file))
        return target.publish(out, file)

    def convert(self, folder, request="request", **options):
        """All that a conversion does with a target."""
        target, files = self.opened(folder, request, **options)
        target.check(files)
        target.begin(files)
        for file in files:
            missing = [rank for rank in file.ranks if not target.done(rank, file.part)]
            there = next((record for rank in file.ranks if (record := target.done(rank, file.part))), None)
            left = FilePlan(tuple(missing), file.tensors, file.part)
            if there is None:
                self.write(target, file)
            elif missing:
                target.replicate(there, left)
        return target.finish()

    def expected(self, folder) -> dict[str, bytes]:
        """Name -> content of every file."""
        target, files = self.opened(folder)
        return {name: self.content(target, file) for file in files for name in target.names(file)}

    def snapshot(self, folder):
        """What lies there under final names; the tracker file of a Checkpoint 2.0, which is no JSON, apart."""
        found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return {name: content for name, content in found.items() if not name.endswith((".tmp", TRACKER_NAME))}

    def weights(self, folder):
        return {n: c for n, c in self.snapshot(folder).items() if not n.endswith(".json")}

    def test_there_are_several_files(self, tmp_path):
        _, files = self.opened(tmp_path)
        assert len(files) > 1, "or the tests below show little"

    def test_finished_target_holds_the_files_and_their_records(self, tmp_path):
        assert self.convert(tmp_path)
        assert self.weights(tmp_path) == self.expected(tmp_path)
        records = read_manifest(tmp_path)
        assert sorted(record.file for record in records) == sorted(self.expected(tmp_path))
        for record in records:
            stat = (tmp_path / record.file).stat()
            assert (stat.st_size, stat.st_mtime_ns) == (record.size, record.mtime_ns)
        assert not (tmp_path / RECORDS_NAME).exists()
        assert not list(tmp_path.rglob("*.tmp"))

    def test_files_can_be_read(self, tmp_path):
        self.convert(tmp_path)
        target, files = self.opened(tmp_path)
        for file in files:
            for name in target.names(file):
                assert set(scan(tmp_path / name).tensors) == {tensor.name for tensor in file.tensors}
                assert target.size(file) == (tmp_path / name).stat().st_size
                assert target.path(name) == tmp_path / name and target.path(name).parent in target.folders(files)

    def test_names_are_distinct_and_those_of_the_ranks(self, tmp_path):
        target, files = self.opened(tmp_path)
        names = [name for file in files for name in target.names(file)]
        assert len(set(names)) == len(names)
        assert all(target.names(f) == [target.name(rank, f.part) for rank in f.ranks] for f in files)

    def test_nothing_is_there_until_it_is_complete(self, tmp_path):
        target, files = self.opened(tmp_path)
        for number, file in enumerate(files):
            with target.open(file) as out:
                for byte in self.content(target, file):
                    out.write(bytes([byte]))
                before = self.weights(tmp_path)
                assert len(before) == sum(len(f.ranks) for f in files[:number])
                assert all(target.done(rank, file.part) is None for rank in file.ranks)
                assert not target.finish(), "what lacks a file is not finished"
            records = target.publish(out, file)
            assert [record.file for record in records] == target.names(file)
            assert all(target.done(r.rank, file.part) == r for r in records)
        assert not set(self.snapshot(tmp_path)) & {MANIFEST_NAME, *INDEX_NAMES}, "they tell that all is there"
        assert target.finish()

    def test_failure_leaves_nothing(self, tmp_path):
        target, files = self.opened(tmp_path)
        with pytest.raises(KeyError), target.open(files[0]) as out:
            out.write(b"half")
            raise KeyError
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == []

    @pytest.mark.parametrize("durable", [True, False], ids=["durable", "not durable"])
    def test_kill_at_any_moment_leaves_only_what_is_complete_and_is_gone_on_from(self, tmp_path, monkeypatch, durable):
        """Whatever was the last thing that it did, the next one finishes it."""
        monkeypatch.setattr(os, "fsync", lambda fd: None)  # nobody turns off the machine, and it takes long
        expected = self.expected(tmp_path / "none")
        at, finished = 0, False
        while not finished:
            folder = tmp_path / str(at)
            with pytest.MonkeyPatch.context() as patched:
                killer = Killer(patched, at)
                with contextlib.suppress(Killed):
                    finished = self.convert(folder, durable=durable)
            there = self.snapshot(folder) if folder.exists() else {}
            for name, content in there.items():
                if name.endswith((".json", "claim")):
                    json.loads(content)
                else:
                    assert content == expected[name], f"after {at} calls {name} is not complete"
            before = {name: (folder / name).stat().st_mtime_ns for name in there if name in expected}
            if MANIFEST_NAME in there:
                assert set(before) == set(expected), "finished, but a file is missing"
            assert self.convert(folder, durable=durable), f"killed after {at} calls it cannot go on"
            assert self.weights(folder) == expected
            after = {name: (folder / name).stat().st_mtime_ns for name in before}
            assert before == after, "what was complete is not written again"
            assert not (folder / RECORDS_NAME).exists()
            at += 1
        assert killer.count == at - 1 > 20

    def test_what_is_durable_is_on_the_disk_before_it_bears_its_name(self, tmp_path, disk):
        """So is then the name; the contents of replicas are there already."""
        assert self.convert(tmp_path)
        target, files = self.opened(tmp_path)
        replicas = {name for file in files for name in target.names(file)[1:]}
        for name in self.snapshot(tmp_path):
            path = tmp_path / name
            at = disk.index(("name", path))
            assert name in replicas or ("sync", path) in disk[:at], f"{name} is not on the disk"
            assert ("sync", path.parent) in disk[at:], f"that it is called {name} is not on the disk"

    def test_what_is_not_durable_never_waits_for_the_disk(self, tmp_path, disk):
        assert self.convert(tmp_path, durable=False)
        assert self.weights(tmp_path) == self.expected(tmp_path)
        assert [path for call, path in disk if call == "sync"] == []

    def test_what_was_not_synced_is_not_believed_where_everything_is(self, tmp_path):
        """A power loss may have taken its contents, and left its name and its record."""
        for folder, whole in ((tmp_path / "part", False), (tmp_path / "whole", True)):
            if whole:
                assert self.convert(folder, durable=False)
            else:
                target, files = self.opened(folder, durable=False)
                target.begin(files)
                self.write(target, files[0])
            before = self.snapshot(folder)
            target, files = self.opened(folder)
            assert not any(target.done(rank, file.part) for file in files for rank in file.ranks)
            assert not target.finish()
            with pytest.raises(OutputExistsError):
                target.check(files)
            assert self.snapshot(folder) == before
            assert self.convert(folder, durable=False), "the job itself goes on with it"
            kept = self.snapshot(folder)
            assert all(kept[name] == content for name, content in before.items() if name in self.expected(folder))

    def test_what_was_synced_is_believed_by_all(self, tmp_path):
        assert self.convert(tmp_path)
        target, files = self.opened(tmp_path, durable=False)
        target.check(files)
        assert all(target.done(rank, file.part) for file in files for rank in file.ranks)

    def test_finished_target_is_kept(self, tmp_path):
        self.convert(tmp_path)
        before = self.snapshot(tmp_path)
        target, files = self.opened(tmp_path)
        target.check(files)
        assert all(target.done(rank, file.part) for file in files for rank in file.ranks)
        assert self.convert(tmp_path) and self.snapshot(tmp_path) == before

    def test_what_is_not_to_be_reused_is_written_again(self, tmp_path):
        self.convert(tmp_path)
        target, files = self.opened(tmp_path, reuse=False)
        target.check(files)
        assert not any(target.done(rank, file.part) for file in files for rank in file.ranks)
        before = os.stat(tmp_path / target.names(files[0])[0]).st_ino
        self.write(target, files[0])
        assert os.stat(tmp_path / target.names(files[0])[0]).st_ino != before
        assert target.finish()

    def test_foreign_file_is_refused_and_untouched(self, tmp_path):
        for number, name in enumerate(self.foreign()):
            folder = tmp_path / str(number)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"precious")
            target, files = self.opened(folder)
            assert target.done(0) is None
            with pytest.raises(OutputExistsError, match=f"{folder / name} is there already"):
                target.check(files)
            assert self.snapshot(folder) == {name: b"precious"}

    def test_other_files_are_let_alone(self, tmp_path):
        for name in self.welcome():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"precious")
        assert self.convert(tmp_path)
        assert all((tmp_path / name).read_bytes() == b"precious" for name in self.welcome())

    def test_what_was_made_for_another_request_is_refused(self, tmp_path):
        self.convert(tmp_path, "another")
        before = self.snapshot(tmp_path)
        target, files = self.opened(tmp_path)
        assert not any(target.done(rank, file.part) for file in files for rank in file.ranks)
        assert not target.finish()
        with pytest.raises(OutputExistsError):
            target.check(files)
        assert self.snapshot(tmp_path) == before

    def test_what_was_half_made_for_another_request_is_refused(self, tmp_path):
        another, files = self.opened(tmp_path, "another")
        self.write(another, files[0])
        target, files = self.opened(tmp_path)
        assert target.done(files[0].ranks[0], files[0].part) is None
        with pytest.raises(OutputExistsError):
            target.check(files)

    def test_file_that_was_written_to_after_it_was_published_is_refused(self, tmp_path):
        self.convert(tmp_path)
        target, files = self.opened(tmp_path)
        name = target.names(files[-1])[-1]
        path = tmp_path / name
        content, stat = path.read_bytes(), path.stat()
        path.unlink()  # or its replicas would change with it
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        assert target.done(files[-1].ranks[-1], files[-1].part) is None
        with pytest.raises(OutputExistsError, match=name):
            self.target_of(tmp_path)

    def target_of(self, folder):
        target, files = self.opened(folder)
        target.check(files)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 2, "request": "request", "files": [{}]}'])
    def test_records_that_are_damaged_are_as_if_they_were_not_there(self, tmp_path, content):
        (tmp_path / RECORDS_NAME).mkdir()
        (tmp_path / RECORDS_NAME / "x.json").write_bytes(content)
        assert self.convert(tmp_path)

    def test_worker_processes_write_to_a_copy(self, tmp_path):
        target, files = self.opened(tmp_path)
        copy = pickle.loads(pickle.dumps(target))
        assert [copy.names(file) for file in files] == [target.names(file) for file in files]
        for file in files:
            self.write(copy, file)
        assert target.done(files[0].ranks[0], files[0].part) is None, "it has not looked"
        target.begin(files)
        assert all(target.done(rank, file.part) for file in files for rank in file.ranks)
        assert target.finish()

    def test_two_that_work_together_finish_once_both_are_done(self, tmp_path):
        (one, files), (other, _) = self.opened(tmp_path), self.opened(tmp_path)
        self.write(one, files[0])
        assert not one.finish()
        for file in files[1:]:
            self.write(other, file)
        assert other.finish() and one.finish()
        assert self.weights(tmp_path) == self.expected(tmp_path)

    def test_two_that_write_the_same_file_leave_it_whole(self, tmp_path):
        (one, files), (other, _) = self.opened(tmp_path), self.opened(tmp_path)
        for file in files:
            with one.open(file) as out:
                out.write(self.content(one, file)[:10])
                self.write(other, file)
                out.write(self.content(one, file)[10:])
            one.publish(out, file)
        assert one.finish() and other.finish()
        assert self.weights(tmp_path) == self.expected(tmp_path)

    def test_two_requests_at_once_do_not_mix(self, tmp_path):
        (one, files), (other, _) = self.opened(tmp_path), self.opened(tmp_path, "another request")
        for target in (one, other):
            target.check(files)  # nothing is there yet
        one.begin(files)
        with pytest.raises(
            OutputExistsError, match=f"a conversion of something else, begun by host .*, pid {os.getpid()}"
        ):
            other.begin(files)
        with pytest.raises(OutputExistsError, match="begun by"):
            other.check(files)
        for file in files:
            self.write(one, file)
        assert one.finish()
        with pytest.raises(OutputExistsError, match=r"a finished conversion of something else|is there already"):
            other.begin(files)
        one.begin(files)

    def test_request_that_was_given_up_before_it_made_anything_is_no_hindrance(self, tmp_path, monkeypatch):
        here = Process.current()
        gone = Process(here.host, here.pid, here.started + 1, here.space)
        with monkeypatch.context() as patched:
            patched.setattr(Process, "current", classmethod(lambda cls: gone))
            target, files = self.opened(tmp_path, "another request")
            target.begin(files)
        assert self.convert(tmp_path)

    def test_only_what_killed_ones_left_is_swept(self, tmp_path, monkeypatch):
        target, files = self.opened(tmp_path)
        here = Process.current()
        left, kept = [], []
        for folder in sorted({*target.folders(files), tmp_path, tmp_path / RECORDS_NAME}):
            folder.mkdir(parents=True, exist_ok=True)
            kept += [temporary_name(folder / "x"), folder / ".swap.tmp"]
            with monkeypatch.context() as patched:
                gone = Process(here.host, here.pid, here.started + 1, here.space)
                patched.setattr(Process, "current", classmethod(lambda cls, gone=gone: gone))
                left.append(temporary_name(folder / "x"))
        for file in (*left, *kept):
            file.write_bytes(b"half")
        target.begin(files)
        assert [file for file in (*left, *kept) if file.exists()] == kept


class RankFoldersTests(TargetTests):
    format = "ckpt"

    def plan(self):
        return plan_of(Strategy.complete(), SLICED, {0: FULL})

    def target(self, folder, request="request", **options):
        return RankFolders(folder, FORMATS[self.format], request, 4, prefix="checkpoint_", **options)

    def foreign(self):
        endings = [f"rank_3/{stem}.{name}" for stem in ("checkpoint_3", "net_rank_3-1_1") for name in FORMATS]
        return [*endings, "rank_0/checkpoint_1.ckpt", "rank_4/checkpoint_4.ckpt"]

    def welcome(self):
        return ["rank_0/notes.txt", "README.md", "rank_7/notes.txt", "other.ckpt"]


class TestRankFoldersOfCkpt(RankFoldersTests):
    pass


class TestRankFoldersOfSafetensors(RankFoldersTests):
    format = "safetensors"


class TestSafetensorsSet(TargetTests):
    def plan(self):
        return plan_of(SLICED, Strategy.complete(), hold(FULL, SLICED))

    def target(self, folder, request="request", **options):
        return SafetensorsSet(folder, request, shard_size=64, **options)

    def foreign(self):
        return [
            "model-00001-of-00003.safetensors",
            "model-00001-of-00002.safetensors",
            "weights.ckpt",
            "notes.txt",
            MANIFEST_NAME,
            *INDEX_NAMES,
        ]

    def welcome(self):
        return [".gitattributes", ".cache/x"]


class TestIteration(TargetTests):
    FULL: ClassVar = {**FULL, "adam_m.layer.1": np.arange(16.0, 32.0).reshape(4, 4)}
    STRATEGY = strategy(
        {**{n: stages[0] for n, stages in SLICED.layouts.items()}, "adam_m.layer.1": Layout((2, 2), ((1,),))}
    )

    def plan(self):
        return plan_of(Strategy.complete(), self.STRATEGY, {0: self.FULL})

    def target(self, folder, request="request", **options):
        return Iteration(folder, request, self.STRATEGY, 7, Common(1, 7, 7), prefix="tiny", **options)

    def foreign(self):
        names = [
            "tiny-model-0000000-0000004.safetensors",
            "opt-0000009-0000004.safetensors",
            "metadata.json",
            "notes.txt",
        ]
        return [
            *(f"iteration_00000007/{name}" for name in names),
            "x.ckpt",
            MANIFEST_NAME,
        ]

    def welcome(self):
        return [".gitattributes", "iteration_00000007/.cache/x"]

    def test_foreign_tracker_file_is_refused_and_untouched(self, tmp_path):
        (tmp_path / TRACKER_NAME).write_text("12")
        target, files = self.opened(tmp_path)
        with pytest.raises(OutputExistsError, match=f"{TRACKER_NAME} is there already"):
            target.check(files)
        assert (tmp_path / TRACKER_NAME).read_text() == "12"

    @pytest.mark.parametrize("name", ["iteration_00000006", "rank_0"])
    def test_other_checkpoint_in_the_folder_is_refused(self, tmp_path, name):
        (tmp_path / name).mkdir()
        target, files = self.opened(tmp_path)
        with pytest.raises(OutputExistsError, match=f"{tmp_path / name} is there already"):
            target.check(files)

    def test_tracker_file_is_written_last_of_all(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "fsync", lambda fd: None)
        at, finished = 0, False
        while not finished:
            folder = tmp_path / str(at)
            with pytest.MonkeyPatch.context() as patched:
                Killer(patched, at)
                with contextlib.suppress(Killed):
                    finished = self.convert(folder)
            if (folder / TRACKER_NAME).exists():
                assert (folder / TRACKER_NAME).read_text() == "7"
                there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
                beside = {f"iteration_00000007/{name}.json" for name in ("metadata", "common")}
                assert {*self.expected(folder), *beside, MANIFEST_NAME} <= there
            else:
                assert not finished
            at += 1
        assert at > 20

    def test_tracker_file_is_not_written_where_a_file_has_changed_meanwhile(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Manifest, "finish", lambda self, files: False)
        assert not self.convert(tmp_path)
        assert not (tmp_path / TRACKER_NAME).exists()

    def test_files_are_those_of_model_and_optimizer(self, tmp_path):
        _, files = self.opened(tmp_path)
        held = {part: {t.name for f in files if f.part == part for t in f.tensors} for part in (0, 1)}
        assert held == {0: {"layer.1", "layer.0", "norm"}, 1: {"adam_m.layer.1", "global_step"}}
