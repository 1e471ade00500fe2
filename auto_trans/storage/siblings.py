"""Is a file that is given as complete one rank's slice? The rank folders beside its own tell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from auto_trans.core.rules import kind_of
from auto_trans.core.strategy import is_optimizer_state
from auto_trans.errors import CheckpointError, ConfigError
from auto_trans.storage.formats import FORMATS, scan
from auto_trans.storage.formats.head import FileHead
from auto_trans.storage.names import RANK_FOLDER, RANK_IN_NAME
from auto_trans.storage.readers import LocalReader

__all__ = ["check_not_a_slice"]

# slices of a weight differ from their first bytes on
_SAMPLE_BYTES = 4 * 1024


def check_not_a_slice(file: Path) -> None:
    """Compares a file in a ``rank_N`` folder with that of the last rank beside it.

    Every rank of a data parallel job holds all weights whole, so that any of its files is complete. If two ranks hold
    different parameters, shapes or numbers, the file is a slice.

    Raises:
        ConfigError: It is one.
    """
    sibling = _find_sibling(file)
    if sibling is None:
        return
    one = scan(file)
    try:
        other = scan(sibling)
    except CheckpointError:  # what is wrong with a file that nobody asked for is no matter here
        return
    differing = _differing(one, other)
    if differing is not None:
        raise ConfigError(
            f"{file} is given as complete weights, but is one rank's slice: parameter {differing} differs from that in "
            f"{sibling}; give the folder above rank_0 («src») and the strategy that it was saved under («src_strategy»), "
            f"or, if it really is complete, a folder of its own"
        )


def _find_sibling(file: Path) -> Optional[Path]:
    """The file of the same step in the last of the other rank folders."""
    own = RANK_FOLDER.match(file.parent.name)
    if own is None:
        return None
    folders = [f for f in file.parent.parent.iterdir() if RANK_FOLDER.match(f.name) and f != file.parent and f.is_dir()]
    for folder in sorted(folders, key=lambda f: int(f.name[len("rank_") :]), reverse=True):
        rank = folder.name[len("rank_") :]
        same = folder / RANK_IN_NAME.sub(f"_rank_{rank}", file.name)
        lone = [f for f in folder.iterdir() if f.suffix[1:] in FORMATS and not f.name.startswith(".")]
        if same.is_file() or len(lone) == 1:
            return same if same.is_file() else lone[0]
    return None


def _differing(one: FileHead, other: FileHead) -> Optional[str]:
    """A weight that two files hold differently."""
    names, others = _weights(one), _weights(other)
    if not {kind_of(name) for name in names} & {kind_of(name) for name in others}:
        return None  # of another model
    for name in dict.fromkeys((*names, *others)):
        a, b = one.tensors.get(name), other.tensors.get(name)
        if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
            return name
    samples = zip(names, _beginnings(one, names), _beginnings(other, names))
    return next((name for name, a, b in samples if a != b), None)


def _weights(head: FileHead) -> list[str]:
    tensors = head.tensors.items()
    return [n for n, t in tensors if len(t.shape) > 1 and math.prod(t.shape) > 1 and not is_optimizer_state(n)]


def _beginnings(head: FileHead, names: list[str]) -> Iterator[bytes]:
    reader = LocalReader(head.path)
    try:
        for name in names:
            offset, nbytes = head.tensors[name].segments[0]
            yield bytes(reader.read(offset, min(nbytes, _SAMPLE_BYTES)))
    finally:
        reader.close()
