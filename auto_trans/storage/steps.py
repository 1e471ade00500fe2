"""Which step of a distributed checkpoint is taken: the same of every rank.

Pure: works on the names of the files, ``{prefix}_rank_{rank}[_{task}]-{epoch}_{step}.ckpt`` as MindFormers'
CheckpointMonitor writes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Callable, NamedTuple, Optional

from auto_trans.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from auto_trans.log import logger
from auto_trans.storage.names import RANK_IN_NAME

__all__ = ["check_names", "choose_latest", "choose_resumed", "choose_step", "choose_suffix", "step_of"]

_STEP = re.compile(r"(?:_rank_\d+_(?P<task>\d+))?-(?P<epoch>\d+)_(?P<step>\d+)\.\w+$")

# rank -> the files in its folder, by name
Candidates = Mapping[int, Sequence[Path]]


class _Step(NamedTuple):
    """A step; of the same step saved by several runs the last run's counts."""

    epoch: int
    step: int
    task: int

    def __str__(self) -> str:
        return f"{self.epoch}_{self.step}"


def step_of(file: Path) -> Optional[int]:
    """The step within its epoch that the name of a file tells."""
    found = _step_of(file)
    return found.step if found else None


def check_names(candidates: Candidates) -> None:
    """Checks that the files of a folder are those of its rank, and one for every step.

    Raises:
        CheckpointError: Files of different ranks or prefixes are mixed up.
    """
    for rank, files in candidates.items():
        by_step: dict[_Step, Path] = {}
        for file in files:
            named = RANK_IN_NAME.search(file.name)
            if named is not None and int(named[1]) != rank:
                raise CheckpointError(
                    f"{file} is named after another rank than its folder: files are mixed up; move it to the folder of its "
                    f"rank, or rename it if it really is that of rank {rank}"
                )
            step = _step_of(file)
            other = by_step.setdefault(step, file) if step is not None else file
            if other is not file:
                raise CheckpointError(
                    f"{other} and {file.name} are of the same step, {step}; keep one of them, or say which is meant («step»)"
                )


def choose_step(candidates: Candidates, step: str) -> dict[int, list[Path]]:
    """The files of a step, given as ``{epoch}_{step}``.

    Raises:
        CheckpointNotFoundError: A rank has none.
        ConfigError: It is no step.
    """
    if not isinstance(step, str) or not re.fullmatch(r"\d+_\d+", step):
        raise ConfigError(f"«step» must be an epoch and a step such as 3_200, not {step!r}")
    return _choose(candidates, lambda file: str(_step_of(file)) == step, f"step {step}", "«step»")


def choose_suffix(candidates: Candidates, suffix: str) -> dict[int, list[Path]]:
    """The files whose names end so; if it looks like a step, those of that step.

    Raises:
        CheckpointNotFoundError: A rank has none.
    """
    if re.fullmatch(r"\d+_\d+", suffix):
        return _choose(candidates, lambda file: str(_step_of(file)) == suffix, f"step {suffix}", "«file_suffix»")
    return _choose(candidates, lambda file: file.stem.endswith(suffix), f"the ending {suffix}", "«file_suffix»")


def _choose(candidates: Candidates, is_meant: Callable[[Path], bool], what: str, setting: str) -> dict[int, list[Path]]:
    chosen = {rank: [file for file in files if is_meant(file)] for rank, files in candidates.items()}
    for rank, files in candidates.items():
        if not chosen[rank]:
            raise CheckpointNotFoundError(
                f"{files[0].parent} holds no file of {what}; there are {', '.join(f.name for f in files)} ({setting})"
            )
    return chosen


def choose_resumed(candidates: Candidates, resume_file: str) -> dict[int, Path]:
    """The files of the step that ``resume_training`` picked; its ``_rank_N`` part is that of any rank.

    Raises:
        CheckpointNotFoundError: A rank has none.
    """
    wanted = Path(resume_file).name
    chosen = {}
    for rank, files in candidates.items():
        chosen[rank] = files[0].parent / RANK_IN_NAME.sub(f"_rank_{rank}", wanted)
        if chosen[rank] not in files:
            raise CheckpointNotFoundError(
                f"{chosen[rank]}, the step that was chosen (resume_training), is not found for rank {rank}; there are "
                f"{', '.join(f.name for f in files)}"
            )
    logger.info("the step of %s, which was chosen, is taken from every rank folder", wanted)
    return chosen


def choose_latest(candidates: Candidates) -> dict[int, Path]:
    """The files of the latest step that all ranks have; without steps in the names the last by name.

    Raises:
        CheckpointNotFoundError: No step is there for all ranks.
    """
    by_step = {rank: {step: f for f in files if (step := _step_of(f))} for rank, files in candidates.items()}
    if not all(by_step.values()):
        return _last_by_name(candidates)
    common = set.intersection(*(set(steps) for steps in by_step.values()))
    if not common:
        raise CheckpointNotFoundError(
            f"no step is there for all ranks below {_parent(candidates)}: "
            + "; ".join(f"rank {rank} has {', '.join(f.name for f in files)}" for rank, files in candidates.items())
        )
    latest, newest = max(common), max(step for steps in by_step.values() for step in steps)
    if latest != newest:
        late = [rank for rank, steps in by_step.items() if newest not in steps]
        logger.warning(
            "step %s is newer than %s but rank %s lacks it; the latest step that all ranks have is used",
            newest, latest, ", ".join(map(str, late)),
        )  # fmt: skip
    if any(len(files) > 1 for files in candidates.values()):
        logger.info("several steps are there; step %s, the latest, is used", latest)
    return {rank: steps[latest] for rank, steps in by_step.items()}


def _last_by_name(candidates: Candidates) -> dict[int, Path]:
    chosen = {rank: files[-1] for rank, files in candidates.items()}
    for rank, files in candidates.items():
        if len(files) > 1:
            logger.warning("%s holds several files; %s, the last by name, is used", files[0].parent, chosen[rank].name)
    return chosen


def _parent(candidates: Candidates) -> Path:
    return next(iter(candidates.values()))[0].parent.parent


def _step_of(file: Path) -> Optional[_Step]:
    match = _STEP.search(file.name)
    return _Step(int(match["epoch"]), int(match["step"]), int(match["task"] or 0)) if match else None
