"""Shows that the tests would notice: breaks one line of the code after the other, and expects them to fail.

``python scripts/mutants.py [WORD...]`` runs the mutants of ``mutants.json`` whose file or lines hold one of the words,
all by default. Each is ``{"file", "old", "new", "tests"}``: in ``file`` the line ``old`` (without its indentation; it must
occur exactly once) becomes ``new``, and pytest with the arguments ``tests`` must fail. That happens in a temporary copy,
never in the checkout. A line that has changed since is told, so that the list follows the code.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_name("mutants.json")
LIMIT = 300  # seconds; a mutant that hangs is noticed too
PARTS = ("auto_trans", "tests", "scripts", "configs", "demo", "setup.cfg", "setup.py", "pyproject.toml", "README.md")


@dataclass(frozen=True)
class Mutant:
    """One broken line, and the tests that must notice it."""

    file: str
    old: str
    new: str
    tests: str

    def apply(self, content: str) -> str | None:
        """The broken file; None where its line is not there exactly once."""
        lines = content.splitlines(keepends=True)
        found = [i for i, line in enumerate(lines) if line.strip() == self.old]
        if len(found) != 1:
            return None
        lines[found[0]] = lines[found[0]].replace(self.old, self.new)
        return "".join(lines)


def main() -> int:
    """Runs the mutants; 1 if one survived or no longer applies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only mutants that hold one of these")
    words = parser.parse_args().words
    mutants = [Mutant(**entry) for entry in json.loads(LIST.read_text())]
    chosen = [m for m in mutants if not words or any(word in f"{m.file} {m.old} {m.new}" for word in words)]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="auto_trans_mutants_") as folder:
        copy = Path(folder)
        for part in filter(lambda part: (ROOT / part).exists(), PARTS):
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / part, copy)
        unbroken = {tests: run(tests, copy) for tests in dict.fromkeys(m.tests for m in chosen)}
        for mutant in chosen:
            begin = time.monotonic()
            result = try_out(mutant, copy) if unbroken[mutant.tests] == "survived" else "tests fail without it"
            failed += result != "killed"
            print(
                f"{result:<22} {time.monotonic() - begin:5.1f} s  {mutant.file}: {mutant.old}  ->  {mutant.new}",
                flush=True,
            )
    print(f"{len(chosen) - failed} of {len(chosen)} mutants killed")
    return 1 if failed or not chosen else 0


def try_out(mutant: Mutant, copy: Path) -> str:
    """Breaks the line, runs the tests, and mends it again."""
    path = copy / mutant.file
    content = path.read_text() if path.exists() else ""
    broken = mutant.apply(content)
    if broken is None:
        return "not applicable"
    path.write_text(broken)
    try:
        return run(mutant.tests, copy)
    finally:
        path.write_text(content)


def run(tests: str, copy: Path) -> str:
    """What pytest says: killed where a test fails or hangs, survived where all pass."""
    # bytecode is told apart by whole seconds and sizes, which a broken line may share with the right one
    environ = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests.split()]
    process = subprocess.Popen(
        command, cwd=copy, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        code = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        return "killed"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {0: "survived", 1: "killed"}.get(code, f"pytest ends with {code}")


if __name__ == "__main__":
    sys.exit(main())
