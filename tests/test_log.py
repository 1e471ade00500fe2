"""Where our log lines appear: once, and in a job where MindFormers' own do."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import ModuleType

import pytest

from auto_trans import log


@pytest.fixture
def see_mindformers():
    """Does in a test what the hook does; pytest's own handlers are at the loggers that do not propagate before the test."""
    handlers, propagate, level = list(log.logger.handlers), log.logger.propagate, log.logger.level
    yield log.use_mindformers_logger
    log.logger.handlers[:], log.logger.propagate = handlers, propagate
    log.logger.setLevel(level)


class MindFormers(logging.Handler):
    """Stands for MindFormers' logger, which takes INFO and keeps its lines to itself."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.lines: list[str] = []
        target = logging.Logger("mindformers", logging.INFO)
        target.addHandler(self)
        module = ModuleType("mindformers.tools.logger")
        module.get_logger = lambda: target
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def emit(self, record):
        self.lines.append(f"{record.filename}: {record.getMessage()}")


def test_without_the_hook_lines_go_the_way_of_the_standard_library(caplog):
    log.logger.warning("plain")
    log.logger.info("quiet")
    assert caplog.messages == ["plain"]


def test_lines_appear_once_in_mindformers_log_and_nowhere_else(see_mindformers, monkeypatch, caplog):
    see_mindformers()
    mindformers = MindFormers(monkeypatch)
    log.logger.info("rank %d", 3)
    log.logger.debug("quiet")
    assert mindformers.lines == ["test_log.py: rank 3"]
    assert not caplog.records


def test_until_mindformers_logger_is_loaded_lines_go_where_they_would_have_gone(see_mindformers, monkeypatch, caplog):
    see_mindformers()
    monkeypatch.delitem(sys.modules, "mindformers.tools.logger", raising=False)
    log.logger.warning("plain")
    log.logger.info("quiet")
    caplog.set_level(logging.INFO)
    log.logger.info("loud")
    assert caplog.messages == ["plain", "loud"]


def test_half_imported_module_is_no_logger_yet(see_mindformers, monkeypatch, caplog):
    see_mindformers()
    monkeypatch.setitem(sys.modules, "mindformers.tools.logger", ModuleType("mindformers.tools.logger"))
    log.logger.warning("plain")
    assert caplog.messages == ["plain"]


def test_hook_may_see_several_modules(see_mindformers, monkeypatch):
    see_mindformers()
    mindformers = MindFormers(monkeypatch)
    see_mindformers()
    log.logger.info("once")
    assert mindformers.lines == ["test_log.py: once"]


def test_logger_that_fails_does_not_stop_the_work(see_mindformers, monkeypatch, capsys):
    see_mindformers()
    MindFormers(monkeypatch)
    monkeypatch.setattr(sys.modules["mindformers.tools.logger"], "get_logger", lambda: 1 / 0)
    log.logger.info("lost")
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.mindspore
def test_genuine_mindformers_logs_our_lines_once(tmp_path):
    code = """
import logging
logging.basicConfig(level=logging.DEBUG, format="ROOT %(message)s")
import auto_trans
auto_trans.install()
from auto_trans.log import logger
logger.warning("line before")
from mindformers.tools.logger import logger as theirs
logger.info("line %s", "after")
logger.error("bad line")
logger.debug("quiet line")
theirs.info("line of mindformers")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=tmp_path,
        env={**os.environ, "LOCAL_DEFAULT_PATH": str(tmp_path / "output"), "GLOG_v": "3"},
    )  # fmt: skip
    out = done.stdout + done.stderr
    assert done.returncode == 0, out
    assert out.count("line before") == 1 and "ROOT line before" in out
    assert out.count("line after") == 1 and "ROOT line after" not in out
    assert out.count("bad line") == 1 and out.count("line of mindformers") == 1
    assert "quiet line" not in out
    (info,) = tmp_path.rglob("info.log")
    (errors,) = tmp_path.rglob("error.log")
    assert [line.rpartition(": ")[2] for line in info.read_text().splitlines() if "line" in line.rpartition(": ")[2]] == [
        "line after", "bad line", "line of mindformers",
    ]  # fmt: skip
    assert "bad line" in errors.read_text() and "line after" not in errors.read_text()
