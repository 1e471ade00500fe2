"""Checkpoints, strategy files and conversions are byte for byte the same, whichever MindSpore made them, and auto_trans'."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
from one_mindspore import CONVERSIONS

from auto_trans import convert

OTHER = os.environ.get("AUTO_TRANS_OTHER_PYTHON", "")  # scripts/test.sh sets it

pytestmark = [
    pytest.mark.mindspore,
    pytest.mark.skipif(not OTHER, reason="AUTO_TRANS_OTHER_PYTHON names no Python that has another MindSpore"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What each of two versions of MindSpore made: version -> folder."""
    folder = tmp_path_factory.mktemp("made")
    found = {}
    for python in (sys.executable, OTHER):
        into = folder / str(len(found))
        script = Path(__file__).with_name("one_mindspore.py")
        environ = {**os.environ, "PYTHONPATH": str(Path(oracle.__file__).parent)}
        done = subprocess.run([python, script, into], env=environ, check=True, stdout=subprocess.PIPE, text=True)
        found[done.stdout.split()[-1]] = into
    assert len(found) == 2, f"both Pythons have MindSpore {list(found)}"
    return found


@pytest.mark.parametrize("kind", ["every_dtype", "saved", "strategies", "merged", "converted"])
def test_two_versions_of_mindspore_write_the_same_bytes(made, kind):
    one, other = (contents(folder, kind) for folder in made.values())
    assert one and one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def contents(folder: Path, kind: str) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if kind in str(p.relative_to(folder))}


def test_strategy_files_keep_their_bytes_in_both(made):
    files = [f for model in oracle.CASES for f in (oracle.DATA / model).glob("*/strategy/*")]
    assert files
    for version, folder in made.items():
        for file in files:
            written = folder / "strategies" / file.relative_to(oracle.DATA).parent.parent / file.name
            assert written.read_bytes() == file.read_bytes(), (version, file)


@pytest.mark.parametrize(("model", "source", "target"), CONVERSIONS, ids=["-".join(c) for c in CONVERSIONS])
def test_conversions_of_both_and_of_auto_trans_are_the_same_bytes(made, genuine, tmp_path, model, source, target):
    weights = genuine.model(model)
    convert(genuine.source(model, source), tmp_path, weights.strategy(source), weights.strategy(target))
    files = sorted(tmp_path.rglob("*.ckpt"))
    assert len(files) == len(weights.slices(target))
    for version, folder in made.items():
        for file in files:
            theirs = folder / "converted" / model / f"{source}-{target}" / file.relative_to(tmp_path)
            assert oracle.read_raw(file) == oracle.read_raw(theirs), (version, file)
            if "pp" not in source:  # of several stages MindSpore has the parameters in an order of its own
                assert file.read_bytes() == theirs.read_bytes(), (version, file)
