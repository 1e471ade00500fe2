"""Messages on a shared directory."""

from __future__ import annotations

import os
import re

import pytest

from auto_trans.coordination.board import Board, Failure, read_json, write_json
from auto_trans.errors import OutputError


@pytest.fixture
def board(tmp_path):
    return Board(tmp_path / "session")


def test_message_is_read_under_its_name_and_no_other(board):
    board.post("written", {"ranks": [1]})
    assert board.read("written") == {"ranks": [1]}
    assert board.read("writte") is None


def test_empty_message_is_a_message(board):
    board.post("cleared", {})
    assert board.read("cleared") == {}


def test_message_may_bear_the_name_of_anything(board):
    board.post("failed", {"a": 1})
    board.post("started", {"a": 1})
    assert board.failure() is None


def test_failure_comes_with_its_traceback(board):
    try:
        raise KeyError("disk")
    except KeyError as e:
        board.post_failure(Failure.of(2, e))
    failure = board.failure()
    assert (failure.rank, failure.type, failure.message) == (2, "KeyError", "'disk'")
    assert "test_failure_comes_with_its_traceback" in failure.traceback


def test_first_failure_stays(board):
    for rank in (2, 1):
        board.post_failure(Failure.of(rank, ValueError(f"of {rank}")))
    assert board.failure().rank == 2


def test_file_that_is_written_again_leaves_nothing_else(tmp_path):
    for number in range(3):
        write_json(tmp_path / "a.json", {"number": number})
    assert read_json(tmp_path / "a.json") == {"number": 2}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", ["", '{"number": ', "[1]", "7"])
def test_what_is_not_whole_is_not_there(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert read_json(tmp_path / "a.json") is None


def test_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OutputError, match=re.escape(f"{tmp_path / 'a.json'} cannot be written")):
        write_json(tmp_path / "a.json", {})
    assert os.listdir(tmp_path) == ["a.json"]
