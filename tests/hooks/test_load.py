"""Whose conversion a load gets, and that doctor foresees it. MindFormers' own functions are stand-ins that note the call."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from builders import hold, strategy
from safetensors.numpy import save_file
from strategy_files import strategy_file

from auto_trans.core.layout import Layout
from auto_trans.doctor import examine
from auto_trans.errors import CheckpointError, PlanError
from auto_trans.hooks import direct
from auto_trans.hooks import load as hook
from auto_trans.hooks import safetensors as inside
from auto_trans.hooks.transform import TransformCkpt

pytestmark = pytest.mark.mindspore

EXAMPLES = Path(__file__).parents[2] / "configs" / "examples"
FULL = {"model.w": np.arange(32, dtype=np.float32).reshape(4, 8), "model.v": np.arange(8, dtype=np.float32)}


class Config(dict):
    """A configuration of MindFormers: its keys are attributes, None where they are not set."""

    def __getattr__(self, name):
        return self.get(name, Config(model_config=Config()) if name == "model" else None)

    __setattr__ = dict.__setitem__


@pytest.fixture
def network():
    from mindspore import Parameter, Tensor, nn

    class Network(nn.Cell):
        def __init__(self):
            super().__init__()
            self.w = Parameter(Tensor(FULL["model.w"]), name="model.w")
            self.v = Parameter(Tensor(FULL["model.v"]), name="model.v")

    return Network()


@pytest.fixture
def sources(tmp_path):
    """Format and kind -> a source of that format: rank folders of two ranks, or a complete file."""
    import mindspore

    sliced = strategy({"model.w": Layout((2,), ((0,), ())), "model.v": Layout((2,), ((0,),))})
    for form in ("ckpt", "safetensors"):
        for folder, held in [(f"rank_{r}", h) for r, h in hold(FULL, sliced).items()] + [("complete", FULL)]:
            path = tmp_path / form / ("checkpoint/" + folder if folder != "complete" else folder)
            path.mkdir(parents=True)
            arrays = {name: np.array(array, order="C") for name, array in held.items()}
            if form == "safetensors":
                save_file(arrays, path / "net.safetensors")
            else:
                data = [{"name": name, "data": mindspore.Tensor(array)} for name, array in arrays.items()]
                mindspore.save_checkpoint(data, str(path / "net.ckpt"))
        for rank in range(2):
            layouts = {"model.w": ([2], [[0, -1]]), "model.v": ([2], [[0]])}
            strategy_file(tmp_path / form / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt", layouts)
    return tmp_path


def test_folder_of_an_earlier_conversion_is_not_waited_for(job, network, sources):
    (job.transformed_dir / "other" / "rank_1").mkdir(parents=True)
    from auto_trans.config import AutoTransConfig
    from auto_trans.coordination.election import elect
    from auto_trans.hooks.transform import convert_for_job

    source = sources / "safetensors"
    config = AutoTransConfig(str(source / "checkpoint"), str(source / "strategy"))
    convert_for_job(job, config, elect(1, 1), "checkpoint_", None, format="safetensors")
    assert (job.transformed_dir / "checkpoint" / "rank_0" / "checkpoint_0.safetensors").is_file()


def convert_as_mindformers_calls_us(job, config, network):
    """Loads as MindFormers would: what it calls inside of its own function; what it is left to load by itself."""
    import mindspore

    loaded = []

    def transform_and_load_checkpoint(config, model, network, dataset, optimizer=None):
        if config.only_save_strategy or not config.auto_trans_ckpt:
            return
        if config.load_ckpt_format == "safetensors":
            arguments = (config, ["merged"], network, "strategy", "merged", optimizer)
            inside.load_slices(lambda _, files, *rest: loaded.extend(files), *arguments)
        else:
            transform = TransformCkpt(auto_trans_ckpt=True, rank_id=0, world_size=1)
            transform(config.load_checkpoint, src_strategy=config.src_strategy_path_or_dir)
            parameters = direct.read_parameters(lambda _: loaded.append("by MindFormers") or {}, config)
            mindspore.load_param_into_net(network, parameters)

    hook.check_settings(lambda trainer: None, SimpleNamespace(config=config))
    if config.ckpt_use_legacy_format is not False:  # the version that is installed is 1.7
        hook.load_checkpoint(transform_and_load_checkpoint, config, None, network, None)
    return loaded


MODES = {
    "plain": {},
    "direct": {"auto_trans": {"load": "direct"}},
    "predict": {"run_mode": "predict"},
    "off": {"auto_trans_ckpt": False},
    "only the strategy": {"only_save_strategy": True},
    "Checkpoint 2.0": {"ckpt_use_legacy_format": False},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["checkpoint", "complete"])
@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_doctor_foresees_what_the_job_does(job, network, sources, tmp_path, form, kind, mode):
    settings = {
        "auto_trans_ckpt": True, "use_parallel": True, "load_ckpt_format": form, "output_dir": str(job.output),
        "load_checkpoint": str(sources / form / kind), **MODES[mode],
    }  # fmt: skip
    if kind == "checkpoint":
        settings["src_strategy_path_or_dir"] = str(sources / form / "strategy")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    checks, _ = examine(tmp_path / "job.yaml", 1)
    verdicts = [check.what for check in checks if "will convert" in check.what or "straight" in check.what]
    convert_as_mindformers_calls_us(job, Config(settings), network)
    converts = any(file.is_file() for file in job.transformed_dir.rglob("checkpoint_0.*"))
    told = "1 rank will load straight from the source" if mode == "direct" else "auto_trans will convert nothing"
    assert [what.partition(",")[0] for what in verdicts] == ["1 of 1 rank will convert" if converts else told]
    assert converts == (mode in ("plain", "predict") and (form, kind) != ("safetensors", "complete"))


@pytest.mark.parametrize("changes", [{"only_save_strategy": True}, {"use_parallel": False}], ids=str)
def test_output_is_emptied_though_nothing_is_converted(job, network, sources, changes):
    """The strategy files of an earlier job would mix with those of this one."""
    job.strategy_dir.mkdir(parents=True)
    (job.strategy_dir / "ckpt_strategy_rank_7.ckpt").write_text("of an earlier job")
    settings = {
        "auto_trans_ckpt": True, "use_parallel": True, "load_ckpt_format": "safetensors",
        "load_checkpoint": str(sources / "safetensors" / "complete"), **changes,
    }  # fmt: skip
    hook.check_settings(lambda trainer: None, SimpleNamespace(config=Config(settings)))
    assert not any(job.strategy_dir.iterdir())


@pytest.mark.parametrize("concatenated", [True, False])
def test_concatenation_is_compared_with_the_source_before_anything_is_compiled(
    job, network, sources, monkeypatch, concatenated
):
    """MindFormers looks for it on rank 0 only, in merged files that there are none of, while the others wait."""
    from mindformers.utils import load_checkpoint_utils as stock

    keys = ["model.w"] if concatenated else ["model.qkv"]
    monkeypatch.setattr(type(network), "obtain_qkv_ffn_concat_keys", lambda *args: keys, raising=False)
    monkeypatch.setattr("mindformers.models.modeling_utils.PreTrainedModel", type(network))
    settings = {
        "auto_trans_ckpt": True, "use_parallel": True, "load_ckpt_format": "safetensors", "run_mode": "predict",
        "load_checkpoint": str(sources / "safetensors" / "checkpoint"),
    }  # fmt: skip
    compiled = []

    def load(config, model, network, dataset, **kwargs):
        compiled.append(config.model.model_config.qkv_concat)
        stock.validate_qkv_concat(network, config.model.model_config.qkv_concat, "/merged/by/nobody")

    for told in (True, False):
        config = Config(settings, model=Config(model_config=Config(qkv_concat=told)))
        if told == concatenated:
            hook.load_checkpoint(load, config, None, network, None, do_predict=True)
        else:
            with pytest.raises(ValueError, match="qkv concat check failed"):
                hook.load_checkpoint(load, config, None, network, None, do_predict=True)
    assert compiled == [concatenated]


@pytest.mark.parametrize(("kind", "reads_ahead"), [("checkpoint", False), ("complete", True)])
def test_source_that_is_converted_is_not_read_ahead(job, sources, kind, reads_ahead):
    """MindFormers 1.8 looks for the file of each rank in the source, and fails where the job has more ranks than that."""
    source = sources / "safetensors"
    settings = {
        "auto_trans_ckpt": True, "use_parallel": True, "load_ckpt_format": "safetensors",
        "load_checkpoint": str(source / kind),
    }  # fmt: skip
    read = []
    hook.preload(read.append, Config(settings))
    assert bool(read) == reads_ahead


@pytest.mark.parametrize("unify", [True, False])
def test_data_parallel_ranks_are_given_whole_files(job, network, sources, monkeypatch, unify):
    """By no strategy MindFormers slices nothing, and fails."""
    from mindspore import context

    monkeypatch.setattr(context, "get_auto_parallel_context", lambda name: "data_parallel")
    settings = {
        "auto_trans_ckpt": True, "use_parallel": True, "load_ckpt_format": "safetensors", "auto_trans": {"unify": unify},
        "load_checkpoint": str(sources / "safetensors" / ("checkpoint" if unify else "complete")),
    }  # fmt: skip
    seen = []

    def load(config, model, network, dataset):
        merged = inside.merge_target_strategy(lambda *args: pytest.fail("merged"), config, "strategy")
        assert merged == "strategy"
        arguments = (config, ["whole.safetensors"], network, merged, "folder", None)
        inside.load_slices(lambda config, files, *rest: seen.append((config.auto_trans_ckpt, files)), *arguments)

    hook.load_checkpoint(load, Config(settings), None, network, None)
    assert seen == [(False, ["whole.safetensors"])]


@pytest.mark.parametrize("more", [{}, {"remove_redundancy": True}], ids=str)
def test_rank_loads_its_converted_file_by_mindformers_where_asked(job, network, sources, more):
    settings = {
        "auto_trans_ckpt": True, "use_parallel": True, "load_ckpt_format": "safetensors",
        "load_checkpoint": str(sources / "safetensors" / "checkpoint"), "auto_trans": {"loader": "mindspore"}, **more,
    }  # fmt: skip
    config = Config(settings)
    (file,) = convert_as_mindformers_calls_us(job, config, network)
    assert Path(file) == job.transformed_dir / "checkpoint" / "rank_0" / "checkpoint_0.safetensors"
    assert config == settings, "the configuration is as it was"


@pytest.mark.parametrize("load", ["files", "direct"])
@pytest.mark.parametrize("kind", ["checkpoint", "complete"])
@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_network_gets_the_weights_by_our_own_loader(job, network, sources, form, kind, load):
    settings = {
        "auto_trans_ckpt": True, "use_parallel": True, "load_ckpt_format": form, "auto_trans": {"load": load},
        "load_checkpoint": str(sources / form / kind),
    }  # fmt: skip
    if kind == "checkpoint":
        settings["src_strategy_path_or_dir"] = str(sources / form / "strategy")
    for parameter in network.parameters_dict().values():
        parameter.set_data(parameter * 0)
    config = Config(settings)
    left = convert_as_mindformers_calls_us(job, config, network)
    assert config == settings, "the configuration is as it was"
    if (load, form, kind) == ("files", "safetensors", "complete"):
        assert left, "MindFormers slices it"
        return
    assert not left
    for name, array in FULL.items():
        assert np.array_equal(network.parameters_dict()[name].asnumpy(), array)
    written = [file for file in job.transformed_dir.rglob("*") if file.is_file()]
    assert bool(written) == (load == "files")
    report = json.loads((job.output / "auto_trans_report.json").read_text())
    assert report.get("load") == ("direct" if load == "direct" else None)


def test_weights_beside_those_of_a_direct_load_are_still_converted(job, network, sources):
    """MindFormers has the LoRA weights of a service converted in the middle of the load."""
    settings = {
        "auto_trans_ckpt": True, "use_parallel": True, "load_ckpt_format": "ckpt", "auto_trans": {"load": "direct"},
        "load_checkpoint": str(sources / "ckpt" / "complete"),
    }  # fmt: skip

    def load(config, model, network, dataset):
        transform = TransformCkpt(auto_trans_ckpt=True, rank_id=0, world_size=1)
        for source in (config.load_checkpoint, str(sources / "ckpt" / "complete" / "net.ckpt")):
            transform(source)
            seen.append((job.transformed_dir / "net" / "rank_0" / "checkpoint_0.ckpt").exists())

    seen = []
    hook.load_checkpoint(load, Config(settings), None, network, None)
    assert seen == [False, True]


@pytest.mark.parametrize("has_map", [True, False])
def test_names_of_huggingface_are_read_by_the_map_of_the_model(job, network, tmp_path, has_map):
    (tmp_path / "hf").mkdir()
    save_file({f"transformer.{name[6:]}": array for name, array in FULL.items()}, tmp_path / "hf" / "model.safetensors")
    before = sorted(tmp_path.rglob("*"))
    settings = {
        "auto_trans_ckpt": True, "use_parallel": True, "load_ckpt_format": "safetensors",
        "load_checkpoint": str(tmp_path / "hf"), "auto_trans": {"load": "direct"},
    }  # fmt: skip
    network.convert_name = lambda name: name.replace("transformer.", "model.")
    if has_map:
        network.obtain_name_map = lambda files: {name: f"transformer.{name[6:]}" for name in FULL if files}
    for parameter in network.parameters_dict().values():
        parameter.set_data(parameter * 0)
    left = convert_as_mindformers_calls_us(job, Config(settings), network)
    assert bool(left) != has_map
    if has_map:
        for name, array in FULL.items():
            assert np.array_equal(network.parameters_dict()[name].asnumpy(), array)
        assert [path for path in sorted(tmp_path.rglob("*")) if job.output not in (path, *path.parents)] == before


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_load_without_the_trainer_checks_and_empties_too(job, network, sources, form):
    """A service loads by a ModelRunner, which checks no settings."""
    stale = job.transformed_dir / "checkpoint" / "rank_0" / "checkpoint_0.ckpt"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier job")
    settings = {
        "auto_trans_ckpt": True, "use_parallel": True, "load_ckpt_format": form,
        "load_checkpoint": str(sources / form / "checkpoint"),
        "src_strategy_path_or_dir": str(sources / form / "strategy"),
    }  # fmt: skip
    seen = []
    hook.load_checkpoint(lambda *args: seen.append(stale.exists()), Config(settings), None, network, None)
    assert seen == [False]
    (sources / form / "checkpoint" / "rank_1" / f"net.{form}").write_bytes(b"")
    with pytest.raises(CheckpointError, match="rank_1"):
        hook.load_checkpoint(lambda *args: pytest.fail("compiled"), Config(settings), None, network, None)


def test_complete_weights_of_another_model_are_told_before_anything_is_compiled(job, network, tmp_path):
    (tmp_path / "gpt").mkdir()
    save_file({"gpt.w": FULL["model.w"]}, tmp_path / "gpt" / "model.safetensors")
    settings = {
        "auto_trans_ckpt": True, "use_parallel": True, "load_ckpt_format": "safetensors",
        "load_checkpoint": str(tmp_path / "gpt"),
    }  # fmt: skip
    with pytest.raises(
        PlanError, match=r"(?s)holds no parameter of the network \(gpt.w, ... instead of model.w.*set load_checkpoint"
    ):
        hook.load_checkpoint(lambda *args: pytest.fail("compiled"), Config(settings), None, network, None)


def test_complete_weights_may_bear_the_names_of_huggingface(job, network, tmp_path):
    (tmp_path / "hf").mkdir()
    save_file({"transformer.w": FULL["model.w"]}, tmp_path / "hf" / "model.safetensors")
    settings = {
        "auto_trans_ckpt": True, "use_parallel": True, "load_ckpt_format": "safetensors",
        "load_checkpoint": str(tmp_path / "hf"),
    }  # fmt: skip
    network.convert_name = lambda name: name.replace("transformer.", "model.")
    settings["transform_process_num"] = 3  # of converters that there are none of
    called = []
    hook.load_checkpoint(lambda *args: called.append(args), Config(settings), None, network, None)
    assert called


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_doctor_knows_every_setting_of_the_examples(example, tmp_path):
    """Their paths do not exist here; everything else is right."""
    checks, _ = examine(example, 8)
    errors = [check.what for check in checks if check.status == "error"]
    asked = yaml.safe_load(example.read_text()).get("auto_trans_ckpt")
    assert any("nothing will be converted" in check.what for check in checks) == (asked is not True)
    assert all("is not found" in error or "hook is not active" in error for error in errors), errors
