"""One self-contained page that shows how parameters are sliced: which rank holds which part of the full tensor.

What is drawn is decided here; ``page.html`` only draws it. Two dimensions of a tensor are the axes of a panel; every cell of
the further dimensions that are cut has a panel of its own, so that no slice lies under another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any, Optional

from auto_trans.core.layout import Layout
from auto_trans.core.strategy import Strategy, is_optimizer_state
from auto_trans.core.tensor import Box, Shape
from auto_trans.describe import slice_shapes, sliced_how
from auto_trans.errors import ConfigError, LayoutError
from auto_trans.storage.files import new_file
from auto_trans.storage.sources import Checkpoint

__all__ = ["Panel", "Slice", "View", "axes_of", "draw_views", "share_of_ranks", "write_page"]

_MARK = "/*DATA*/"
_ROWS = 16  # up to so many ranks each has a bar of its own


@dataclass(frozen=True)
class Slice:
    """A part of a tensor and the ranks that hold it, in ascending order."""

    ranks: tuple[int, ...]
    box: Box


@dataclass(frozen=True)
class Panel:
    """The slices that differ in the drawn dimensions only.

    Attributes:
        fixed: Dimension -> which of its parts the panel shows, for every other dimension that is cut.
        slices: The slices, in row-major order.
    """

    fixed: Mapping[int, int]
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class View:
    """A parameter in the stages that slice it in one way.

    Attributes:
        stages: The stages.
        words: How it is sliced.
        grid: Into how many parts every dimension is cut.
        panels: What to draw.
        problem: Why it cannot be drawn; then there are no panels.
    """

    stages: tuple[int, ...]
    words: str
    grid: Shape = ()
    panels: tuple[Panel, ...] = ()
    problem: str = ""


def axes_of(ndim: int, grids: Sequence[Shape]) -> tuple[int, ...]:
    """The dimensions to draw, at most two and in ascending order: those that are cut into the most parts.

    Args:
        ndim: Number of dimensions of the tensor.
        grids: All the ways in which it is cut; what is drawn side by side has the same axes.
    """
    parts = [max((grid[dim] for grid in grids), default=1) for dim in range(ndim)]
    return tuple(sorted(sorted(range(ndim), key=lambda dim: (-parts[dim], dim))[:2]))


def draw_views(strategy: Strategy, name: str, full: Shape, axes: Sequence[int]) -> tuple[View, ...]:
    """A parameter under a strategy: one view for all stages that slice it in the same way.

    Args:
        strategy: The strategy.
        name: The parameter.
        full: Shape of the full tensor.
        axes: The dimensions to draw.
    """
    stages_by_layout: dict[Layout, list[int]] = {}
    for stage, layout in _layouts(strategy, name):
        stages_by_layout.setdefault(layout, []).append(stage)
    views = []
    for layout, stages in stages_by_layout.items():
        words = sliced_how(layout)
        try:
            layout.slice_shape(full)
        except LayoutError as e:
            views.append(View(tuple(stages), words, problem=str(e)))
            continue
        grid = layout.grid(len(full))
        bases = [stage * strategy.stage_devices for stage in stages]
        panels = _panels(layout, full, bases, [dim for dim, n in enumerate(grid) if n > 1 and dim not in axes])
        views.append(View(tuple(stages), words, grid, panels))
    return tuple(views)


def _panels(layout: Layout, full: Shape, bases: Sequence[int], further: Sequence[int]) -> tuple[Panel, ...]:
    """The slices of a tensor by their cell in the ``further`` dimensions; ``bases`` are the first ranks of the stages."""
    panels: dict[tuple[int, ...], list[Slice]] = {}
    for cell in sorted({layout.cell(local, len(full)) for local in range(layout.devices)}):
        owners = layout.owners(cell)
        ranks = tuple(base + local for base in bases for local in owners)
        part = Slice(ranks, layout.box(owners[0], full))
        panels.setdefault(tuple(cell[dim] for dim in further), []).append(part)
    return tuple(Panel(dict(zip(further, key)), tuple(parts)) for key, parts in sorted(panels.items()))


def share_of_ranks(views: Sequence[View], world_size: int) -> list[tuple[range, int]]:
    """How many elements ranks hold: ranks that follow each other and hold the same number are told together.

    In a small job every rank that holds something is told alone. Empty if some view cannot be drawn.
    """
    if not views or any(view.problem for view in views):
        return []
    held = [0] * world_size
    for view in views:
        for panel in view.panels:
            for part in panel.slices:
                for rank in part.ranks:
                    held[rank] = part.box.volume
    shares = []
    for _, group in groupby(range(world_size), key=lambda rank: (held[rank], rank if _alone(held, rank) else -1)):
        ranks = list(group)
        shares.append((range(ranks[0], ranks[-1] + 1), held[ranks[0]]))
    return shares


def _alone(held: Sequence[int], rank: int) -> bool:
    return len(held) <= _ROWS and held[rank] > 0


def write_page(
    path: Path,
    before: Strategy,
    after: Optional[Strategy],
    weights: Optional[Checkpoint] = None,
    pattern: str = "*",
) -> None:
    """Writes the page.

    Args:
        path: The HTML file.
        before: The strategy to show.
        after: A second strategy to show beside it.
        weights: A checkpoint saved under the first strategy, which tells the shapes; without it slices are shown in
            proportion only.
        pattern: Only parameters that match it.

    Raises:
        ConfigError: No parameter matches.
    """
    shapes = slice_shapes(before, weights)
    strategies = [strategy for strategy in (before, after) if strategy is not None]
    listed = {name for strategy in strategies for name in (*strategy.names(), *strategy.refused)}
    # the page opens on the first
    names = sorted((n for n in listed if fnmatchcase(n, pattern)), key=lambda n: (is_optimizer_state(n), n))
    if not names:
        raise ConfigError(f"no parameter of {' or '.join(s.origin for s in strategies)} matches {pattern!r}")
    # a model has hundreds of parameters, but few ways to slice them: each drawing is stored once
    drawings: dict[Any, tuple[int, dict[str, Any]]] = {}
    parameters = []
    for name in names:
        kind = (shapes.get(name), *((tuple(_layouts(s, name)), s.refused.get(name)) for s in strategies))
        if kind not in drawings:
            drawings[kind] = (len(drawings), _drawing(name, strategies, shapes.get(name)))
        parameters.append([name, drawings[kind][0]])
    data = {
        "sides": [{"origin": s.origin, "ranks": s.world_size, "stages": s.stages} for s in strategies],
        "parameters": parameters,
        "drawings": [drawing for _, drawing in drawings.values()],
    }
    template = resources.files("auto_trans").joinpath("page.html").read_text(encoding="utf-8")
    # "</" would end the script element
    text = json.dumps(data).replace("</", "<\\/")
    with new_file(path) as out:
        out.write(template.replace(_MARK, text).encode())


def _drawing(name: str, strategies: Sequence[Strategy], known: Optional[tuple[Shape, int]]) -> dict[str, Any]:
    """A parameter as the page draws it, as plain data; ``known`` is the shape of a slice and bytes of an element."""
    full = _full_shape(strategies[0], name, known[0]) if known else _proportions(name, strategies)
    layouts = [layout for strategy in strategies for _, layout in _layouts(strategy, name)]
    axes = axes_of(len(full), _grids(layouts, len(full)))
    sides = []
    for strategy in strategies:
        views = draw_views(strategy, name, full, axes)
        problem = strategy.refused.get(name)
        lowest = {rank: s.ranks[0] for view in views for panel in view.panels for s in panel.slices for rank in s.ranks}
        shares = share_of_ranks(views, strategy.world_size)
        sides.append(
            {
                "problem": f"refused: {problem}" if problem else "" if views else "not listed",
                "views": [_plain_view(view) for view in views],
                "shares": [
                    [_ranks_text(ranks), n, lowest.get(ranks[0]) if len(ranks) == 1 else None] for ranks, n in shares
                ],
            }
        )
    return {"full": full, "known": known is not None, "item": known[1] if known else 0, "axes": axes, "sides": sides}


def _plain_view(view: View) -> dict[str, Any]:
    return {
        "stages": _ranks_text(view.stages),
        "words": view.words,
        "problem": view.problem,
        "grid": view.grid,
        "panels": [
            {
                "fixed": sorted(panel.fixed.items()),
                "slices": [
                    [_ranks_text(part.ranks), len(part.ranks), part.ranks[0], part.box.offset, part.box.size]
                    for part in panel.slices
                ],
            }
            for panel in view.panels
        ],
    }


def _full_shape(strategy: Strategy, name: str, shape: Shape) -> Shape:
    """The full tensor of which the weights hold slices; a parameter that is not listed is not sliced."""
    for _, layout in _layouts(strategy, name):
        with suppress(LayoutError):  # the view of such a layout tells what is wrong
            return layout.full_shape(shape)
    return shape


def _proportions(name: str, strategies: Sequence[Strategy]) -> Shape:
    """A shape that every layout of a parameter divides, where the real one is not known."""
    layouts = [layout for strategy in strategies for _, layout in _layouts(strategy, name)]
    ndim = max(max((len(layout.tensor_map) for layout in layouts), default=1), 1)
    ndim = min([ndim, *(layout.ndims[0] or 1 for layout in layouts if layout.ndims)])
    grids = _grids(layouts, ndim)
    return tuple(math.lcm(*(grid[dim] for grid in grids)) for dim in range(ndim))


def _grids(layouts: Sequence[Layout], ndim: int) -> list[Shape]:
    """How the layouts that fit a tensor of ``ndim`` dimensions cut it."""
    grids = []
    for layout in layouts:
        with suppress(LayoutError):
            grids.append(layout.grid(ndim))
    return grids


def _layouts(strategy: Strategy, name: str) -> Iterator[tuple[int, Layout]]:
    """The stages that hold a parameter and its layout in each; none if the layout is refused."""
    for stage in strategy.stages_of(name) if name not in strategy.refused else ():
        layout = strategy.layout(name, stage)
        if layout is not None:
            yield stage, layout


def _ranks_text(ranks: Sequence[int]) -> str:
    """Ranks as people write them, also those at even distances: ``0-3, 8`` or ``0, 8, \u2026, 4088``."""
    parts = []
    first = 0
    while first < len(ranks):
        step = ranks[first + 1] - ranks[first] if first + 1 < len(ranks) else 0
        last = first
        while last + 1 < len(ranks) and ranks[last + 1] - ranks[last] == step:
            last += 1
        if step == 1 and last > first:
            parts.append(f"{ranks[first]}-{ranks[last]}")
        elif last - first >= 3:
            parts.append(f"{ranks[first]}, {ranks[first + 1]}, \u2026, {ranks[last]}")
        else:
            last = first
            parts.append(str(ranks[first]))
        first = last + 1
    return ", ".join(parts)
