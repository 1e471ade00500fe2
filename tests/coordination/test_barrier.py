"""Waiting, and judging from signs of life."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from auto_trans.config import Timing
from auto_trans.coordination.barrier import Heartbeat, PulseMonitor, spread, wait_until
from auto_trans.coordination.board import read_json
from auto_trans.coordination.clock import Pace
from auto_trans.errors import RankLostError
from auto_trans.process import Process

TIMING = Timing(heartbeat_timeout=60, stall_timeout=180, log_interval=10)


def wait(world, look, **options):
    """What waiting returns or raises, and the seconds it took."""
    begin = world.clock.now()
    options = {"waiting_for": lambda: "rank 3", "timing": TIMING, "clock": world.clock, **options}
    result = world.run(waiting=lambda: wait_until(look, **options))["waiting"]
    return result, world.clock.now() - begin


def test_what_is_there_is_returned_at_once(world):
    assert wait(world, lambda: "found") == ("found", 0)


def test_what_is_false_but_there_is_returned(world):
    assert wait(world, lambda: 0) == (0, 0)


def test_looks_become_rarer_up_to_the_longest_pause(world):
    timing = dataclasses.replace(TIMING, poll_min=0.02, poll_max=0.5)
    begin = world.clock.now()
    wait(world, lambda: True if world.clock.now() - begin > 5 else None, timing=timing)
    assert world.slept[0] == 0.02 and world.slept[-1] == 0.5
    assert world.slept == sorted(world.slept)


@pytest.mark.parametrize("there_after, found", [(10, True), (10.5, False)])
def test_what_is_there_at_the_deadline_is_taken(world, there_after, found):
    timing = dataclasses.replace(TIMING, poll_min=0.5, poll_max=0.5)
    begin = world.clock.now()
    result, seconds = wait(
        world,
        lambda: True if world.clock.now() - begin >= there_after else None,
        timing=timing,
        deadline=10.0,
        on_timeout=lambda seconds: TimeoutError(f"{seconds:.1f}"),
    )
    assert seconds == 10
    assert result is True if found else str(result) == "10.0"


def test_error_of_a_look_ends_the_waiting(world):
    def look():
        raise RankLostError("lost", rank=3)

    result, _ = wait(world, look)
    assert isinstance(result, RankLostError) and result.rank == 3


def test_log_line_at_every_interval_says_for_whom_and_how_long(world, caplog):
    caplog.set_level(logging.INFO)
    begin = world.clock.now()
    timing = dataclasses.replace(TIMING, poll_min=0.5, poll_max=0.5)
    wait(world, lambda: True if world.clock.now() - begin > 29.5 else None, timing=timing)
    assert caplog.messages == ["waiting 10 s for rank 3", "waiting 20 s for rank 3"]


@pytest.mark.parametrize("world_size, longest", [(1, 0.5), (250, 0.5), (512, 1.024), (5000, 10)])
def test_many_ranks_look_less_often_each(world_size, longest):
    assert spread(Timing(poll_max=0.5), world_size).poll_max == pytest.approx(longest)


def test_pace_is_due_once_in_an_interval(world):
    def live():
        pace, due = Pace(world.clock, 2.0), []
        for _ in range(10):
            due.append(pace.due())
            world.clock.sleep(0.5)
        return due

    assert world.run(rank=live)["rank"] == [False] * 4 + [True] + [False] * 3 + [True] + [False]


class Watched:
    """A rank with its signs of life, and what watches it."""

    def __init__(self, world, folder, process=None):
        self.world, path = world, folder / "rank_3.json"
        self.heart = Heartbeat(path, 3600)
        self.monitor = PulseMonitor(3, process or Process.current(), path, TIMING, world.clock)

    def verdict(self, seconds, beats_every=None, step=lambda: None):
        """Lets some seconds pass and judges after each; the first error with its time, if there is one."""

        def live():
            for second in range(1, seconds + 1):
                self.world.clock.sleep(1)
                if beats_every and second % beats_every == 0:
                    step()
                    self.heart.beat()
                try:
                    self.monitor.check()
                except RankLostError as e:
                    return second, str(e)
            return None

        return self.world.run(watcher=live)["watcher"]


@pytest.fixture
def watched(world, tmp_path):
    return Watched(world, tmp_path)


def test_rank_that_never_gave_a_sign_of_life_is_lost_after_the_timeout(watched):
    second, text = watched.verdict(100)
    assert second == 61 and "gave no sign of life for 61 s" in text and f"rank 3 ({Process.current()})" in text


def test_rank_whose_signs_of_life_end_is_lost(watched):
    watched.heart.beat()
    assert watched.verdict(60) is None
    second, text = watched.verdict(60)
    assert second == 2 and "gave no sign of life for 61 s" in text


def test_signs_of_life_at_the_last_moment_count(watched):
    assert watched.verdict(170, beats_every=60) is None


def test_rank_with_signs_of_life_but_no_progress_hangs(watched):
    second, text = watched.verdict(250, beats_every=2)
    assert second == 183 and "is alive but made no progress for 181 s" in text


def test_any_progress_counts_as_progress(watched):
    def step():
        watched.heart.progress(int(watched.world.clock.now()) // 170, 10**9)

    assert watched.verdict(500, beats_every=2, step=step) is None


def test_idle_rank_need_not_make_progress(watched):
    with watched.heart.idle():
        assert watched.verdict(500, beats_every=2) is None
    second, _ = watched.verdict(500, beats_every=2)
    assert second in (181, 182)


def test_rank_stays_idle_when_an_inner_wait_ends(watched):
    with watched.heart.idle():
        with watched.heart.idle():
            pass
        assert watched.verdict(500, beats_every=2) is None


def test_idle_rank_must_give_signs_of_life(watched):
    with watched.heart.idle():
        watched.heart.beat()
    assert "gave no sign of life" in watched.verdict(100)[1]


def test_dead_process_is_noticed_at_once(world, tmp_path):
    gone = dataclasses.replace(Process.current(), started=Process.current().started - 1)
    watched = Watched(world, tmp_path, gone)
    watched.heart.beat()
    second, text = watched.verdict(10, beats_every=1)
    assert second == 1 and "died" in text


def test_description_tells_how_far_a_rank_is(watched):
    assert watched.monitor.describe() == "rank 3"
    watched.heart.progress(30, 40)
    watched.heart.beat()
    watched.monitor.check()
    assert watched.monitor.describe() == "rank 3 (75%)"


def test_heartbeat_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    with Heartbeat(tmp_path / "file" / "rank_3.json", 3600):
        pass
    assert "no sign of life of this rank can be given" in caplog.text and str(tmp_path) in caplog.text


def test_heartbeat_thread_beats_until_the_end(tmp_path):
    path = tmp_path / "rank_3.json"
    with Heartbeat(path, 0.001) as heart:
        heart.progress(1, 2)
        while (read_json(path) or {}).get("beat", 0) < 3 or read_json(path)["done"] != 1:
            pass
    last = read_json(path)
    assert last["total"] == 2 and read_json(path) == last
    assert not heart._thread.is_alive()
