"""Runs ``auto-trans`` again and again, each time in a process of its own that has imported everything before.

Importing takes most of the time of a small command. One request a line: arguments, folder, and the files for its output.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

from auto_trans.cli.main import main

# what the commands import when they run
for name in ("conversion", "describe", "doctor", "merge_lora", "merge_safetensors", "page", "verify"):
    importlib.import_module(f"auto_trans.{name}")


def run(arguments: list[str], folder: str, out: str, err: str) -> None:
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["auto-trans", *arguments]
    sys.exit(main())


def serve() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            run(**json.loads(line))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
