"""The file formats that are read and written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

from auto_trans.errors import ConfigError
from auto_trans.storage.formats import ckpt, safetensors
from auto_trans.storage.formats.head import FileHead, Record, TensorHead
from auto_trans.storage.readers import LocalReader, Reader

__all__ = ["FORMATS", "Format", "encoded_size", "format_of", "parse_format", "scan"]


class Format(NamedTuple):
    """A file format.

    Attributes:
        name: Its name, which is also the ending of its files.
        scan: Finds the tensors of a file without reading their contents.
        encode: Lays out a file: the tensors in file order, each with its records.
    """

    name: str
    scan: Callable[[Reader], FileHead]
    encode: Callable[[Iterable[Any]], Iterator[tuple[Any, list[Record]]]]

    @property
    def suffix(self) -> str:
        """The ending of its files, with the dot."""
        return f".{self.name}"


FORMATS = {
    "ckpt": Format("ckpt", ckpt.scan, ckpt.encode),
    "safetensors": Format("safetensors", safetensors.scan, safetensors.encode),
}


def parse_format(name: str) -> Format:
    """The format of a name.

    Raises:
        ConfigError: There is none.
    """
    if name not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, not {name!r}")
    return FORMATS[name]


def format_of(path: Path) -> Format:
    """The format of a file, by its ending."""
    return parse_format(path.suffix[1:])


def scan(path: Path) -> FileHead:
    """Finds the tensors of a local file of any format without reading their contents.

    Raises:
        CheckpointError: The file cannot be read, or is none of its format.
    """
    with contextlib.closing(LocalReader(path)) as reader:
        return format_of(path).scan(reader)


def encoded_size(format: Format, tensors: Iterable[TensorHead]) -> int:
    """Bytes of a file with these tensors."""
    return sum(len(record.head) + record.length for _, records in format.encode(tensors) for record in records)
