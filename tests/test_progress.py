from __future__ import annotations

import logging

from auto_trans import progress
from auto_trans.progress import Meter


def test_log_lines_where_there_is_no_terminal(caplog, monkeypatch):
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    seen = []
    meter = Meter(4 << 20, "converting net", listener=lambda done, total: seen.append((done, total)))
    meter(1 << 20)
    meter.close()
    assert "converting net: 25%, 1.0 MiB of 4.0 MiB" in caplog.text and "s left" in caplog.text
    assert seen == [(1 << 20, 4 << 20)]


def test_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    meter = Meter(1000, "converting net")
    meter(1000)
    meter.close()
    assert "converting net: 100%" in capsys.readouterr().err


def test_quiet_shows_nothing(capsys, caplog, monkeypatch):
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    meter = Meter(1000, "converting net", quiet=True)
    meter(10)
    meter.close()
    assert capsys.readouterr().err == "" and caplog.text == ""
