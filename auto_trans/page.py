"""One self-contained page that shows how parameters are sliced: which rank holds which part of the full tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Optional

from auto_trans.core.layout import Layout
from auto_trans.core.strategy import Strategy
from auto_trans.describe import slice_shapes, sliced_how
from auto_trans.errors import ConfigError
from auto_trans.storage.files import new_file
from auto_trans.storage.sources import Checkpoint

__all__ = ["write_page"]

_MARK = "/*DATA*/"


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
    names = sorted(name for name in before.names() if fnmatchcase(name, pattern))
    if not names:
        raise ConfigError(f"no parameter of {before.origin} matches {pattern!r}")
    parameters = []
    for name in names:
        layout = before.layouts[name][before.stages_of(name)[0]]
        shape, item = shapes.get(name, (None, 0))
        full = layout.full_shape(shape) if shape is not None else _proportions(name, before, after)
        parameters.append(
            {
                "name": name,
                "full": list(full),
                "known": shape is not None,
                "item": item,
                "sides": [_side(s, name, full) for s in (before, after) if s is not None],
            }
        )
    sides = [{"origin": s.origin, "ranks": s.world_size, "stages": s.stages} for s in (before, after) if s is not None]
    template = resources.files("auto_trans").joinpath("page.html").read_text(encoding="utf-8")
    # "</" would end the script element
    data = json.dumps({"sides": sides, "parameters": parameters}).replace("</", "<\\/")
    with new_file(path) as out:
        out.write(template.replace(_MARK, data).encode())


def _side(strategy: Strategy, name: str, full: tuple[int, ...]) -> Mapping[str, Any]:
    """A parameter under one strategy: in words, and the box of every rank that holds a part of it."""
    boxes = []
    words = "not listed"
    for stage in strategy.stages_of(name):
        layout = strategy.layouts[name][stage]
        words = sliced_how(layout)
        if any(n % count for n, count in zip(full, layout.grid(len(full)))):
            words += " (does not divide)"
            continue
        for local in range(strategy.stage_devices):
            box = layout.box(local, full)
            boxes.append([stage * strategy.stage_devices + local, list(box.offset), list(box.size)])
    return {"words": words, "boxes": boxes}


def _proportions(name: str, *strategies: Optional[Strategy]) -> tuple[int, ...]:
    """A shape that every layout of a parameter divides, where the real one is not known."""
    layouts: list[Layout] = [layout for s in strategies if s is not None for layout in s.layouts.get(name, {}).values()]
    ndim = max(max((len(layout.tensor_map) for layout in layouts), default=1), 1)
    ndim = min([ndim, *(layout.ndims[0] or 1 for layout in layouts if layout.ndims)])
    return tuple(math.lcm(*(layout.grid(ndim)[dim] for layout in layouts)) for dim in range(ndim))
