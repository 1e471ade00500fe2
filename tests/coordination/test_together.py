"""Real processes convert together, and are killed, stopped, late and mistaken."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import oracle
import pytest

from auto_trans.together import REPORT_NAME

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "worker.py"
SOURCE, TARGET, WORLD = "dp1mp2pp2", "dp2mp2", 4


class Rank:
    """The process of a rank, and the pipes over which it and the test tell each other how far they are."""

    def __init__(self, rank: int, settings: dict, environ: dict[str, str]) -> None:
        (self._reached, reached), (go, self._go) = os.pipe(), os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), json.dumps(settings), str(reached), str(go)],
            env={**os.environ, **environ}, text=True, pass_fds=(reached, go),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._lines: list[str] = []
        os.close(reached)
        os.close(go)

    def comes_to_its_fault(self) -> None:
        """Waits until it does; then it waits for `goes_on`, if the fault lets it."""
        assert os.read(self._reached, 1), f"it ended before:\n{self.process.stdout.read()}"

    def goes_on(self) -> None:
        os.write(self._go, b"!")

    def says(self, pattern: str) -> None:
        """Waits for a line of its output."""
        for line in self.process.stdout:
            self._lines.append(line)
            if re.search(pattern, line):
                return
        raise AssertionError(f"never said {pattern!r}:\n{''.join(self._lines)}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def ends(self) -> tuple[int, str]:
        """Waits for its end: exit code and output."""
        code = self.process.wait(90)
        return code, "".join(self._lines) + self.process.stdout.read()

    def close(self) -> None:
        self.kill()
        self.process.stdout.close()
        os.close(self._reached)
        os.close(self._go)


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
        self.ranks: dict[int, Rank] = {}
        self.all_ranks: list[Rank] = []

    def compile(self, case: str = TARGET) -> Launch:
        """Has the output directory look like after a job's start: emptied, with the strategy files that it compiled."""
        for name in ("strategy", "transformed_checkpoint"):
            shutil.rmtree(self.output / name, ignore_errors=True)
        shutil.copytree(self.weights.strategy(case), self.output / "strategy")
        return self

    def start(self, *ranks: int, port: int = 1, by_rank: dict | None = None, **changes) -> Launch:
        """Starts ranks; all by default."""
        for rank in ranks or range(self.settings["world_size"]):
            settings = {**self.settings, **changes, **(by_rank or {}).get(rank, {})}
            self.ranks[rank] = Rank(rank, settings, {"MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": str(port)})
            self.all_ranks.append(self.ranks[rank])
        return self

    def ends(self, *but: int) -> dict[int, tuple[int, str]]:
        """Waits for all ranks (but some): exit code and output of each. Only timeouts that a test sets end so soon."""
        return {number: rank.ends() for number, rank in self.ranks.items() if number not in but}

    def succeeds(self, *but: int) -> None:
        for rank, (code, text) in self.ends(*but).items():
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
        for rank in job.all_ranks:
            rank.close()


def test_elected_ranks_convert_and_all_return(launch):
    job = launch().compile().start()
    job.succeeds()
    job.check_weights()
    report = job.report()
    assert [(c["rank"], c["slices"]) for c in report["converters"]] == [(0, [0, 1]), (2, [2, 3])]
    assert not report["matches"] and report["bytes_written"] > 0


def test_pipeline_target_gets_a_merged_strategy(launch):
    job = launch()
    job.settings["world_size"] = 8
    job.compile("dp2mp2pp2").start().succeeds()
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
    job.compile("dp4mp2").start(processes=4, faults={2: "hold"}, timing={"log_interval": 0.2})
    job.ranks[2].comes_to_its_fault()
    job.ranks[6].says("for rank 2 to write what others link")
    if not dies:
        job.ranks[2].goes_on()
        job.succeeds()
        return job.check_weights("dp4mp2")
    job.ranks[2].kill()
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
def test_killed_converter_is_named_long_before_its_signs_of_life_are_missed(launch, rank):
    job = launch().compile().start(faults={rank: "hold"})
    job.ranks[rank].comes_to_its_fault()
    job.ranks[rank].kill()
    for code, text in job.ends(rank).values():
        assert code == 1
        assert f"rank {rank} (host" in text
        assert "died" in text


def test_stopped_converter_gives_no_sign_of_life(launch):
    job = launch().compile().start(faults={2: "stop"}, timing={"heartbeat_timeout": 3})
    job.ranks[2].comes_to_its_fault()
    for code, text in job.ends(2).values():
        assert code == 1
        assert re.search(r"rank 2 \(host .*\) gave no sign of life for [3-9] s", text), text


