"""One rank of a job without MindFormers: ``worker.py RANK JSON REACHED GO``; faults are put into the conversion on request.

A fault begins with a handshake over two pipes: the rank says that it has come to the conversion, and most faults last until
the test says go (which it never does where the rank is to hang).
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
from pathlib import Path

from auto_trans import together
from auto_trans.config import AutoTransConfig, Timing
from auto_trans.coordination.election import elect
from auto_trans.core.consistency import Network
from auto_trans.hooks.job import Job
from auto_trans.hooks.transform import convert_for_job


def put_fault(fault: str, reached: int, go: int) -> None:
    """Has the conversion of this rank begin with a fault.

    Args:
        fault: ``raise``; ``stop`` as a signal does; ``hold`` until the test says go; ``progress`` until then.
        reached: Pipe that tells the test that the rank has come to the conversion.
        go: Pipe that tells the rank to go on.
    """
    convert = together.run_conversion

    def faulty(*args, **kwargs):
        os.write(reached, b"!")
        if fault == "raise":
            raise RuntimeError("the disk of rank has a bad day")
        if fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        step = 0
        while not select.select([go], [], [], 0.1 if fault == "progress" else None)[0]:
            step += 1
            kwargs["listener"](step, 1000)
        if not os.read(go, 1):
            sys.exit("the test has ended")
        return convert(*args, **kwargs)

    together.run_conversion = faulty


def main() -> None:
    rank, job, reached, go = int(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    fault = job.get("faults", {}).get(str(rank))
    if fault:
        put_fault(fault, reached, go)
    # any wait that is not the matter of a test would be far too long for it
    timing = {"join_timeout": 600, "heartbeat_interval": 0.2, "heartbeat_timeout": 600, "stall_timeout": 600}
    settings = AutoTransConfig(
        job["source"],
        job["strategy"],
        transform_process_num=job["processes"],
        timing=Timing(**{**timing, "lock_timeout": 2, **job.get("timing", {})}),
    )
    assignments = elect(job["world_size"], settings.transform_process_num)
    shapes = {name: tuple(shape) for name, shape in job.get("network", {}).items()}
    network = Network(shapes, sliced=True) if shapes else None
    place = Job(rank, job["world_size"], Path(job["output"]))
    convert_for_job(place, settings, assignments, "checkpoint_", network)
    print("converted")


if __name__ == "__main__":
    main()
