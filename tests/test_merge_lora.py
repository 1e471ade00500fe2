"""LoRA weights merged into base weights: complete and distributed, every float type, and in a real LLaMA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from builders import hold, strategy

import auto_trans
from auto_trans.core.edits import find_pairs, is_lora
from auto_trans.core.layout import Layout
from auto_trans.errors import ConfigError, OutputExistsError, PlanError
from auto_trans.merge_lora import merge_lora, parse_scaling

RNG = np.random.default_rng(11)
OUT, IN, RANK = 24, 16, 4


def tuned(dtype=np.float32):
    """Base and LoRA weights of a column-parallel and a row-parallel layer, with what else a checkpoint holds."""
    held = {"norm.weight": RNG.standard_normal(IN)}
    for layer in ("w1", "w2"):
        held[f"{layer}.weight"] = RNG.standard_normal((OUT, IN))
        held[f"{layer}.mindpet_delta_lora_a"] = RNG.standard_normal((RANK, IN))
        held[f"{layer}.mindpet_delta_lora_b"] = RNG.standard_normal((OUT, RANK))
        for side in "ab":
            held[f"adam_m.{layer}.mindpet_delta_lora_{side}"] = held[f"{layer}.mindpet_delta_lora_{side}"] * 0.1
    held = {name: array.astype(dtype) for name, array in held.items()}
    return {**held, "global_step": np.array([7], np.int32)}


def expected(held, scaling):
    """The merged weights, in float32 (float64) and rounded once."""
    merged = {name: array for name, array in held.items() if "lora" not in name}
    for layer in ("w1", "w2"):
        wide = np.float64 if held[f"{layer}.weight"].dtype == np.float64 else np.float32
        w, a, b = (
            held[f"{layer}.{n}"].astype(wide) for n in ("weight", "mindpet_delta_lora_a", "mindpet_delta_lora_b")
        )
        merged[f"{layer}.weight"] = (w + (b @ a) * wide(scaling)).astype(held[f"{layer}.weight"].dtype)
    return merged


NUMPY = {"Float16": np.float16, "Float32": np.float32, "Float64": np.float64, "Int32": np.int32}


def to_raw(array):
    return oracle.Raw({np.dtype(t).name: n for n, t in NUMPY.items()}[array.dtype.name], array.shape, array.tobytes())


def to_array(raw):
    return np.frombuffer(raw.content, NUMPY[raw.dtype]).reshape(raw.dims)


def save(path, held):
    return oracle.write_raw(path, {name: to_raw(array) for name, array in held.items()})


def load(folder, rank):
    return {n: to_array(r) for n, r in oracle.read_raw(folder / f"rank_{rank}" / f"checkpoint_{rank}.ckpt").items()}


def check(got, wanted):
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        if name.endswith("w1.weight") or name.endswith("w2.weight"):
            # the order of additions in a product may differ by its last bits
            np.testing.assert_allclose(
                got[name].astype(float), array.astype(float), rtol=2e-3 if array.itemsize == 2 else 1e-5, atol=1e-5
            )
        else:
            assert np.array_equal(got[name], array), name


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_complete_weights(tmp_path, dtype):
    held = tuned(dtype)
    merge_lora(save(tmp_path / "tuned.ckpt", held), tmp_path / "new" / "out", scaling="16/8")
    got = load(tmp_path / "new" / "out", 0)
    check(got, expected(held, 2.0))
    assert got["w1.weight"].dtype == dtype


@pytest.mark.mindspore
def test_bfloat16_is_rounded_once_to_the_nearest(tmp_path):
    import mindspore

    held = tuned()
    bf16 = {n: oracle.raw(a, "BFloat16") if a.dtype == np.float32 else to_raw(a) for n, a in held.items()}
    seen = {  # the numbers that bfloat16 really holds
        n: (np.frombuffer(r.content, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(r.dims)
        for n, r in bf16.items() if r.dtype == "BFloat16"
    }  # fmt: skip
    merge_lora(oracle.write_raw(tmp_path / "tuned.ckpt", bf16), tmp_path / "out", scaling=0.5)
    got = oracle.read_raw(tmp_path / "out" / "rank_0" / "checkpoint_0.ckpt")
    assert got["norm.weight"] == bf16["norm.weight"]
    wanted = expected({**held, **seen}, 0.5)["w1.weight"]
    theirs = mindspore.Tensor(wanted, mindspore.bfloat16).get_bytes()
    ours, reference = (np.frombuffer(c, np.uint16).astype(int) for c in (got["w1.weight"].content, theirs))
    assert got["w1.weight"].dtype == "BFloat16"
    assert (ours == reference).mean() > 0.99 and abs(ours - reference).max() <= 1


TP = Layout((2, 2), ((0,), ()))  # dp2 mp2: w1 is sliced by rows, w2 by columns
STRATEGIES = {
    "w1.weight": TP, "w1.mindpet_delta_lora_a": Layout((2, 2), ((), ())), "w1.mindpet_delta_lora_b": TP,
    "w2.weight": Layout((2, 2), ((), (0,)), 2, 2), "w2.mindpet_delta_lora_a": Layout((2, 2), ((), (0,))),
    "w2.mindpet_delta_lora_b": Layout((2, 2), ((), ()), -1, 1), "norm.weight": Layout((2, 2), ((),)),
}  # fmt: skip
STRATEGIES.update({f"adam_m.{n}": layout for n, layout in list(STRATEGIES.items()) if "lora" in n})
TARGET = {
    "w1.weight": Layout((3,), ((0,), ())), "w2.weight": Layout((3,), ((0,), ())), "norm.weight": Layout((3,), ((),)),
}  # fmt: skip


def test_distributed_weights_to_one_file_and_straight_to_slices(tmp_path):
    held = tuned()
    source, target = strategy(STRATEGIES), strategy(TARGET)
    for rank, slices in hold(held, source).items():
        save(tmp_path / "src" / f"rank_{rank}" / "x.ckpt", slices)
    merge_lora(tmp_path / "src", tmp_path / "whole", source, scaling=3)
    check(load(tmp_path / "whole", 0), expected(held, 3.0))
    merge_lora(tmp_path / "src", tmp_path / "sliced", source, target, scaling=3, memory_limit="1MiB")
    for rank, slices in hold(expected(held, 3.0), target).items():
        check(load(tmp_path / "sliced", rank), slices)


@pytest.mark.parametrize(
    "base, a, b",
    [
        ("l.wq.weight", "l.wq.mindpet_delta_lora_a", "l.wq.mindpet_delta_lora_b"),
        ("l.wq.weight", "l.wq.tk_delta_lora_a", "l.wq.tk_delta_lora_b"),
        ("l.wq.weight", "l.wq.weight_lora_a", "l.wq.weight_lora_b"),
        ("l.wq.weight", "l.wq.lora_A.weight", "l.wq.lora_B.weight"),
        ("l.wq.weight", "l.wq.weight.lora_A", "l.wq.weight.lora_B"),
    ],
)
def test_names_of_all_kinds(base, a, b):
    assert find_pairs([base, a, b, f"adam_m.{a}", f"adam_v.{b}", "other.weight"]) == {base: (a, b)}
    assert is_lora(a) and is_lora(f"adam_v.{b}") and not is_lora(base) and not is_lora("exploration.weight")


@pytest.mark.parametrize(
    "drop, message",
    [
        ("w1.mindpet_delta_lora_b", r"w1\.mindpet_delta_lora_a has no partner B"),
        ("w1.mindpet_delta_lora_a", r"w1\.mindpet_delta_lora_b has no partner A"),
        ("w1.weight", r"belongs to w1\.weight, which is not there"),
    ],
)
def test_what_is_missing_is_named(tmp_path, drop, message):
    held = tuned()
    del held[drop]
    with pytest.raises(PlanError, match=message):
        merge_lora(save(tmp_path / "tuned.ckpt", held), tmp_path / "out", scaling=2)
    assert not (tmp_path / "out").exists()


def test_shapes_that_do_not_multiply_are_named(tmp_path):
    held = {**tuned(), "w1.mindpet_delta_lora_a": np.zeros((RANK + 1, IN), np.float32)}
    with pytest.raises(
        PlanError,
        match=r"lora_b \[24, 4\] times w1\.mindpet_delta_lora_a \[5, 16\] does not give w1\.weight \[24, 16\]",
    ):
        merge_lora(save(tmp_path / "tuned.ckpt", held), tmp_path / "out", scaling=2)


def test_source_without_lora_and_integer_weights_are_refused(tmp_path):
    with pytest.raises(PlanError, match="holds no LoRA parameters"):
        merge_lora(save(tmp_path / "a.ckpt", {"w.weight": np.ones((2, 2), np.float32)}), tmp_path / "out", scaling=2)
    held = {**tuned(), "w1.weight": np.zeros((OUT, IN), np.int32)}
    with pytest.raises(PlanError, match=r"w1\.weight is of type Int32"):
        merge_lora(save(tmp_path / "b.ckpt", held), tmp_path / "out", scaling=2)


def test_files_of_something_else_are_not_overwritten(tmp_path):
    source = save(tmp_path / "tuned.ckpt", tuned())
    (tmp_path / "out" / "rank_0").mkdir(parents=True)
    (tmp_path / "out" / "rank_0" / "checkpoint_0.ckpt").write_text("precious")
    with pytest.raises(OutputExistsError, match=r"checkpoint_0\.ckpt is there already"):
        merge_lora(source, tmp_path / "out", scaling=2)
    assert (tmp_path / "out" / "rank_0" / "checkpoint_0.ckpt").read_text() == "precious"


def test_same_merge_again_is_reused_and_another_scaling_refused(tmp_path):
    source = save(tmp_path / "tuned.ckpt", tuned())
    assert merge_lora(source, tmp_path / "out", scaling=2).converted == (0,)
    assert merge_lora(source, tmp_path / "out", scaling="16/8").reused == (0,)
    with pytest.raises(OutputExistsError, match="was not made by this conversion"):
        merge_lora(source, tmp_path / "out", scaling=3)


def test_scaling_must_be_given_to_the_command_and_the_script_says_what_it_takes(tmp_path, bin_folder):
    held = tuned()
    source = save(tmp_path / "tuned.ckpt", held)
    command = [bin_folder / "auto-trans", "merge-lora", source, tmp_path / "a"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 2 and "--scaling" in done.stderr and not (tmp_path / "a").exists()
    script = [sys.executable, "-m", "auto_trans.tools.transform_ckpt_lora"]
    flags = ["--src_ckpt_path_or_dir", source, "--dst_ckpt_dir", tmp_path / "b"]
    done = subprocess.run([*script, *map(str, flags)], capture_output=True, text=True, check=True)
    assert "--lora_scaling is not given; 1 is used" in done.stderr
    check(load(tmp_path / "b", 0), expected(held, 1.0))


@pytest.mark.parametrize("text, value", [("2", 2.0), (0.5, 0.5), ("16/8", 2.0), (" 8 / 16 ", 0.5), ("1e-1", 0.1)])
def test_scaling(text, value):
    assert parse_scaling(text) == value


@pytest.mark.parametrize("text", ["", "alpha/rank", "1/0", "1/2/3", "nan"])
def test_wrong_scaling(text):
    with pytest.raises(ConfigError, match="a number or alpha/rank such as 16/8"):
        parse_scaling(text)


def test_drop_in_script_and_command(tmp_path, bin_folder):
    held = tuned()
    source = save(tmp_path / "tuned.ckpt", held)
    script = Path(auto_trans.__file__).parent / "tools" / "transform_ckpt_lora.py"
    flags = [
        "--src_ckpt_path_or_dir",
        source,
        "--dst_ckpt_dir",
        tmp_path / "a",
        "--prefix",
        "checkpoint_",
        "--lora_scaling",
        "16/8",
    ]
    done = subprocess.run([sys.executable, str(script), *map(str, flags)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"load_checkpoint: {tmp_path / 'a' / 'rank_0' / 'checkpoint_0.ckpt'}"
    command = [bin_folder / "auto-trans", "merge-lora", source, tmp_path / "b", "--scaling", "16/8"]
    subprocess.run(list(map(str, command)), check=True)
    assert load(tmp_path / "a", 0).keys() == load(tmp_path / "b", 0).keys()
    check(load(tmp_path / "b", 0), expected(held, 2.0))
    flags[-1] = "16/4"
    failed = subprocess.run([sys.executable, str(script), *map(str, flags)], capture_output=True, text=True)
    assert failed.returncode == 1 and "is there already" in failed.stderr and "Traceback" not in failed.stderr
    assert "--dst_ckpt_dir" in failed.stderr


LLAMA = """
import numpy as np, mindspore
from mindformers import LlamaConfig, LlamaForCausalLM
from mindformers.pet import get_pet_model
from mindformers.pet.pet_config import LoraConfig
from auto_trans.merge_lora import merge_lora
settings = dict(
    batch_size=1, seq_length=16, hidden_size=64, num_layers=2, num_heads=4, vocab_size=128, multiple_of=16,
    compute_dtype="float32", layernorm_compute_type="float32", softmax_compute_type="float32", rotary_dtype="float32",
    param_init_type="float32", use_flash_attention=False, fused_rms_norm=False, use_rope_slice=True, use_past=False)
