from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def server():
    """Runs commands in processes that need not import anything."""
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.stdin.close()


@pytest.fixture
def auto_trans(bin_folder, tmp_path, tmp_path_factory, server):
    """Runs the command; with options of `subprocess.run` the very one that is installed."""

    def run(*arguments, code=0, **options):
        arguments = list(map(str, arguments))
        if options:
            command = [str(bin_folder / "auto-trans"), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, **options)
        else:
            done = served(server, arguments, tmp_path, tmp_path_factory.mktemp("output"))
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


def served(server, arguments, folder, output):
    out, err = output / "out", output / "err"
    request = {"arguments": arguments, "folder": str(folder), "out": str(out), "err": str(err)}
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    code = int(server.stdout.readline())
    return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())
