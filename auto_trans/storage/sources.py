"""Find the files of a checkpoint and choose among the steps that lie in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

from auto_trans.errors import CheckpointNotFoundError, UnsupportedCheckpointError
from auto_trans.log import logger
from auto_trans.storage.formats import FORMATS, Format, format_of

__all__ = ["SourceCheckpoint", "find_checkpoints", "rank_file"]

_RANK_FOLDER = re.compile(r"^rank_(\d+)$")
_RANK_IN_NAME = re.compile(r"_rank_\d+")
# {prefix}_rank_{rank}[_{task}]-{epoch}_{step}.ckpt, as MindFormers' CheckpointMonitor names its files
_STEP = re.compile(r"(?:_rank_\d+_(?P<task>\d+))?-(?P<epoch>\d+)_(?P<step>\d+)\.\w+$")

_SUFFIXES = tuple(format.suffix for format in FORMATS.values())
_Step = tuple[int, int, int]


@dataclass(frozen=True)
class SourceCheckpoint:
    """The chosen files of one checkpoint.

    Attributes:
        name: Name of the checkpoint: that of its folder, or of the file without its ending.
        path: The folder, or the file.
        files: Rank -> chosen file. A complete checkpoint is rank 0.
        distributed: Whether it lies in ``rank_N`` folders.
    """

    name: str
    path: Path
    files: Mapping[int, Path]
    distributed: bool

    @property
    def format(self) -> Format:
        """The format of the files."""
        return format_of(next(iter(self.files.values())))


def rank_file(folder: Path, prefix: str, rank: int, suffix: str = ".ckpt") -> Path:
    """Where the slice of ``rank`` lies in a target folder: ``rank_N/{prefix}N.ckpt``, as MindFormers expects it."""
    return folder / f"rank_{rank}" / f"{prefix}{rank}{suffix}"


def find_checkpoints(
    path: Union[str, Path], resume_file: Optional[str] = None, step: Optional[str] = None
) -> list[SourceCheckpoint]:
    """Finds the checkpoints at a path.

    Args:
        path: A ``.ckpt`` or ``.safetensors`` file, a folder of ``rank_N`` folders, or a folder of complete files.
        resume_file: Name of the file to take from the rank folders, e.g. where ``resume_training`` picked a step; its
            ``_rank_N`` part is that of any rank. By default the latest step that all ranks have.
        step: The step to take from the rank folders, as ``{epoch}_{step}``.

    Returns:
        The checkpoints; several only for a folder of complete files.

    Raises:
        CheckpointNotFoundError: There is nothing to convert.
        UnsupportedCheckpointError: The files are of neither format, or of both.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise UnsupportedCheckpointError(
                f"checkpoint {path} does not end with {' or '.join(_SUFFIXES)}; give such a file, or a folder"
            )
        return [SourceCheckpoint(path.stem, path, {0: path}, distributed=False)]
    if not path.is_dir():
        raise CheckpointNotFoundError(f"checkpoint {path} is not found; set it to a file or folder that exists")
    folders = {int(m.group(1)): f for f in path.iterdir() if (m := _RANK_FOLDER.match(f.name)) and f.is_dir()}
    complete = _checkpoint_files(path)
    if folders:
        if complete:
            logger.warning("%s holds rank folders and complete files; the rank folders are used", path)
        files = _choose({rank: folders[rank] for rank in sorted(folders)}, resume_file, step)
        return [SourceCheckpoint(path.resolve().name, path, files, distributed=True)]
    if not complete:
        raise CheckpointNotFoundError(
            f"checkpoint folder {path} holds neither rank_N folders nor checkpoint files; set it to the folder above rank_0"
        )
    return [SourceCheckpoint(file.stem, file, {0: file}, distributed=False) for file in complete]


