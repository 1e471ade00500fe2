from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")

import hypothesis
import oracle
import pytest

# a slow machine is no failure; speed is measured in benchmarks/
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


_HAD_MINDSPORE = pytest.StashKey[bool]()


def may_start_mindspore(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("mindspore", "trainer"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fast tests come first: what is broken is soon known, and none finds MindSpore imported by another."""
    for item in filter(may_start_mindspore, items):
        item.add_marker("slow")
    items.sort(key=lambda item: (may_start_mindspore(item), item.get_closest_marker("slow") is not None))


def pytest_collection_finish() -> None:
    """A test file that imports MindSpore makes all the others slow."""
    if "mindspore" in sys.modules:
        raise pytest.UsageError("a test file imports mindspore at its top; import it in tests marked mindspore")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[_HAD_MINDSPORE] = "mindspore" in sys.modules


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    if "mindspore" in sys.modules and not item.stash[_HAD_MINDSPORE] and not may_start_mindspore(item):
        pytest.fail("this test imports mindspore, which takes seconds; mark it @pytest.mark.mindspore", pytrace=False)


@pytest.fixture(scope="session")
def genuine(tmp_path_factory):
    """Model -> its weights, saved under every genuine strategy; see `GenuineSources`."""
    return GenuineSources(tmp_path_factory.mktemp("genuine"), oracle.save_genuine)


@pytest.fixture(scope="session")
def saved_by_mindspore(tmp_path_factory):
    """The same, saved by mindspore.save_checkpoint; for tests that are marked mindspore."""
    return GenuineSources(tmp_path_factory.mktemp("saved_by_mindspore"), oracle.save_with_mindspore)


class GenuineSources:
    """Genuine checkpoints, saved once per session."""

    def __init__(self, folder: Path, save: Callable[..., Path]) -> None:
        self._folder, self._save = folder, save
        self._models: dict[str, oracle.Genuine] = {}

    def model(self, name: str) -> oracle.Genuine:
        if name not in self._models:
            self._models[name] = oracle.Genuine(name)
        return self._models[name]

    def source(self, model: str, case: str) -> Path:
        """The checkpoint folder of a case."""
        folder = self._folder / model / case
        if not folder.exists():
            weights = self.model(model)
            self._save(folder, weights.slices(case), weights.dtypes)
        return folder

    def complete(self, model: str) -> Path:
        """One complete file."""
        return next(iter((self.source(model, "dp1mp1") / "rank_0").iterdir()))


@pytest.fixture(scope="session")
def bin_folder() -> Path:
    """Where the commands of this environment lie."""
    return Path(sys.executable).parent


@pytest.fixture
def snapshot():
    """Tells what a folder tree holds, to show that nothing in it was touched."""

    def take(folder: Path) -> dict[str, tuple[int, int]]:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}

    return take