def test_hanging_converter_is_alive_without_progress(launch):
    job = launch().compile().start(faults={2: "hold"}, timing={"stall_timeout": 3})
    for code, text in job.ends(2).values():
        assert code == 1
        assert "rank 2 (host" in text and "is alive but made no progress" in text


def test_rank_that_waits_for_a_slow_one_does_not_count_as_hanging(launch):
    """Rank 0 is done at once and has no more progress to show; rank 2 takes longer than the stall timeout."""
    job = launch().compile().start(faults={2: "progress"}, timing={"stall_timeout": 3, "log_interval": 1})
    job.ranks[2].comes_to_its_fault()
    job.ranks[1].says("waiting ([4-9]|[0-9]{2}) s for .*rank 2")
    job.ranks[2].goes_on()
    job.succeeds()


def test_waiting_rank_that_is_killed_stops_nobody(launch):
    """Nobody waits for it, and a converter writes its file: noticing its death is up to the launcher of the job."""
    job = launch().compile().start(faults={0: "hold"}, timing={"log_interval": 0.2})
    job.ranks[0].comes_to_its_fault()
    job.ranks[1].says(" to convert")
    job.ranks[1].kill()
    job.ranks[0].goes_on()
    job.succeeds(1)
    job.check_weights()


def test_rank_that_is_killed_once_present_stops_nobody_if_it_only_waits(launch):
    job = launch().compile().start(0, 1, 2, timing={"log_interval": 0.2})
    job.ranks[1].says("for rank 0 to gather all ranks")
    job.ranks[0].says("for rank 3 to arrive")
    job.ranks[1].kill()
    job.start(3)
    job.succeeds(1)
    job.check_weights()


def test_converter_that_is_killed_once_present_is_named(launch):
    job = launch().compile().start(0, 1, 2, timing={"log_interval": 0.2})
    job.ranks[2].says("for rank 0 to gather all ranks")
    job.ranks[0].says("for rank 3 to arrive")
    job.ranks[2].kill()
    job.start(3)
    for code, text in job.ends(2).values():
        assert code == 1
        assert "rank 2 (host" in text and "died" in text


def test_late_rank_is_waited_for(launch):
    job = launch().compile().start(0, 1, 2, timing={"log_interval": 0.2})
    job.ranks[0].says("for rank 3 to arrive")
    job.start(3).succeeds()
    job.check_weights()


def test_rank_that_never_arrives_is_named(launch):
    job = launch().compile().start(0, 2, 3, timing={"join_timeout": 3})
    for code, text in job.ends().values():
        assert code == 1
        assert "JoinTimeoutError" in text and "rank 1 to arrive" in text


def test_nothing_of_an_earlier_run_is_believed(launch):
    """First a run that fails, then one that works, then another strategy with a late rank, all in one directory."""
    job = launch().compile().start(faults={2: "raise"})
    assert all(code == 1 for code, _ in job.ends().values())
    job.compile().start().succeeds()
    job.check_weights()
    job.compile("dp2mp2_opt").start(0, 2, 3, timing={"log_interval": 0.2})
    job.ranks[0].says("for rank 1 to arrive")
    job.start(1).succeeds()
    job.check_weights("dp2mp2_opt")


def test_killed_run_leaves_nothing_that_stops_the_next(launch):
    job = launch().compile().start(faults={0: "hold"})
    job.ranks[0].comes_to_its_fault()
    for rank in job.ranks.values():
        rank.kill()
    job.compile().start().succeeds()
    job.check_weights()


def test_second_job_in_the_same_output_directory_is_refused_and_the_first_goes_on(launch):
    first = launch().compile().start(port=1, faults={0: "hold"})
    first.ranks[0].comes_to_its_fault()
    second = launch().start(port=2)
    for code, text in second.ends().values():
        assert code == 1
        assert "is in use by another job" in text
    first.ranks[0].goes_on()
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
def test_bad_input_is_told_on_every_rank_at_once(launch, tmp_path, damage, message):
    job = launch().compile("dp4mp2" if damage == "strategy" else TARGET)
    if damage == "truncated":
        shutil.copytree(job.settings["source"], tmp_path / "source")
        job.settings["source"] = str(tmp_path / "source")
        (file,) = (tmp_path / "source" / "rank_0").iterdir()
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content[:-50])
    for code, text in job.start().ends().values():
        assert code == 1
        assert message in text


def all_refuse(job, *messages):
    """Every rank is told, and nothing is written."""
    for code, text in job.ends().values():
        assert code == 1
        assert all(message in text for message in messages), text
    assert not list(job.output.glob("transformed_checkpoint/*/rank_*/*"))


