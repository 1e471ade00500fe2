"""Writes strategy files byte by byte, by a tiny encoder of its own: no auto_trans, no MindSpore, no protobuf library."""

from __future__ import annotations

import json


def varint(value):
    value &= 2**64 - 1
    if value < 0x80:
        return bytes([value])
    return bytes([value & 0x7F | 0x80]) + varint(value >> 7)


def field(number, value):
    """A field of a number, or of bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def dims(values):
    return b"".join(field(1, n) for n in values)


def strategy_item(stage, node="n"):
    return field(2, field(1, node) + field(2, field(1, stage)))


def layout_item(name, dev_matrix, entries, **extra):
    """A parameter; extra: field, param_split_shape, indices_offset, opt_weight_shard_step, opt_weight_shard_size."""
    return field(
        3,
        field(1, name)
        + field(
            2,
            field(1, dims(dev_matrix))
            + b"".join(field(2, dims(entry)) for entry in entries)
            + field(3, dims(extra.get("param_split_shape", ())))
            + field(4, dims(extra.get("indices_offset", ())))
            + field(5, extra.get("field", 0))
            + field(6, extra.get("opt_weight_shard_step", 0))
            + field(7, extra.get("opt_weight_shard_size", 0)),
        ),
    )


def strategy_file(path, layouts, stage=0, **extra):
    """Writes a strategy file: parameter -> (dev_matrix, tensor_map entries)."""
    items = b"".join(layout_item(name, *layout, **extra) for name, layout in layouts.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(field(1, 2) + strategy_item(stage) + items)
    return path


def parse(content):
    """A message as (field number, number or bytes)."""
    found = []
    position = 0

    def number():
        nonlocal position
        value = shift = 0
        while True:
            byte = content[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value - 2**64 if value >> 63 else value

    while position < len(content):
        key = number()
        value = number()
        if key & 7 == 2:
            value, position = content[position : position + value], position + value
        found.append((key >> 3, value))
    return found


def to_json(file):
    """MindSpore's JSON form of a strategy file."""
    items, layouts = {}, {}
    for number, content in parse(file.read_bytes()):
        if number == 2:
            node, strategys = dict(parse(content))[1], dict(parse(content))[2]
            items[node.decode()] = {"stage": dict(parse(strategys))[1]}
        elif number == 3:
            item = dict(parse(content))
            layout = dict(reversed(parse(item[2])))
            layouts[item[1].decode()] = {
                "dev_matrix": [n for _, n in parse(layout[1])],
                "tensor_map": [n for _, n in parse(layout[2])],
                "param_split_shape": [],
                "indices_offset": [],
                "field": layout[5],
                "opt_weight_shard_size": layout[7],
                "opt_weight_shard_step": layout[6],
            }
    return json.dumps({"current_stage": 2, "parallel_strategy_item": items, "parallel_layout_item": layouts})
