"""Settings: the documented YAML keys, our own environment variables, and what they may be.

The only place that reads settings. The YAML keys are those of MindFormers' documentation; what it has no key for can be
set in a YAML mapping ``auto_trans:`` or in the environment, which wins:

=============================  ==============================  =========  ============================================
YAML ``auto_trans:``           environment                     default    meaning
=============================  ==============================  =========  ============================================
``engine``                     ``AUTO_TRANS_ENGINE``           native     ``native``, or ``mindspore`` for its own API
``load``                       ``AUTO_TRANS_LOAD``             files      ``files`` to convert first, or ``direct``
``loader``                     ``AUTO_TRANS_LOADER``           native     ``native``, or ``mindspore`` for its own loader
``memory_limit``               ``AUTO_TRANS_MEMORY_LIMIT``     64MiB      memory of a converter
``join_timeout``               ``AUTO_TRANS_JOIN_TIMEOUT``     7200       seconds to wait for all ranks to arrive
``heartbeat_timeout``          ``AUTO_TRANS_HEARTBEAT_TIMEOUT``  60       seconds without a sign of life: a rank is lost
``stall_timeout``              ``AUTO_TRANS_STALL_TIMEOUT``    1800       seconds alive without progress: a rank hangs
``allow_extra``                ``AUTO_TRANS_ALLOW_EXTRA``      none       patterns of parameters that no strategy need list
``allow_missing``              ``AUTO_TRANS_ALLOW_MISSING``    none       patterns of weights that the source may lack
=============================  ==============================  =========  ============================================

Patterns are a list in the YAML and separated by commas in the environment. ``AUTO_TRANS_DISABLE=1`` leaves MindFormers as
it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

from auto_trans.errors import ConfigError, ConfigTypeError
from auto_trans.sizes import parse_bytes

__all__ = [
    "DEFAULT_MEMORY",
    "DEFAULT_NPU_NUM",
    "DEFAULT_TIMING",
    "ENGINES",
    "YAML_KEYS",
    "AutoTransConfig",
    "Timing",
    "parse_boolean",
    "parse_engine",
    "parse_memory",
]

# The library's name of a setting -> what it is called in the YAML of a job; for messages.
YAML_KEYS = {
    "src": "load_checkpoint",
    "dst": "output_dir",
    "src_strategy": "src_strategy_path_or_dir",
    "dst_strategy": "the files in strategy/ of the output directory",
    "allow_extra": "auto_trans: {allow_extra: [...]}",
    "allow_missing": "auto_trans: {allow_missing: [...]}",
    "engine": "auto_trans: {engine: ...}",
    "load": "auto_trans: {load: ...}",
    "loader": "auto_trans: {loader: ...}",
    "memory_limit": "auto_trans: {memory_limit: ...}",
    "step": "resume_training",
    "file_suffix": "resume_training",
    "ranks": "transform_process_num",
    "processes": "transform_process_num",
    # what no job has, but the commands
    "prefix": "auto-trans convert --prefix",
    "format": "auto-trans convert --format",
    "scaling": "auto-trans merge-lora --scaling",
    "max_shard_size": "auto-trans merge-safetensors --max-shard-size",
    "against": "auto-trans verify --against",
}
ENGINES = ("native", "mindspore")
LOADERS = ("native", "mindspore")
LOADS = ("files", "direct")
_TIMEOUTS = ("join_timeout", "heartbeat_timeout", "stall_timeout")
# the settings of the YAML mapping ``auto_trans:``
_OWN = ("engine", "load", "loader", "memory_limit", *_TIMEOUTS, "allow_extra", "allow_missing", "unify")
DEFAULT_NPU_NUM = 8
DEFAULT_MEMORY = 64 * 1024 * 1024
_LEAST_MEMORY = 1024 * 1024


@dataclass(frozen=True)
class Timing:
    """How long ranks wait for each other, in seconds.

    Attributes:
        join_timeout: For all ranks to arrive; compiling takes some of them much longer than others.
        heartbeat_interval: Between a busy rank's signs of life.
        heartbeat_timeout: Without a sign of life, until a rank counts as lost.
        stall_timeout: With signs of life but without progress, until a rank counts as hanging.
        lock_timeout: For another job to leave the output directory.
        poll_min: Between two looks at the directory, at first.
        poll_max: ... after some time without news.
        log_interval: Between two log lines of a waiting rank.
    """

    join_timeout: float = 7200.0
    heartbeat_interval: float = 2.0
    heartbeat_timeout: float = 60.0
    stall_timeout: float = 1800.0
    lock_timeout: float = 10.0
    poll_min: float = 0.02
    poll_max: float = 0.5
    log_interval: float = 10.0


DEFAULT_TIMING = Timing()


@dataclass(frozen=True)
class AutoTransConfig:
    """The validated settings of an automatic conversion.

    Attributes:
        load_checkpoint: Complete file, folder of complete files, or folder of ``rank_N`` folders.
        src_strategy: Strategy file or folder of the source; None for complete weights.
        transform_process_num: Into how many converter ranks the work is divided.
        transform_by_rank: Has the mindspore engine convert rank by rank.
        npu_num_per_node: Devices of a node.
        resume_file: Name of the file to take from the rank folders, where ``resume_training`` picked a step.
        engine: ``native`` or ``mindspore``.
        memory_limit: Bytes of memory of a converter.
        allow_extra: Patterns of parameters that every rank may hold whole although no strategy lists them.
        allow_missing: Patterns of weights that the target lists and the source may lack.
        load: ``files`` to convert first and load what was written, or ``direct`` to assemble the slices in memory.
        loader: What reads the files of a rank: ``native``, or ``mindspore``.
        unify: Has a safetensors job merge the weights to ``unified_checkpoint/``, for MindFormers to slice.
        timing: How long ranks wait for each other.
    """

    load_checkpoint: str
    src_strategy: Optional[str] = None
    transform_process_num: int = 1
    transform_by_rank: bool = False
    npu_num_per_node: int = DEFAULT_NPU_NUM
    resume_file: Optional[str] = None
    engine: str = "native"
    memory_limit: int = DEFAULT_MEMORY
    allow_extra: tuple[str, ...] = ()
    allow_missing: tuple[str, ...] = ()
    load: str = "files"
    loader: str = "native"
    unify: bool = False
    timing: Timing = DEFAULT_TIMING

    @property
    def is_direct(self) -> bool:
        """Whether every rank assembles its slices in memory, and nothing is written."""
        return self.load == "direct"

    def check_combination(self) -> None:
        """Raises ConfigError if settings contradict each other."""
        if not self.is_direct:
            return
        for name, value in (("engine", self.engine), ("loader", self.loader)):
            if value != "native":
                raise ConfigError(f"«load» direct goes with «{name}» native only; leave «{name}» {value} out")
        if self.unify:
            raise ConfigError("«load» direct merges nothing; leave auto_trans: {unify: True} out")

    @classmethod
    def from_settings(
        cls,
        settings: Mapping[str, Any],
        load_checkpoint: Any,
        environ: Mapping[str, str] = os.environ,
        *,
        loads: bool = True,
    ) -> AutoTransConfig:
        """Reads and validates the settings of a job.

        Args:
            settings: A MindFormers configuration, or any mapping with its keys; absent keys take their defaults.
            load_checkpoint: The checkpoint path; its key differs between MindFormers' versions.
            environ: The environment.
            loads: Whether a checkpoint is loaded at all, so that its path must be given.

        Raises:
            ConfigError: A setting has a value that it cannot have.
        """
        own = settings.get("auto_trans") or {}
        if not isinstance(own, Mapping):
            raise ConfigTypeError(f"auto_trans must be a mapping of settings, not {own!r}")

        def setting(name: str, default: Any) -> Any:
            return environ.get(f"AUTO_TRANS_{name.upper()}", own.get(name, default))

        unknown = [str(name) for name in own if name not in _OWN]
        if unknown:
            raise ConfigError(f"auto_trans has no setting {', '.join(unknown)}; it has {', '.join(_OWN)}")
        if not loads and not load_checkpoint:
            load_checkpoint = ""
        elif not isinstance(load_checkpoint, (str, os.PathLike)) or not str(load_checkpoint):
            raise ConfigTypeError(f"load_checkpoint must be the path of the weights to load, not {load_checkpoint!r}")
        strategy = settings.get("src_strategy_path_or_dir")
        if strategy is not None and not isinstance(strategy, (str, os.PathLike)):
            raise ConfigTypeError(f"src_strategy_path_or_dir must be a path, not {strategy!r}")
        npus = settings.get("npu_num_per_node")
        if npus is None:
            npus = environ.get("DEVICE_NUM_PER_NODE") or None
        resume = settings.get("resume_training")
        timing = Timing(**{name: _seconds(name, setting(name, getattr(Timing, name))) for name in _TIMEOUTS})
        return cls(
            load_checkpoint=str(load_checkpoint),
            src_strategy=str(strategy) if strategy and strategy != "None" else None,
            transform_process_num=parse_process_num(settings.get("transform_process_num")),
            transform_by_rank=parse_boolean("transform_by_rank", settings.get("transform_by_rank")),
            npu_num_per_node=parse_npu_num(npus),
            resume_file=resume if isinstance(resume, str) and os.path.isdir(load_checkpoint) else None,
            engine=parse_engine(setting("engine", "native")),
            memory_limit=parse_memory(setting("memory_limit", None)),
            allow_extra=_patterns("allow_extra", setting("allow_extra", ())),
            allow_missing=_patterns("allow_missing", setting("allow_missing", ())),
            load=_choice("load", setting("load", "files"), LOADS),
            loader=_choice("loader", setting("loader", "native"), LOADERS),
            unify=_switch("unify", setting("unify", False)),
            timing=timing,
        )


def parse_process_num(value: Any) -> int:
    """``transform_process_num``; None is its default. The world size is checked by the election."""
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigTypeError(f"transform_process_num must be a whole number of at least 1, not {value!r}")
    if value < 1:
        raise ConfigError(f"transform_process_num should not be smaller than 1, but got {value}")
    return value


def parse_npu_num(value: Any) -> int:
    """``npu_num_per_node``; None is its default."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = DEFAULT_NPU_NUM if value is None else int(value)
    except (TypeError, ValueError):
        raise ConfigTypeError(f"npu_num_per_node must be a power of 2, not {value!r}") from None
    if number < 1 or number & (number - 1):
        raise ConfigError(f"npu_num_per_node must be a power of 2, but got {number}")
    return number


