"""metadata.json of Checkpoint 2.0: parsed strictly, and formatted as MindFormers writes it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from auto_trans.core.layout import Layout
from auto_trans.core.saved import Place, Saved, SavedTensor, arrange_saved, slice_numbers
from auto_trans.core.tensor import ITEM_BYTES, Shape
from auto_trans.errors import (
    AutoTransError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    LayoutError,
    UnsupportedCheckpointError,
)
from auto_trans.storage.names import ITERATION_FILE

__all__ = ["format_metadata", "parse_metadata", "read_metadata"]

_TYPES = {name.lower(): name for name in ITEM_BYTES}  # MindFormers, too, takes them as the same
_MOST = 2**63 - 1
_MOST_RANKS = 2**24


def read_metadata(path: Path) -> Saved:
    """Reads metadata.json.

    Raises:
        CheckpointNotFoundError: It is not there.
        CorruptCheckpointError: It cannot be read, or contradicts itself.
        UnsupportedCheckpointError: It tells of something that cannot be converted.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise CheckpointNotFoundError(f"{path} is not found; copy it from where the checkpoint was saved") from e
    except (OSError, ValueError, RecursionError) as e:
        raise CorruptCheckpointError(f"{path} cannot be read ({type(e).__name__}: {e}); copy it again") from e
    return parse_metadata(content, str(path))


def parse_metadata(content: Any, origin: str) -> Saved:
    """Parses the content of metadata.json; errors as `read_metadata`.

    Args:
        content: What the JSON holds.
        origin: The file, for messages.
    """
    if not isinstance(content, dict):
        _corrupt(origin, "it holds no JSON object")
    described, stored = (_mapping(content.get(key), key, origin) for key in ("state_dict_metadata", "storage_data"))
    tensors = []
    known: dict[Place, Place] = {}  # of the millions of places there is one for every file
    left = len(stored)
    for name, entry in described.items():
        try:
            tensor = _Entry(f"{origin}: parameter {name}", entry, known).tensor(name, stored)
        except AutoTransError:
            raise
        except (KeyError, TypeError, ValueError) as e:
            _corrupt(f"{origin}: parameter {name}", f"it is told of in another way ({type(e).__name__}: {e})")
        left -= len(tensor.places)
        tensors.append(tensor)
    if not tensors:
        _corrupt(origin, "it tells of no parameters")
    saved = arrange_saved(tensors, origin)
    if left:
        # several stages may hold a parameter, each sliced in its own way
        chunks = ((name, chunk) for name, entry in described.items() for chunk in entry["chunk"])
        keys = {_key(name, chunk["global_offset"][0]) for name, chunk in chunks}
        unknown = next((key for key in stored if key not in keys), None)
        if unknown is not None:
            _corrupt(origin, f"storage_data tells of {unknown}, nothing else does")
    return saved


def format_metadata(tensors: Iterable[SavedTensor]) -> dict[str, Any]:
    """The content of metadata.json, in the order of keys by which MindFormers reads it.

    Args:
        tensors: The parameters, of which every rank has saved its slice; every one has a layout, which MindFormers before
            2.1 needs.
    """
    described: dict[str, Any] = {}
    stored: dict[str, Any] = {}
    for tensor in tensors:
        layout, ndim = tensor.layout, len(tensor.shape)
        assert layout is not None
        numbers = slice_numbers(layout, ndim)
        entries = [*layout.tensor_map[:ndim], *[()] * (ndim - len(layout.tensor_map))]
        described[tensor.name] = {
            "properties": {
                "dtype": tensor.dtype,
                "replica_id": _replicas(numbers),
                "allow_shape_mismatch": False,
                "allow_to_save": True,
            },
            "global_shape": tensor.shape,
            "axis_fragmentations": layout.grid(ndim),
            "layout": {
                "device_matrix": layout.dev_matrix,
                "tensor_map": [-1 if not e else e[0] if len(e) == 1 else e for e in entries],
                "interleaved_parallel": False,
                "alias_name": [f"axis_{i}" for i in range(len(layout.dev_matrix))],
                "rank_list": tensor.ranks,
            },
            "chunk": [
                {"global_offset": [number], "local_shape": tensor.slice_shape} for number in dict.fromkeys(numbers)
            ],
        }
        for number in dict.fromkeys(numbers):
            # rank_group is for ranks that have no file of their own; all replicas in it would be the square of their number
            stored[_key(tensor.name, number)] = [
                {"file_name": place.file, "storage_rank": place.rank, "rank_group": [place.rank]}
                for place in tensor.places[number]
            ]
    return {"state_dict_metadata": described, "storage_data": stored}