def test_strategy_of_one_stage_only_is_refused_before_anything_is_written(launch, genuine):
    """The strategy files of the other node are not there."""
    job = launch().compile("dp2mp2pp2")
    for rank in range(4, 8):
        (job.output / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt").unlink()
    job.start(source=str(genuine.complete("mf_llama")), strategy=None)
    all_refuse(job, "does not list parameter model.layers.2.", "auto_trans: {allow_extra: [...]}")


def rewrite(file, change):
    """Replaces a source file of a job, which may be a link to one that other tests share."""
    held = oracle.read_raw(file)
    change(held)
    file.unlink()
    oracle.write_raw(file, held)


@pytest.mark.parametrize("target", [SOURCE, TARGET])
def test_rank_file_of_another_shape_is_refused_whether_it_would_be_linked_or_read(launch, tmp_path, target):
    """One rank folder holds an unsliced file; where the strategies match MindSpore's loader would die of it."""
    job = launch().compile(target)
    shutil.copytree(job.settings["source"], tmp_path / "source")
    name = "model.layers.0.attention.wq.weight"

    def unslice(held):
        held[name] = oracle.Raw(held[name].dtype, (64, 64), held[name].content * 2)

    (file,) = (tmp_path / "source" / "rank_1").iterdir()
    rewrite(file, unslice)
    expected = f"parameter {name} is [32, 64] Float32 in", "rank_1/net_rank_1-1_1.ckpt"
    all_refuse(job.start(source=str(tmp_path / "source")), *expected)


def test_replica_of_another_shape_is_refused_though_it_is_not_read(launch, genuine, tmp_path):
    """dp2 mp2: rank 2 holds what rank 0 holds, and only rank 0 is read."""
    job = launch().compile("dp1mp2pp2")
    shutil.copytree(genuine.source("mf_llama", "dp2mp2"), tmp_path / "source")
    (file,) = (tmp_path / "source" / "rank_2").iterdir()
    rewrite(file, lambda held: held.update({"lm_head.weight": oracle.Raw("Float16", (2, 2), b"\0" * 8)}))
    job.start(source=str(tmp_path / "source"), strategy=str(job.weights.strategy("dp2mp2")))
    all_refuse(job, "parameter lm_head.weight is")


@pytest.mark.parametrize("target", [SOURCE, TARGET])
def test_network_that_expects_another_shape_is_told_before_anything_is_written(launch, target):
    """The strategy has the right names, but is not the one that the weights were saved under."""
    job = launch().compile(target)
    name = "model.tok_embeddings.embedding_weight"
    job.start(network={name: [256, 64], "model.layers.0.attention.wq.weight": [64, 64]})
    all_refuse(job, f"parameter {name} is [256, 64] in the network")


def test_network_that_expects_what_is_planned_is_content(launch):
    network = {"model.tok_embeddings.embedding_weight": [128, 64], "model.layers.0.attention.wq.weight": [32, 64]}
    launch().compile().start(network=network).succeeds()


def test_converter_whose_strategy_differs_from_that_of_rank_0_is_told(launch):
    """A node that sees an old strategy of the source would convert something else."""
    job = launch().compile()
    ends = job.start(by_rank={2: {"strategy": str(job.weights.strategy("dp2mp2"))}}).ends()
    assert all(code == 1 for code, _ in ends.values())
    assert "rank 2 would convert something else than rank 0" in ends[0][1]


def test_matching_strategy_of_a_source_that_lacks_layers_is_refused_as_in_a_conversion(launch, tmp_path):
    """Linked, the layers would keep their initial values without a word."""
    job = launch().compile(SOURCE)
    shutil.copytree(job.settings["source"], tmp_path / "source")
    for folder in (tmp_path / "source").iterdir():
        (file,) = folder.iterdir()
        rewrite(file, lambda held: [held.pop(name) for name in list(held) if "layers.1." in name])
    all_refuse(job.start(source=str(tmp_path / "source")), "lacks parameter model.layers.1.")


def test_matching_files_from_which_redundancy_was_removed_are_converted_not_linked(launch, tmp_path):
    """One rank's file lacks what another holds for it."""
    job = launch().compile("dp2mp1")
    job.settings["world_size"] = 2
    held = job.weights.slices("dp2mp1")
    del held[1]["model.norm_out.weight"]
    source = oracle.save_genuine(tmp_path / "source", held, job.weights.dtypes)
    job.start(source=str(source), strategy=str(job.weights.strategy("dp2mp1")), processes=1).succeeds()
    assert not job.report()["matches"]
    (file,) = (job.output / "transformed_checkpoint" / "source" / "rank_1").iterdir()
    assert "model.norm_out.weight" in oracle.read_raw(file)
