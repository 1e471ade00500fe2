"""Everything that can be checked before an expensive job starts."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

import filelock
import yaml

from auto_trans.config import YAML_KEYS, AutoTransConfig, parse_boolean
from auto_trans.coordination.board import read_json, write_json
from auto_trans.coordination.election import Assignment, elect
from auto_trans.core.consistency import check_heads
from auto_trans.errors import AutoTransError
from auto_trans.hooks.compatibility import judge_installed
from auto_trans.jobs import NOT_ASKED, RESHARDS, Load, reshards_itself
from auto_trans.sizes import format_bytes, plural
from auto_trans.storage.capacity import available_memory, free_disk
from auto_trans.storage.clean import check_cleanable
from auto_trans.storage.sources import ScannedFiles

__all__ = ["Check", "examine", "probe_file_system"]

_VISIBLE_SECONDS = 5.0


@dataclass(frozen=True)
class Check:
    """Something that was looked at.

    Attributes:
        status: ``ok``, ``warning`` or ``error``.
        what: What was found.
        remedy: What to do about it.
    """

    status: str
    what: str
    remedy: str = ""


def examine(
    config: Optional[Path] = None, world_size: Optional[int] = None
) -> tuple[list[Check], tuple[Assignment, ...]]:
    """Looks at this environment, and at the settings of a job.

    Args:
        config: The YAML of the job.
        world_size: Its number of ranks; by its ``parallel_config`` if not given.

    Returns:
        What was found, and which ranks would convert what.
    """
    checks = list(_environment())
    if config is None:
        return checks, ()
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        if not isinstance(settings, Mapping):
            raise ValueError("it holds no settings")
    except (OSError, ValueError, yaml.YAMLError) as e:
        return [*checks, Check("error", f"{config} cannot be read: {e}", "give the YAML of a MindFormers job")], ()
    verdict = judge_installed()
    found, load = _settings(settings, "" if verdict is None else verdict.mindformers)
    told, expected = _told_ranks(settings)
    found += told if told or load is None else [Check("ok", "the settings are valid")]
    ranks = expected if world_size is None else world_size
    if ranks is None and not told:
        found.append(Check("warning", "the YAML does not tell the number of ranks", "give it: --world-size"))
    if world_size is not None and expected not in (None, world_size):
        what = f"the job is to have {plural(world_size, 'rank')}, but its YAML makes {expected}"
        found.append(Check("warning", what, "check --world-size, or use_parallel and parallel_config in the YAML"))
    assignments: tuple[Assignment, ...] = ()
    if load is not None and load.checked:
        try:
            assignments = () if ranks is None or load.left else elect(ranks, load.config.transform_process_num)
        except AutoTransError as e:
            found.append(Check("error", str(e)))
        found += _job(settings, load, ranks)
    if any(check.status == "error" for check in found):
        return [*checks, *found], ()
    if (load is not None and load.left) or (verdict is not None and not verdict.fits):
        found.append(Check("ok", "auto_trans will convert nothing"))
        assignments = ()
    elif load is not None and load.is_direct:
        who = "every rank" if ranks is None else plural(ranks, "rank")
        found.append(Check("ok", f"{who} will load straight from the source, and nothing will be converted"))
        assignments = ()
    elif ranks is not None:
        found.append(Check("ok", f"{len(assignments)} of {plural(ranks, 'rank')} will convert"))
    return [*checks, *found], assignments


def probe_file_system(output: Path) -> list[Check]:
    """Tries on a folder what the ranks of a job rely on: locks, atomic renames, and files that others see at once.

    A folder that is not there yet is not made: the one above it is tried, on the same file system.
    """
    folder = output.absolute()
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    checks = []
    if folder != output.absolute():
        checks.append(Check("ok", f"{output} is not there yet; what follows is tried in {folder}"))
    lock_path, word = folder / ".auto_trans_probe.lock", folder / ".auto_trans_probe.json"
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_probe_child, args=(there, str(lock_path), str(word)), daemon=True)
    try:
        tempfile.TemporaryFile(dir=folder).close()  # a lock would be asked for again and again, to no avail
        with filelock.FileLock(str(lock_path), timeout=5):
            child.start()
            there.close()  # so that its end is noticed
            if here.recv():
                checks.append(
                    Check("error", f"locks in {folder} do not exclude", "set output_dir to a file system with locks")
                )
            else:
                checks.append(Check("ok", f"locks in {folder} exclude other processes"))
        here.send("look")
        time.sleep(0.2)
        write_json(word, {"text": "x" * 100_000, "written": time.monotonic()})
        seconds = here.recv()
        if seconds is None:
            remedy = "set output_dir to a file system that shows files promptly, or mount it with lookupcache=none"
            checks.append(Check("error", f"a file in {folder} is not seen within {_VISIBLE_SECONDS:.0f} s", remedy))
        else:
            checks.append(Check("ok", f"a renamed file in {folder} is seen whole after {seconds * 1000:.0f} ms"))
    except (OSError, filelock.Timeout, EOFError) as e:
        what = f"{output} cannot be used: {e}"
        checks.append(Check("error", what, "set an output_dir that is writable"))
    finally:
        child.join(10) if child.pid else None
        for path in (lock_path, word):
            with contextlib.suppress(OSError):  # of a folder that is none, say
                path.unlink()
    return checks


def _probe_child(pipe: Any, lock_path: str, word: str) -> None:
    """The other process: whether it gets the lock that is held, and how soon it sees a file."""
    try:
        with filelock.FileLock(lock_path, timeout=0):
            pipe.send(True)
    except filelock.Timeout:
        pipe.send(False)
    pipe.recv()
    begin = time.monotonic()
    while time.monotonic() - begin < _VISIBLE_SECONDS:
        content = read_json(Path(word))
        if content is not None:
            # the clock is that of the machine, so both processes agree on it
            pipe.send(max(time.monotonic() - content["written"], 0.0))
            return
        time.sleep(0.002)
    pipe.send(None)


def _environment() -> Iterator[Check]:
    from auto_trans.hooks.finder import is_installed

    version = sys.version.split()[0]
    yield Check("ok", f"Python {version}")
    try:
        yield Check("ok", f"mindspore {metadata.version('mindspore')}")
    except metadata.PackageNotFoundError:
        yield Check("warning", "mindspore is not installed here", "install it where the jobs run")
    verdict = judge_installed()
    if verdict is None:
        yield Check("warning", "mindformers is not installed here", "install it where the jobs run")
    else:
        yield Check("ok" if verdict.fits else "warning", verdict.what, verdict.remedy)
    if os.environ.get("AUTO_TRANS_DISABLE", "0") not in ("", "0"):
        yield Check("warning", "the hook is turned off by AUTO_TRANS_DISABLE", "unset it")
    elif is_installed():  # type: ignore[no-untyped-call]
        yield Check("ok", "the hook is active in this environment")
    else:
        yield Check(
            "error",
            "the hook is not active: this environment ignores .pth files",
            "start jobs with python -m auto_trans.run run_mindformer.py ..., or call auto_trans.install()",
        )


def _settings(settings: Mapping[str, Any], mindformers: str) -> tuple[list[Check], Optional[Load]]:
    """Whether the settings are valid, and what the job loads if they are."""
    try:
        load = Load.of(settings, reshards=reshards_itself(settings, mindformers))
    except AutoTransError as e:
        e.told_by(YAML_KEYS)
        return [Check("error", str(e))], None
    if not load.left:
        return [], load
    if load.left == NOT_ASKED:
        what = f"{load.left}: nothing will be converted"
        return [Check("warning", what, "set auto_trans_ckpt: True")], load
    checks = [Check("ok", f"{load.left}: MindFormers' own conversion is used, not that of auto_trans")]
    path = load.config.load_checkpoint
    if path and not load.checked and not Path(path).expanduser().exists():
        checks.append(Check("error", f"checkpoint {path} is not found", "set it to a file or folder that exists"))
    if load.left == RESHARDS and not settings.get("load_checkpoint"):
        what = "MindFormers refuses auto_trans_ckpt: True without load_checkpoint, also beside checkpoint: {load_path: ...}"
        checks.append(Check("error", what, "set auto_trans_ckpt: False; such a job reshards by itself"))
    return checks, load


def _job(settings: Mapping[str, Any], load: Load, world_size: Optional[int]) -> Iterator[Check]:
    output = Path(str(settings.get("output_dir") or "./output")).expanduser()
    config, size = load.config, 0
    try:
        check_cleanable(
            [output / "strategy", output / "transformed_checkpoint", output / "unified_checkpoint"],
            [p for p in (config.load_checkpoint, config.src_strategy) if p],
        )
        given = load.source_strategy()
        found = load.find(given)
        for one in found:
            source = one.strategy(given)
            stages = f"source strategy: {plural(source.world_size, 'rank')} in {plural(source.stages, 'stage')}"
            yield Check("ok", stages if one.distributed else "the source is complete")
            size += sum(file.stat().st_size for file in one.all_files)
            heads = ScannedFiles(one)
            size = max(size, load.check(heads, source).nbytes)
            check_heads(source, heads)
            yield Check("ok", f"{one.path}: {plural(len(one.all_files), 'file')} readable and complete")
    except AutoTransError as e:
        e.told_by(YAML_KEYS)
        yield Check("error", str(e))
        return
    if config.unify and not load.left:
        yield Check(
            "ok", f"unify: the weights are merged to {output / 'unified_checkpoint'}, and MindFormers slices them"
        )
    if load.is_direct:
        yield Check("ok", f"load: direct: {format_bytes(size)} of weights are read, and none are written to {output}")
    elif not load.left:
        yield from _resources(config, output, size, world_size)
    yield from probe_file_system(output)


def _resources(config: AutoTransConfig, output: Path, size: int, world_size: Optional[int]) -> Iterator[Check]:
    """Whether disk and memory suffice for a conversion of some bytes."""
    free, memory = free_disk(output), available_memory()
    enough = free > size
    yield Check(
        "ok" if enough else "error",
        f"the weights need about {format_bytes(size)} in {output}, {format_bytes(free)} is free (replicas are links)",
        "" if enough else "free space, or set another output_dir",
    )
    converters = min(config.transform_process_num, world_size or config.transform_process_num)
    enough = memory > converters * config.memory_limit
    yield Check(
        "ok" if enough else "error",
        f"{plural(converters, 'converter')} of {format_bytes(config.memory_limit)} of memory each, "
        f"{format_bytes(memory)} is available",
        "" if enough else "decrease transform_process_num",
    )


def _told_ranks(settings: Mapping[str, Any]) -> tuple[list[Check], Optional[int]]:
    """What is wrong with the settings that tell the number of ranks of a job, and the number; None if they do not."""
    try:
        if not parse_boolean("use_parallel", settings.get("use_parallel")):
            return [], 1
    except AutoTransError as e:
        return [Check("error", str(e), "set use_parallel")], None
    parallel = settings.get("parallel_config")
    checks = []
    ranks = 1
    for key in ("data_parallel", "model_parallel", "pipeline_stage", "context_parallel"):
        number = parallel.get(key) if isinstance(parallel, Mapping) else None
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            what = f"parallel_config: {key} must be a whole number of at least 1, not {number!r}"
            checks.append(Check("error", what, f"set {key}"))
        ranks *= number if isinstance(number, int) else 1
    return checks, None if checks or not parallel else ranks
