"""MindSpore's JSON form of a strategy file, checked and turned into the protobuf message that says the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from auto_trans.storage.formats.wire import INT32, INT64, UINT32, Range, bytes_field, number_field

__all__ = ["message_of_json"]

_LISTS: dict[str, tuple[int, Range, bool]] = {  # key -> field number, range, whether it must be there
    "dev_matrix": (1, UINT32, True),
    "tensor_map": (2, INT32, True),
    "param_split_shape": (3, INT64, False),
    "indices_offset": (4, INT64, False),
}
_NUMBERS = {"field": 5, "opt_weight_shard_step": 6, "opt_weight_shard_size": 7}


class _Object(tuple):
    """A JSON object as its (key, value) pairs, so that a key that comes twice is seen."""


def message_of_json(content: bytes) -> bytes:
    """The ``ParallelStrategyMap`` message of a strategy in MindSpore's JSON form.

    Raises:
        ValueError: It is none; the text names the parameter.
    """
    try:
        parsed = json.loads(content, object_pairs_hook=_Object)
    except RecursionError:
        raise ValueError("lists within lists without end") from None
    top = _mapping(parsed, "the file")
    pieces = [number_field(1, _number(top.get("current_stage", 0), UINT32, "current_stage"))]
    for node, value in _mapping(top.get("parallel_strategy_item", _Object()), "parallel_strategy_item").items():
        pieces.append(bytes_field(2, bytes_field(1, _utf8(node)) + bytes_field(2, _strategys(value, node))))
    for name, value in _mapping(top.get("parallel_layout_item", _Object()), "parallel_layout_item").items():
        pieces.append(bytes_field(3, bytes_field(1, _utf8(name)) + bytes_field(2, _layouts(value, name))))
    return b"".join(pieces)


def _strategys(value: Any, node: str) -> bytes:
    where = f"operator {node}"
    item = _mapping(value, where)
    if "stage" not in item:
        raise ValueError(f"{where} has no stage")
    stage = number_field(1, _number(item["stage"], UINT32, f"{where}: stage"))
    strategies = item.get("parallel_strategy", [])
    if not isinstance(strategies, list):
        raise ValueError(f"{where}: parallel_strategy is no list")
    return stage + b"".join(bytes_field(2, _dims(s, UINT32, f"{where}: parallel_strategy")) for s in strategies)


def _layouts(value: Any, name: str) -> bytes:
    where = f"parameter {name}"
    item = _mapping(value, where)
    missing = [key for key, (_, _, needed) in _LISTS.items() if needed and key not in item]
    missing += [key for key in _NUMBERS if key not in item]
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}")
    pieces = []
    for key, (number, allowed, _) in _LISTS.items():
        for entry in _entries(item.get(key, []), f"{where}: {key}"):
            pieces.append(bytes_field(number, _dims(entry, allowed, f"{where}: {key}")))
    pieces += [number_field(n, _number(item[key], INT32, f"{where}: {key}")) for key, n in _NUMBERS.items()]
    return b"".join(pieces)


def _entries(value: Any, where: str) -> Iterator[Any]:
    """The lists of numbers in a value that is one such list, or a list of them."""
    if not isinstance(value, list):
        raise ValueError(f"{where} is {_shown(value)} instead of a list")
    nested = bool(value) and all(isinstance(entry, (list, _Object)) for entry in value)
    yield from value if nested else [value]


def _dims(value: Any, allowed: Range, where: str) -> bytes:
    if isinstance(value, _Object):  # {"dim": [...]}, as the message has it
        value = _mapping(value, where).get("dim")
    if not isinstance(value, list):
        raise ValueError(f"{where} holds {_shown(value)} instead of a list of numbers")
    return b"".join(number_field(1, _number(n, allowed, where)) for n in value)


def _number(value: Any, allowed: Range, where: str) -> int:
    low, high = allowed
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{where} holds {_shown(value)} instead of a number from {low} to {high}")
    return value


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, _Object):
        raise ValueError(f"{where} holds {_shown(value)} instead of an object")
    found: dict[str, Any] = {}
    for key, entry in value:
        if key in found:
            raise ValueError(f"{where} holds {_shown(key)} twice")
        found[key] = entry
    return found


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text!r} is no valid text") from None


def _shown(value: Any) -> str:
    if isinstance(value, (_Object, list)):
        return "an object" if isinstance(value, _Object) else "a list"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
