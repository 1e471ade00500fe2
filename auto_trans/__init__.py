"""auto_trans: change the parallel strategy, restart the job, and its weights load.

The public API is imported on first use: every interpreter of the environment imports this package for the hook, and must
not pay for more.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from auto_trans.arrays import load as load
    from auto_trans.arrays import load_each as load_each
    from auto_trans.core.strategy import Strategy as Strategy
    from auto_trans.errors import AutoTransError as AutoTransError
    from auto_trans.hooks.installation import install as install
    from auto_trans.network import load_into as load_into
    from auto_trans.offline import convert as convert
    from auto_trans.report import ConversionReport as ConversionReport
    from auto_trans.storage.strategies import merge_strategies as merge_strategies
    from auto_trans.storage.strategies import read_strategy as read_strategy

__version__ = "0.3.0"

_PUBLIC = {
    "AutoTransError": "auto_trans.errors",
    "ConversionReport": "auto_trans.report",
    "Strategy": "auto_trans.core.strategy",
    "convert": "auto_trans.offline",
    "install": "auto_trans.hooks.installation",
    "load": "auto_trans.arrays",
    "load_each": "auto_trans.arrays",
    "load_into": "auto_trans.network",
    "merge_strategies": "auto_trans.storage.strategies",
    "read_strategy": "auto_trans.storage.strategies",
}
__all__ = [*_PUBLIC, "__version__"]


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value
