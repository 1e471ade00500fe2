"""Real processes convert together, and are killed, stopped, late and mistaken."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import oracle
import pytest

from auto_trans.hooks.transform import REPORT_NAME

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "worker.py"
SOURCE, TARGET, WORLD = "dp1mp2pp2", "dp2mp2", 4


class Launch:
    """Starts the ranks of a job and gathers what became of them."""

    def __init__(self, genuine, output: Path) -> None:
        self.output = output
        self.weights = genuine.model("mf_llama")
        self.settings = {
            "source": str(genuine.source("mf_llama", SOURCE)),
            "strategy": str(self.weights.strategy(SOURCE)),
            "output": str(output),
            "world_size": WORLD,
            "processes": 2,
        }
        self.processes: dict[int, subprocess.Popen] = {}

    def compile(self, case: str = TARGET) -> Launch:
        """Has the output directory look like after a job's start: emptied, with the strategy files that it compiled."""
        for name in ("strategy", "transformed_checkpoint"):
            shutil.rmtree(self.output / name, ignore_errors=True)
        shutil.copytree(self.weights.strategy(case), self.output / "strategy")
        return self

    def start(self, port: int = 1, by_rank: dict | None = None, **changes) -> Launch:
        environ = {**os.environ, "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": str(port)}
        for rank in range(self.settings["world_size"]):
            settings = {**self.settings, **changes, **(by_rank or {}).get(rank, {})}
            self.processes[rank] = subprocess.Popen(
                [sys.executable, str(WORKER), str(rank), json.dumps(settings)],
                env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        return self

    def wait_for_fault(self, rank: int) -> None:
        mark = self.output / f"faulty_{rank}"
        deadline = time.monotonic() + 60
        while not mark.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def ends(self, *but: int) -> dict[int, tuple[int, str]]:
        """Waits for all ranks (but some): exit code and output of each."""
        return {r: (p.wait(90), p.stdout.read()) for r, p in self.processes.items() if r not in but}

    def succeeds(self) -> None:
        for rank, (code, text) in self.ends().items():
            assert code == 0, f"rank {rank}:\n{text}"
            assert "converted" in text

    def check_weights(self, case: str = TARGET) -> None:
        (folder,) = (self.output / "transformed_checkpoint").iterdir()
        for rank, boxes in self.weights.slices(case).items():
            (file,) = (folder / f"rank_{rank}").iterdir()
            got = oracle.read_raw(file)
            for name, box in boxes.items():
                if self.weights.dtypes[name] == "Float32" and name in got:
                    assert got[name].content == oracle.raw(box).content, name

    def report(self) -> dict:
        return json.loads((self.output / REPORT_NAME).read_text())


@pytest.fixture
def launch(genuine, tmp_path):
    made = []

    def make(folder: str = "output") -> Launch:
        made.append(Launch(genuine, tmp_path / folder))
        return made[-1]

    yield make
    for job in made:
        for process in job.processes.values():
            process.kill()
            process.wait()


def test_elected_ranks_convert_and_all_return(launch):
    job = launch().compile().start()
    job.succeeds()
    job.check_weights()
    report = job.report()
    assert [(c["rank"], c["slices"]) for c in report["converters"]] == [(0, [0, 1]), (2, [2, 3])]
    assert not report["matches"] and report["bytes_written"] > 0


def test_pipeline_target_gets_a_merged_strategy(launch):
    job = launch().compile("dp2mp2pp2").start(world_size=8)
    job.settings["world_size"] = 8
    for rank in range(4, 8):
        job.processes[rank] = subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), json.dumps(job.settings)],
            env={**os.environ, "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": "1"},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    job.succeeds()
    job.check_weights("dp2mp2pp2")
    assert (job.output / "strategy" / "merged_ckpt_strategy.ckpt").exists()
    assert [(c["rank"], c["slices"]) for c in job.report()["converters"]] == [(0, [0, 3]), (4, [4, 7])]


def test_replicas_that_several_converters_need_are_written_by_one(launch):
    """dp4 mp2: every converter of two ranks needs both of the distinct files."""
    job = launch()
    job.settings["world_size"] = 8
    job.compile("dp4mp2").start(processes=4).succeeds()
    job.check_weights("dp4mp2")
    files = sorted(job.output.glob("transformed_checkpoint/*/rank_*/*.ckpt"))
    assert len(files) == 8 and len({file.stat().st_ino for file in files}) == 2
    converters = job.report()["converters"]
    assert [c["slices"] for c in converters] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [c["bytes_written"] > 0 for c in converters] == [True, True, False, False]
    assert job.report()["bytes_written"] == sum({f.stat().st_ino: f.stat().st_size for f in files}.values())


@pytest.mark.parametrize("dies", [False, True])
def test_converter_that_needs_anothers_file_waits_for_it_or_is_told_that_it_died(launch, dies):
    job = launch()
    job.settings["world_size"] = 8
    faults = {"2": "hang" if dies else 3}
    job.compile("dp4mp2").start(processes=4, faults=faults, timing={"heartbeat_timeout": 5})
    if not dies:
        job.succeeds()
        return job.check_weights("dp4mp2")
    job.wait_for_fault(2)
    job.processes[2].kill()
    for rank, (code, text) in job.ends(2).items():
        assert code != 0 and "rank 2" in text, f"rank {rank}:\n{text}"
    return None


def test_without_pipeline_nothing_is_merged(launch):
    job = launch().compile().start()
    job.succeeds()
    assert not (job.output / "strategy" / "merged_ckpt_strategy.ckpt").exists()


