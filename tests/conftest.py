from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")

import hypothesis
import oracle
import pytest

# a slow machine is no failure; speed is measured in benchmarks/
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def genuine(tmp_path_factory):
    """Model -> its weights, saved by MindSpore under every genuine strategy; see `GenuineSources`."""
    return GenuineSources(tmp_path_factory.mktemp("genuine"))


class GenuineSources:
    """Genuine checkpoints, saved once per session."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
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
            oracle.save_with_mindspore(folder, weights.slices(case), weights.dtypes)
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
