"""``auto-trans convert --processes``: workers end with their parent, however it ends, and go on where they stopped."""

from __future__ import annotations

import signal
import subprocess
import time

import psutil
import pytest
from builders import large_source
from strategy_files import strategy_file

from auto_trans.storage.manifest import RECORDS_NAME

pytestmark = pytest.mark.slow
FILES = 8


@pytest.fixture
def arguments(bin_folder, tmp_path):
    """A conversion of gigabytes to eight files."""
    large_source(tmp_path, mib=1200)
    strategy_file(tmp_path / "s_rank_0.ckpt", {f"w{i}": ([FILES], [[0, -1]]) for i in range(8)})
    arguments = [bin_folder / "auto-trans", "convert", tmp_path / "large.ckpt", "out"]
    return list(map(str, [*arguments, "--dst-strategy", tmp_path / "s_rank_0.ckpt", "--processes", "2"]))


@pytest.fixture
def working(arguments, tmp_path):
    """The command, once its first file is published and both workers write."""
    process = subprocess.Popen(
        arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        # a shell has what it starts in the background, and all its children, ignore the interrupt
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not list(tmp_path.glob(f"out/{RECORDS_NAME}/rank_*.json")):
        assert process.poll() is None, "ended before it could be ended"
        time.sleep(0.002)
    yield process
    process.kill()
    process.wait()


def workers_of(process):
    return [p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())]


def go_on(arguments, tmp_path):
    """The same command again: it keeps what is complete, and nothing half-written stays."""
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"of {FILES} files" in done.stdout and "0 reused" not in done.stdout
    assert not list(tmp_path.glob("out/**/.*.tmp"))
    assert len(list(tmp_path.glob("out/rank_*/*.ckpt"))) == FILES


@pytest.mark.parametrize(
    "number, code, text", [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, -signal.SIGINT, "interrupted")]
)
def test_signal_ends_all_and_the_rest_is_resumed(working, arguments, tmp_path, number, code, text):
    workers = workers_of(working)
    assert len(workers) == 2
    working.send_signal(number)
    _, stderr = working.communicate(timeout=30)
    assert working.returncode == code
    assert f"{text}; start it again to go on where it stopped" in stderr and "Traceback" not in stderr
    assert not psutil.wait_procs(workers, timeout=2)[1]
    assert not list(tmp_path.glob("out/**/.*.tmp")), "nothing half-written is left"
    go_on(arguments, tmp_path)


def test_workers_end_within_two_seconds_of_a_killed_parent(working, arguments, tmp_path):
    workers = workers_of(working)
    working.kill()
    working.wait()
    assert not psutil.wait_procs(workers, timeout=2)[1]
    go_on(arguments, tmp_path)


def test_killed_worker_fails_the_whole(working, arguments, tmp_path):
    workers_of(working)[0].kill()
    _, stderr = working.communicate(timeout=60)
    assert working.returncode == 1
    assert "a worker process died" in stderr and "Traceback" not in stderr
    go_on(arguments, tmp_path)
