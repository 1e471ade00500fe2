"""What a job loads, and whose conversion it gets: one answer for the hook, which acts by it, and for doctor."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

from auto_trans.config import AutoTransConfig, parse_boolean
from auto_trans.conversion import check_source
from auto_trans.core.plan import Plan
from auto_trans.core.rules import Allowed
from auto_trans.core.strategy import Strategy
from auto_trans.errors import CheckpointNotFoundError, ConfigError, UnsupportedCheckpointError
from auto_trans.storage.checkpoint2.find import is_checkpoint2
from auto_trans.storage.formats import FORMATS
from auto_trans.storage.names import HYPER_PARAMETERS, ITERATION_FOLDER, RANK_FOLDER
from auto_trans.storage.scanned import ScannedFiles, read_errors
from auto_trans.storage.sources import Checkpoint, as_strategy, find_sources

__all__ = ["NOT_ASKED", "RESHARDS", "Load", "load_path", "reshards_itself"]

NOT_ASKED = "auto_trans_ckpt is not True"
RESHARDS = "it loads Checkpoint 2.0, which MindFormers reshards by itself"

_STEP = "global_step"


@dataclass(frozen=True)
class Load:
    """What a job loads.

    Attributes:
        config: Its settings; those of a safetensors job name the folder above the rank folders, and the strategy beside it
            where none is given.
        format: ``ckpt`` or ``safetensors``.
        resumes: Whether training goes on where it was, so that the optimizer and its step are needed.
        left: Why MindFormers loads by itself, as a sentence without its beginning; empty if auto_trans converts.
        checked: Whether auto_trans checks the source before the graph is compiled.
    """

    config: AutoTransConfig
    format: str
    resumes: bool = False
    left: str = ""
    checked: bool = True

    @classmethod
    def of(cls, settings: Mapping[str, Any], *, modelarts: bool = False, reshards: bool = False) -> Load:
        """Judges the settings of a job.

        Args:
            settings: A MindFormers configuration, or any mapping with its keys.
            modelarts: Whether the job runs on ModelArts.
            reshards: Whether it is a job of Checkpoint 2.0, see `reshards_itself`.

        Raises:
            ConfigError: A setting has a value that it cannot have, or MindFormers would refuse to load.
        """
        format = settings.get("load_ckpt_format") or "ckpt"
        if format not in FORMATS:
            raise ConfigError(f"load_ckpt_format must be {' or '.join(FORMATS)}, not {format!r}")
        left = _left_as_a_whole(settings, modelarts, reshards)
        config = AutoTransConfig.from_settings(settings, load_path(settings), loads=not left)
        load = cls(config, format, bool(settings.get("resume_training")))
        if left:
            return replace(load, left=left, checked=False)
        config.check_combination()
        if config.unify and format != "safetensors":
            raise ConfigError("auto_trans: {unify: True} is for load_ckpt_format: safetensors only; leave it out")
        if format == "safetensors":
            return _safetensors(load, parse_boolean("use_parallel", settings.get("use_parallel")))
        return load

    @property
    def is_direct(self) -> bool:
        """Whether every rank assembles its slices in memory."""
        return self.config.is_direct and not self.left

    @property
    def allowed(self) -> Allowed:
        """What is allowed although it looks wrong."""
        return Allowed(self.config.allow_extra, self.config.allow_missing)

    def source_strategy(self) -> Strategy:
        """The strategy of the source, read.

        Raises:
            StrategyError: It cannot be read.
        """
        return as_strategy(self.config.src_strategy)

    def check(self, heads: ScannedFiles, strategy: Strategy) -> Plan:
        """Checks all that a source and its strategy tell, before the target's is compiled.

        Args:
            heads: The heads of the chosen files.
            strategy: Their strategy.

        Returns:
            The plan of one complete checkpoint.

        Raises:
            AutoTransError: It cannot be converted, or MindFormers would refuse it.
        """
        plan = check_source(strategy, heads, self.allowed)
        self._check_resumable(heads.checkpoint, {tensor.tensor.name for file in plan.files for tensor in file.tensors})
        return plan

    def _check_resumable(self, checkpoint: Checkpoint, names: Collection[str]) -> None:
        """Looks whether a safetensors job that resumes finds the step at which it goes on."""
        if self.format != "safetensors" or not self.resumes:
            return
        if checkpoint.distributed and _STEP not in names:
            raise ConfigError(
                f"resume_training is set, but {checkpoint.path} holds no {_STEP}: it was saved without its optimizer; set "
                f"resume_training: False, or load_checkpoint to weights that hold it"
            )
        if not checkpoint.distributed and not (Path(self.config.load_checkpoint) / HYPER_PARAMETERS).is_file():
            raise ConfigError(
                f"resume_training is set, but {self.config.load_checkpoint} holds no {HYPER_PARAMETERS}, without which "
                f"MindFormers does not resume from complete weights; set resume_training: False, or give the rank folders"
            )

    def find(self, strategy: Strategy) -> list[Checkpoint]:
        """The chosen files, see `auto_trans.storage.sources.find_sources`.

        Raises:
            AutoTransError: There are none, or they and the strategy do not go together.
        """
        return find_sources(self.config.load_checkpoint, strategy, self.config.resume_file)


def load_path(settings: Mapping[str, Any]) -> Any:
    """The path of the weights; MindFormers 1.9 moved it to ``checkpoint.load_path``."""
    checkpoint = settings.get("checkpoint")
    moved = checkpoint.get("load_path") if isinstance(checkpoint, Mapping) else None
    return moved or settings.get("load_checkpoint")


def reshards_itself(settings: Mapping[str, Any], mindformers: str) -> bool:
    """Whether the settings, as the user wrote them, are those of a job of Checkpoint 2.0.

    MindFormers 1.9 fills ``checkpoint`` of every job when it checks the settings; afterwards this tells nothing.

    Args:
        settings: The settings.
        mindformers: The version of MindFormers; one that tells none is taken for a new one.
    """
    if settings.get("run_mode") not in (None, "train", "finetune"):  # nothing else knows that format
        return False
    found = re.match(r"(\d+)\.(\d+)", mindformers)
    version = (int(found[1]), int(found[2])) if found else (9, 9)
    if version >= (1, 9) and settings.get("checkpoint"):
        return True
    key = "use_legacy_format" if version >= (1, 8) else "ckpt_use_legacy_format"
    return version >= (1, 7) and settings.get(key) is False


def _left_as_a_whole(settings: Mapping[str, Any], modelarts: bool, reshards: bool) -> str:
    if not settings.get("auto_trans_ckpt"):
        return NOT_ASKED
    if reshards:
        return RESHARDS
    if modelarts:
        return "this is ModelArts"
    if settings.get("only_save_strategy"):
        return "only_save_strategy is True"
    if settings.get("use_legacy") is False and settings.get("run_mode") == "predict":
        return "inference with use_legacy: False reads weights by itself"
    return ""


def _safetensors(load: Load, use_parallel: bool) -> Load:
    """A safetensors job: distributed weights are converted and complete ones sliced by MindFormers, unless all is direct."""
    with read_errors(load.config.load_checkpoint):
        path = Path(load.config.load_checkpoint).expanduser()
        if not path.exists():
            raise CheckpointNotFoundError(
                f"checkpoint {path} is not found; set it to a file or folder that exists («src»)"
            )
        if is_checkpoint2(path):
            if load.config.is_direct and ITERATION_FOLDER.match(path.resolve().name):
                return load
            direct = "give the folder of an iteration" + (
                "" if load.config.is_direct else " with auto_trans: {load: direct}"
            )
            raise ConfigError(
                f"load_checkpoint {path} is {'of ' if path.is_file() else ''}a Checkpoint 2.0; MindFormers 1.9 and later "
                f"loads it with checkpoint: {{load_path: ...}}; for this job give the folder of an iteration{direct}, or "
                f"convert it: auto-trans convert {path.parent if path.is_file() else path} ... --dst-strategy ..."
            )
        of_a_rank = path.is_file() and RANK_FOLDER.match(path.parent.name)
        folder = path.parent.parent if of_a_rank else path
        if folder.is_dir() and any(RANK_FOLDER.match(child.name) for child in folder.iterdir()):
            return _distributed(load, folder, path.name if of_a_rank else load.config.resume_file, use_parallel)
        return _complete(load, path, use_parallel)


def _distributed(load: Load, folder: Path, resume_file: Optional[str], use_parallel: bool) -> Load:
    config = load.config
    if not use_parallel:
        raise ConfigError(
            f"load_checkpoint {folder} holds rank folders, which MindFormers loads as safetensors with use_parallel: True "
            f"only; set it, or merge the weights first: auto-trans merge-safetensors"
        )
    if config.engine != "native":
        raise ConfigError(f"a safetensors job is converted by «engine» native only, not {config.engine}")
    strategy = config.src_strategy or _beside(folder)
    return replace(
        load, config=replace(config, load_checkpoint=str(folder), resume_file=resume_file, src_strategy=strategy)
    )


def _complete(load: Load, path: Path, use_parallel: bool) -> Load:
    if path.is_file() and use_parallel:
        raise ConfigError(
            f"load_checkpoint {path} is a file, which MindFormers does not load with use_parallel: True; give the folder "
            f"that holds it alone"
        )
    if not any(file.suffix == ".safetensors" for file in ([path] if path.is_file() else path.iterdir())):
        raise UnsupportedCheckpointError(
            f"load_checkpoint {path} holds no .safetensors files, which load_ckpt_format: safetensors asks for; set "
            f"load_ckpt_format: ckpt, or another path"
        )
    if not use_parallel:
        return replace(load, left="the weights are complete, and so is the model of one rank", checked=False)
    if load.config.is_direct:
        return load
    return replace(load, left="the weights are complete, and MindFormers slices them while it loads")


def _beside(checkpoint: Path) -> Optional[str]:
    """The strategy folder that a job leaves beside its checkpoints."""
    folder = checkpoint.absolute().parent / "strategy"
    return str(folder) if folder.is_dir() and any(folder.iterdir()) else None
