"""Presets: the numbers of the released checkpoints, by every name that four other systems have for them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from camelid.checkpoint.formats import hf
from camelid.errors import UserError
from camelid.model.flops import count_parameters
from camelid.model.presets import ALIASES, PRESETS, preset

DOCS = Path(__file__).parent.parent.parent / "docs"

# As the makers and the Hub's safetensors headers give them; of Gemma 3, the decoder alone.
PARAMETERS = {
    "debug": 8_520_320,
    "llama_1b": 1_244_227_584,
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama_30b": 32_528_943_616,
    "llama_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "codellama_7b": 6_738_546_688,
    "codellama_13b": 13_016_028_160,
    "codellama_34b": 33_743_970_304,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "openllama_3b": 3_426_473_600,
    "openllama_7b": 6_738_415_616,
    "openllama_13b": 13_015_864_320,
    "tinyllama_1b": 1_100_048_384,
    "smollm_135m": 134_515_008,
    "smollm_360m": 361_821_120,
    "smollm_1_7b": 1_711_376_384,
    "mistral_7b": 7_241_732_096,
    "mistral_7b_v0_3": 7_248_023_552,
    "mistral_nemo_12b": 12_247_782_400,
    "qwen2_0_5b": 494_032_768,
    "qwen2_1_5b": 1_543_714_304,
    "qwen2_7b": 7_615_616_512,
    "qwen2_72b": 72_706_203_648,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "qwen2_5_72b": 72_706_203_648,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "gemma_2b": 2_506_172_416,
    "gemma_7b": 8_537_680_896,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 3_880_263_168,
    "gemma3_12b": 11_766_034_176,
    "gemma3_27b": 27_009_346_304,
    "phi_1": 1_418_270_720,
    "phi_1_5": 1_418_270_720,
    "phi_2": 2_779_683_840,
    "phi3_mini_4k": 3_821_079_552,
    "stablelm_3b": 2_795_443_200,
}
# Each released config.json among the assets that a preset stands for.
RELEASED = {
    "dfurman__llama-7b": "llama_7b",
    "quoted/huggyllama__llama-7b.resaved-4.34": "llama_7b",
    "meta-llama__Llama-2-7b-hf": "llama2_7b",
    "meta-llama__Llama-2-7b-chat-hf": "llama2_7b",
    "meta-llama__Llama-2-13b-hf": "llama2_13b",
    "meta-llama__Llama-2-70b-hf": "llama2_70b",
    "meta-llama__Meta-Llama-3-8B": "llama3_8b",
    "meta-llama__Meta-Llama-3-8B-Instruct": "llama3_8b",
    "meta-llama__Llama-3.1-8B": "llama3_1_8b",
    "meta-llama__Llama-3.1-405B": "llama3_1_405b",
    "meta-llama__Llama-3.2-1B": "llama3_2_1b",
    "TinyLlama__TinyLlama-1.1B-intermediate-step": "tinyllama_1b",
    "HuggingFaceTB__SmolLM-1.7B": "smollm_1_7b",
    "mistralai__Mistral-7B-v0.1": "mistral_7b",
    "Qwen__Qwen2-7B": "qwen2_7b",
    "Qwen__Qwen2.5-0.5B": "qwen2_5_0_5b",
    "Qwen__Qwen2.5-1.5B": "qwen2_5_1_5b",
    "Qwen__Qwen2.5-7B": "qwen2_5_7b",
    "Qwen__Qwen3-0.6B": "qwen3_0_6b",
    "Qwen__Qwen3-1.7B": "qwen3_1_7b",
    "Qwen__Qwen3-8B": "qwen3_8b",
    "google__gemma-7b": "gemma_7b",
    "google__gemma-2-2b": "gemma2_2b",
    "google__gemma-3-1b-it": "gemma3_1b",
    "google__gemma-3-4b-it": "gemma3_4b",
    "google__gemma-3-27b-it": "gemma3_27b",
    "microsoft__Phi-3-mini-4k-instruct": "phi3_mini_4k",
    "stabilityai__stablelm-3b-4e1t": "stablelm_3b",
}
META = {
    "LLaMA-7B": "llama_7b",
    "LLaMA-13B": "llama_13b",
    "LLaMA-30B": "llama_30b",
    "LLaMA-65B": "llama_65b",
    "Llama-2-7b": "llama2_7b",
    "Meta-Llama-3-8B": "llama3_8b",
    "Meta-Llama-3-70B": "llama3_70b",
    "Llama-3.1-8B": "llama3_1_8b",
}
# vocabulary, embed, mlp, layers, heads, kv_heads, eps, context, theta
EASYLM = {
    "debug": (32000, 128, 256, 2, 4, 4, 1e-6, 2048, 1e4),
    "llama_1b": (32000, 2048, 5504, 22, 16, 16, 1e-6, 2048, 1e4),
    "llama_3b": (32000, 3200, 8640, 26, 32, 32, 1e-6, 2048, 1e4),
    "llama_7b": (32000, 4096, 11008, 32, 32, 32, 1e-6, 2048, 1e4),
    "llama_13b": (32000, 5120, 13824, 40, 40, 40, 1e-6, 2048, 1e4),
    "llama_30b": (32000, 6656, 17920, 60, 52, 52, 1e-6, 2048, 1e4),
    "llama_65b": (32000, 8192, 22016, 80, 64, 64, 1e-5, 2048, 1e4),
    "llama2_7b": (32000, 4096, 11008, 32, 32, 32, 1e-5, 4096, 1e4),
    "llama2_13b": (32000, 5120, 13824, 40, 40, 40, 1e-5, 4096, 1e4),
    "llama2_70b": (32000, 8192, 28672, 80, 64, 8, 1e-5, 4096, 1e4),
    "llama3_8b": (128256, 4096, 14336, 32, 32, 8, 1e-5, 8192, 5e5),
    "llama3_70b": (128256, 8192, 28672, 80, 64, 8, 1e-5, 8192, 5e5),
}
# embed, mlp, layers, heads, kv_heads of the other systems' names
OTHERS = {
    "1b": (2048, 5504, 22, 16, 16),
    "3b": (3200, 8640, 26, 32, 32),
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "30b": (6656, 17920, 60, 52, 52),
    "65b": (8192, 22016, 80, 64, 64),
    "llama1-7B": (4096, 11008, 32, 32, 32),
    "llama2-7B": (4096, 11008, 32, 32, 32),
    "llama2-13B": (5120, 13824, 40, 40, 40),
    "llama2-70B": (8192, 28672, 80, 64, 8),
    "model_config_llama1_7B": (4096, 11008, 32, 32, 32),
    "model_config_llama2_7B": (4096, 11008, 32, 32, 32),
    "model_config_llama2_13B": (5120, 13824, 40, 40, 40),
    "model_config_llama2_70B": (8192, 28672, 80, 64, 8),
    "llama_7b_lora": (4096, 11008, 32, 32, 32),
    "llama_7b_flash": (4096, 11008, 32, 32, 32),
    "llama_70b": (8192, 28672, 80, 64, 8),
    "llama_70bflash": (8192, 28672, 80, 64, 8),
    "mistral_7b": (4096, 14336, 32, 32, 8),
    "open_llama_3b": (3200, 8640, 26, 32, 32),
    "tiny_llama_1b": (2048, 5632, 22, 32, 4),
    "gemma_2b": (2048, 16384, 18, 8, 1),
    "gemma_7b": (3072, 24576, 28, 16, 16),
    "phi_2": (2560, 10240, 32, 32, 32),
}


def released(assets: Path, name: str) -> dict[str, Any]:
    """A config.json; of a model that also sees, what it says of the decoder."""
    table = json.loads((assets / "hf_files" / "configs" / f"{name}.json").read_text())
    return table if "text_config" not in table else table["text_config"] | {"eos_token_id": table["eos_token_id"]}


def test_every_preset_has_the_published_count():
    assert {name: count_parameters(config) for name, config in PRESETS.items()} == PARAMETERS


@pytest.mark.parametrize(("file", "name"), RELEASED.items())
def test_a_preset_is_what_the_released_config_says(assets: Path, file: str, name: str):
    table = released(assets, file)
    assert preset(name) == hf.config_from_hf(table)
    assert preset(name).family == table["model_type"]


@pytest.mark.parametrize("name", dict.fromkeys(RELEASED.values()))
def test_transformers_counts_the_same(assets: Path, name: str):
    table = released(assets, next(file for file, known in RELEASED.items() if known == name))
    config = transformers.AutoConfig.for_model(table.pop("model_type"), **table)
    with torch.device("meta"):
        assert transformers.AutoModelForCausalLM.from_config(config).num_parameters() == count_parameters(preset(name))


@pytest.mark.parametrize(("file", "name"), META.items())
def test_a_preset_is_what_metas_params_json_says(assets: Path, file: str, name: str):
    params, config = json.loads((assets / "hf_files" / "params" / f"{file}.params.json").read_text()), preset(name)
    assert (config.embed_dim, config.num_layers, config.num_heads) == tuple(
        params[key] for key in ("dim", "n_layers", "n_heads")
    )
    assert config.num_kv_heads == params.get("n_kv_heads", params["n_heads"])
    assert (config.norm_eps, config.rope_theta) == (params["norm_eps"], params.get("rope_theta", 10_000.0))
    assert config.vocab_size == (params["vocab_size"] if params["vocab_size"] > 0 else 32000)
    hidden = int(params.get("ffn_dim_multiplier", 1.0) * int(2 * 4 * params["dim"] / 3))
    assert config.mlp_dim == -(-hidden // params["multiple_of"]) * params["multiple_of"]
    assert (config.rope_scaling is not None) == params.get("use_scaled_rope", False)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_saved_as_its_own_family(name: str):
    table = hf.config_to_hf(preset(name), "bfloat16")
    assert table["model_type"] == preset(name).family
    assert hf.config_from_hf(table) == preset(name)


# Names --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EASYLM)
def test_easylms_names_mean_easylms_numbers(name: str):
    c = preset(name)
    sizes = (c.vocab_size, c.embed_dim, c.mlp_dim, c.num_layers, c.num_heads, c.num_kv_heads)
    assert (*sizes, c.norm_eps, c.context_length, c.rope_theta) == EASYLM[name]
    assert c.head_dim == c.embed_dim // c.num_heads


@pytest.mark.parametrize("name", OTHERS)
def test_the_names_of_other_systems_mean_their_sizes(name: str):
    c = preset(name)
    assert (c.embed_dim, c.mlp_dim, c.num_layers, c.num_heads, c.num_kv_heads) == OTHERS[name]


def test_released_numbers_win_where_a_name_meant_others_elsewhere():
    assert (preset("llama_7b").norm_eps, preset("llama_7b").context_length) == (1e-6, 2048)  # LL3M: 1e-5, 8192
    assert preset("llama2-7B").norm_eps == 1e-5  # llama-2-jax: 1e-6
    assert preset("llama_70b").context_length == 4096  # LL3M: 8192
    assert preset("mistral_7b").sliding_window == 4096  # LL3M: none
    assert preset("gemma_7b").head_dim == 256  # LL3M: 192


def test_an_alias_leads_to_a_preset_and_hides_none():
    assert set(ALIASES.values()) <= PRESETS.keys()
    assert not ALIASES.keys() & PRESETS.keys()


def test_the_page_on_migrating_has_every_alias_with_its_preset():
    rows = [line for line in (DOCS / "migrating" / "index.md").read_text().splitlines() if line.startswith("|")]
    for alias, name in ALIASES.items():
        assert any(f"`{alias}`" in row and f"`{name}`" in row for row in rows), alias


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("llama2_7bb", "Did you mean llama2_7b or "),
        ("Llama-2-70B", "Did you mean llama2_70b or "),
        ("llama3.1-8b", "Did you mean llama3_1_8b or "),
        ("TinyLlama_1b", "Did you mean tinyllama_1b"),
        ("", "`camelid inspect --presets` lists all"),
        ("gpt2", "`camelid inspect --presets` lists all"),
    ],
)
def test_an_unknown_preset_is_refused_with_the_nearest_names(name: str, advice: str):
    with pytest.raises(UserError) as refusal:
        preset(name)
    assert refusal.value.problem == f"there is no preset {name!r}"
    assert refusal.value.advice.startswith(advice)
