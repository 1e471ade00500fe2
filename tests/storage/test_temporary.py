"""Temporary files of killed writers are removed, those of live ones never."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import oracle
import pytest

from auto_trans import convert
from auto_trans.errors import OutputBusyError
from auto_trans.process import Process
from auto_trans.storage.clean import clean_folders
from auto_trans.storage.files import NewFile, replicate
from auto_trans.storage.temporary import SILENT_SECONDS, find_busy, sweep, temporary_name

# converts, and stops for ever once it has written half of the file of rank 0
CONVERT_AND_STOP = """
import sys, time
from auto_trans import convert
from auto_trans.storage.files import NewFile
write = NewFile.write
def write_and_stop(self, data):
    write(self, data)
    if self.path.suffix == ".ckpt" and len(data) > 1000:
        print("writing", flush=True)
        time.sleep(600)
NewFile.write = write_and_stop
convert(*sys.argv[1:])
"""


@contextlib.contextmanager
def stopped(source, target):
    """A process that is in the middle of a conversion."""
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERT_AND_STOP, source, target], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "writing\n"
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.fixture
def source(tmp_path):
    arrays = {name: oracle.raw(np.arange(5000, dtype=np.float32)) for name in ("a", "b")}
    return oracle.write_raw(tmp_path / "src" / "model.ckpt", arrays)


def temporary(folder):
    return sorted(folder.rglob("*.tmp"))


def leave(folder, *, pid=None, started=None, space=None, age=0.0):
    """A temporary file in a folder, by default that of this process."""
    folder.mkdir(parents=True, exist_ok=True)
    path = temporary_name(folder / "checkpoint_0.ckpt")
    mark = re.search(r"\.([0-9a-f]{16})-(\d+)-(\d+)-([0-9a-f]{8})\.tmp$", path.name)
    fields = [str(new if new is not None else old) for new, old in zip((space, pid, started), mark.groups())]
    path = folder / f".checkpoint_0.ckpt.{'-'.join((*fields, mark[4]))}.tmp"
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age,) * 2)
    return path


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


ELSEWHERE = "0123456789abcdef"


def test_killed_conversion_is_swept_by_the_next_and_its_result_is_right(source, tmp_path):
    target = tmp_path / "out"
    with stopped(source, target):
        (left,) = temporary(target)
        assert left.parent == target / "rank_0" and left.stat().st_size > 1000
    assert temporary(target) == [left], "killed, it could remove nothing"
    convert(source, target)
    assert temporary(target) == []
    assert oracle.read_raw(target / "rank_0" / "checkpoint_0.ckpt") == oracle.read_raw(source)


def test_live_conversion_is_neither_swept_nor_cleaned(source, tmp_path):
    output = tmp_path / "output"
    target = output / "transformed_checkpoint" / "net"
    with stopped(source, target) as process:
        (theirs,) = temporary(target)
        os.utime(theirs, (0, 0))
        assert sweep([target / "rank_0"]) == []
        (output / "strategy").mkdir()
        (output / "strategy" / "ckpt_strategy_rank_0.ckpt").write_bytes(b"x")
        with pytest.raises(OutputBusyError, match=rf"process {process.pid} is writing {re.escape(str(theirs))}"):
            clean_folders([output / "strategy", output / "transformed_checkpoint"], [])
        assert theirs.exists() and (output / "strategy" / "ckpt_strategy_rank_0.ckpt").exists(), "nothing is deleted"
    clean_folders([output / "strategy", output / "transformed_checkpoint"], [])
    assert list((output / "transformed_checkpoint").iterdir()) == []


def test_file_of_a_process_whose_number_is_used_again_is_swept(tmp_path):
    started = Process.current().started
    assert sweep([tmp_path]) == []
    again = leave(tmp_path, started=started + 1)
    mine = leave(tmp_path)
    gone = leave(tmp_path, pid=dead_pid())
    assert sorted(sweep([tmp_path])) == sorted([again, gone])
    assert temporary(tmp_path) == [mine]


def test_old_file_of_a_live_process_is_kept(tmp_path):
    mine = leave(tmp_path, age=10 * SILENT_SECONDS)
    assert sweep([tmp_path]) == []
    assert find_busy(tmp_path) == (mine, os.getpid())


def test_file_of_another_machine_is_given_up_after_a_day(tmp_path):
    fresh = leave(tmp_path, space=ELSEWHERE, pid=dead_pid(), age=SILENT_SECONDS - 60)
    silent = leave(tmp_path, space=ELSEWHERE, age=SILENT_SECONDS + 60)
    assert sweep([tmp_path]) == [silent]
    assert temporary(tmp_path) == [fresh]


@pytest.mark.parametrize("writer", [{"space": ELSEWHERE, "age": SILENT_SECONDS + 60}, {"pid": "dead"}])
def test_locked_file_is_kept(tmp_path, writer):
    writer = {**writer, "pid": dead_pid()} if "pid" in writer else writer
    file = leave(tmp_path / "rank_0", **writer)
    with open(file, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert sweep([tmp_path / "rank_0"]) == []
        assert find_busy(tmp_path)[0] == file
        with pytest.raises(OutputBusyError):
            clean_folders([tmp_path / "rank_0"], [])
    assert find_busy(tmp_path) is None
    assert sweep([tmp_path / "rank_0"]) == [file]


def test_job_that_was_killed_on_other_machines_can_be_started_again_at_once(tmp_path):
    """A temporary file of another machine that nobody locks does not hold up the cleaning of the next job."""
    leave(tmp_path / "transformed_checkpoint" / "rank_0", space=ELSEWHERE)
    clean_folders([tmp_path / "transformed_checkpoint"], [])
    assert list((tmp_path / "transformed_checkpoint").iterdir()) == []


def test_files_of_others_are_never_removed(tmp_path):
    names = [".editor.tmp", "weights.tmp", ".x.ckpt.12ab34cd.tmp", f".x.ckpt.{ELSEWHERE}-1-2-12ab34cd.tmp.bak"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (0, 0))
    assert sweep([tmp_path, tmp_path / "nowhere", tmp_path / names[0]]) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


def test_folders_below_are_not_swept(tmp_path):
    below = leave(tmp_path / "rank_0", pid=dead_pid())
    assert sweep([tmp_path]) == [] and below.exists()


@pytest.mark.parametrize("links", [True, False])
def test_files_that_are_written_are_locked(tmp_path, monkeypatch, links):
    """Wherever the other machine has the same locks, it sees by them that the writer lives."""
    seen = []

    def look(*arguments, **options):
        for file in temporary(tmp_path):
            with open(file, "rb") as other, contextlib.suppress(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                seen.append(file)

    def no_link(*arguments):
        raise OSError("no links here")

    out = NewFile(tmp_path / "a.ckpt")
    out.write(b"weights")
    look()
    out.publish()
    if not links:
        monkeypatch.setattr(os, "link", no_link)
        monkeypatch.setattr(os, "utime", lambda *a, utime=os.utime, **k: (look(), utime(*a, **k)))
    replicate(tmp_path / "a.ckpt", tmp_path / "rank_1" / "b.ckpt")
    assert seen == []
    assert (tmp_path / "rank_1" / "b.ckpt").stat().st_mtime_ns == (tmp_path / "a.ckpt").stat().st_mtime_ns
