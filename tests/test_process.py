"""Which process is dead."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from auto_trans import process
from auto_trans.process import Process


@pytest.fixture
def child():
    """A process that lives until it is told to end."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    state = process._state(child.pid)
    yield child, dataclasses.replace(Process.current(), pid=child.pid, started=state[1])
    child.kill()
    child.wait()


def test_living_process_is_not_dead(child):
    assert not Process.current().is_dead() and not child[1].is_dead()


def test_ended_process_is_dead(child):
    child[0].kill()
    child[0].wait()
    assert child[1].is_dead()


def test_zombie_is_dead(child):
    child[0].kill()
    os.waitid(os.P_PID, child[0].pid, os.WEXITED | os.WNOWAIT)  # ended, but nobody has taken note
    assert child[1].is_dead()


def test_number_that_is_used_again_is_another_process():
    assert dataclasses.replace(Process.current(), started=Process.current().started - 1).is_dead()


@pytest.mark.parametrize("space", ["another machine/1", ""])
def test_nothing_is_known_of_processes_elsewhere(space, child):
    child[0].kill()
    child[0].wait()
    assert not dataclasses.replace(child[1], space=space).is_dead()


def test_system_that_does_not_tell_makes_no_process_dead(child, monkeypatch):
    child[0].kill()
    child[0].wait()
    monkeypatch.setattr(process, "_space", lambda: "")
    assert not dataclasses.replace(child[1], space="").is_dead()


def test_json_and_back():
    assert Process.parse(Process.current().to_json()) == Process.current()


@pytest.mark.parametrize("change", [{"pid": "1"}, {"pid": True}, {"host": None}, {"started": 1.5}, {"space": 3}])
def test_what_is_no_process_is_not_taken_for_one(change):
    with pytest.raises(ValueError, match="does not describe a process"):
        Process.parse({**Process.current().to_json(), **change})