def _choose(folders: Mapping[int, Path], resume_file: Optional[str], step: Optional[str]) -> dict[int, Path]:
    """The file of every rank: the same step of all of them."""
    candidates = {rank: _checkpoint_files(folder) for rank, folder in folders.items()}
    if step is not None:
        candidates = {rank: _of_step(folders[rank], files, step) for rank, files in candidates.items()}
    for rank, files in candidates.items():
        if not files:
            raise CheckpointNotFoundError(
                f"rank folder {folders[rank]} holds no checkpoint file; copy the weights of rank {rank} there, or remove "
                f"the folder if another rank holds the same slices"
            )
    formats = {file.suffix: file for files in candidates.values() for file in files}
    if len(formats) > 1:
        raise UnsupportedCheckpointError(
            f"the rank folders hold files of both formats ({', '.join(map(str, formats.values()))}); keep one format"
        )
    if resume_file is not None:
        chosen = {rank: folders[rank] / _RANK_IN_NAME.sub(f"_rank_{rank}", Path(resume_file).name) for rank in folders}
        for rank, file in chosen.items():
            if not file.is_file():
                raise CheckpointNotFoundError(
                    f"{file}, the step that resume_training names, is not found for rank {rank}; there are "
                    f"{', '.join(f.name for f in candidates[rank])}"
                )
        logger.info("step of %s is taken from every rank folder, as resume_training says", Path(resume_file).name)
        return chosen
    by_step = {rank: {_step(f): f for f in files if _step(f)} for rank, files in candidates.items()}
    if all(by_step.values()):
        common = set.intersection(*(set(steps) for steps in by_step.values()))
        newest = max(step for steps in by_step.values() for step in steps if step)
        if not common:
            raise CheckpointNotFoundError(
                f"no step is there for all ranks below {next(iter(folders.values())).parent}: "
                + "; ".join(f"rank {rank} has {', '.join(f.name for f in files)}" for rank, files in candidates.items())
            )
        latest = max(s for s in common if s)
        if latest != newest:
            late = [rank for rank, steps in by_step.items() if newest not in steps]
            logger.warning(
                "step %s is newer than %s but rank %s lacks it; the latest step that all ranks have is used",
                _step_name(newest), _step_name(latest), ", ".join(map(str, late)),
            )  # fmt: skip
        chosen = {rank: steps[latest] for rank, steps in by_step.items()}
        if any(len(files) > 1 for files in candidates.values()):
            logger.info("several steps are there; step %s, the latest, is used", _step_name(latest))
        return chosen
    chosen = {rank: files[-1] for rank, files in candidates.items()}
    for rank, files in candidates.items():
        if len(files) > 1:
            logger.warning("%s holds several files; %s, the last by name, is used", folders[rank], chosen[rank].name)
    return chosen


def _of_step(folder: Path, files: list[Path], step: str) -> list[Path]:
    """The files of a rank that are of a step (``{epoch}_{step}``), or whose names end so if it is none."""
    if re.fullmatch(r"\d+_\d+", step):
        chosen = [file for file in files if (found := _step(file)) and _step_name(found) == step]
    else:
        chosen = [file for file in files if file.stem.endswith(step)]
    if not chosen:
        raise CheckpointNotFoundError(
            f"{folder} holds no file of step {step}; there are {', '.join(f.name for f in files) or 'none'}"
        )
    return chosen


def _checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoint files of a folder by name."""
    files = sorted(f for f in folder.iterdir() if f.suffix in _SUFFIXES and f.is_file())
    formats = {f.suffix for f in files}
    if len(formats) > 1:
        raise UnsupportedCheckpointError(
            f"{folder} holds both .ckpt and .safetensors files ({files[0].name}, ...); keep one format there"
        )
    return files


def _step(file: Path) -> Optional[_Step]:
    match = _STEP.search(file.name)
    return (int(match["epoch"]), int(match["step"]), int(match["task"] or 0)) if match else None


def _step_name(step: _Step) -> str:
    return f"{step[0]}_{step[1]}"
