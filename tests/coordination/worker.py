"""One rank of a job without MindFormers: ``worker.py RANK JSON``; faults are put into the conversion on request."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from auto_trans.config import AutoTransConfig, Timing
from auto_trans.coordination.election import elect
from auto_trans.hooks import transform
from auto_trans.hooks.job import Job


def main() -> None:
    rank, job = int(sys.argv[1]), json.loads(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    late = job.get("late", {})
    time.sleep(late.get(str(rank), 0))
    fault = job.get("faults", {}).get(str(rank))
    if fault:
        convert = transform.run_conversion

        def faulty(*args, **kwargs):
            Path(job["output"], f"faulty_{rank}").touch()
            if fault == "raise":
                raise RuntimeError("the disk of rank has a bad day")
            if fault == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault == "slow":
                for step in range(12):
                    kwargs["listener"](step, 100)
                    time.sleep(0.5)
            else:
                time.sleep(3600 if fault == "hang" else float(fault))
            return convert(*args, **kwargs)

        transform.run_conversion = faulty
    settings = AutoTransConfig(
        job["source"],
        job["strategy"],
        transform_process_num=job["processes"],
        timing=Timing(**{"join_timeout": 60, "heartbeat_interval": 0.2, "lock_timeout": 2, **job.get("timing", {})}),
    )
    assignments = elect(job["world_size"], settings.transform_process_num)
    transform.convert_together(Job(rank, job["world_size"], Path(job["output"])), settings, assignments, "checkpoint_")
    print("converted")


if __name__ == "__main__":
    main()
