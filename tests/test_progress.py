from __future__ import annotations

import logging

import pytest

from auto_trans import progress
from auto_trans.progress import Meter


class Watch:
    """A time that stands still until it is set."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def watch(caplog):
    caplog.set_level(logging.INFO)
    return Watch()


def test_log_line_every_ten_seconds_where_there_is_no_terminal(caplog, watch):
    meter = Meter(4 << 20, "converting net", now=watch)
    watch.seconds = 109.9
    meter(1 << 20)
    assert not caplog.records
    watch.seconds = 110
    meter(1 << 20)
    assert caplog.messages == ["converting net: 50%, 2.0 MiB of 4.0 MiB, 204.8 KiB/s, about 10 s left"]
    watch.seconds = 119.9
    meter(1 << 20)
    assert len(caplog.records) == 1
    watch.seconds = 120
    meter(1 << 20)
    meter.close()
    assert caplog.messages[1:] == ["converting net: 100%, 4.0 MiB of 4.0 MiB, 204.8 KiB/s, about 0 s left"]


def test_nothing_done_yet_makes_no_line(caplog, watch):
    meter = Meter(1000, "converting net", now=watch)
    watch.seconds = 200
    meter(0)
    assert not caplog.records
    meter(1)
    assert len(caplog.records) == 1


def test_listener_is_told_of_every_step(watch):
    seen = []
    meter = Meter(4, "converting net", now=watch, listener=lambda done, total: seen.append((done, total)))
    meter(1)
    meter(3)
    assert seen == [(1, 4), (4, 4)]


def test_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    meter = Meter(1000, "converting net")
    meter(500)
    assert "converting net:   0%|" in capsys.readouterr().err
    meter(500)
    meter.close()
    left = capsys.readouterr().err
    assert left.endswith("\r") and "\n" not in left, "no line stays, not even an empty one"


def test_no_bar_where_nothing_is_to_be_done(capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    Meter(0, "converting net").close()
    assert capsys.readouterr().err == ""


def test_quiet_shows_nothing(capsys, caplog, monkeypatch, watch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    meter = Meter(1000, "converting net", quiet=True, now=watch)
    watch.seconds = 200
    meter(10)
    meter.close()
    assert capsys.readouterr().err == "" and caplog.text == ""
