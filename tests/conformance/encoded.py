"""Files made by a format's own `encode`, as the engine makes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import oracle
from hypothesis import strategies as st

from auto_trans.core.tensor import ITEM_BYTES
from auto_trans.storage.formats import Format, encoded_size


class Head(NamedTuple):
    """What is encoded of a tensor besides its contents."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    nbytes: int


def write(format: Format, path: Path, tensors: Mapping[str, oracle.Raw]) -> list[str]:
    """Writes a file; returns the names in file order."""
    heads = [Head(name, raw.dtype, raw.dims, len(raw.content)) for name, raw in tensors.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    order = []
    with path.open("wb") as file:
        for head, records in format.encode(heads):
            position = 0
            for record in records:
                file.write(record.head + tensors[head.name].content[position : position + record.length])
                position += record.length
            assert position == head.nbytes, "the records hold the whole tensor"
            order.append(head.name)
    assert path.stat().st_size == encoded_size(format, heads), "encoded_size tells the bytes of the file"
    return order


def contents(path: Path, segments) -> bytes:
    """What lies in some extents of a file."""
    content = path.read_bytes()
    assert all(offset >= 0 and offset + nbytes <= len(content) for offset, nbytes in segments)
    return b"".join(content[offset : offset + nbytes] for offset, nbytes in segments)


@st.composite
def raws(draw, dtypes):
    """A tensor of any type and small dims, with any bytes."""
    dtype, shape = draw(st.sampled_from(dtypes)), tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    size = ITEM_BYTES[dtype]
    for n in shape:
        size *= n
    return oracle.Raw(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


# names as JSON and protobuf can hold them: no half characters
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