class _Entry:
    """What metadata.json tells of one parameter."""

    def __init__(self, where: str, entry: Any, known: dict[Place, Place]) -> None:
        self._where, self._entry, self._known = where, entry, known

    def tensor(self, name: str, stored: Mapping[str, Any]) -> SavedTensor:
        entry, properties = self._entry, self._entry["properties"]
        dtype = _TYPES.get(str(properties["dtype"]).lower(), "")
        if not dtype:
            raise UnsupportedCheckpointError(
                f"{self._where} is of type {properties['dtype']}, which cannot be converted"
            )
        for key in ("allow_shape_mismatch", "allow_to_save"):
            if type(properties[key]) is not bool:
                self._corrupt(f"{key} is {properties[key]!r}")
        shape = _numbers(entry["global_shape"])
        if math.prod(shape) * ITEM_BYTES[dtype] > _MOST:
            self._corrupt(f"its shape is {list(shape)}")
        tensor = SavedTensor(name, dtype, shape, None, (), ())
        if entry["layout"] is not None:
            layout, ranks = self._layout(shape)
            tensor = tensor._replace(layout=layout, ranks=ranks)
        count = math.prod(tensor.layout.grid(len(shape))) if tensor.layout else 1
        self._check_slices(tensor, count)
        return tensor._replace(places=[self._places(stored, name, number) for number in range(count)])

    def _layout(self, shape: Shape) -> tuple[Layout, tuple[int, ...]]:
        told = self._entry["layout"]
        interleaved = told["interleaved_parallel"]
        if (interleaved is not False and (type(interleaved) is not int or interleaved != 1)) or (
            "interleaved_parallel" in told["alias_name"]
        ):
            raise UnsupportedCheckpointError(
                f"{self._where} is sliced with interleaved_parallel, a second time within every rank, which cannot be "
                f"converted; load and save it with MindFormers under a strategy without it"
            )
        matrix, ranks = _numbers(told["device_matrix"]), _numbers(told["rank_list"])
        if math.prod(matrix) != len(ranks) or len(set(ranks)) != len(ranks) or max(ranks) >= _MOST_RANKS:
            self._corrupt(f"its rank_list {list(ranks)[:8]} does not fit device_matrix {list(matrix)}")
        tensor_map = [_axes(axes) for axes in told["tensor_map"]]
        if len(tensor_map) != len(shape):
            self._corrupt(f"its tensor_map {told['tensor_map']} does not fit shape {list(shape)}")
        try:
            layout = Layout(matrix, tuple(tensor_map))
            layout.slice_shape(shape)
        except LayoutError as e:
            self._corrupt(str(e))
        return layout, ranks

    def _check_slices(self, tensor: SavedTensor, count: int) -> None:
        """What is told of the slices beside the layout says the same."""
        layout, ndim = tensor.layout, len(tensor.shape)
        grid = layout.grid(ndim) if layout else (1,) * ndim
        if _numbers(self._entry["axis_fragmentations"]) != grid:
            self._corrupt(f"axis_fragmentations is {self._entry['axis_fragmentations']}, but its layout cuts it {grid}")
        found = set()
        for chunk in self._entry["chunk"]:
            (number,) = _numbers(chunk["global_offset"])
            # a parameter that several stages hold, each sliced in its own way, has chunks of each
            if _numbers(chunk["local_shape"]) == tensor.slice_shape:
                found.add(number)
        missing = sorted(set(range(count)) - found)
        if missing:
            self._corrupt(
                f"no chunk of shape {list(tensor.slice_shape)} has global_offset {missing[0]}, the number of a slice; there "
                f"are {count}"
            )

    def _places(self, stored: Mapping[str, Any], name: str, number: int) -> list[Place]:
        places = []
        for item in stored.get(_key(name, number), ()):
            file, rank = item["file_name"], item["storage_rank"]
            if not isinstance(file, str) or not ITERATION_FILE.match(file):
                self._corrupt(f"it lies in {file!r}, which is no name of a file of an iteration")
            if type(rank) is not int or not 0 <= rank < _MOST_RANKS:
                self._corrupt(f"it lies with rank {rank!r}")
            _numbers(item["rank_group"])
            place = Place(file, rank)
            places.append(self._known.setdefault(place, place))
        return places

    def _corrupt(self, what: str) -> NoReturn:
        _corrupt(self._where, what)


def _replicas(numbers: Iterable[int]) -> list[int]:
    """Of every rank, how many before it hold the same slice."""
    before: Counter[int] = Counter()
    replicas = []
    for number in numbers:
        replicas.append(before[number])
        before[number] += 1
    return replicas


def _axes(entry: Any) -> tuple[int, ...]:
    """The axes that slice a dimension; -1 slices nothing."""
    axes = entry if isinstance(entry, list) else [entry]
    if any(type(axis) is not int or axis < -1 for axis in axes):
        raise ValueError(f"{entry!r} is no entry of a tensor_map")
    return tuple(axis for axis in axes if axis >= 0)


def _key(name: str, number: int) -> str:
    """What storage_data calls a slice."""
    return str((name, (number,)))


def _mapping(value: Any, key: str, origin: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        _corrupt(origin, f"it has no {key}")
    return value


def _numbers(values: Any) -> Shape:
    if not isinstance(values, list) or any(type(n) is not int or not 0 <= n <= _MOST for n in values):
        raise ValueError(f"{values!r} is no list of sizes")
    return tuple(values)


def _corrupt(where: str, what: str) -> NoReturn:
    raise CorruptCheckpointError(f"{where}: {what}; it is damaged or of another version, copy metadata.json again")
