"""Stand-in for hyper-parallel, which MindFormers 2 requires and which is not published: each of its names is an empty class.

MindFormers imports it for jobs in PyNative mode, which the demo does not run. ``scripts/venv.sh`` copies it into
environments of such a MindFormers, as the package ``hyper_parallel``.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Optional


class _Empty(type):
    """A class whose every attribute is such a class, too."""

    def __getattr__(cls, name: str) -> Any:
        return _empty(name)


def _empty(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Empty(name, (), {"__init__": lambda self, *args, **kwargs: None})


class _Modules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes its modules, except those that MindFormers does without where they are not there."""

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]] = None, target: Optional[ModuleType] = None
    ) -> Optional[importlib.machinery.ModuleSpec]:
        if not fullname.startswith("hyper_parallel.") or fullname.startswith("hyper_parallel.custom_ops"):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = _empty


__getattr__ = _empty
sys.meta_path.append(_Modules())