mindspore.set_context(mode=0, device_target="CPU")
base = LlamaForCausalLM(LlamaConfig(**settings))
pet = LoraConfig(target_modules=".*wq|.*wk|.*wv|.*wo", lora_rank=4, lora_alpha=8, lora_dropout=0.0)
tuned = get_pet_model(LlamaForCausalLM(LlamaConfig(**settings)), pet)
rng = np.random.default_rng(0)
for parameter in tuned.get_parameters():
    if "lora" in parameter.name:
        parameter.set_data(mindspore.Tensor(rng.standard_normal(parameter.shape) * 0.1, parameter.dtype))
tokens = mindspore.Tensor(rng.integers(1, 128, (1, 16)), mindspore.int32)
def logits(network):
    network.set_train(False)
    return network(tokens)[0].asnumpy()
before = logits(base)
mindspore.save_checkpoint(tuned, "tuned.ckpt")
merge_lora("tuned.ckpt", "merged", scaling="8/4")
merged = mindspore.load_checkpoint("merged/rank_0/checkpoint_0.ckpt")
assert list(merged) == [p.name for p in base.get_parameters()], "the parameters of the base model"
assert mindspore.load_param_into_net(base, merged) == ([], [])
wanted, got = logits(tuned), logits(base)
print("DIFFERENCE", abs(wanted - got).max(), "OF", abs(wanted - before).max())
"""


@pytest.mark.trainer
def test_merged_llama_answers_like_base_and_lora(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LLAMA], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "GLOG_v": "3"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    words = done.stdout.split("DIFFERENCE ")[1].split()
    assert float(words[0]) < 1e-5 < 1e-2 < float(words[2])
