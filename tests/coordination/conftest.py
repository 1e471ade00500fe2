from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from virtual import World

_counting: list[tuple[str, Counter]] = []


def _count(event: str, arguments: tuple) -> None:
    if _counting and event in ("open", "os.listdir", "os.scandir"):
        root, counter = _counting[-1]
        if str(arguments[0]).startswith(root):
            counter[event] += 1
            if event == "open":
                counter["written" if ".tmp" in str(arguments[0]) else "read"] += 1


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
