"""What is replaced in MindFormers, for the versions whose inside is known."""

from __future__ import annotations

import functools
import importlib
import re
import sys
from types import ModuleType
from typing import Any, Callable

from auto_trans.log import logger, use_mindformers_logger

__all__ = ["KNOWN_VERSIONS", "patch"]

# The versions whose load path was read: the signatures are the same. The clearing function moved from tools/utils to
# utils/file_utils in 1.8; from 1.9 the path of the weights is config.checkpoint.load_path.
KNOWN_VERSIONS = ("1.6", "1.7", "1.8", "1.9")

_MARK = "_auto_trans_original"
_WARNS = "mindformers.trainer.utils"  # every version has it, and imports it once


def patch(module: ModuleType) -> None:
    """Replaces what a freshly imported MindFormers module defines; leaves unknown versions as they are."""
    use_mindformers_logger()
    version = getattr(sys.modules.get("mindformers"), "__version__", "")
    if not _is_known(version):
        if module.__name__ == _WARNS:
            _warn_of_version(version)
        return
    for name, make in _REPLACEMENTS[module.__name__].items():
        original = module.__dict__.get(name)
        if original is not None and not hasattr(original, _MARK):
            replacement = make(original)
            setattr(replacement, _MARK, original)
            _replace(name, original, replacement)


def _replace(name: str, original: Any, replacement: Any) -> None:
    """Replaces an object in the module that defines it and in those that have imported it from there."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "mindformers" and getattr(module, "__dict__", {}).get(name) is original:
            setattr(module, name, replacement)


def _is_known(version: str) -> bool:
    release = re.match(r"\d+\.\d+", version)
    return bool(release) and release.group() in KNOWN_VERSIONS  # type: ignore[union-attr]


def _warn_of_version(version: str) -> None:
    logger.warning(
        "auto_trans does not know MindFormers %s (it knows %s) and leaves it as it is: MindFormers' own checkpoint "
        "conversion is used",
        version or "of unknown version", ", ".join(KNOWN_VERSIONS),
    )  # fmt: skip


def _around(module: str, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a replacement that hands the original to a function of `auto_trans.hooks`, imported when it is made."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        ours = getattr(importlib.import_module(f"auto_trans.hooks.{module}"), name)

        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return ours(original, *args, **kwargs)

        return replacement

    return make


def _trainer(original: type) -> type:
    """The Trainer itself, which makes its settings known while it checks them."""
    from auto_trans.hooks.load import check_settings

    check = original.__dict__.get(_CHECK)
    if check is not None:

        @functools.wraps(check)
        def checking(self: Any, *args: Any, **kwargs: Any) -> None:
            check_settings(check, self, *args, **kwargs)

        setattr(original, _CHECK, checking)
    return original


def _transform(original: type) -> type:
    from auto_trans.hooks.transform import TransformCkpt

    class Transform(TransformCkpt):
        """MindFormers' ``TransformCkpt`` as auto_trans does it."""

        stock = original

    return Transform


_CHECK = "_check_config_rules"
_CLEAR = {"clear_auto_trans_output": _around("clear", "clear_auto_trans_output")}
_REPLACEMENTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "mindformers.tools.utils": _CLEAR,
    "mindformers.utils.file_utils": _CLEAR,
    "mindformers.utils.load_checkpoint_utils": {
        "_get_src_file_suffix": _around("safetensors", "choose_suffix"),
        "get_merged_dst_strategy_path": _around("safetensors", "merge_target_strategy"),
        "get_merged_src_strategy_path": _around("safetensors", "merge_source_strategy"),
        "load_safetensors_checkpoint": _around("safetensors", "load_slices"),
        "unify_safetensors": _around("safetensors", "unify"),
    },
    "mindformers.models.modeling_utils": {"TransformCkpt": _transform},
    "mindformers.trainer.trainer": {"Trainer": _trainer},
    "mindformers.trainer.utils": {
        "TransformCkpt": _transform,
        "transform_and_load_checkpoint": _around("load", "load_checkpoint"),
    },
}