def test_matching_strategy_converts_nothing(launch):
    job = launch().compile(SOURCE).start()
    ends = job.ends()
    assert all(code == 0 for code, _ in ends.values()), ends
    assert "already match the strategy of this job: nothing is converted" in ends[0][1]
    job.check_weights(SOURCE)
    assert job.report()["matches"]
    assert all(f.is_symlink() for f in job.output.glob("transformed_checkpoint/*/rank_*/*.ckpt"))


def test_folder_of_several_complete_checkpoints(launch, genuine, tmp_path):
    job = launch().compile()
    (tmp_path / "source").mkdir()
    for name in ("base", "lora"):
        shutil.copy(genuine.complete("mf_llama"), tmp_path / "source" / f"{name}.ckpt")
    job.start(source=str(tmp_path / "source"), strategy=None).succeeds()
    transformed = job.output / "transformed_checkpoint"
    assert sorted(p.name for p in transformed.iterdir()) == ["base", "lora"]
    shutil.rmtree(transformed / "lora")
    job.check_weights()


@pytest.mark.parametrize("rank", [0, 2])
def test_converter_that_raises_reaches_all_with_its_traceback(launch, rank):
    ends = launch().compile().start(faults={rank: "raise"}).ends()
    for other, (code, text) in ends.items():
        assert code == 1
        assert "the disk of rank has a bad day" in text
        if other != rank:
            assert f"RankFailedError: rank {rank} failed with RuntimeError" in text
            assert "in faulty" in text, "the original traceback"


@pytest.mark.parametrize("rank", [0, 2])
def test_killed_converter_is_named_within_the_deadline(launch, rank):
    job = launch().compile().start(faults={rank: "hang"}, timing={"heartbeat_timeout": 10})
    job.wait_for_fault(rank)
    begin = time.monotonic()
    job.processes[rank].send_signal(signal.SIGKILL)
    for code, text in job.ends(rank).values():
        assert code == 1
        assert f"RankLostError: rank {rank} (host" in text or f"rank {rank} (host" in text
        assert "died" in text
    assert time.monotonic() - begin < 10


def test_stopped_converter_gives_no_sign_of_life(launch):
    job = launch().compile().start(faults={2: "stop"}, timing={"heartbeat_timeout": 3})
    job.wait_for_fault(2)
    begin = time.monotonic()
    for code, text in job.ends(2).values():
        assert code == 1
        assert "rank 2 (host" in text and "gave no sign of life for" in text
    assert 2 < time.monotonic() - begin < 20


def test_hanging_converter_is_alive_without_progress(launch):
    job = launch().compile().start(faults={2: "hang"}, timing={"stall_timeout": 3})
    for code, text in job.ends(2).values():
        assert code == 1
        assert "rank 2 (host" in text and "is alive but made no progress" in text


def test_rank_that_waits_for_a_slow_one_does_not_count_as_hanging(launch):
    """Rank 0 is done at once and has no more progress to show; rank 2 takes longer than the stall timeout."""
    launch().compile().start(faults={2: "slow"}, timing={"stall_timeout": 3}).succeeds()


def test_late_rank_is_waited_for(launch):
    begin = time.monotonic()
    job = launch().compile().start(late={"3": 20}, timing={"log_interval": 2})
    ends = job.ends()
    assert all(code == 0 for code, _ in ends.values()), ends
    assert time.monotonic() - begin > 20
    assert "for rank 3 to arrive" in ends[0][1]
    job.check_weights()


def test_rank_that_never_arrives_is_named(launch):
    job = launch().compile()
    job.start(timing={"join_timeout": 3}, late={"1": 3600})
    for code, text in job.ends(1).values():
        assert code == 1
        assert "JoinTimeoutError" in text
    assert "rank 1 to arrive" in text or "rank 0 to gather" in text


def test_nothing_of_an_earlier_run_is_believed(launch):
    """First a run that fails, then one that works, then another strategy with a late rank, all in one directory."""
    job = launch().compile().start(faults={2: "raise"})
    assert all(code == 1 for code, _ in job.ends().values())
    job.compile().start().succeeds()
    job.check_weights()
    job.compile("dp2mp2_opt").start(late={"1": 3}).succeeds()
    job.check_weights("dp2mp2_opt")


def test_killed_run_leaves_nothing_that_stops_the_next(launch):
    job = launch().compile().start(faults={0: "hang"})
    job.wait_for_fault(0)
    for process in job.processes.values():
        process.kill()
        process.wait()
    job.compile().start().succeeds()
    job.check_weights()


def test_second_job_in_the_same_output_directory_is_refused_and_the_first_goes_on(launch):
    first = launch().compile().start(port=1, faults={0: "8"})
    first.wait_for_fault(0)
    second = launch().start(port=2)
    for code, text in second.ends().values():
        assert code == 1
        assert "is in use by another job" in text
    first.succeeds()
    first.check_weights()


def test_ranks_started_with_different_settings_are_told(launch):
    job = launch().compile().start(by_rank={3: {"processes": 4}})
    for code, text in job.ends().values():
        assert code == 1
        assert "different settings" in text


@pytest.mark.parametrize(
    "damage, message", [("truncated", "is not a complete MindSpore checkpoint"), ("strategy", "describe 8 ranks")]
)
def test_bad_input_is_told_on_every_rank_within_seconds(launch, tmp_path, damage, message):
    job = launch().compile("dp4mp2" if damage == "strategy" else TARGET)
    if damage == "truncated":
        shutil.copytree(job.settings["source"], tmp_path / "source")
        job.settings["source"] = str(tmp_path / "source")
        (file,) = (tmp_path / "source" / "rank_0").iterdir()
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content[:-50])
    begin = time.monotonic()
    for code, text in job.start().ends().values():
        assert code == 1
        assert message in text
    assert time.monotonic() - begin < 30
