from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from virtual import World

_counting: list[tuple[str, Counter]] = []


def _count(event: str, arguments: tuple) -> None:
    if event == "open" and arguments[1] is None and sys.version_info < (3, 10) and _is_told_twice():
        return
    if _counting and event in ("open", "os.listdir", "os.scandir"):
        root, counter = _counting[-1]
        if str(arguments[0]).startswith(root):
            counter[event] += 1
            if event == "open":
                counter["written" if ".tmp" in str(arguments[0]) else "read"] += 1


def _is_told_twice() -> bool:
    """Whether a file is opened by the opener that `pathlib` of Python 3.9 hands to `open`, which has told of it."""
    caller = sys._getframe(2)
    return caller.f_code.co_name == "_opener" and "pathlib" in caller.f_code.co_filename


sys.addaudithook(_count)


@pytest.fixture
def world() -> World:
    """Ranks in a time of their own."""
    return World()


@pytest.fixture
def accesses(tmp_path: Path):
    """How often files and directories of the test are opened from here on."""
    _counting.append((str(tmp_path), Counter()))
    yield _counting[-1][1]
    _counting.pop()
