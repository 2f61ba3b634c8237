"""`camelid inspect`: what a model is and costs, told of a name or of files, in JSON and in a terminal."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from camelid import describe
from camelid.checkpoint.registry import open_checkpoint
from camelid.disk.space import format_bytes
from camelid.model.config import LongRopeScaling, ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.flops import cache_bytes, forward_flops, training_flops
from camelid.model.params import named
from camelid.model.presets import ALIASES, PRESETS, preset
from camelid.train.optimizer import make_optimizer
from camelid.train.optimizer_config import OptimizerConfig
from camelid.train.state import start_state
from runs import TIMEOUT_S, assert_refused, called
from tiny import tiny_config, tiny_params

COSTS = {
    "parameters",
    "formula",
    "bytes_in",
    "training_bytes",
    "adapter_training_bytes",
    "cache_bytes_per_token",
    "cache_bytes",
    "flops_per_token",
}


def told(*arguments: object) -> dict[str, Any]:
    done = called("inspect", *arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def shown(config: ModelConfig, capsys: pytest.CaptureFixture[str]) -> str:
    describe.show(describe.of_config(config))
    return capsys.readouterr().out


def test_a_preset_is_told_in_full_and_nothing_is_allocated():
    before = len(jax.live_arrays())
    whole = told("llama2_70b")
    assert len(jax.live_arrays()) == before
    assert whole.keys() == COSTS | {"preset", "config", "tree"}
    assert whole["preset"] == "llama2_70b"
    assert whole["parameters"] == 68_976_648_192
    assert whole["formula"] == {"text": "2CM + (2N+1)M + 2NMRHK + 2NMHK + 3NMF", "parameters": 68_976_648_192}
    assert whole["bytes_in"] == {"float32": 4 * 68_976_648_192, "bfloat16": 2 * 68_976_648_192}
    assert whole["training_bytes"] == {
        "parameters": 4 * 68_976_648_192,
        "gradients": 4 * 68_976_648_192,
        "adamw_moments": 8 * 68_976_648_192,
    }
    per_token = 2 * 80 * 8 * 128  # keys and values of each layer
    assert whole["cache_bytes_per_token"] == {"float32": 4 * per_token, "bfloat16": 2 * per_token}
    assert whole["cache_bytes"] == {"float32": 4096 * 4 * per_token, "bfloat16": 4096 * 2 * per_token}
    assert whole["flops_per_token"] == {
        "length": 4096,
        "forward": forward_flops(preset("llama2_70b"), 4096),
        "training": training_flops(preset("llama2_70b"), 4096),
    }
    assert whole["tree"]["layers.attn.k_proj"] == {
        "axes": ["layers", "kv_heads", "head_dim", "embed"],
        "shape": [80, 8, 128, 8192],
        "parameters": 671_088_640,
    }
    assert sum(entry["parameters"] for entry in whole["tree"].values()) == whole["parameters"]
    assert whole["config"] == json.loads(json.dumps(dataclasses.asdict(preset("llama2_70b"))))


def test_an_alias_tells_of_the_preset_that_it_names():
    assert told("tiny_llama_1b") == told("tinyllama_1b")


def test_a_checkpoint_is_told_the_same_and_what_its_files_hold(stories: Path):
    whole, config = told(stories), open_checkpoint(stories).config
    assert whole.keys() == COSTS | {"bytes", "config", "notes", "tree"}
    assert whole["bytes"] == whole["bytes_in"]["float32"] == 1_040_128
    assert whole["cache_bytes_per_token"]["bfloat16"] == cache_bytes(config, "bfloat16")
    assert whole["formula"] is None  # its head is the embedding table


def test_a_folder_comes_before_a_preset_of_its_name(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "llama2_7b").symlink_to(stories)
    monkeypatch.chdir(tmp_path)
    assert told("llama2_7b")["parameters"] == 260_032
    assert told("llama2_13b")["parameters"] == 13_015_864_320


def test_presets_are_listed_with_their_sizes_and_other_names():
    listed = told("--presets")
    assert listed.keys() == PRESETS.keys()
    assert listed["llama2_70b"] == {
        "family": "llama",
        "parameters": 68_976_648_192,
        "context_length": 4096,
        "vocab_size": 32000,
        "aliases": ["llama2-70B", "model_config_llama2_70B", "llama_70b", "llama_70bflash"],
    }
    assert sorted(alias for entry in listed.values() for alias in entry["aliases"]) == sorted(ALIASES)
    printed = called("inspect", "--presets").stdout
    for name in PRESETS:
        (line,) = [line for line in printed.splitlines() if line.split()[:1] == [name]]
        assert f" {listed[name]['parameters']:,} " in line


def test_training_of_adapters_keeps_what_a_run_of_adapters_holds():
    """A base in bfloat16, or in NF4 with a byte for 64 elements and four for 256 of these, and adapters of rank 16."""
    config = tiny_config(num_layers=3)
    sizes = describe.of_config(config)["adapter_training_bytes"]
    specs = named(declare_decoder(config))
    matrices = [(math.prod(s.shape[1 : 1 + len(s.outputs)]), s) for s in specs.values() if s.stacked and s.is_matrix]
    scales = 4 * 3 * len(matrices)
    others = sum(spec.size * (2 if spec.is_matrix else 4) for spec in specs.values()) + scales
    others -= sum(2 * spec.size for _, spec in matrices)
    nf4, adapters = 0, 0
    for outputs, spec in matrices:
        inputs = spec.size // 3 // outputs
        blocks = outputs * math.ceil(inputs / 64)
        nf4 += 3 * (outputs * inputs // 2 + blocks + 4 * math.ceil(blocks / 256) + 4)
        adapters += 4 * 3 * 16 * (inputs + outputs)
    frozen = {"lora": others + sum(2 * spec.size for _, spec in matrices), "qlora": others + nf4}
    for name, size in frozen.items():
        assert sizes[name] == {
            "frozen_parameters": size,
            "parameters": adapters,
            "gradients": adapters,
            "adamw_moments": 2 * adapters,
        }


def test_adapters_that_do_not_fit_are_left_out(capsys: pytest.CaptureFixture[str]):
    none, odd = (describe.of_config(tiny_config(**{name: size})) for name, size in (("head_dim", 2), ("mlp_dim", 81)))
    assert none["adapter_training_bytes"] == {}
    assert odd["adapter_training_bytes"].keys() == {"lora"}
    describe.show(none)
    assert "LoRA" not in capsys.readouterr().out
    describe.show(odd)
    assert "\nLoRA: rank 16, all matrices of attention and mlp." in capsys.readouterr().out


def test_the_memory_of_training_adapters_names_what_is_assumed(capsys: pytest.CaptureFixture[str]):
    describe.show(describe.of_config(tiny_config(num_layers=3)))
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "LoRA and QLoRA: rank 16, all matrices of attention and mlp. For a recipe of your own: camelid train" in shown
    )


@pytest.mark.parametrize(
    ("arguments", "problem", "advice"),
    [
        (["llama2_70bb"], "llama2_70bb does not exist, and there is no preset 'llama2_70bb'", "llama2_70b or"),
        (["TinyLlama"], "TinyLlama does not exist", "Did you mean tinyllama_1b"),
        (["./llama2_70b"], "llama2_70b does not exist", "folder"),
        ([], "inspect takes either a MODEL or --presets", "--help"),
        (["llama2_70b", "--presets"], "inspect takes either a MODEL or --presets", "--help"),
    ],
)
def test_what_is_neither_folder_nor_preset_is_refused(arguments: list[str], problem: str, advice: str):
    done = called("inspect", *arguments)
    assert_refused(done, problem)
    assert advice in done.stderr


# In a terminal --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_a_hundred_columns(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")
    whole, lines = told(name), called("inspect", name).stdout.splitlines()
    # Nothing is folded or cut: every parameter is one line, with its count at the end.
    for path, entry in whole["tree"].items():
        (line,) = [line for line in lines if line.split()[:1] == [path]]
        sizes = "x".join(map(str, entry["shape"]))
        assert line.split() == [path, *entry["axes"], sizes, f"{entry['parameters']:,}"]
    assert lines[-1] == f"{whole['parameters']:,} parameters"
    assert max(map(len, lines)) <= 100
    assert not any("…" in line for line in lines)


def test_training_memory_is_that_of_the_state_and_the_gradients(capsys: pytest.CaptureFixture[str]):
    """The arrays that a step holds besides activations: those of the state that it is given, and one gradient each."""
    config = tiny_config()
    params = jax.eval_shape(lambda: tiny_params(config))
    optimizer = make_optimizer(OptimizerConfig(), 1, declare_decoder(config))
    state = jax.eval_shape(lambda: start_state(tiny_params(config), optimizer))
    arrays = [*jax.tree.leaves((state.trainable, state.opt_state, params))]
    sizes = describe.of_config(config)["training_bytes"]
    assert sum(sizes.values()) == sum(4 * leaf.size for leaf in arrays if leaf.ndim)
    assert sizes["adamw_moments"] == sum(4 * leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    rows = [line.split() for line in shown(config, capsys).splitlines()]
    all_sizes = [sizes, *describe.of_config(config)["adapter_training_bytes"].values()]
    totals = [word for each in all_sizes for word in format_bytes(sum(each.values())).split()]
    assert len(all_sizes) == 3
    assert ["total", "without", "activations", *totals] in rows


def test_the_closed_formula_stands_beside_the_count():
    assert called("inspect", "llama_7b").stdout.splitlines()[-3:] == [
        "parameters by the formula of Llama: 2CM + (2N+1)M + 2NMRHK + 2NMHK + 3NMF = 6,738,415,616",
        "(C vocabulary, M embed, N layers, R query heads per kv head, H kv heads, K head_dim, F mlp)",
        "6,738,415,616 parameters",
    ]
    assert "2CM" not in called("inspect", "llama3_2_1b").stdout


def test_fields_are_shown_where_they_are_not_llamas(capsys: pytest.CaptureFixture[str]):
    first = [line.split() for line in called("inspect", "mistral_7b").stdout.splitlines()]
    assert ["sliding_window", "4096"] in first
    assert ["num_kv_heads", "8"] in first
    assert not {"window_pattern", "rope_scaling", "tie_embeddings", "norm"} & {words[0] for words in first if words}
    numbers = tuple(1.0 + i / 7 for i in range(32))
    scaling = LongRopeScaling(short_factor=numbers, long_factor=numbers, original_context=64, factor=2.0)
    printed = shown(tiny_config(head_dim=64, rope_scaling=scaling), capsys)
    line = next(line for line in printed.splitlines() if line.startswith("rope_scaling"))
    rope = "longrope: short_factor (32 values), long_factor (32 values), original_context 64, factor 2.0"
    assert line.split() == ["rope_scaling", *rope.split()]


def test_a_pipe_gets_whole_lines_without_color(user_env: dict[str, str]):
    words = [sys.executable, "-m", "camelid", "inspect", "gemma2_27b"]
    done = subprocess.run(words, env=user_env, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("layers.attn.k_proj")]
    assert line.split()[-2:] == ["46x16x128x4608", "434,110,464"]
    assert "\x1b" not in done.stdout
