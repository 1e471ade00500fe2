"""Every pair of genuine strategies loaded directly, against the boxes of the full weights, file mode and MindSpore."""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from itertools import product

import numpy as np
import oracle
import pytest
from builders import read_file

from auto_trans import convert, load_each, load_into, read_strategy
from auto_trans.core.strategy import Strategy
from auto_trans.errors import ConfigTypeError, CorruptCheckpointError, PlanError, SourceChangedError
from auto_trans.loading import assemble, file_of_rank
from auto_trans.planned import Planned
from auto_trans.storage.sources import find_source

FORMATS = ("ckpt", "safetensors")
PAIRS = [(model, a, b) for model, cases in oracle.CASES.items() for a, b in product(cases, cases)]
# every case once as source and once as target
RING = [(model, a, cases[(i + 3) % len(cases)]) for model, cases in oracle.CASES.items() for i, a in enumerate(cases)]
CASES = [(model, case) for model, cases in oracle.CASES.items() for case in cases]


def ids(tuples):
    return ["-".join(one) for one in tuples]


@pytest.fixture(scope="module")
def sources(genuine, tmp_path_factory):
    """Model, case, format -> its rank folders."""
    folder = tmp_path_factory.mktemp("direct")

    def source(model, case, format):
        if format == "ckpt":
            return genuine.source(model, case)
        place = folder / model / case
        if not place.exists():
            weights = genuine.model(model)
            for rank, held in weights.slices(case).items():
                tensors = {name: oracle.raw(array, weights.dtypes[name]) for name, array in held.items()}
                oracle.write_safetensors_raw(place / f"rank_{rank}" / f"net_rank_{rank}-1_1.safetensors", tensors)
        return place

    return source


@pytest.fixture(scope="module")
def expected(genuine):
    """Model, case -> the box of every parameter on every rank, as it lies in a file."""
    found = {}

    def boxes(model, case):
        if (model, case) not in found:
            weights = genuine.model(model)
            found[model, case] = {
                rank: {name: oracle.raw(box, weights.dtypes[name]) for name, box in held.items()}
                for rank, held in weights.slices(case).items()
            }
        return found[model, case]

    return boxes


@pytest.fixture(scope="module")
def strategies(genuine):
    """Model, case -> its strategy."""
    return functools.lru_cache(None)(lambda model, case: read_strategy(genuine.model(model).strategy(case)))


def assembled(src, source, target):
    """What every rank loads: rank -> parameter -> type, shape and bytes."""
    planned = Planned(find_source(src, source), source, target)
    planned.check_heads()
    planned.check_whole()
    return {
        rank: {one.name: oracle.Raw(one.dtype, one.shape, one.data.tobytes()) for one in assemble(file.tensors)}
        for file in planned.plan.files
        for rank in file.ranks
    }


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("model", "source", "target"), PAIRS, ids=ids(PAIRS))
def test_every_rank_loads_the_boxes_of_the_full_weights(sources, strategies, expected, model, source, target, format):
    got = assembled(sources(model, source, format), strategies(model, source), strategies(model, target))
    assert got == expected(model, target)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("model", "case"), CASES, ids=ids(CASES))
