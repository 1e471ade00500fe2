"""Tables that align, for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from auto_trans.report import ConversionReport

__all__ = ["print_json", "print_table", "ranks_text", "report_facts"]


def print_table(heads: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[int] = ()) -> None:
    """Prints rows under heads, each column as wide as it must be.

    Args:
        heads: The heads of the columns.
        rows: The rows.
        right: Columns that are aligned to the right, as numbers are.
    """
    table = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    for row in table:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())


def print_json(content: Any) -> None:
    """Prints facts for other programs."""
    print(json.dumps(content, indent=1))


def report_facts(report: ConversionReport) -> dict[str, Any]:
    """A report as plain data."""
    return {
        "source": str(report.source),
        "target": str(report.target),
        "files": [vars(record) for record in report.files],
        "converted": report.converted,
        "linked": report.linked,
        "reused": report.reused,
        "bytes_written": report.bytes_written,
        "seconds": report.seconds,
        "carried": report.carried,
        "absent": report.absent,
        "dropped": report.dropped,
    }


def ranks_text(ranks: Sequence[int]) -> str:
    """Ranks as people write them, e.g. ``0-3, 8``."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
