"""Runs the hook right after MindFormers' modules are imported; nothing else is imported before.

Every interpreter of the environment loads this module through ``auto_trans.pth``, so it imports only what the interpreter
has loaded anyway.
"""

import os
import sys

__all__ = ["WATCHED", "install", "is_installed"]

WATCHED = frozenset(
    {
        "mindformers.tools.utils",
        "mindformers.utils.file_utils",
        "mindformers.utils.load_checkpoint_utils",
        "mindformers.trainer.trainer",
        "mindformers.trainer.utils",
        "mindformers.models.modeling_utils",
    }
)


class _Finder:
    """A meta path finder that finds nothing itself, but has the hook see the modules that others find."""

    def find_spec(self, name, path=None, target=None):
        if name not in WATCHED:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            if finder is self or find_spec is None:
                continue
            spec = find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader:
    """Has the real loader do its work, then patches the module; looks like the real one to everybody else."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        from auto_trans.hooks.patches import patch

        patch(module)


def is_installed():
    """Whether the hook sees modules as they are imported."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def install():
    """Has the hook see MindFormers' modules as they are imported; does nothing with ``AUTO_TRANS_DISABLE=1``."""
    disabled = os.environ.get("AUTO_TRANS_DISABLE", "0") not in ("", "0")
    if not disabled and not is_installed():
        sys.meta_path.insert(0, _Finder())
