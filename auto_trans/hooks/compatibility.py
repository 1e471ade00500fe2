"""Whether an installed MindFormers looks as the hook expects it: told by its source, of which nothing is imported.

The hook replaces functions in the middle of MindFormers' import, one module after the other. So that it replaces all of
them or none, this is known before the first one: the source is parsed, and what the hook wraps, replaces and calls is
compared with `auto_trans.hooks.expected`. `auto_trans.doctor` asks the same.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Optional, Union

from auto_trans.hooks.expected import EXPECTED, Expected, Others

__all__ = ["TESTED", "Verdict", "judge", "judge_installed", "pairs"]

# MindFormers and MindSpore: what scripts/versions.sh runs. README.md and scripts/versions.md hold the same.
TESTED = (
    ("1.6.0", "2.7.0"),
    ("1.7.0", "2.7.1"),
    ("1.8.0", "2.7.2"),
    ("1.9.0", "2.9.0"),
    ("2.0.0", "2.10.0"),
    ("2.1.0", "2.10.0"),
)


@dataclass(frozen=True)
class Verdict:
    """What the hook makes of an installed MindFormers.

    Attributes:
        mindformers: Its version; empty where it tells none.
        mindspore: The version of MindSpore beside it; empty where none is installed.
        differences: Where it does not look as expected, one sentence each. Then it is left alone as a whole.
    """

    mindformers: str
    mindspore: str
    differences: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the hook does its work."""
        return not self.differences

    @property
    def tested(self) -> bool:
        """Whether ``scripts/versions.sh`` runs these two versions."""
        return self.fits and (self.mindformers, self.mindspore) in TESTED

    @property
    def what(self) -> str:
        """What is so, in a sentence."""
        name = (
            f"MindFormers {self.mindformers or 'of unknown version'} with MindSpore {self.mindspore or '(none found)'}"
        )
        if self.tested:
            return f"{name}: tested"
        if self.fits:
            return f"{name}: expected to work, for its functions look as they should; tested on {pairs()}"
        return f"{name}: left alone, its own checkpoint conversion is used; {'; '.join(self.differences)}"

    @property
    def remedy(self) -> str:
        """What to do about it; empty where nothing is wrong."""
        return "" if self.fits else f"convert offline (auto-trans convert), or use a MindFormers tested on: {pairs()}"


def pairs() -> str:
    """The versions that are tested, for a message."""
    return ", ".join(f"{mindformers} with {mindspore}" for mindformers, mindspore in TESTED)


def judge_installed() -> Optional[Verdict]:
    """What the hook makes of the MindFormers that this interpreter would import, or has; None if there is none."""
    try:
        spec = importlib.util.find_spec("mindformers")
    except ValueError:  # some module of that name, made by hand
        return None
    locations = list(spec.submodule_search_locations or ()) if spec is not None else []
    return judge(Path(locations[0]), _mindspore_version()) if locations else None


@functools.cache
def judge(root: Path, mindspore: str) -> Verdict:
    """What the hook makes of a MindFormers.

    Args:
        root: Its folder.
        mindspore: The version of MindSpore beside it.
    """
    source = _Source(root)
    found = dict.fromkeys(difference for expected in EXPECTED for difference in _differences(expected, source))
    return Verdict(source.version(), mindspore, tuple(found))


def _mindspore_version() -> str:
    try:
        return metadata.version("mindspore")
    except metadata.PackageNotFoundError:
        return ""


_Definition = Union[ast.FunctionDef, ast.ClassDef]


@dataclass(frozen=True)
class _Module:
    """The statements of a module that run when it is imported."""

    statements: tuple[ast.stmt, ...] = ()
    is_package: bool = False


