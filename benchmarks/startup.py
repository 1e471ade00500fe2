"""Measures the start of a real job, from launch to its first step, with MindFormers alone and with auto_trans.

    python benchmarks/startup.py [--gigabytes 0.2] [--runs 5] [--folder /tmp/x] [--json results.json]

The Trainer of MindFormers trains a LLaMA of about so many gigabytes (float32) under ``msrun``: four ranks load safetensors
that four tensor-parallel ranks saved, with the optimizer's moments. Of all candidates the same is measured: "start" is the
wall time from the launch to the end of the first step of the last rank, "load" that from where MindFormers begins to load to
where it goes on to compile the training graph, by the logs. A job is ended after its first step.

"stock" is MindFormers alone, which merges on rank 0; "files" has two converters; with "direct" every rank reads its slices.
Model and dataset are those of the demo, the model larger. Four ranks that train take some 40 times its bytes of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Optional

from harness import add_arguments, table, work_folder

RANKS = 4
DEMO = Path(__file__).resolve().parents[1] / "demo"
CANDIDATES: dict[str, tuple[dict[str, str], list[str]]] = {
    "stock": ({"AUTO_TRANS_DISABLE": "1"}, []),
    "files": ({}, ["transform_process_num=2"]),
    "direct": ({}, ["auto_trans={load: direct}"]),
}
_STEP = re.compile(r"^(\S+ \S+) - .*step:\[ *1/", re.MULTILINE)
_LOAD = re.compile(r"^(\S+ \S+) - .*Start load checkpoint from", re.MULTILINE)
_COMPILE = re.compile(r"^(\S+ \S+) - .*Model Compiling, Please Wait", re.MULTILINE)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(gigabytes=0.2)
    arguments = parser.parse_args()
    with work_folder(arguments.folder) as folder:
        model = _model(arguments.gigabytes)
        prepare(folder, model)
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in CANDIDATES}
        for _ in range(arguments.runs):
            for name in CANDIDATES:
                samples[name].append(start(name, folder, model))
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in samples.items()
    }
    rows = [
        (name, f"{m['start']:.1f}", f"{m['load']:.2f}", f"{medians['stock']['load'] / m['load']:.1f}")
        for name, m in medians.items()
    ]
    print(table(("by", "start s", "load s", "load: times faster than stock"), rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"model": model, "samples": samples}, indent=1))


def prepare(folder: Path, model: list[str]) -> None:
    """Trains one rank for a few steps, and slices what it saved."""
    _python(DEMO / "prepare.py", "data", folder / "data")
    _python(DEMO / "start.py", DEMO / "tiny_llama.yaml", f"output_dir={folder / 'first'}", *_data(folder), *model)
    (saved,) = (folder / "first" / "checkpoint" / "rank_0").glob("*-1_8.ckpt")
    _python(DEMO / "prepare.py", "slice", saved, folder / "mp4", RANKS, "safetensors")
    shutil.rmtree(folder / "first")


def start(name: str, folder: Path, model: list[str]) -> dict[str, float]:
    """Starts a job, and ends it after its first step."""
    environ, settings = CANDIDATES[name]
    output, logs = folder / "output", folder / "logs"
    for old in (output, logs):
        shutil.rmtree(old, ignore_errors=True)
    os.sync()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "msrun"), f"--worker_num={RANKS}", f"--local_worker_num={RANKS}",
        f"--master_port={port}", f"--log_dir={logs}", "--join=True", "--cluster_time_out=120",
        str(DEMO / "start.py"), str(DEMO / "tiny_llama.yaml"), f"output_dir={output}", *_data(folder), *model,
        "use_parallel=True", f"parallel_config.data_parallel={RANKS}", "parallel.parallel_mode=STAND_ALONE",
        "load_ckpt_format=safetensors", "auto_trans_ckpt=True", f"load_checkpoint={folder / 'mp4' / 'checkpoint'}",
        f"src_strategy_path_or_dir={folder / 'mp4' / 'strategy'}", *settings,
    ]  # fmt: skip
    begin = time.time()
    job = subprocess.Popen(
        command, env=_environ(environ), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        while not all(_times(logs, _STEP)):
            if job.poll() is not None:
                tails = [log.read_text(errors="replace")[-3000:] for log in sorted(logs.glob("*.log"))]
                raise RuntimeError(f"{name} failed:\n" + "\n".join(tails))
            time.sleep(0.2)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    steps, loads, compiles = ([t for t in _times(logs, what) if t] for what in (_STEP, _LOAD, _COMPILE))
    return {"start": max(steps) - begin, "load": max(compiles) - min(loads)}


def _times(logs: Path, what: re.Pattern[str]) -> list[Optional[float]]:
    """When each rank logged something."""
    times: list[Optional[float]] = []
    for rank in range(RANKS):
        log = logs / f"worker_{rank}.log"
        found = what.search(log.read_text(errors="replace")) if log.exists() else None
        times.append(datetime.datetime.fromisoformat(found[1].replace(",", ".")).timestamp() if found else None)
    return times


def _model(gigabytes: float) -> list[str]:
    """Settings of a LLaMA of four layers and about so many gigabytes of float32."""
    hidden = max(round((gigabytes * 1e9 / 4 / (4 * 12)) ** 0.5 / 128) * 128, 128)
    config = {"hidden_size": hidden, "num_layers": 4, "num_heads": hidden // 64}
    return [f"model.model_config.{key}={value}" for key, value in config.items()]


def _data(folder: Path) -> list[str]:
    return [f"train_dataset.data_loader.dataset_dir={folder / 'data'}"]


def _python(*arguments: Any) -> None:
    command = [sys.executable, *map(str, arguments)]
    subprocess.run(command, check=True, env=_environ({}), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _environ(more: dict[str, str]) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # msrun starts plain "python"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(DEMO), "GLOG_v": "3", **more}


if __name__ == "__main__":
    main()
