"""Genuine strategies as safetensors jobs: all ranks together, against the boxes of the full weights and against MindSpore.

What a job of MindFormers does by itself is the second oracle: `mindspore.unified_safetensors`, and
`mindspore.load_distributed_checkpoint` for every rank.
"""

from __future__ import annotations

import threading
from itertools import product
from pathlib import Path

import numpy as np
import oracle
import pytest

from auto_trans import merge_strategies, read_strategy
from auto_trans.config import Timing
from auto_trans.coordination.election import elect
from auto_trans.coordination.joining import Joined
from auto_trans.coordination.session import Session
from auto_trans.core.strategy import Strategy
from auto_trans.process import Process
from auto_trans.request import Request
from auto_trans.together import SharedConversion, convert_together

TIMING = Timing(poll_min=0.002, poll_max=0.02, heartbeat_interval=5)
PAIRS = [(model, a, b) for model, cases in oracle.CASES.items() for a, b in product(cases, cases)]
# every case once as source and once as target
RING = [(model, a, cases[(i + 3) % len(cases)]) for model, cases in oracle.CASES.items() for i, a in enumerate(cases)]
NUMPY = {"F16": np.float16, "F32": np.float32, "I32": np.int32, "I64": np.int64}


@pytest.fixture(scope="module")
def sources(genuine, tmp_path_factory):
    """Model, case -> its rank folders as safetensors, and what every rank holds."""
    folder = tmp_path_factory.mktemp("safetensors")

    def source(model, case):
        if not (folder / model / case).exists():
            weights = genuine.model(model)
            for rank, held in weights.slices(case).items():
                tensors = {name: oracle.raw(array, weights.dtypes[name]) for name, array in held.items()}
                oracle.write_safetensors_raw(
                    folder / model / case / f"rank_{rank}" / f"net_rank_{rank}-1_1.safetensors", tensors
                )
        return folder / model / case

    return source


def convert_as_job(src: Path, folder: Path, source: Path, target: Path) -> Path:
    """All ranks of a job, as threads, convert together; the folder above the rank folders that they load."""
    to = read_strategy(target)
    ranks = to.world_size
    request = Request(src, folder / "out", read_strategy(source), Strategy.complete(), format="safetensors")
    shared = SharedConversion(
        request, folder / "strategy", lambda: to, folder / "report.json", elect(ranks, min(ranks, 2)), TIMING
    )
    (folder / "strategy").mkdir(parents=True)
    if to.stages > 1:
        for file in target.iterdir():
            (folder / "strategy" / file.name).write_bytes(file.read_bytes())
    errors: list[BaseException] = []
    joined = Joined(folder / "session", (Process.current(),) * ranks)

    def live(rank: int) -> None:
        session = Session(joined, rank, TIMING)
        try:
            convert_together(session, shared)
        except Exception as e:
            session.fail(e)
            errors.append(e)

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return folder / "out" / src.name


def own(folder: Path, rank: int) -> dict[str, np.ndarray]:
    """What a rank loads, as float32."""
    raws = oracle.read_safetensors_raw(folder / f"rank_{rank}" / f"checkpoint_{rank}.safetensors")
    return {name: as_float(raw) for name, raw in raws.items()}


def as_float(raw: oracle.Raw) -> np.ndarray:
    if raw.dtype == "BF16":
        upper = np.frombuffer(raw.content, np.uint16).astype(np.uint32)
        return (upper << 16).view(np.float32).reshape(raw.dims)
    return np.frombuffer(raw.content, NUMPY[raw.dtype]).astype(np.float32).reshape(raw.dims)


@pytest.mark.parametrize(("model", "source", "target"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_every_rank_loads_the_boxes_of_the_full_weights(genuine, sources, tmp_path, model, source, target):
    weights = genuine.model(model)
    converted = convert_as_job(sources(model, source), tmp_path, weights.strategy(source), weights.strategy(target))
    for rank, boxes in weights.slices(target).items():
        got = own(converted, rank)
        assert got.keys() == boxes.keys()
        for name, box in boxes.items():
            assert np.array_equal(got[name], np.asarray(box, np.float32)), (rank, name)


@pytest.mark.mindspore
@pytest.mark.parametrize(("model", "source", "target"), RING, ids=["-".join(pair) for pair in RING])
def test_every_rank_loads_what_mindformers_own_path_gives_it(
    genuine, sources, tmp_path, monkeypatch, model, source, target
):
    import mindspore
    import safetensors.numpy
    from mindspore.parallel import transform_safetensors

    def save_file(tensors, *args, **kwargs):
        """safetensors 0.8 ignores the strides of arrays, of which MindSpore saves parts."""
        return original({name: np.array(array, order="C") for name, array in tensors.items()}, *args, **kwargs)

    original = safetensors.numpy.save_file
    monkeypatch.setattr(transform_safetensors, "save_file", save_file)
    weights = genuine.model(model)
    converted = convert_as_job(
        sources(model, source), tmp_path / "ours", weights.strategy(source), weights.strategy(target)
    )
    merged = {
        case: str(merge_strategies(weights.strategy(case), tmp_path / case / "m.ckpt")) for case in (source, target)
    }
    mindspore.unified_safetensors(
        str(sources(model, source)), merged[source], str(tmp_path / "unified"), file_suffix="-1_1"
    )
    for rank in weights.slices(target):
        mindspore.load_distributed_checkpoint(
            None, predict_strategy=merged[target], unified_safetensors_dir=str(tmp_path / "unified"),
            dst_safetensors_dir=str(tmp_path / "theirs"), rank_id=rank, format="safetensors",
        )  # fmt: skip
        (file,) = (tmp_path / "theirs" / f"rank_{rank}").glob("*.safetensors")
        got = own(converted, rank)
        theirs = {name: as_float(raw) for name, raw in oracle.read_safetensors_raw(file).items()}
        assert theirs and theirs.keys() <= got.keys()
        for name, array in theirs.items():
            assert np.array_equal(got[name], array), (rank, name)