def parse_engine(value: Any) -> str:
    """The engine's name."""
    return _choice("engine", value, ENGINES)


def parse_memory(value: Union[int, str, None]) -> int:
    """Bytes of a memory limit; None is the default."""
    if value is None:
        return DEFAULT_MEMORY
    number = parse_bytes(value, "«memory_limit»")
    if number < _LEAST_MEMORY:
        raise ConfigError(f"«memory_limit» must be at least 1MiB, not {value!r}")
    return number


def parse_boolean(name: str, value: Any) -> bool:
    """A setting that is True or False; None is False."""
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ConfigTypeError(f"{name} must be True or False, not {value!r}")
    return value


def _choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """A setting that is one of some words."""
    if value not in choices:
        raise ConfigError(f"«{name}» must be one of {', '.join(choices)}, not {value!r}")
    return str(value)


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    """Patterns of parameter names."""
    found = [part.strip() for part in value.split(",")] if isinstance(value, str) else value or ()
    if not isinstance(found, (list, tuple)) or not all(isinstance(pattern, str) and pattern for pattern in found):
        raise ConfigTypeError(f"«{name}» must be a list of patterns such as '*.freqs_*', not {value!r}")
    return tuple(found)


def _switch(name: str, value: Any) -> bool:
    """A setting that is True or False, also as the environment gives it."""
    return parse_boolean(name, {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower(), value))


def _seconds(name: str, value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise ConfigTypeError(f"{name} must be a number of seconds, not {value!r}") from None
    if seconds <= 0:
        raise ConfigError(f"{name} must be more than 0 seconds, not {value!r}")
    return seconds
