"""What several tests build: strategies, sources in memory and on disk, and layouts by chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import oracle
from hypothesis import strategies as st

from auto_trans.conversion import plan_conversion
from auto_trans.core.layout import Layout
from auto_trans.core.planning import make_plan
from auto_trans.core.source import SlicedSource
from auto_trans.core.strategy import Strategy
from auto_trans.core.tensor import SourceFile
from auto_trans.engine.gather import Gatherer
from auto_trans.loading import assemble, find_file
from auto_trans.request import Request
from auto_trans.storage.sources import as_strategy


class MemoryFile:
    """A source file in memory."""

    def __init__(self, content, mapped=True):
        self._bytes, self._mapped = np.frombuffer(content, np.uint8), mapped

    def read(self, offset, nbytes):
        part = self._bytes[offset : offset + nbytes]
        assert offset >= 0 and part.nbytes == nbytes, "read beyond the file"
        return part

    def view(self, offset, nbytes):
        return self.read(offset, nbytes) if self._mapped else None

    def read_into(self, offset, out):
        out.reshape(-1)[:] = self.read(offset, out.nbytes)

    def check_unchanged(self):
        pass

    def close(self):
        pass


def gatherer(buffer_bytes, files, mapped=True):
    """A gatherer of files in memory: name -> contents."""
    return Gatherer(buffer_bytes, lambda file: MemoryFile(files[file.path], mapped))


@st.composite
def layouts(draw):
    """Any layout MindSpore can write: axes of any size, several on one dimension, optimizer shard in groups."""
    dev_matrix = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=3)))
    axes = draw(st.permutations(range(len(dev_matrix))))
    used = axes[: draw(st.integers(0, len(axes)))]
    ndim = draw(st.integers(1, 3))
    entries: list[list[int]] = [[] for _ in range(ndim)]
    for axis in used:
        entries[draw(st.integers(0, ndim - 1))].append(axis)
    plain = Layout(dev_matrix, tuple(map(tuple, entries)))
    shards = draw(st.sampled_from([k for k in range(1, plain.replicas + 1) if plain.replicas % k == 0]))
    if shards == 1:
        return plain
    owners = plain.owners((0,) * ndim)  # MindSpore writes their mean distance, also where they are not evenly spaced
    size = -1 if shards == plain.replicas and draw(st.booleans()) else shards
    return Layout(dev_matrix, plain.tensor_map, size, (owners[-1] - owners[0]) // (len(owners) - 1))


@st.composite
def conversions(draw):
    """Two layouts of one tensor on any numbers of ranks, 24 to 16 among them."""
    source = draw(layouts())
    target = draw(layouts().filter(lambda layout: len(layout.tensor_map) == len(source.tensor_map)))
    ndim = len(source.tensor_map)
    shape = tuple(math.lcm(a, b) for a, b in zip(source.grid(ndim), target.grid(ndim)))
    return source, target, np.arange(math.prod(shape)).reshape(shape)


@dataclass(frozen=True)
class Meta:
    """What the head of a file would tell of a tensor."""

    shape: tuple
    dtype: str = "Float32"

    @property
    def dims(self):
        return self.shape

    @property
    def nbytes(self):
        return 4 * math.prod(self.shape)

    @property
    def segments(self):
        return ((0, self.nbytes),)


class Index:
    """The heads of a source in memory: rank -> parameter -> array."""

    def __init__(self, held):
        self.held = held
        self.ranks = tuple(sorted(held))

    def tensors(self, rank):
        return {name: Meta(array.shape) for name, array in self.held[rank].items()}

    def file(self, rank, name):
        return SourceFile(self.describe(rank), 0, 0, rank)

    def describe(self, rank):
        return f"rank_{rank}/x.ckpt"


def source_of(strategy, index):
    """A source in memory, from its heads or from what its ranks hold."""
    return SlicedSource(strategy, index if isinstance(index, Index) else Index(index))


def plan_of(source, target, index, ranks=None, **options):
    """The plan of a source in memory."""
    return make_plan(source_of(source, index), target, ranks, **options)


def strategy(parameters, stages=1, origin="strategy"):
    """parameters: name -> layout, or name -> {stage: layout}."""
    by_stage = {n: v if isinstance(v, dict) else {0: v} for n, v in parameters.items()}
    devices = next(iter(next(iter(by_stage.values())).values())).devices
    return Strategy(stages, devices, by_stage, origin=origin)


def hold(full, strategy):
    """What every rank holds under a strategy; parameters that it does not list are held whole by all."""
    held = {}
    for rank in range(strategy.world_size):
        held[rank] = {}
        for name, array in full.items():
            layout = strategy.layout(name, strategy.stage_of(rank))
            if layout is not None:
                box = layout.box(rank % strategy.stage_devices, array.shape)
                held[rank][name] = array[box.slices()]
            elif not strategy.lists(name):
                held[rank][name] = array
    return held


def request(src, dst, source=None, target=None, **options):
    """A request; strategies may be paths, nothing means complete."""
    return Request(Path(src), Path(dst), as_strategy(source), as_strategy(target), **options)


def planned(src, dst, source=None, target=None, **options):
    """A planned conversion."""
    return plan_conversion(request(src, dst, source, target, **options))


def save(folder, held, dtype=np.float32):
    for rank, tensors in held.items():
        raws = {name: oracle.raw(array.astype(dtype)) for name, array in tensors.items()}
        oracle.write_raw(folder / f"rank_{rank}" / f"net_rank_{rank}-1_1.ckpt", raws)
    return folder


def load(folder, rank, dtype=np.float32):
    found = oracle.read_raw(folder / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
    return {n: np.frombuffer(r.content, dtype).reshape(r.dims) for n, r in found.items()}


def large_source(folder, mib=400):
    """Writes a complete checkpoint with matrices that are sliced on either dimension."""
    rows = mib * 1024 * 1024 // 2 // 8 // 4096
    block = np.arange(rows * 4096, dtype=np.uint16).view(np.float16).reshape(rows, 4096)
    return oracle.write_raw(folder / "large.ckpt", {f"w{i}": oracle.raw(block) for i in range(8)})


def every_array():
    """Name -> array and MindSpore's type, of every type that it saves; with a scalar among them."""
    rng = np.random.default_rng(3)
    arrays = {f"layer.{d}": (rng.integers(0, 2, (3, 4)).astype(d), dtype) for d, dtype in oracle.NAMES.items()}
    arrays["layer.bfloat16"] = (rng.integers(-128, 128, (5, 2)).astype(np.float32), "BFloat16")
    arrays["scalar"] = (np.float32(2.5), "Float32")
    arrays["one"] = (np.array([7], np.int32), "Int32")
    arrays["naïve.名前"] = (np.array([1, 2], np.int32), "Int32")
    return arrays


def every_dtype():
    """One parameter of every type, for mindspore.save_checkpoint."""
    import mindspore

    return [
        {
            "name": name,
            "data": mindspore.Tensor(array, getattr(mindspore, "bool_" if dtype == "Bool" else dtype.lower())),
        }
        for name, (array, dtype) in every_array().items()
    ]


def every_raw():
    """The same as it lies in a file, with what ``append_dict={"note": "text", "epoch_num": 3}`` adds."""
    note = oracle.Raw("str", (0,), "text".encode("utf-32-le"))
    arrays = {name: oracle.raw(array, dtype) for name, (array, dtype) in every_array().items()}
    return {**arrays, "note": note, "epoch_num": oracle.raw(np.int64(3))}


def read_file(path):
    """The slices in a file, read as they are."""
    return assemble(find_file(path))
