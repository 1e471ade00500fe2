"""What is refused, and what is told: the rules that keep a conversion from being silently wrong.

MindSpore copies a parameter that its strategies do not list as it is. That is right for single numbers (global_step,
loss scale) and for buffers that no graph uses; it is wrong for weights, which would be whole, or a slice of something
else, beside sliced ones. Strategy files do not tell how many pipeline stages there are, so the names must: a parameter
whose siblings in other layers are listed belongs to a stage whose strategy file is missing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from auto_trans.core.edits import Recipe
from auto_trans.core.source import Source
from auto_trans.core.strategy import Strategy, is_accumulated_gradient, is_optimizer_state, owner_of
from auto_trans.errors import ConfigTypeError, PlanError

__all__ = ["NOTHING", "Allowed", "Sorting", "kind_of", "some", "sort_parameters"]

# Tables and masks that models hold beside their weights, and that a graph may not use.
_BUFFER = re.compile(r"(?:^|[._])(?:freqs?|rope|rotary|inv_freq|cos|sin|masks?|position_ids|alibi|cached?)(?=$|[._\d])")
# What is trained on top of a model, and begins with its initial values.
_ADDED = re.compile(r"lora|adapter|prefix_|_delta|(?:^|\.)pet[._]", re.IGNORECASE)
_WEIGHT = re.compile(r"(?:^|[._])(?:weight|bias|gamma|beta|kernel|embedding|table)$")
# that of a layer or an expert; the 1 of w1 is none
_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


@dataclass(frozen=True)
class Allowed:
    """What a user takes responsibility for.

    Attributes:
        extra: Patterns of parameters that are carried whole although no strategy lists them.
        missing: Patterns of weights that the target lists and the source may lack.
    """

    extra: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @classmethod
    def of(cls, extra: Iterable[str], missing: Iterable[str]) -> Allowed:
        """What callers allow; a single pattern may be a plain string.

        Raises:
            ConfigTypeError: It is neither a pattern nor several.
        """
        return cls(_patterns("«allow_extra»", extra), _patterns("«allow_missing»", missing))


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ConfigTypeError(f"{name} must be patterns of parameter names such as '*.freqs_*', not {value!r}")
    return patterns


NOTHING = Allowed()


@dataclass(frozen=True)
class Sorting:
    """What becomes of the parameters.

    Attributes:
        sliced: They are sliced anew.
        carried: No strategy lists them; every rank gets them as they are.
        dropped: Optimizer state that the target, which has no optimizer, does not take.
        absent: The target lists them and the source does not hold them.
        taken_whole: Of the sliced ones those that the source strategy does not list; every source rank holds them whole.
        warnings: What a user should know, as sentences.
    """

    sliced: tuple[str, ...]
    carried: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    taken_whole: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def sort_parameters(
    source: Source, target: Strategy, recipes: Mapping[str, Recipe], allowed: Allowed = NOTHING
) -> Sorting:
    """Sorts the parameters of a target by what becomes of them.

    Args:
        source: The source.
        target: Strategy of the target.
        recipes: How the target's parameters are made.
        allowed: What is allowed although it looks wrong.

    Raises:
        PlanError: A parameter would be silently wrong.
    """
    return _Sorter(source, target, recipes, allowed).sort()


class _Sorter:
    def __init__(self, source: Source, target: Strategy, recipes: Mapping[str, Recipe], allowed: Allowed) -> None:
        self._source, self._target, self._recipes, self._allowed = source, target, recipes, allowed
        self._strategies = [strategy for strategy in (source.strategy, target) if not strategy.is_complete]
        listed = {name for strategy in self._strategies for name in (*strategy.layouts, *strategy.refused)}
        self._listed_kinds = {kind_of(name) for name in listed}
        self._known = {*listed, *recipes}
        self._stated = {owner_of(name) for name in recipes} - {""}
        self._trained = {owner_of(name, self._known) for name in target.names()} - {""}

    def sort(self) -> Sorting:
        if not self._strategies:
            return Sorting(tuple(self._recipes))
        source, target = self._source.strategy, self._target
        sliced: list[str] = []
        carried: list[str] = []
        lost: list[str] = []
        unlisted: list[str] = []
        for name, recipe in self._recipes.items():
            in_source, in_target = source.lists(recipe.source), target.lists(name)
            if not in_source and not in_target:
                carried.append(name)
            elif source.tells(recipe.source) and target.tells(name):
                sliced.append(name)
            else:
                (lost if in_source else unlisted).append(name)
        if not sliced:
            raise PlanError(
                f"none of the {len(self._recipes)} parameters of the source ({some(self._recipes)}) is in "
                f"{self._origins()}; they are of another model"
            )
        dropped = [name for name in (*carried, *lost) if self._is_unwanted(name)]
        carried, lost = _without(carried, dropped), _without(lost, dropped)
        self._check_unlisted(unlisted)
        self._check_lost(lost)
        absent = self._absent()
        self._check_carried(carried, absent)
        self._check_absent(absent)
        return Sorting(
            (*sliced, *lost, *unlisted), tuple(carried), tuple(dropped), absent, tuple(unlisted),
            tuple(self._warnings([*carried, *unlisted])),
        )  # fmt: skip

    def _is_unwanted(self, name: str) -> bool:
        """Whether a parameter is optimizer state that the target does not ask for.

        A target that lists a weight and no state of it does not train it: it infers, or trains LoRA weights or other layers.
        """
        if is_accumulated_gradient(name):
            return True
        weight = owner_of(name, self._known)
        if not weight or self._target.is_complete or weight in self._trained:
            return False
        return not self._trained or self._target.lists(weight)

    def _check_unlisted(self, names: Iterable[str]) -> None:
        names = [
            name for name in names if not _matches(name, self._allowed.extra) and not self._is_small_or_buffer(name)
        ]
        if names:
            raise PlanError(
                f"parameter {some(names)} is in the source and in the target strategy {self._target.origin}, but not in "
                f"the source strategy {self._source.strategy.origin}; give the strategy that the weights were saved under, "
                f"of all pipeline stages («src_strategy»), or, if every rank holds them whole, allow them with «allow_extra»"
            )

    def _check_lost(self, names: Sequence[str]) -> None:
        missing = [name for name in names if not _matches(name, self._allowed.extra)]
        if missing:
            raise PlanError(
                f"parameter {some(missing)} is in the source, but not in the target strategy {self._target.origin}, which "
                f"describes {_stages(self._target)}; give the strategy of the same model, of all pipeline stages "
                f"(«dst_strategy»), or have every rank hold them whole with «allow_extra»"
            )

    def _check_carried(self, names: Iterable[str], absent: Iterable[str]) -> None:
        names = [name for name in names if not _matches(name, self._allowed.extra)]
        wrong = [name for name in names if self._is_weight(name)]
        siblings = [name for name in wrong if kind_of(name) in self._listed_kinds]
        lacking = [name for name in absent if not is_optimizer_state(name)]
        strange = [name for name in names if self._is_array(name) and not _BUFFER.search(name)]
        if self._source.strategy.is_complete and lacking and strange and not siblings:
            raise PlanError(
                f"the source holds {some(strange)}, which {self._origins()} does not list, and lacks {some(lacking)}, which "
                f"it lists; they are of another model"
            )
        if not wrong:
            return
        because = " though it lists the same parameter of other layers" if siblings else ""
        hint = ""
        if any(strategy.stages == 1 and _lists_gradients(strategy) for strategy in self._strategies):
            hint = ", and lists accumulated gradients, as the stage files of pipeline jobs do"
        stages = "; ".join(f"{strategy.origin} describes {_stages(strategy)}" for strategy in self._strategies)
        setting = "«dst_strategy»" if not self._target.is_complete else "«src_strategy»"
        raise PlanError(
            f"{self._origins()} does not list parameter {_weights_first(wrong)}, which the source holds{because}: every "
            f"rank would get them whole beside sliced ones. {stages}{hint}. Give the strategy files of all pipeline "
            f"stages ({setting}: the folder with the files of all nodes, or the merged file), or, if no graph uses these "
            f"parameters, allow them with «allow_extra»"
        )

    def _is_weight(self, name: str) -> bool:
        """Whether a parameter that no strategy lists is a weight, or the optimizer state of one."""
        if kind_of(name) in self._listed_kinds or owner_of(name, self._known):
            return True
        if not self._is_array(name):
            return False
        if name in self._stated:
            return True
        is_matrix = len(self._source.tensor(self._recipes[name].source).shape) > 1
        return bool(_WEIGHT.search(name)) or (is_matrix and not _BUFFER.search(name))

    def _is_small_or_buffer(self, name: str) -> bool:
        is_buffer = bool(_BUFFER.search(name)) and not _WEIGHT.search(name) and name not in self._stated
        return is_buffer or not self._is_array(name)

    def _is_array(self, name: str) -> bool:
        """Whether a parameter has more than one element."""
        return math.prod(self._source.tensor(self._recipes[name].source).shape) > 1

    def _absent(self) -> tuple[str, ...]:
        """What the target lists, or for a complete target what the source strategy lists, and the source does not hold."""
        held = {*self._source.names, *self._recipes}
        wanted = self._source.strategy if self._target.is_complete else self._target
        names: Iterable[str] = wanted.names()
        if self._target.is_complete and not any(is_optimizer_state(name) for name in held):
            names = (name for name in names if not is_optimizer_state(name))  # saved without optimizer
        return tuple(sorted(name for name in names if name not in held and not is_accumulated_gradient(name)))

    def _check_absent(self, names: Iterable[str]) -> None:
        held = {kind_of(name) for name in self._source.names}
        lacking = [n for n in names if not owner_of(n, self._known) and not _matches(n, self._allowed.missing)]
        # what is merged may have been saved in part, of all layers alike; what a job lists it needs, unless it is added
        wrong = [n for n in lacking if kind_of(n) in held or not (self._target.is_complete or _ADDED.search(n))]
        wrong.sort(key=lambda name: kind_of(name) not in held)
        if wrong:
            beside = ", though it holds the same parameter of other layers" if kind_of(wrong[0]) in held else ""
            raise PlanError(
                f"the source lacks parameter {_weights_first(wrong)}{beside}: a part of the checkpoint is missing, or "
                f"{self._origins()} is of another model; copy the rank folders and strategy files of all pipeline stages to "
                f"the source, or, if the model shall keep its initial values there, allow it with «allow_missing»"
            )

    def _warnings(self, carried: Iterable[str]) -> Iterable[str]:
        known = {*self._recipes, *self._target.names(), *self._source.strategy.names()}
        for pattern in (*self._allowed.extra, *self._allowed.missing):
            if not any(fnmatchcase(name, pattern) for name in known):
                yield f"no parameter matches {pattern}, which is allowed"
        arrays = [name for name in carried if self._is_array(name)]
        if arrays:
            yield f"in no strategy, every rank gets the whole of {_weights_first(arrays)}"
        for strategy in self._strategies:
            if strategy.stages == 1 and _lists_gradients(strategy):
                yield (
                    f"{strategy.origin} lists accumulated gradients, as pipeline jobs do, but describes one stage only; if "
                    f"the job had more, give the strategy files of all stages"
                )

    def _origins(self) -> str:
        return " or ".join(dict.fromkeys(strategy.origin for strategy in self._strategies))


def some(names: Iterable[str], count: int = 3) -> str:
    """Some of many names, for messages."""
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _weights_first(names: Sequence[str]) -> str:
    """Some weights and how many more, with their optimizer state counted apart."""
    weights = [name for name in names if not is_optimizer_state(name)]
    states = [name for name in names if is_optimizer_state(name)]
    more = f" (and optimizer state: {len(states)} parameters)" if weights and states else ""
    return some(weights or states, 5) + more


def kind_of(name: str) -> str:
    """The name without the number of its layer: the same in every layer."""
    return _NUMBER.sub("#", name)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _without(names: Iterable[str], others: Iterable[str]) -> list[str]:
    left_out = set(others)
    return [name for name in names if name not in left_out]


def _stages(strategy: Strategy) -> str:
    return "stage 0 only" if strategy.stages == 1 else f"stage 0 to {strategy.stages - 1}"


def _lists_gradients(strategy: Strategy) -> bool:
    return any(is_accumulated_gradient(name) for name in strategy.names())
