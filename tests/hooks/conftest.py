from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from auto_trans.hooks.job import Job

DEMO = Path(__file__).parents[2] / "demo"


class Run(NamedTuple):
    """What became of a job: exit code and log of every rank."""

    code: int
    logs: list[str]

    @property
    def losses(self) -> list[list[str]]:
        """Per rank the loss of every step, as it was printed."""
        return [re.findall(r"step:\[ *\d+/ *\d+\], loss:\[([\d.]+)/", log) for log in self.logs]


def _wait(launcher: subprocess.Popen) -> int:
    """The exit code of msrun, whose scheduler waits most of a minute for ranks that have failed: it is ended before."""
    process, most, lone_since, begin = psutil.Process(launcher.pid), 0, None, time.monotonic()
    while launcher.poll() is None:
        assert time.monotonic() - begin < 280, "msrun does not end"
        try:
            children = [child for child in process.children() if child.status() != psutil.STATUS_ZOMBIE]
        except psutil.NoSuchProcess:
            continue
        most = max(most, len(children))
        lone_since = (lone_since or time.monotonic()) if most > 1 == len(children) else None
        if lone_since is not None and time.monotonic() - lone_since > 5:
            children[0].kill()
        time.sleep(0.2)
    return launcher.returncode


class TinyLlama:
    """A tiny LLaMA, its data, and its checkpoints, made by the real Trainer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._python(DEMO / "prepare.py", "data", folder / "data")
        assert self.train("first").code == 0
        self.checkpoint = folder / "first" / "checkpoint"
        self.complete = self.checkpoint / "rank_0" / "tiny_rank_0-1_8.ckpt"
        self._python(DEMO / "prepare.py", "slice", self.complete, folder / "mp4", 4)
        self.distributed, self.strategy = folder / "mp4" / "checkpoint", folder / "mp4" / "strategy"
        self._python(DEMO / "prepare.py", "slice", self.complete, folder / "mp4_safetensors", 4, "safetensors")
        self.safetensors = folder / "mp4_safetensors" / "checkpoint"

    def train(
        self,
        output: str,
        *settings: str,
        ranks: int = 1,
        nodes: int = 1,
        environ: dict | None = None,
        msrun: bool = False,
        script: Path = DEMO / "start.py",
        mode: str = "",
    ) -> Run:
        """Trains with the Trainer; several ranks are started by msrun, one launcher for each node."""
        arguments = [
            str(script), str(DEMO / "tiny_llama.yaml"), *([mode] if mode else []), f"output_dir={self.folder / output}",
            f"train_dataset.data_loader.dataset_dir={self.folder / 'data'}",
        ]  # fmt: skip
        if ranks == 1 and not msrun:
            done = self._python(*arguments, *settings, check=False, environ=environ)
            return Run(done.returncode, [done.stdout])
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        logs = self.folder / f"{output}_logs"
        parallel = ["use_parallel=True", f"parallel_config.data_parallel={ranks}"]
        launchers = []
        for node in range(nodes):
            command = [str(Path(sys.executable).parent / "msrun"), f"--worker_num={ranks}", "--cluster_time_out=120"]
            command += [
                f"--local_worker_num={ranks // nodes}",
                f"--master_port={port}",
                f"--log_dir={logs}_{node}",
                "--join=True",
            ]
            command += ["--master_addr=127.0.0.1", f"--node_rank={node}"] if nodes > 1 else []
            launchers.append(
                subprocess.Popen(
                    [*command, *arguments, *parallel, *map(str, settings)], env=self._environ(environ), cwd=self.folder,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )
            )  # fmt: skip
        codes = [_wait(launcher) for launcher in launchers]
        # with several nodes on one machine msrun itself fails at the end, whatever its ranks did: their logs tell
        files = [Path(f"{logs}_{rank * nodes // ranks}") / f"worker_{rank}.log" for rank in range(ranks)]
        return Run(max(map(abs, codes)), [file.read_text(errors="replace") for file in files])

    def _python(self, *arguments, check=True, environ=None):
        return subprocess.run(
            [sys.executable, *map(str, arguments)], env=self._environ(environ), cwd=self.folder, check=check, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=280,
        )  # fmt: skip

    @staticmethod
    def _environ(extra):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # msrun starts plain "python"
        return {**os.environ, "PATH": path, "PYTHONPATH": str(DEMO), "GLOG_v": "3", **(extra or {})}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job of one rank, without MindFormers."""
    job = Job(0, 1, tmp_path / "output")
    monkeypatch.setattr(Job, "current", classmethod(lambda cls, *args: job))
    monkeypatch.setattr(Job, "in_modelarts", staticmethod(lambda: False))
    yield job
    job.release()


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return TinyLlama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def alone(llama):
    """One rank that loads the unsliced weights with MindFormers alone."""
    run = llama.train("alone", f"load_checkpoint={llama.complete}", environ={"AUTO_TRANS_DISABLE": "1"})
    assert run.code == 0, run.logs[0][-3000:]
    return run


@pytest.fixture(scope="session")
def four(llama):
    """Four ranks that load the unsliced weights with MindFormers alone."""
    run = llama.train("four", f"load_checkpoint={llama.complete}", ranks=4, environ={"AUTO_TRANS_DISABLE": "1"})
    assert run.code == 0, run.logs[0][-3000:]
    return run
