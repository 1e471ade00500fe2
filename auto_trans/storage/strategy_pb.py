"""The protobuf messages of MindSpore's strategy files (``node_strategy.proto``), without importing MindSpore.

The descriptor lives in a pool of its own, so that MindSpore's copy of the same file can be loaded beside it. Field names
and numbers are those of ``mindspore.train.node_strategy_pb2``.
"""

from __future__ import annotations

import os
from typing import Any

# MindSpore's generated messages load only with protobuf's Python implementation, for which it sets this variable. If we
# are imported first, protobuf must already make that choice, or MindSpore can no longer be imported in this process.
_VARIABLE = "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"
_before = os.environ.get(_VARIABLE)
os.environ.setdefault(_VARIABLE, "python")
try:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    from google.protobuf.message import DecodeError
finally:
    if _before is None:
        del os.environ[_VARIABLE]

__all__ = ["DecodeError", "ParallelStrategyMap"]

_PACKAGE = "mindspore.straspb"
_UINT32, _INT32, _INT64, _STRING = (
    descriptor_pb2.FieldDescriptorProto.TYPE_UINT32,
    descriptor_pb2.FieldDescriptorProto.TYPE_INT32,
    descriptor_pb2.FieldDescriptorProto.TYPE_INT64,
    descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
)
# message -> (field, type or message name, repeated), in the order of the field numbers
_MESSAGES: dict[str, list[tuple[str, Any, bool]]] = {
    "ParallelStrategy": [("dim", _UINT32, True)],
    "ParallelStrategys": [("stage", _UINT32, False), ("parallel_strategy", "ParallelStrategy", True)],
    "ParallelStrategyItem": [("node_name", _STRING, False), ("parallel_strategys", "ParallelStrategys", False)],
    "DevMatrix": [("dim", _UINT32, True)],
    "TensorMap": [("dim", _INT32, True)],
    "ParamSplitShape": [("dim", _INT64, True)],
    "IndicesOffset": [("dim", _INT64, True)],
    "ParallelLayouts": [
        ("dev_matrix", "DevMatrix", True),
        ("tensor_map", "TensorMap", True),
        ("param_split_shape", "ParamSplitShape", True),
        ("indices_offset", "IndicesOffset", True),
        ("field", _INT32, False),
        ("opt_weight_shard_step", _INT32, False),
        ("opt_weight_shard_size", _INT32, False),
    ],
    "ParallelLayoutItem": [("param_name", _STRING, False), ("parallel_layouts", "ParallelLayouts", False)],
    "ParallelStrategyMap": [
        ("current_stage", _UINT32, False),
        ("parallel_strategy_item", "ParallelStrategyItem", True),
        ("parallel_layout_item", "ParallelLayoutItem", True),
    ],
}


def _message_class(name: str) -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="auto_trans/node_strategy.proto", package=_PACKAGE)
    for message, fields in _MESSAGES.items():
        descriptor = file.message_type.add(name=message)
        for number, (field, kind, repeated) in enumerate(fields, start=1):
            added = descriptor.field.add(name=field, number=number)
            added.label = added.LABEL_REPEATED if repeated else added.LABEL_OPTIONAL
            if isinstance(kind, str):
                added.type, added.type_name = added.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
            else:
                added.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    found = pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")
    get_class = getattr(message_factory, "GetMessageClass", None)  # protobuf 4.22 and later
    if get_class is None:
        get_class = message_factory.MessageFactory(pool).GetPrototype  # type: ignore[attr-defined]
    return get_class(found)


ParallelStrategyMap: Any = _message_class("ParallelStrategyMap")
