"""Emptying the output directory at the start of a job."""

from __future__ import annotations

import oracle
import pytest

from auto_trans.coordination.lock import OutputLock
from auto_trans.errors import OutputBusyError
from auto_trans.hooks.clear import clear_auto_trans_output
from auto_trans.hooks.job import Job


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job of one rank, without MindFormers."""
    job = Job(0, 1, tmp_path / "output")
    monkeypatch.setattr(Job, "current", classmethod(lambda cls, *args: job))
    monkeypatch.setattr(Job, "in_modelarts", staticmethod(lambda: False))
    yield job
    job.release()


def stock(*args):
    pytest.fail("MindFormers' own function would not spare the source")


@pytest.mark.parametrize("form, stays", [("ckpt", True), ("safetensors", False)])
def test_output_is_kept_until_the_end_of_a_load_that_is_ours(job, tmp_path, form, stays):
    """A load that is MindFormers' own does not tell when it ends: a second job would be kept out for the whole training."""
    source = oracle.write_raw(tmp_path / "llama.ckpt", {"w": oracle.Raw("Int8", (1,), b"x")})
    clear_auto_trans_output(stock, str(source), None, form)
    other = OutputLock(job.output / ".auto_trans" / "output.lock", timeout=0.1)
    if stays:
        with pytest.raises(OutputBusyError, match="is in use by another job"):
            other.acquire()
        job.release()
    other.acquire()
    other.release()


def test_folders_are_emptied_and_made(job, tmp_path):
    source = oracle.write_raw(tmp_path / "llama.ckpt", {"w": oracle.Raw("Int8", (1,), b"x")})
    for folder in (job.strategy_dir, job.transformed_dir):
        folder.mkdir(parents=True)
        (folder / "old").write_text("of an earlier job")
    clear_auto_trans_output(stock, str(source))
    assert not any(job.strategy_dir.iterdir()) and not any(job.transformed_dir.iterdir())
    assert source.exists()
