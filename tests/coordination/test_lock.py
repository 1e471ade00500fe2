"""One output directory, one job."""

from __future__ import annotations

import re

import pytest

from auto_trans.coordination.lock import OutputLock
from auto_trans.errors import OutputBusyError, OutputError
from auto_trans.process import Process


@pytest.fixture
def make(world, tmp_path):
    made = []

    def make(timeout=10.0):
        made.append(OutputLock(tmp_path / ".auto_trans" / "output.lock", timeout, clock=world.clock))
        return made[-1]

    yield make
    for lock in made:
        lock.release()


def test_second_job_is_refused_after_the_timeout_with_the_owner_named(world, make, tmp_path):
    make().acquire()
    begin = world.clock.now()
    error = world.run(second=make().acquire)["second"]
    assert isinstance(error, OutputBusyError)
    assert f"{tmp_path} is in use by another job ({Process.current()})" in str(error)
    assert 10 <= world.clock.now() - begin < 11


def test_second_job_goes_on_once_the_first_has_left(world, make):
    first, second = make(), make()
    first.acquire()

    def leave():
        world.clock.sleep(9)
        first.release()

    assert world.run(second=second.acquire, first=leave) == {"second": None, "first": None}
    assert isinstance(world.run(first=first.acquire)["first"], OutputBusyError)


def test_lock_taken_twice_by_one_job_is_let_go_once(world, make):
    first = make()
    first.acquire()
    first.acquire()
    first.release()
    assert world.run(second=make(0.0).acquire)["second"] is None


def test_lock_let_go_twice_is_free(make):
    first = make()
    first.acquire()
    first.release()
    first.release()
    first.acquire()


def test_owner_that_left_no_name_is_unknown(world, make, tmp_path):
    make().acquire()
    (tmp_path / ".auto_trans" / "output.owner.json").write_text("{}")
    assert "(host and pid unknown)" in str(world.run(second=make().acquire)["second"])


def test_directory_that_cannot_be_made_is_named(make, tmp_path):
    (tmp_path / ".auto_trans").touch()
    with pytest.raises(OutputError, match=re.escape(str(tmp_path / ".auto_trans"))):
        make().acquire()