class _Source:
    """The source of a package, parsed as far as it is asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._parsed: dict[str, Optional[_Module]] = {}

    def version(self) -> str:
        """What the package says of itself; empty if nothing."""
        for statement in (self.module(self._root.name) or _Module()).statements:
            if isinstance(statement, ast.Assign) and "__version__" in map(ast.unparse, statement.targets):
                value = statement.value
                return str(value.value) if isinstance(value, ast.Constant) else ""
        return ""

    def module(self, name: str) -> Optional[_Module]:
        """A module; None if it, or its source, is not there."""
        if name not in self._parsed:
            self._parsed[name] = self._parse(name)
        return self._parsed[name]

    def find(self, module: str, name: str, seen: frozenset[str] = frozenset()) -> Optional[tuple[str, _Definition]]:
        """The definition of a name of a module, and the module that it is in; imports from one to the other are followed."""
        if module in seen:
            return None
        seen |= {module}
        parsed = self.module(module) or _Module()
        for statement in parsed.statements:
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef)) and statement.name == name:
                return module, statement
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if name == (alias.asname or alias.name) or alias.name == "*":
                        origin = _origin(statement, module, parsed.is_package)
                        found = self.find(origin, name if alias.name == "*" else alias.name, seen)
                        if found is not None:
                            return found
        return None

    def _parse(self, name: str) -> Optional[_Module]:
        package, *rest = name.split(".")
        if package != self._root.name:
            return None
        path = self._root.joinpath(*rest)
        for file, is_package in ((path / "__init__.py", True), (path.with_name(f"{path.name}.py"), False)):
            try:
                return _Module(tuple(_flat(ast.parse(file.read_bytes()).body)), is_package)
            except (OSError, SyntaxError, ValueError):
                continue
        return None


def _origin(statement: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The module that an import takes its names from."""
    above = module.split(".")[: None if is_package else -1]
    base = above[: len(above) - statement.level + 1] if statement.level else []
    return ".".join([*base, *([statement.module] if statement.module else [])])


def _flat(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, and those that they run when a module is imported."""
    for statement in statements:
        yield statement
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            yield from _flat(statement.body)
            for handler in getattr(statement, "handlers", ()):
                yield from _flat(handler.body)
            yield from _flat(getattr(statement, "orelse", []))


def _differences(expected: Expected, source: _Source) -> Iterator[str]:
    """What is not as expected, one sentence for each place."""
    outer, _, method = expected.name.partition(".")
    for module in expected.used_in:
        found = source.find(module, outer)
        if found is None and expected.may_lack:
            continue
        if found is None:
            missing = f"has no {outer}" if source.module(module) is not None else "is not there, or its source is not"
            yield f"module {module} {missing}"
            continue
        origin, definition = found
        if expected.defined_in and origin not in expected.defined_in:
            yield f"{outer} is defined in {origin}, not in {' or '.join(expected.defined_in)}"
            continue
        function = _function(definition, method)
        if function is None:
            lacks = f"has no method {method} of its own" if method else "is a class, not a function"
            yield f"{outer} in {origin} {lacks}"
            continue
        told = _compare(expected, function.args, bool(method))
        if told:
            yield f"{expected.name} in {origin} {told}"


def _function(definition: _Definition, method: str) -> Optional[ast.FunctionDef]:
    """A function itself, or the method of a class; None if it is the other, or has none."""
    if isinstance(definition, ast.FunctionDef):
        return None if method else definition
    for statement in definition.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == method:
            return statement
    return None


def _compare(expected: Expected, arguments: ast.arguments, is_method: bool) -> str:
    """How the parameters of a function differ from those expected; empty if they do not."""
    positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)][int(is_method) :]
    keywords = [a.arg for a in arguments.kwonlyargs]
    missing = [name for name in expected.parameters if name not in positional + keywords]
    if missing:
        return f"has no parameter {', '.join(missing)}"
    leading = len(expected.parameters)
    if tuple(positional[:leading]) != expected.parameters:
        return f"begins with the parameters {', '.join(positional[:leading])}, not {', '.join(expected.parameters)}"
    if expected.others is Others.NONE:
        more = [f"{star}{a.arg}" for star, a in (("*", arguments.vararg), ("**", arguments.kwarg)) if a is not None]
        unknown = [name for name in positional[leading:] + keywords + more if name not in expected.optional]
        return f"has the unknown parameter {', '.join(unknown)}" if unknown else ""
    if expected.others is Others.DEFAULTED:
        required = positional[leading : max(len(positional) - len(arguments.defaults), leading)]
        required += [name for name, default in zip(keywords, arguments.kw_defaults) if default is None]
        return f"needs the parameter {', '.join(required)}" if required else ""
    return ""
