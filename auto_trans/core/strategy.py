"""How the parameters of a job are sliced over its ranks: strategies, and how two of them compare.

Pure: the files are read in `auto_trans.storage.strategies`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any, Optional

import xxhash

from auto_trans.core.layout import Layout
from auto_trans.errors import LayoutError

__all__ = [
    "Strategy",
    "describe_difference",
    "is_accumulated_gradient",
    "is_optimizer_state",
    "owner_of",
    "same_slices",
]

# So the optimizers of MindFormers (AdamW, FusedAdamW, CAME, PMA) and MindSpore name the state of a weight; accu_grads are
# the accumulated gradients of pipeline jobs.
_OPTIMIZER_STATE = re.compile(
    r"^(?:(?:adam_m|adam_v|moment1|moment2|moments|accu_grads|accum|stat|muon_m|momentum|velocity)\."
    r"|(?:max_)?exp_avg(?:_sq|_insta)?(?:_row|_col)?[._]|pma_weight_)"
)


def is_optimizer_state(name: str) -> bool:
    """Whether a parameter belongs to the optimizer and not to the model."""
    return bool(_OPTIMIZER_STATE.match(name))


def owner_of(name: str, known: Container[str] = ()) -> str:
    """The weight that an optimizer state belongs to; empty for what is none.

    Args:
        name: The parameter.
        known: The weights of the model: what ends with the name of one of them after a dot is its state, whatever the
            optimizer.
    """
    match, rest = _OPTIMIZER_STATE.match(name), name.partition(".")[2]
    if match:
        return name[match.end() :]
    return rest if rest and rest in known else ""


def is_accumulated_gradient(name: str) -> bool:
    """Whether a parameter is an accumulated gradient, which pipeline jobs list in their strategies and never save."""
    return name.startswith("accu_grads.")


@dataclass(frozen=True)
class Strategy:
    """How the parameters of a job are sliced over its ranks.

    Attributes:
        stages: Number of pipeline stages.
        stage_devices: Number of ranks of a stage; rank = stage * stage_devices + rank within the stage.
        layouts: Parameter name -> stage -> layout. A parameter that several stages hold is listed for each of them.
        refused: Parameter name -> why its layout cannot be converted; raised only where the parameter is needed.
        origin: Where it was read, for messages.
        otherwise: The layout of parameters that are not listed. Complete weights are a strategy that lists nothing and
            has every parameter whole. None: the strategy does not tell how such a parameter lies.
    """

    stages: int
    stage_devices: int
    layouts: Mapping[str, Mapping[int, Layout]] = field(repr=False)
    refused: Mapping[str, str] = field(default_factory=dict, repr=False)
    origin: str = "no strategy"
    otherwise: Optional[Layout] = None

    @classmethod
    def complete(cls, world_size: int = 1) -> Strategy:
        """The strategy of unsliced weights, held by each of ``world_size`` ranks."""
        return cls(1, world_size, {}, origin="complete weights", otherwise=Layout.whole(world_size))

    @property
    def is_complete(self) -> bool:
        """Whether every rank holds every parameter whole."""
        return self.otherwise is not None

    @property
    def world_size(self) -> int:
        """Number of ranks of the job."""
        return self.stages * self.stage_devices

    @property
    def digest(self) -> str:
        """Digest of all that decides which rank holds what; where the strategy was read does not count."""
        layouts = sorted((name, sorted(stages.items())) for name, stages in self.layouts.items())
        content = (self.stages, self.stage_devices, layouts, sorted(self.refused.items()), self.otherwise)
        return xxhash.xxh3_128_hexdigest(repr(content).encode())

    def as_json(self) -> dict[str, Any]:
        """The strategy as data that other ranks can read, see `from_json`; every distinct layout is in it once."""
        layouts: dict[Layout, int] = {}
        parameters = {
            name: [[stage, layouts.setdefault(layout, len(layouts))] for stage, layout in stages.items()]
            for name, stages in self.layouts.items()
        }
        return {
            "stages": self.stages,
            "stage_devices": self.stage_devices,
            "parameters": parameters,
            "layouts": [astuple(layout) for layout in layouts],
            "refused": dict(self.refused),
            "origin": self.origin,
            "otherwise": None if self.otherwise is None else astuple(self.otherwise),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Strategy:
        """The strategy that another rank has read."""
        layouts = [Layout.from_json(layout) for layout in content["layouts"]]
        otherwise = content["otherwise"]
        return cls(
            content["stages"],
            content["stage_devices"],
            {
                name: {stage: layouts[number] for stage, number in stages}
                for name, stages in content["parameters"].items()
            },
            content["refused"],
            content["origin"],
            None if otherwise is None else Layout.from_json(otherwise),
        )

    def stage_of(self, rank: int) -> int:
        """The pipeline stage of a rank."""
        return rank // self.stage_devices

    def layout(self, name: str, stage: int) -> Optional[Layout]:
        """The layout of a parameter in a stage, or None where the strategy does not tell it.

        Raises:
            LayoutError: The layout is of a kind that cannot be converted.
        """
        if name in self.refused:
            raise LayoutError(f"{self.origin}: parameter {name}: {self.refused[name]}")
        stages = self.layouts.get(name)
        return self.otherwise if stages is None else stages.get(stage)

    def lists(self, name: str) -> bool:
        """Whether any stage lists the parameter."""
        return name in self.layouts or name in self.refused

    def tells(self, name: str) -> bool:
        """Whether the strategy tells how the parameter lies."""
        return self.is_complete or self.lists(name)

    def stages_of(self, name: str) -> tuple[int, ...]:
        """The stages that hold a parameter, in ascending order; none where the strategy does not tell."""
        if self.is_complete:
            return tuple(range(self.stages))
        return tuple(sorted(self.layouts.get(name, ())))

    def names(self, stage: Optional[int] = None) -> Iterator[str]:
        """The parameters that a stage, or any stage, lists."""
        return (name for name, stages in self.layouts.items() if stage is None or stage in stages)


def same_slices(source: Strategy, target: Strategy) -> bool:
    """Whether every rank already holds exactly the slices that the target strategy gives it.

    Parameters that only one side lists do not count, save that a weight which only the source lists means that the
    strategies are not of one model.
    """
    if source.is_complete or target.is_complete:
        return source.is_complete and target.is_complete
    common = source.layouts.keys() & target.layouts.keys()
    if not common or (source.stages, source.stage_devices) != (target.stages, target.stage_devices):
        return False
    if any(name not in common and not is_optimizer_state(name) for name in source.layouts):
        return False
    if dict(source.refused) != dict(target.refused):  # the reasons tell how these are sliced
        return False
    return all(source.stages_of(n) == target.stages_of(n) for n in common) and all(
        _same_layout(source.layouts[n][stage], target.layouts[n][stage]) for n in common for stage in source.layouts[n]
    )


def describe_difference(source: Strategy, target: Strategy) -> str:
    """One line that says how two strategies differ, for people."""
    sizes = [f"{s.world_size} ranks in {s.stages} stage{'s' * (s.stages > 1)}" for s in (source, target)]
    text = f"{sizes[0]} -> {sizes[1]}"
    known = target if source.is_complete else source
    for name in known.names():
        before, after = (_first_layout(strategy, name) for strategy in (source, target))
        if before and after:
            ndim = max(len(before.tensor_map), len(after.tensor_map))
            cut = [" x ".join(map(str, layout.grid(ndim))) for layout in (before, after)]
            if cut[0] != cut[1]:
                return f"{text}, e.g. {name} cut {cut[0]} -> {cut[1]}"
    return text


def _first_layout(strategy: Strategy, name: str) -> Optional[Layout]:
    stages = strategy.stages_of(name)
    return strategy.layout(name, stages[0]) if stages and name not in strategy.refused else None


def _same_layout(a: Layout, b: Layout) -> bool:
    if a == b:
        return True
    ndim = max(len(a.tensor_map), len(b.tensor_map))
    try:
        return a.grid(ndim) == b.grid(ndim) and all(a.cell(r, ndim) == b.cell(r, ndim) for r in range(a.devices))
    except LayoutError:
        return False
