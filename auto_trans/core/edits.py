"""Changes on the way: what becomes of the parameters of a source besides being sliced anew.

An edit turns recipes into other recipes, one for every target parameter. It only names things; the plan resolves the names
into tensors, and the engine does the arithmetic. To add an edit (cast, rename, ...), write a frozen dataclass with `apply`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Optional, Protocol

from auto_trans.core.strategy import Strategy, is_optimizer_state, owner_of
from auto_trans.errors import PlanError

__all__ = [
    "AddLora",
    "Drop",
    "Edit",
    "KeepFor",
    "LeaveOut",
    "LoraPair",
    "Product",
    "Recipe",
    "Rename",
    "apply_edits",
    "find_pairs",
    "is_lora",
]


@dataclass(frozen=True)
class Product:
    """What is added to a parameter W [out, in]: (B [out, r] @ A [r, in]) * scaling.

    Attributes:
        a: Name of A.
        b: Name of B.
        scaling: The factor.
    """

    a: str
    b: str
    scaling: float


@dataclass(frozen=True)
class Recipe:
    """How a target parameter is made.

    Attributes:
        source: The source parameter that it is copied from.
        added: What is added to it.
    """

    source: str
    added: Optional[Product] = None


class Edit(Protocol):
    """A change on the way. Frozen and picklable; its ``repr`` is part of what a conversion is known by."""

    def apply(self, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
        """Turns recipes, by target name in file order, into other recipes.

        Raises:
            PlanError: The source lacks what the edit needs.
        """


def apply_edits(edits: Iterable[Edit], names: Iterable[str]) -> dict[str, Recipe]:
    """The recipe of every target parameter, by its name in file order; without edits the source's names."""
    recipes = {name: Recipe(name) for name in names}
    for edit in edits:
        recipes = edit.apply(recipes)
    return recipes


@dataclass(frozen=True)
class Drop:
    """Leaves out parameters.

    Attributes:
        prefixes: Their names begin with one of these.
    """

    prefixes: tuple[str, ...]

    def apply(self, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
        """Drops, see `Edit`."""
        return {name: recipe for name, recipe in recipes.items() if not name.startswith(self.prefixes)}


@dataclass(frozen=True)
class LeaveOut:
    """Leaves out parameters.

    Attributes:
        names: Their names.
    """

    names: tuple[str, ...]

    def apply(self, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
        """Leaves out, see `Edit`."""
        left_out = frozenset(self.names)
        return {name: recipe for name, recipe in recipes.items() if name not in left_out}


@dataclass(frozen=True)
class Rename:
    """Gives parameters other names; those that it does not know keep theirs.

    Attributes:
        names: Pairs of the new name and the name in the source; what has several new names is there under each.
    """

    names: tuple[tuple[str, str], ...]

    def apply(self, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
        """Renames, see `Edit`."""
        new: dict[str, list[str]] = {}
        for name, old in dict.fromkeys(self.names):
            new.setdefault(old, []).append(name)
        renamed: dict[str, Recipe] = {}
        for old, recipe in recipes.items():
            for name in new.get(old, [old]):
                if name in renamed:
                    raise PlanError(f"parameter {renamed[name].source} and {recipe.source} would both be named {name}")
                renamed[name] = recipe
        return renamed


@dataclass(frozen=True)
class KeepFor:
    """Leaves out what cannot be judged without a target: uneven layouts, and optimizer state that is not listed.

    Attributes:
        strategy: The source strategy.
    """

    strategy: Strategy

    def apply(self, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
        """Leaves out, see `Edit`."""
        strategy = self.strategy
        return {
            name: recipe
            for name, recipe in recipes.items()
            if name not in strategy.refused and (strategy.tells(name) or not owner_of(name, recipes))
        }


@dataclass(frozen=True)
class AddLora:
    """Merges LoRA weights into the base weights beside them, and leaves out the LoRA matrices and their moments.

    Attributes:
        scaling: lora_alpha / lora_rank.
    """

    scaling: float

    def apply(self, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
        """Merges, see `Edit`."""
        pairs = find_pairs(recipes)
        kept = {name: recipe for name, recipe in recipes.items() if not is_lora(name)}
        for base, pair in pairs.items():
            added = Product(recipes[pair.a].source, recipes[pair.b].source, self.scaling)
            kept[base] = replace(kept[base], added=added)
        return kept


# MindFormers: ...mindpet_delta_lora_a beside ...weight; ...weight_lora_a; ...lora_A.weight. Moments carry a prefix.
_LORA = re.compile(r"(?:_lora_|\.lora_)([aAbB])(?=$|\.)")
_DELTA = re.compile(r"\.(?:mindpet|tk)_delta$")


class LoraPair(NamedTuple):
    """The names of the two matrices that belong to a base weight."""

    a: str
    b: str


def is_lora(name: str) -> bool:
    """Whether a parameter is a LoRA matrix, or the optimizer state of one."""
    return bool(_LORA.search(name))


def find_pairs(names: Iterable[str]) -> dict[str, LoraPair]:
    """The base weights that LoRA changes, with their matrices.

    Raises:
        PlanError: A matrix has no partner, or a base weight is missing.
    """
    known = set(names)
    sides: dict[str, dict[str, str]] = {}
    for name in sorted(known):
        match = _LORA.search(name)
        if match and not is_optimizer_state(name):
            base = _DELTA.sub(".weight", name[: match.start()] + name[match.end() :])
            sides.setdefault(base, {})[match[1].lower()] = name
    for base, pair in sides.items():
        for side, other in (("a", "b"), ("b", "a")):
            if side not in pair:
                raise PlanError(
                    f"LoRA parameter {pair[other]} has no partner {side.upper()}; the weights are incomplete"
                )
        if base not in known:
            raise PlanError(
                f"LoRA parameter {pair['a']} belongs to {base}, which is not there; give base and LoRA weights"
            )
    if not sides:
        raise PlanError("the source holds no LoRA parameters (..._lora_a and ..._lora_b, or ...lora_A and ...lora_B)")
    return {base: LoraPair(pair["a"], pair["b"]) for base, pair in sides.items()}
