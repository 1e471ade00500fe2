"""Distributed safetensors merged into one complete set; the oracle is the full tensors, and MindSpore's own merge."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import auto_trans
from auto_trans import merge_strategies
from auto_trans.errors import CheckpointNotFoundError, ConfigError, MissingSliceError, OutputExistsError, PlanError
from auto_trans.merge_safetensors import HYPER_PARAMETERS, merge_safetensors, parse_shard_size
from auto_trans.storage.formats import scan

CASES = ["dp2mp2", "dp2mp2_opt", "dp2mp2pp2"]


def slices(genuine, case):
    """What every rank holds, in the types that numpy knows."""
    weights = genuine.model("mf_llama")
    return {r: {n: a.astype(dtype(weights, n)) for n, a in held.items()} for r, held in weights.slices(case).items()}


def dtype(weights, name):
    return weights.dtypes[name].lower()


def save(folder, held, step="1_1", metadata=None, by_mindspore=False):
    for rank, tensors in held.items():
        path = folder / f"rank_{rank}" / f"net_rank_{rank}-{step}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        if by_mindspore:
            import mindspore

            data = [{"name": n, "data": mindspore.Tensor(np.array(a, order="C"))} for n, a in tensors.items()]
            mindspore.save_checkpoint(data, str(path), format="safetensors")
        else:
            contiguous = {n: np.array(a, order="C") for n, a in tensors.items()}
            safetensors.numpy.save_file(contiguous, path, metadata={"format": "ms", **(metadata or {})})
    return folder


def without_redundancy(genuine, case, held):
    """Every slice with the last of the ranks that share it only."""
    strategy = auto_trans.read_strategy(genuine.model("mf_llama").strategy(case))
    kept = {rank: {} for rank in held}
    for rank, tensors in held.items():
        stage, local = divmod(rank, strategy.stage_devices)
        for name, array in tensors.items():
            layout = strategy.layout(name, stage) if strategy.lists(name) else None
            if layout is None or layout.owners(layout.cell(local, array.ndim))[-1] == local:
                kept[rank][name] = array
    return kept


def merged(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {file: safetensors.numpy.load_file(folder / file) for file in set(index["weight_map"].values())}
    return {name: files[file][name] for name, file in index["weight_map"].items()}


def check(genuine, folder, without=()):
    weights = genuine.model("mf_llama")
    left_out = ("global_step", "scale_sense", "accu_grads.", *without)
    names = [n for n in weights.full if not n.startswith(left_out)]
    expected = {n: weights.full[n].astype(dtype(weights, n)) for n in names}
    got = merged(folder)
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[n], a) and got[n].dtype == a.dtype for n, a in expected.items())


@pytest.mark.parametrize("case", CASES)
def test_slices_are_merged_to_the_full_tensors(genuine, tmp_path, case):
    source = save(tmp_path / "src", slices(genuine, case))
    report = merge_safetensors(source, tmp_path / "out", genuine.model("mf_llama").strategy(case), file_suffix="1_1")
    check(genuine, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "param_name_map.json").read_text())
    assert (
        index["metadata"]["total_size"] == report.total_size == sum(a.nbytes for a in merged(tmp_path / "out").values())
    )
    assert set(safetensors.numpy.load_file(tmp_path / "out" / HYPER_PARAMETERS)) == {"global_step", "scale_sense"}


@pytest.mark.parametrize("case", CASES)
def test_slices_without_redundancy_are_found_wherever_they_are(genuine, tmp_path, case):
    held = without_redundancy(genuine, case, slices(genuine, case))
    source = save(tmp_path / "src", held, metadata={"remove_redundancy": "True"})
    merge_safetensors(source, tmp_path / "out", genuine.model("mf_llama").strategy(case), redundancy_removed=True)
    check(genuine, tmp_path / "out")


@pytest.mark.mindspore
def test_mindspores_own_merge_agrees_where_it_is_right(genuine, tmp_path):
    """With safetensors 0.8.0 it is wrong for what is sliced on a dimension above 0 (wo and w2)."""
    import mindspore

    strategy = merge_strategies(genuine.model("mf_llama").strategy("dp2mp2pp2"), tmp_path / "merged.ckpt")
    source = save(tmp_path / "src", slices(genuine, "dp2mp2pp2"), by_mindspore=True)
    mindspore.unified_safetensors(str(source), str(strategy), str(tmp_path / "theirs"))
    merge_safetensors(source, tmp_path / "ours", strategy)
    theirs = {}
    for file in (tmp_path / "theirs").glob("part*.safetensors"):
        theirs.update(safetensors.numpy.load_file(file))
    ours = merged(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    right = [n for n in ours if ".wo." not in n and ".w2." not in n]
    assert len(right) > 80 and all(np.array_equal(ours[n], theirs[n]) for n in right)


@pytest.mark.mindspore
def test_mindspore_cuts_the_merged_weights_for_a_rank(genuine, tmp_path):
    import mindspore

    weights = genuine.model("mf_llama")
    source = save(tmp_path / "src", slices(genuine, "dp2mp2pp2"), by_mindspore=True)
    merge_safetensors(source, tmp_path / "out", weights.strategy("dp2mp2pp2"), max_shard_size="300KB")
    target = weights.strategy("dp1mp2") / "ckpt_strategy_rank_0.ckpt"
    mindspore.load_distributed_checkpoint(
        network=None, predict_strategy=str(target), unified_safetensors_dir=str(tmp_path / "out"),
        dst_safetensors_dir=str(tmp_path / "cut"), rank_id=1, format="safetensors",
    )  # fmt: skip
    (file,) = (tmp_path / "cut").rglob("*.safetensors")
    cut = safetensors.numpy.load_file(file)
    expected = slices(genuine, "dp1mp2")[1]
    name = "model.layers.3.feed_forward.w1.weight"
    assert np.array_equal(cut[name], expected[name])


def test_shards_are_of_the_size_that_was_asked_for(genuine, tmp_path):
    source = save(tmp_path / "src", slices(genuine, "dp2mp2"))
    report = merge_safetensors(
        source, tmp_path / "out", genuine.model("mf_llama").strategy("dp2mp2"), max_shard_size="100KB"
    )
    assert len(report.files) > 5
    assert report.files[0] == f"model-00001-of-{len(report.files):05d}.safetensors"
    for file in report.files:
        tensors = scan(tmp_path / "out" / file).tensors.values()
        assert sum(t.nbytes for t in tensors) <= 100_000 or len(tensors) == 1
    check(genuine, tmp_path / "out")


@pytest.mark.parametrize("prefixes", [["adam_m.", "adam_v."], "adam_"])
def test_optimizer_state_can_be_left_out(genuine, tmp_path, prefixes):
    """A text is one prefix, and not one for each of its letters."""
    source = save(tmp_path / "src", slices(genuine, "dp2mp2_opt"))
    strategy = genuine.model("mf_llama").strategy("dp2mp2_opt")
    merge_safetensors(source, tmp_path / "out", strategy, filter_out_param_prefix=prefixes)
    check(genuine, tmp_path / "out", without=("adam_m.", "adam_v."))


def test_suffix_chooses_among_steps(genuine, tmp_path):
    held = slices(genuine, "dp1mp2")
    wrong = {rank: {n: a + 1 for n, a in tensors.items()} for rank, tensors in held.items()}
    for step, tensors in (("1_1", held), ("11_1", wrong), ("2_1", wrong)):
        save(tmp_path / "src", tensors, step)
    strategy = genuine.model("mf_llama").strategy("dp1mp2")
    merge_safetensors(tmp_path / "src", tmp_path / "out", strategy, file_suffix="1_1")
    check(genuine, tmp_path / "out")
    with pytest.raises(
        CheckpointNotFoundError, match=r"holds no file of step 7_7; there are net_rank_0-11_1\.safetensors"
    ):
        merge_safetensors(tmp_path / "src", tmp_path / "none", strategy, file_suffix="7_7")


def test_gap_is_named(genuine, tmp_path):
    held = slices(genuine, "dp2mp2")
    name = "model.layers.1.attention.wq.weight"
    for rank in (1, 3):
        del held[rank][name]
    source = save(tmp_path / "src", held)
    with pytest.raises(MissingSliceError, match=rf"{name} is held by source rank 1, 3 only"):
        merge_safetensors(source, tmp_path / "out", genuine.model("mf_llama").strategy("dp2mp2"))
    assert not (tmp_path / "out").exists()


def test_replicas_that_differ_are_noticed_when_asked(genuine, tmp_path):
    held = slices(genuine, "dp2mp2")
    held[3]["model.norm_out.weight"] = held[3]["model.norm_out.weight"] + 1
    source = save(tmp_path / "src", held)
    strategy = genuine.model("mf_llama").strategy("dp2mp2")
    with pytest.raises(
        PlanError, match=r"rank 0 and rank 3 should hold the same slice of parameter model\.norm_out\.weight"
    ):
        merge_safetensors(source, tmp_path / "out", strategy, check_replicas=True)
    merge_safetensors(source, tmp_path / "out", strategy)
    check(genuine, tmp_path / "out")


@pytest.mark.parametrize("said, claimed, warned", [("True", False, True), ("False", True, True), ("True", True, False)])
def test_metadata_win_over_the_flag_with_a_warning(genuine, tmp_path, caplog, said, claimed, warned):
    held = slices(genuine, "dp2mp2")
    held = without_redundancy(genuine, "dp2mp2", held) if said == "True" else held
    source = save(tmp_path / "src", held, metadata={"remove_redundancy": said})
    merge_safetensors(
        source, tmp_path / "out", genuine.model("mf_llama").strategy("dp2mp2"), redundancy_removed=claimed
    )
    check(genuine, tmp_path / "out")
    assert ("the metadata are followed" in caplog.text) == warned


def test_folder_that_is_not_empty_and_missing_strategy_are_refused(genuine, tmp_path):
    source = save(tmp_path / "src", slices(genuine, "dp1mp2"))
    with pytest.raises(OutputExistsError, match="src is there already"):
        merge_safetensors(source, tmp_path, genuine.model("mf_llama").strategy("dp1mp2"))
    with pytest.raises(ConfigError, match="needs the strategy"):
        merge_safetensors(source, tmp_path / "out", None)


@pytest.mark.parametrize(
    "text, size", [("5GB", 5 * 10**9), ("2GiB", 2 << 30), ("100KB", 10**5), (7, 7), ("1.5MB", 1_500_000)]
)
def test_shard_sizes(text, size):
    assert parse_shard_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "0", "-1GB"])
def test_wrong_shard_sizes(text):
    with pytest.raises(ConfigError, match="max_shard_size must be a size such as 5GB"):
        parse_shard_size(text)


def test_drop_in_script_and_command(genuine, tmp_path, bin_folder):
    source = save(tmp_path / "src", slices(genuine, "dp2mp2pp2"))
    strategy = tmp_path / "strategy"
    shutil.copytree(genuine.model("mf_llama").strategy("dp2mp2pp2"), strategy)
    (strategy / "merged_ckpt_strategy.ckpt").write_bytes(b"of an earlier job")
    script = Path(auto_trans.__file__).parent / "tools" / "convert_reversed.py"
    flags = ["--src_strategy_dirs", strategy, "--mindspore_ckpt_dir", source, "--tmp_dir", tmp_path / "a"]
    flags += ["--file_suffix", "1_1", "--has_redundancy", "False"]
    command = [sys.executable, script, *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(tmp_path / "a")
    check(genuine, tmp_path / "a")
    assert auto_trans.read_strategy(strategy / "merged_ckpt_strategy.ckpt").world_size == 8, "merged anew"
    other = [*command, "--max_shard_size", "100KB"]
    again = subprocess.run(list(map(str, other)), capture_output=True, text=True)
    assert again.returncode == 1 and "is there already" in again.stderr and "--tmp_dir" in again.stderr
    missing = subprocess.run(list(map(str, command[:6])), capture_output=True, text=True)
    assert missing.returncode == 2 and "--tmp_dir" in missing.stderr
    command = [bin_folder / "auto-trans", "merge-safetensors", source, tmp_path / "b", "--src-strategy", strategy]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert "117 parameters" in done.stdout
    check(genuine, tmp_path / "b")