def test_complete_weights_are_loaded_as_boxes_and_boxes_as_complete_weights(
    sources, strategies, expected, model, case, format
):
    strategy, complete = strategies(model, case), Strategy.complete()
    whole = expected(model, "dp1mp1")[0]
    (file,) = (sources(model, "dp1mp1", format) / "rank_0").iterdir()
    for rank, got in assembled(file, complete, strategy).items():
        assert got == {name: box for name, box in expected(model, case)[rank].items() if name in whole}, rank
    got = assembled(sources(model, case, format), strategy, complete)[0]
    assert {name: got[name] for name in whole} == whole


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("model", "source", "target"), RING, ids=ids(RING))
def test_every_rank_loads_what_file_mode_writes(genuine, sources, strategies, tmp_path, model, source, target, format):
    src, sides = sources(model, source, format), (strategies(model, source), strategies(model, target))
    convert(src, tmp_path, *sides, format="ckpt")
    loaded = assembled(src, *sides)
    for rank, got in loaded.items():
        written = oracle.read_raw(tmp_path / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
        assert got == written and list(got) == list(written), rank
    last = len(loaded) - 1
    paths = [genuine.model(model).strategy(case) for case in (source, target)]
    by_call = dict(load_each(src, last, *paths, bfloat16=np.uint16))
    assert list(by_call) == list(loaded[last])
    for name, array in by_call.items():
        assert (array.shape, array.tobytes()) == loaded[last][name][1:], name


# with MindSpore


def check_same_parameters(ours, theirs):
    """Compares what we make of slices with what mindspore.load_checkpoint returns."""
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        other = theirs[name]
        assert type(one) is type(other), name
        if isinstance(one, str):
            assert one == other
            continue
        facts = [(p.shape, p.dtype, p.requires_grad, p.sliced, p.layerwise_parallel) for p in (one, other)]
        assert facts[0] == facts[1], name
        # those of .safetensors files MindSpore gives names of no meaning
        assert one.name == name and (other.name == name or other.name.startswith("Parameter#"))
        assert one.data.get_bytes() == other.data.get_bytes(), name


@pytest.mark.mindspore
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("model", "source", "target"), RING, ids=ids(RING))
def test_parameters_are_those_that_mindspore_loads_from_the_file(
    genuine, sources, tmp_path, model, source, target, format
):
    import mindspore

    from auto_trans.network import as_parameters

    strategies = [genuine.model(model).strategy(case) for case in (source, target)]
    src = sources(model, source, format)
    convert(src, tmp_path, *strategies)
    from_strategy, to_strategy = map(read_strategy, strategies)
    for rank in range(to_strategy.world_size):
        file = tmp_path / f"rank_{rank}" / f"checkpoint_{rank}.{format}"
        theirs = mindspore.load_checkpoint(str(file), format=format)
        check_same_parameters(as_parameters(read_file(file)), theirs)
        planned = Planned(find_source(src, from_strategy), from_strategy, to_strategy, [rank])
        ours = as_parameters(assemble(file_of_rank(planned, rank).tensors))
        check_same_parameters(ours, theirs)


@pytest.mark.mindspore
def test_parameters_of_every_type_are_those_that_mindspore_loads(tmp_path):
    import builders
    import mindspore

    from auto_trans.network import as_parameters

    file = tmp_path / "every.ckpt"
    appended = {"note": "text", "epoch_num": 3, "flag": True, "loss": 1.5}
    mindspore.save_checkpoint(builders.every_dtype(), str(file), append_dict=appended)
    padded = oracle.Raw("str", (0,), "ab\0".encode("utf-32-le"))
    packed = oracle.Raw("Int4", (3, 2), b"\x12\x34\x56")
    oracle.write_raw(file, {**oracle.read_raw(file), "padded": padded, "packed": packed})
    check_same_parameters(as_parameters(read_file(file)), mindspore.load_checkpoint(str(file)))
    safe = tmp_path / "every.safetensors"
    mindspore.save_checkpoint(builders.every_dtype(), str(safe), format="safetensors")
    check_same_parameters(as_parameters(read_file(safe)), mindspore.load_checkpoint(str(safe), format="safetensors"))


@pytest.mark.mindspore
def test_type_that_mindspore_does_not_know_is_refused(tmp_path):
    from auto_trans.errors import UnsupportedCheckpointError
    from auto_trans.network import as_parameters

    file = oracle.write_raw(tmp_path / "net.ckpt", {"w": oracle.Raw("Float3", (1,), b"\1")})
    with pytest.raises(UnsupportedCheckpointError, match="parameter w is of type Float3"):
        as_parameters(read_file(file))


@pytest.mark.mindspore
def test_parameter_takes_the_memory_of_the_slice(genuine):
    """Read once, straight to where the network takes it from."""
    from auto_trans.network import as_parameters

    slices = list(read_file(genuine.complete("mf_llama")))
    parameters = as_parameters(slices)
    assert slices and all(parameters[one.name].data_ptr() == one.data.ctypes.data for one in slices)


