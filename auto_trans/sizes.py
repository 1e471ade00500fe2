"""Sizes and numbers as people write and read them."""

from __future__ import annotations

import re
from typing import Union

from auto_trans.errors import ConfigError, ConfigTypeError

__all__ = ["format_bytes", "parse_bytes", "plural"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(text: Union[str, int], setting: str = "memory") -> int:
    """Parses a size such as ``512MiB``, ``2G`` or a plain number of bytes; units are powers of 1024."""
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise ConfigTypeError(f"{setting} must be a size such as 512MiB, not {text!r}")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", str(text), re.IGNORECASE)
    if not match:
        raise ConfigError(f"{setting} must be a size such as 512MiB, not {text!r}")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def format_bytes(nbytes: float) -> str:
    """A size for people, e.g. ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def plural(number: int, word: str) -> str:
    """A number of things, e.g. ``1 rank`` or ``2 ranks``."""
    return f"{number} {word}{'' if number == 1 else 's'}"
