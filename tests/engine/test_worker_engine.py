"""Worker processes share a task, and none of them is left."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import oracle
import psutil
import pytest
from builders import planned, strategy

from auto_trans.core.layout import Layout
from auto_trans.engine.native import NativeEngine
from auto_trans.engine.workers import WorkerEngine
from auto_trans.errors import ConfigError, OutputError, RankLostError

FULL = {"w": np.arange(4096, dtype=np.float32)}


class Raising(NativeEngine):
    """Fails where rank 1 is written."""

    def write(self, task, progress):
        if any(1 in file.ranks for file in task.files):
            raise OutputError("a bad day")
        return super().write(task, progress)


class Dying(NativeEngine):
    """Is killed where rank 1 is written."""

    def write(self, task, progress):
        if any(1 in file.ranks for file in task.files):
            os._exit(9)
        return super().write(task, progress)


class Here(NativeEngine):
    """Notes the processes that write."""

    def __init__(self):
        self.pids = []

    def write(self, task, progress):
        self.pids.append(os.getpid())
        return super().write(task, progress)


class Lingering(NativeEngine):
    """Takes a second to end after its work."""

    def write(self, task, progress):
        atexit.register(time.sleep, 1)
        return super().write(task, progress)


@pytest.fixture
def conversion(tmp_path):
    source = oracle.write_raw(tmp_path / "a.ckpt", {name: oracle.raw(array) for name, array in FULL.items()})
    return planned(source, tmp_path / "out", None, strategy({"w": Layout((2,), ((0,),))}))


def task_of(conversion, number=2):
    return conversion._task(conversion.files[:number])


def test_workers_write_all_files_and_tell_their_progress(conversion, tmp_path):
    told = []
    records = WorkerEngine(NativeEngine(), 2).write(task_of(conversion), told.append)
    assert sorted(record.rank for record in records) == [0, 1]
    assert sum(told) == FULL["w"].nbytes
    halves = [oracle.read_raw(tmp_path / "out" / record.file)["w"].content for record in sorted(records, key=str)]
    assert b"".join(halves) == FULL["w"].tobytes()
    assert multiprocessing.active_children() == []


def test_worker_that_is_ended_while_it_shuts_down_says_nothing(conversion, capfd):
    begin = time.monotonic()
    assert len(WorkerEngine(Lingering(), 2).write(task_of(conversion), lambda _: None)) == 2
    assert capfd.readouterr().err == ""
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("engine, error, message", [
    (Raising(), OutputError, "a bad day"),
    (Dying(), RankLostError, "a worker process died"),
])  # fmt: skip
def test_worker_that_fails_or_dies_is_told_and_ends_the_others(conversion, engine, error, message):
    with pytest.raises(error, match=message):
        WorkerEngine(engine, 2).write(task_of(conversion), lambda nbytes: None)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("processes, files", [(1, 2), (4, 1)])
def test_one_share_needs_no_other_process(conversion, processes, files):
    engine = Here()
    assert len(WorkerEngine(engine, processes).write(task_of(conversion, files), lambda nbytes: None)) == files
    assert engine.pids == [os.getpid()]


def test_at_least_one_process_is_needed():
    with pytest.raises(ConfigError, match="must be at least 1, not 0"):
        WorkerEngine(NativeEngine(), 0)


class Holding(NativeEngine):
    """Tells its process, and never ends."""

    def write(self, task, progress):
        (task.target.folder.parent / f"pid_{os.getpid()}").touch()
        while True:
            time.sleep(1)


PARENT = """
import sys
from pathlib import Path
from builders import planned, strategy
from test_worker_engine import Holding, Layout, WorkerEngine, task_of

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    conversion = planned(folder / "a.ckpt", folder / "out", None, strategy({"w": Layout((2,), ((0,),))}))
    WorkerEngine(Holding(), 2).write(task_of(conversion), lambda nbytes: None)
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_parent_though_they_never_hear_of_it(conversion, tmp_path):
    here = Path(__file__).parent
    (tmp_path / "parent.py").write_text(PARENT)
    path = os.pathsep.join(map(str, (here, here.parent, *filter(None, [os.environ.get("PYTHONPATH")]))))
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path)]
    parent = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL)
    try:
        while len(found := list(tmp_path.glob("pid_*"))) < 2:
            assert parent.poll() is None, "ended before its workers began"
            time.sleep(0.01)
    finally:
        parent.kill()
        parent.wait()
    pids = [int(file.name.partition("_")[2]) for file in found]
    deadline = time.monotonic() + 2
    while alive := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        assert time.monotonic() < deadline, f"still alive: {alive}"
        time.sleep(0.05)
