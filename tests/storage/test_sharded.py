"""A folder of shards with an index is one complete checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import oracle
import pytest
from builders import save

from auto_trans import convert, read_strategy
from auto_trans.core.consistency import check_heads, check_shapes
from auto_trans.core.source import SlicedSource
from auto_trans.core.strategy import Strategy
from auto_trans.describe import describe_checkpoint, read_path
from auto_trans.errors import (
    AutoTransError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)
from auto_trans.merge_safetensors import merge_safetensors
from auto_trans.storage.sources import ScannedFiles, find_checkpoints
from auto_trans.verify import verify_against

FULL = {
    "embed.weight": np.arange(24, dtype=np.float32).reshape(6, 4),
    "layer.weight": np.arange(16, dtype=np.float32).reshape(4, 4) + 100,
    "norm.weight": np.arange(4, dtype=np.float32) + 200,
}
SHARDS = {
    "model-00001-of-00002.safetensors": ["embed.weight"],
    "model-00002-of-00002.safetensors": ["layer.weight", "norm.weight"],
}
HUGGINGFACE, MINDSPORE = "model.safetensors.index.json", "param_name_map.json"


def weight_map():
    return {name: file for file, names in SHARDS.items() for name in names}


def write_index(folder, content=None, name=HUGGINGFACE):
    folder.mkdir(parents=True, exist_ok=True)
    index = {"metadata": {"total_size": 176}, "weight_map": weight_map()} if content is None else content
    (folder / name).write_text(index if isinstance(index, str) else json.dumps(index))
    return folder


def write_shard(folder, file, names, change=0):
    oracle.write_safetensors_raw(folder / file, {name: oracle.raw(FULL[name] + np.float32(change)) for name in names})


@pytest.fixture
def shards(tmp_path):
    folder = write_index(tmp_path / "model")
    for file, names in SHARDS.items():
        write_shard(folder, file, names)
    return folder


def read_all(path):
    return {n: (r.dims, r.content) for n, r in oracle.read_safetensors_raw(path).items()}


def whole():
    return {name: (array.shape, array.tobytes()) for name, array in FULL.items()}


def refused(folder, error, message):
    """Whether finding, planning or converting it raises the error; it must be one of ours."""
    with pytest.raises(AutoTransError, match=message) as caught:
        convert(folder, folder.parent / "out")
    assert isinstance(caught.value, error)
    assert not (folder.parent / "out").exists()


def test_set_is_one_complete_checkpoint(shards, tmp_path):
    (found,) = find_checkpoints(shards)
    assert (found.name, found.distributed, found.is_sharded) == ("model", False, True)
    assert [file.name for file in found.files[0]] == list(SHARDS)
    convert(shards, tmp_path / "out")
    assert read_all(tmp_path / "out" / "rank_0" / "checkpoint_0.safetensors") == whole()


@pytest.mark.parametrize(
    "name, content",
    [(MINDSPORE, None), (MINDSPORE, weight_map()), ("model.fp32.safetensors.index.json", None)],
    ids=["mindspore", "mindspore flat", "variant"],
)
def test_index_may_be_any_of_both_kinds(shards, tmp_path, name, content):
    (shards / HUGGINGFACE).unlink()
    write_index(shards, content, name)
    convert(shards, tmp_path / "out")
    assert read_all(tmp_path / "out" / "rank_0" / "checkpoint_0.safetensors") == whole()


def test_both_indices_may_be_there_if_they_agree(shards):
    write_index(shards, weight_map(), MINDSPORE)
    assert len(find_checkpoints(shards)) == 1


def test_set_of_one_shard_without_index_is_a_file(tmp_path):
    write_shard(tmp_path, "model-00001-of-00001.safetensors", FULL)
    (found,) = find_checkpoints(tmp_path)
    assert (found.name, found.is_sharded) == ("model-00001-of-00001", False)


def test_spelling_of_the_path_does_not_matter(shards, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(shards)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(shards)
    for path in (f"{shards}/", "~/model", tmp_path / "link", ".", f"{shards}/../model"):
        (found,) = find_checkpoints(path)
        assert (found.name, len(found.all_files), found.is_sharded) == ("model", 2, True), path


def test_it_is_inspected_as_one(shards, bin_folder):
    (found,) = read_path(shards)
    facts = describe_checkpoint(found)
    assert [p["name"] for p in facts["parameters"]] == list(FULL)
    assert [f["parameters"] for f in facts["files"]] == [1, 2]
    command = [bin_folder / "auto-trans", "inspect", shards]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{shards} (safetensors)") and done.stdout.count("(safetensors)") == 1
    assert all(name in done.stdout for name in (*FULL, *SHARDS))


def test_it_is_checked_as_a_jobs_source_is(shards):
    (found,) = find_checkpoints(shards)
    heads = ScannedFiles(found)
    source = SlicedSource(Strategy.complete(), heads)
    check_shapes(source)
    check_heads(Strategy.complete(), heads)
    assert list(source.names) == list(FULL)
    assert source.where("norm.weight") == str(shards / "model-00002-of-00002.safetensors")


def test_weights_are_verified_against_a_set_and_a_set_against_weights(shards, tmp_path):
    complete = Strategy.complete()
    (found,) = find_checkpoints(shards)
    convert(shards, tmp_path / "out", format="ckpt")
    assert verify_against(tmp_path / "out", found, complete, complete) == ([], 176)
    (made,) = find_checkpoints(tmp_path / "out")
    assert verify_against(shards, made, complete, complete) == ([], 176)
    write_shard(shards, "model-00002-of-00002.safetensors", ["layer.weight", "norm.weight"], change=1)
    wrong, _ = verify_against(shards, made, complete, complete)
    assert [(d.parameter, d.file) for d in wrong] == [
        (name, str(shards / "model-00002-of-00002.safetensors")) for name in ("layer.weight", "norm.weight")
    ]


@pytest.mark.parametrize("target", ["dp2mp2_opt", "dp1mp2"])
def test_merged_weights_are_sliced_again(genuine, tmp_path, target):
    """Our own set, with what no strategy lists in hyper_param.safetensors, is a source like any other."""
    weights = genuine.model("mf_llama")
    source = genuine.source("mf_llama", "dp2mp2pp2")
    report = merge_safetensors(source, tmp_path / "set", weights.strategy("dp2mp2pp2"), max_shard_size="300KB")
    assert len(report.files) > 2 and (tmp_path / "set" / "hyper_param.safetensors").exists()
    (found,) = find_checkpoints(tmp_path / "set")
    assert len(found.all_files) == len(report.files) + 1
    convert(tmp_path / "set", tmp_path / "out", dst_strategy=weights.strategy(target))
    for rank, boxes in weights.slices(target).items():
        got = oracle.read_safetensors_raw(tmp_path / "out" / f"rank_{rank}" / f"checkpoint_{rank}.safetensors")
        left_out = {name for name in boxes if name.startswith("accu_grads.")}
        assert got.keys() == boxes.keys() - left_out
        for name, raw in got.items():
            assert (raw.dims, raw.content) == oracle.raw(boxes[name], weights.dtypes[name])[1:], name
    strategy = read_strategy(weights.strategy(target))
    wrong, compared = verify_against(tmp_path / "out", found, Strategy.complete(), strategy)
    assert wrong == [] and compared > 0


def test_shards_without_index_are_refused(shards):
    (shards / HUGGINGFACE).unlink()
    refused(
        shards, CheckpointNotFoundError, r"model-00001-of-00002\.safetensors, \.\.\..* no \*\.safetensors\.index\.json"
    )


def test_hyper_parameters_without_index_are_refused(tmp_path):
    """They are a part of a set, not a second checkpoint; without the index nobody knows which files are the others."""
    write_shard(tmp_path / "model", "part0.safetensors", ["embed.weight"])
    write_shard(tmp_path / "model", "hyper_param.safetensors", ["norm.weight"])
    refused(tmp_path / "model", CheckpointNotFoundError, r"hyper_param\.safetensors.*copy the index there")
    assert len(find_checkpoints(tmp_path / "model" / "part0.safetensors")) == 1, "given by name it is what is meant"


def test_index_that_names_a_missing_file_is_refused(shards):
    (shards / "model-00002-of-00002.safetensors").unlink()
    refused(
        shards, CheckpointNotFoundError, r"names model-00002-of-00002\.safetensors, e\.g\. for parameter layer\.weight"
    )
    for file in shards.glob("*.safetensors"):
        file.unlink()
    refused(shards, CheckpointNotFoundError, r"names model-00001-of-00002\.safetensors, model-00002-of-00002")


def test_index_that_names_a_missing_parameter_is_refused(shards):
    write_shard(shards, "model-00002-of-00002.safetensors", ["norm.weight"])
    message = r"parameter layer\.weight is in model-00002-of-00002\.safetensors, but no shard holds it"
    refused(shards, CorruptCheckpointError, message)


def test_parameter_that_the_index_gives_to_another_shard_is_refused(shards):
    write_index(shards, {"weight_map": {**weight_map(), "norm.weight": "model-00001-of-00002.safetensors"}})
    message = r"norm\.weight is in model-00001-of-00002\.safetensors, but it is in model-00002-of-00002\.safetensors"
    refused(shards, CorruptCheckpointError, message)


def test_parameter_in_two_shards_is_refused(shards):
    write_shard(shards, "model-00001-of-00002.safetensors", ["embed.weight", "norm.weight"])
    message = r"norm\.weight is in model-00001-of-00002\.safetensors and in model-00002-of-00002\.safetensors"
    refused(shards, CorruptCheckpointError, message)


def test_parameter_that_the_index_lacks_is_refused(shards):
    partial = {name: file for name, file in weight_map().items() if name != "norm.weight"}
    write_index(shards, {"weight_map": partial})
    refused(
        shards, CorruptCheckpointError, r"norm\.weight is in .*model-00002-of-00002\.safetensors, but not in the index"
    )


def test_indices_that_contradict_each_other_are_refused(shards):
    write_index(shards, {**weight_map(), "norm.weight": "model-00001-of-00002.safetensors"}, MINDSPORE)
    message = (
        r"model\.safetensors\.index\.json and param_name_map\.json contradict each other: parameter norm\.weight is in "
        r"model-00002-of-00002\.safetensors by the one and in model-00001-of-00002\.safetensors"
    )
    refused(shards, CorruptCheckpointError, message)
    partial = {name: file for name, file in weight_map().items() if name != "embed.weight"}
    write_index(shards, partial, MINDSPORE)
    refused(shards, CorruptCheckpointError, r"embed\.weight is in .* by the one and in no file by the other")


def test_index_of_mindformers_beside_that_of_huggingface_is_no_contradiction(shards):
    """MindFormers leaves its own names of the same parameters there when it loads such weights for the first time."""
    mapped = {name.replace("embed", "tok_embeddings"): file for name, file in weight_map().items()}
    write_index(shards, mapped, MINDSPORE)
    (found,) = find_checkpoints(shards)
    assert ScannedFiles(found).tensors(0).keys() == weight_map().keys()
    write_index(shards, {**mapped, "more": "model-00002-of-00002.safetensors"}, MINDSPORE)
    refused(shards, CorruptCheckpointError, "contradict each other")


def test_shard_that_the_index_does_not_name_is_refused(shards):
    write_shard(shards, "model-00003-of-00003.safetensors", ["embed.weight"])
    refused(
        shards, CorruptCheckpointError, r"model-00003-of-00003\.safetensors is a shard that the index does not name"
    )


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", r"index\.json cannot be read \(JSONDecodeError"),
        ("[" * 100_000, r"index\.json cannot be read \(RecursionError"),
        ("[]", r"index\.json cannot be read"),
        ('{"weight_map": ["a"]}', r"index\.json cannot be read"),
        ('{"weight_map": {}}', r"index\.json names no parameters"),
        ("{}", r"index\.json names no parameters"),
        ({"weight_map": {"w": "../model.safetensors"}}, r"index\.json gives parameter w the place '\.\./model"),
        ({"weight_map": {"w": "/etc/model.safetensors"}}, r"gives parameter w the place '/etc/model"),
        ({"weight_map": {"w": "sub/model.safetensors"}}, r"gives parameter w the place"),
        ({"weight_map": {"w": 1}}, r"gives parameter w the place 1"),
        ({"weight_map": {"w": ""}}, r"which is not there|gives parameter w the place"),
        ({"weight_map": {"w": ".."}}, r"names \.\., e\.g\. for parameter w, which is not there"),
    ],
)
def test_index_that_is_none_is_refused(shards, content, message):
    write_index(shards, content)
    refused(shards, CheckpointError, message)


def test_index_that_is_no_text_is_refused(shards):
    (shards / HUGGINGFACE).write_bytes(b"\xff\xfe\0")
    refused(shards, CorruptCheckpointError, r"index\.json cannot be read \(UnicodeDecodeError")


def test_hidden_files_are_no_indices(shards):
    (shards / f"._{HUGGINGFACE}").write_bytes(b"\0\5\26\7 of another system")
    assert len(find_checkpoints(shards)) == 1


def test_truncated_shard_is_named(shards):
    file = shards / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(shards, CorruptCheckpointError, r"model-00001-of-00002\.safetensors is not a complete safetensors file")


def test_a_single_shard_and_an_index_are_no_sources(shards):
    with pytest.raises(UnsupportedCheckpointError, match=r"model-00001-of-00002\.safetensors is one of several shards"):
        find_checkpoints(shards / "model-00001-of-00002.safetensors")
    for name in (HUGGINGFACE, MINDSPORE):
        write_index(shards, None, name)
        with pytest.raises(UnsupportedCheckpointError, match=rf"{name} is the index of .* give the folder .*/model \("):
            find_checkpoints(shards / name)


def test_strategy_for_a_set_is_refused(shards, genuine):
    with pytest.raises(ConfigError, match=r"model is complete, but its strategy"):
        convert(shards, shards.parent / "out", genuine.model("mf_llama").strategy("dp2mp2"))


def test_other_weights_beside_a_set_are_not_read_and_that_is_said(shards, tmp_path, caplog):
    write_shard(shards, "consolidated.safetensors", FULL)
    (shards / "pytorch_model-00001-of-00002.bin").write_bytes(b"x")
    (shards / "config.json").write_text("{}")
    convert(shards, tmp_path / "out")
    assert read_all(tmp_path / "out" / "rank_0" / "checkpoint_0.safetensors") == whole()
    assert "consolidated.safetensors is not in the index and is not read" in caplog.text
    assert "pytorch_model-00001-of-00002.bin is not read" in caplog.text


def test_rank_folder_with_shards_is_refused(shards, tmp_path):
    (tmp_path / "src").mkdir()
    shutil.move(str(shards), str(tmp_path / "src" / "rank_0"))
    with pytest.raises(UnsupportedCheckpointError, match=r"rank_0 holds shards .*model-00001-of-00002\.safetensors"):
        find_checkpoints(tmp_path / "src")
    assert len(find_checkpoints(tmp_path / "src" / "rank_0")) == 1


def test_reuse_notices_another_index_or_shard(shards, tmp_path):
    convert(shards, tmp_path / "out")
    assert convert(shards, tmp_path / "out").reused == (0,)
    write_shard(shards, "model-00002-of-00002.safetensors", ["layer.weight", "norm.weight"], change=1)
    with pytest.raises(AutoTransError, match="is there already"):
        convert(shards, tmp_path / "out")


@pytest.fixture
def distributed(tmp_path):
    return save(tmp_path / "src", {rank: {"w": np.arange(4, dtype=np.float32)} for rank in (0, 1)})


@pytest.mark.parametrize("call", ["is_file", "is_dir", "iterdir", "resolve"])
def test_folder_that_cannot_be_read_is_told(shards, distributed, monkeypatch, call):
    """Whatever the system says, it is an error of the checkpoint that names the path."""

    def fail(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, call, fail)
    for path in (shards, distributed):
        with pytest.raises(CheckpointError, match=rf"checkpoint {path} cannot be read: .*Permission denied"):
            find_checkpoints(path)


@pytest.mark.parametrize("name", [HUGGINGFACE, "rank_1"])
def test_part_of_a_folder_that_cannot_be_read_is_told(shards, distributed, monkeypatch, name):
    def fail_at(original):
        def call(self, *arguments, **options):
            if self.name == name:
                raise PermissionError(13, "Permission denied", str(self))
            return original(self, *arguments, **options)

        return call

    for call in ("iterdir", "read_text", "stat"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, call, fail_at(getattr(Path, call)))
            for path in (shards, distributed):
                try:
                    find_checkpoints(path)
                except CheckpointError as e:
                    assert name in str(e) and "Permission denied" in str(e)


def test_folder_that_becomes_unreadable_meanwhile_is_told(shards, monkeypatch):
    (found,) = find_checkpoints(shards)

    def fail(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(CheckpointError, match="model cannot be read"):
        ScannedFiles(found).heads(0)


def test_home_that_nobody_has_and_endless_links_are_told(tmp_path):
    with pytest.raises(CheckpointError, match="nobody_of_that_name"):
        find_checkpoints("~nobody_of_that_name/model")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match="loop"):
        find_checkpoints(tmp_path / "loop")
    with pytest.raises(CheckpointError, match="too long"):
        find_checkpoints(tmp_path / ("x" * 300))


def test_rank_folders_may_be_links_and_hold_other_things(distributed, tmp_path, monkeypatch):
    shutil.move(str(distributed / "rank_1"), str(tmp_path / "elsewhere"))
    (distributed / "rank_1").symlink_to(tmp_path / "elsewhere")
    rank = distributed / "rank_0"
    (rank / "sub.ckpt").mkdir()
    (rank / ".hidden-9_9.ckpt").write_bytes(b"x")
    (rank / ".net_rank_0-1_1.ckpt.0-1-2-3.tmp").write_bytes(b"x")
    (rank / "net_rank_0-2_2.ckpt.tmp").write_bytes(b"x")
    (rank / "readme.txt").write_bytes(b"x")
    (distributed / "rank_one").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (distributed, f"{distributed}/", "~/src", "~/src/"):
        (found,) = find_checkpoints(path)
        assert {r: [f.name for f in files] for r, files in found.files.items()} == {
            0: ["net_rank_0-1_1.ckpt"],
            1: ["net_rank_1-1_1.ckpt"],
        }


def test_rank_that_is_a_file_or_leads_nowhere_is_refused(distributed):
    """Otherwise the rank would be taken as one whose replica is enough."""
    shutil.rmtree(distributed / "rank_1")
    (distributed / "rank_1").write_bytes(b"x")
    with pytest.raises(UnsupportedCheckpointError, match=r"rank_1 is no folder.*rank 1"):
        find_checkpoints(distributed)
    (distributed / "rank_1").unlink()
    (distributed / "rank_1").symlink_to(distributed / "nowhere")
    with pytest.raises(UnsupportedCheckpointError, match="rank_1 is no folder, or a link to nothing"):
        find_checkpoints(distributed)


def test_two_folders_of_one_rank_are_refused(distributed):
    (distributed / "rank_0").rename(distributed / "rank_00")
    (found,) = find_checkpoints(distributed)
    assert list(found.files) == [0, 1], "a leading zero says the same"
    shutil.copytree(distributed / "rank_1", distributed / "rank_01")
    with pytest.raises(UnsupportedCheckpointError, match=r"rank_0?1 and .*rank_0?1 are both folders of rank 1"):
        find_checkpoints(distributed)


def test_link_to_nothing_is_not_passed_over_for_an_older_step(distributed):
    (distributed / "rank_0" / "net_rank_0-2_2.ckpt").symlink_to(distributed / "gone.ckpt")
    with pytest.raises(CheckpointNotFoundError, match=r"net_rank_0-2_2\.ckpt is a link to nothing"):
        find_checkpoints(distributed)