class Script:
    """A training script of its own: a small network, and a source of two ranks for it."""

    def __init__(self, folder):
        from builders import hold, save, strategy
        from mindspore import nn

        from auto_trans.core.layout import Layout

        self.network = nn.SequentialCell(nn.Dense(4, 2, weight_init="zeros", bias_init="zeros"), nn.LayerNorm((2,)))
        self.full = {"0.weight": np.arange(8).reshape(2, 4) + 1, "0.bias": np.arange(2) + 5, "other": np.arange(2)}
        rows = Layout((2,), ((0,),))
        self.source = strategy(dict.fromkeys(self.full, rows))
        self.folder = save(folder / "net", hold(self.full, self.source))

    def file(self, rank):
        return self.folder / f"rank_{rank}" / f"net_rank_{rank}-1_1.ckpt"

    def values(self):
        return {parameter.name: parameter.asnumpy().copy() for parameter in self.network.get_parameters()}

    def is_untouched(self):
        values = self.values()
        return not values["0.weight"].any() and not values["0.bias"].any()


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path)


@pytest.mark.mindspore
def test_network_gets_the_values_and_what_is_not_loaded_is_told(script):
    not_loaded, unknown = load_into(script.network, script.folder, script.source)
    values = script.values()
    assert (values["0.weight"] == script.full["0.weight"]).all() and (values["0.bias"] == script.full["0.bias"]).all()
    assert (not_loaded, unknown) == (["1.gamma", "1.beta"], ["other"])


@pytest.mark.mindspore
def test_network_gets_only_what_is_chosen(script):
    not_loaded, unknown = load_into(script.network, script.folder, script.source, only_prefix="0.", names=["0.bias"])
    values = script.values()
    assert not values["0.weight"].any() and (values["0.bias"] == [5, 6]).all()
    assert (not_loaded, unknown) == (["0.weight", "1.gamma", "1.beta"], [])


@pytest.mark.mindspore
def test_network_of_a_rank_gets_its_slices(script):
    from mindspore import nn

    network = nn.SequentialCell(nn.Dense(4, 1, weight_init="zeros"))
    load_into(network, script.folder, script.source, script.source, rank=1, skip_prefix="other")
    assert (network[0].weight.asnumpy() == script.full["0.weight"][1:]).all()


@pytest.mark.mindspore
def test_network_is_untouched_if_a_file_is_damaged(script):
    content = script.file(1).read_bytes()
    script.file(1).write_bytes(content[:-3])
    with pytest.raises(CorruptCheckpointError, match="net_rank_1-1_1"):
        load_into(script.network, script.folder, script.source)
    assert script.is_untouched()


@pytest.mark.mindspore
def test_network_is_untouched_if_a_file_changes_while_it_is_read(script, monkeypatch):
    from auto_trans import network

    def assemble_and_touch(tensors):
        for one in assemble(tensors):
            os.utime(script.file(1), ns=(0, 0))
            yield one

    monkeypatch.setattr(network, "assemble", assemble_and_touch)
    with pytest.raises(SourceChangedError, match="net_rank_1-1_1"):
        load_into(script.network, script.folder, script.source)
    assert script.is_untouched()


@pytest.mark.mindspore
def test_network_of_other_shapes_or_names_is_refused_untouched(script):
    from mindspore import nn

    rank_1 = (script.folder, script.source, script.source)
    with pytest.raises(
        PlanError, match=r"0.weight is \[2, 4\] in the network, but \[1, 4\] is loaded; give the strategy"
    ):
        load_into(script.network, *rank_1, rank=1)
    assert script.is_untouched()
    with pytest.raises(PlanError, match=r"holds no parameter of the network \(0.weight, .* instead of other_name"):
        load_into(nn.SequentialCell(OrderedDict(other_name=nn.Dense(4, 2))), script.folder, script.source)
    for network in ({}, None, "network"):
        with pytest.raises(ConfigTypeError, match=r"network must be a mindspore.nn.Cell"):
            load_into(network, script.folder, script.source)


@pytest.mark.mindspore
@pytest.mark.parametrize("rank", [0, 3])
def test_every_rank_gets_whole_weights_where_the_network_is_whole(script, rank):
    load_into(script.network, script.folder, script.source, rank=rank)
    assert (script.values()["0.weight"] == script.full["0.weight"]).all()
