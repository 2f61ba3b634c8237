"""config.json: real ones map both ways as transformers reads them, and what would be computed wrongly is refused."""

import copy
import functools
import json
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from camelid.checkpoint.formats.hf_config import config_from_hf, config_to_hf
from camelid.checkpoint.formats.hf_families import FAMILIES, SCALINGS
from camelid.checkpoint.formats.hf_ignored_fields import IGNORED
from camelid.errors import UserError
from camelid.model.config import (
    DynamicScaling,
    LinearScaling,
    LongRopeScaling,
    ModelConfig,
    YarnScaling,
)
from camelid.model.flops import count_parameters
from families import FAMILIES as TINY
from tiny import LLAMA3, tiny_config

Json = dict[str, Any]

# Every config.json among the assets that describes a decoder of a family of ours.
REAL = [
    f"{folder}/{name}"
    for folder, names in {
        "configs": """
            HuggingFaceTB__SmolLM-1.7B Infinigence__Megrez-3B-Instruct Qwen__Qwen1.5-0.5B-Chat Qwen__Qwen1.5-1.8B-Chat
            Qwen__Qwen1.5-7B-Chat Qwen__Qwen2-7B Qwen__Qwen2-7B-Instruct Qwen__Qwen2.5-0.5B Qwen__Qwen2.5-1.5B
            Qwen__Qwen2.5-7B Qwen__Qwen2.5-7B-Instruct Qwen__Qwen3-0.6B Qwen__Qwen3-1.7B Qwen__Qwen3-8B
            TinyLlama__TinyLlama-1.1B-intermediate-step dfurman__llama-7b google__gemma-2-2b google__gemma-2-2b-it
            google__gemma-3-1b-it google__gemma-7b meta-llama__Llama-2-13b-hf meta-llama__Llama-2-70b-hf
            meta-llama__Llama-2-7b-chat-hf meta-llama__Llama-2-7b-hf meta-llama__Llama-3.1-405B
            meta-llama__Llama-3.1-8B meta-llama__Llama-3.1-8B-Instruct meta-llama__Llama-3.2-1B
            meta-llama__Llama-3.2-1B-Instruct meta-llama__Meta-Llama-3-8B meta-llama__Meta-Llama-3-8B-Instruct
            microsoft__Phi-3-mini-4k-instruct mistralai__Mistral-7B-v0.1 quoted/decapoda-research__llama-13b-hf
            quoted/decapoda-research__llama-7b-hf quoted/huggyllama__llama-7b.resaved-4.34
            stabilityai__stablelm-3b-4e1t
        """,
        "variants": """
            01-ai__Yi-6B-Chat.automap LargeWorldModel__LWM-Text-Chat-1M.edited Qwen__Qwen3-0.6B.prerelease
            TinyLlama__TinyLlama-1.1B-Chat-v0.x.automap codellama-13b-like.neuron-training
            intfloat__e5-mistral-7b-instruct microsoft__phi-1.edited mistralai__Mistral-7B-Instruct-v0.2.maxpos512
            modelscope__Llama-2-7b-chat-ms.automap
        """,
    }.items()
    for name in names.split()
]
REFUSED = {
    "configs/google__gemma-3-27b-it": "model_type = 'gemma3'",
    "configs/google__gemma-3-4b-it": "model_type = 'gemma3'",
    "configs/mistralai__Mixtral-8x7B-v0.1": "model_type = 'mixtral'",
    "variants/deepseek-ai__deepseek-moe-16b-base": "model_type = 'deepseek'",
    "variants/meta-llama__Llama-2-7b-chat.bnb-4bit-finetune": r"quantization_config = \{.*'load_in_4bit': True",
    "variants/meta-llama__Llama-3.1-405B-Instruct-FP8": r"quantization_config = \{.*'quant_method': 'fbgemm_fp8'",
}
# As the makers and the Hub's safetensors headers give them.
PARAMETERS = {
    "configs/meta-llama__Llama-2-7b-hf": 6_738_415_616,
    "configs/meta-llama__Llama-2-13b-hf": 13_015_864_320,
    "configs/meta-llama__Llama-2-70b-hf": 68_976_648_192,
    "configs/meta-llama__Llama-3.1-8B": 8_030_261_248,
    "configs/meta-llama__Llama-3.1-405B": 405_853_388_800,
    "configs/meta-llama__Llama-3.2-1B": 1_235_814_400,
    "configs/TinyLlama__TinyLlama-1.1B-intermediate-step": 1_100_048_384,
    "configs/HuggingFaceTB__SmolLM-1.7B": 1_711_376_384,
    "configs/mistralai__Mistral-7B-v0.1": 7_241_732_096,
    "configs/Qwen__Qwen1.5-0.5B-Chat": 463_987_712,
    "configs/Qwen__Qwen2-7B": 7_615_616_512,
    "configs/Qwen__Qwen2.5-0.5B": 494_032_768,
    "configs/Qwen__Qwen3-0.6B": 596_049_920,
    "configs/Qwen__Qwen3-8B": 8_190_735_360,
    "configs/google__gemma-7b": 8_537_680_896,
    "configs/google__gemma-2-2b": 2_614_341_888,
    "configs/google__gemma-3-1b-it": 999_885_952,
    "configs/microsoft__Phi-3-mini-4k-instruct": 3_821_079_552,
    "configs/stabilityai__stablelm-3b-4e1t": 2_795_443_200,
    "variants/01-ai__Yi-6B-Chat.automap": 6_061_035_520,
}
# What is written otherwise than it was read, and when that is no loss.
INERT: dict[str, Callable[[Json], bool]] = {
    "architectures": lambda table: True,
    "use_cache": lambda table: True,
    "pad_token_id": lambda table: table["pad_token_id"] == -1,  # an early word for none
    "hidden_act": lambda table: table["model_type"] == "gemma",  # "gelu" there stands for the approximation
    "sliding_window": lambda table: table["use_sliding_window"] is False,
    "max_window_layers": lambda table: table["use_sliding_window"] is False,
}
# What says nothing about the decoder, or is written for other programs.
ASIDE = {"_name_or_path", "architectures", "transformers_version", "pretraining_tp", "auto_map", "use_cache"}
NEURON = {"selective_checkpoint_enabled", "sequence_parallel_enabled", "move_model_to_device"}
ONLY_READ = {"max_sequence_length", "cache_implementation", "sliding_window_size", "hidden_act", "rotary_dim", *NEURON}
ONLY_READ |= {"attention_bias", "use_mrope"}  # of Phi, which has biases always, and of Qwen, where it is always false
# What the file left to the defaults, or named once where two versions have two names.
ONLY_WRITTEN = {"head_dim", "hidden_act", "hidden_activation", "partial_rotary_factor"}

# One model of each family, and the config.json that it is saved with.
BASES: dict[str, ModelConfig] = {}
for entry in TINY.values():
    BASES.setdefault(model_type := entry.theirs().model_type, replace(entry.ours, family=model_type))
EVERY = " ".join(FAMILIES)
GEMMAS = "gemma gemma2 gemma3_text"


def read(assets: Path, name: str) -> Json:
    return json.loads((assets / "hf_files" / f"{name}.json").read_text())


def saved(family: str) -> Json:
    return config_to_hf(BASES[family], "float32")


def in_transformers(table: Json) -> transformers.PreTrainedConfig:
    """What transformers makes of a config.json; it is handed a copy, because it writes into what it is given."""
    return transformers.CONFIG_MAPPING[table["model_type"]].from_dict(json.loads(json.dumps(table)))


def from_transformers(theirs: transformers.PreTrainedConfig) -> ModelConfig:
    """Ours from what transformers would save; the two ways in which it can write must say the same."""
    config = config_from_hf(theirs.to_dict())
    assert config == config_from_hf(json.loads(theirs.to_json_string(use_diff=True)))
    return config


# Real files ----------------------------------------------------------------------------------


def test_the_tables_list_every_file(assets: Path):
    folder = assets / "hf_files"
    found = [file for name in ("configs", "variants") for file in (folder / name).rglob("*.json")]
    assert {str(file.relative_to(folder).with_suffix("")) for file in found} == {*REAL, *REFUSED}
    assert {read(assets, name)["model_type"] for name in REAL} == set(FAMILIES)


@pytest.mark.parametrize("name", REAL)
def test_a_real_config_maps_to_ours_and_back(assets: Path, name: str):
    table = read(assets, name)
    config = config_from_hf(table)
    back = config_to_hf(config, table["torch_dtype"])
    assert json.loads(json.dumps(back)) == back
    assert back["model_type"] == table["model_type"]
    assert config_from_hf(back) == config
    differ = {key for key in table.keys() & back.keys() if table[key] != back[key]}
    assert {key for key in differ if key not in INERT or not INERT[key](table)} == set()


@pytest.mark.parametrize("name", REAL)
def test_transformers_reads_the_same_from_a_real_config_and_from_ours(assets: Path, name: str):
    table = read(assets, name)
    config = config_from_hf(table)
    theirs, ours = in_transformers(table), in_transformers(config_to_hf(config, table["torch_dtype"]))
    assert from_transformers(theirs) == config
    said, back = ({k: v for k, v in t.to_dict().items() if k not in ASIDE} for t in (theirs, ours))
    if "max_position_embeddings" not in table:
        said["max_position_embeddings"] = table["max_sequence_length"]  # the name that the first conversions used
    assert said.keys() - back.keys() <= ONLY_READ
    assert back.keys() - said.keys() <= ONLY_WRITTEN
    differ = {key for key in said.keys() & back.keys() if said[key] != back[key]}
    assert {key for key in differ if key not in INERT or not INERT[key](table)} == set()
    with torch.device("meta"):
        twin = transformers.AutoModelForCausalLM.from_config(theirs)
    assert count_parameters(config) == twin.num_parameters()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_that_the_makers_give(assets: Path, name: str):
    assert count_parameters(config_from_hf(read(assets, name))) == PARAMETERS[name]


@pytest.mark.parametrize("name", REFUSED)
def test_another_architecture_and_quantized_weights_are_refused_by_name(assets: Path, name: str):
    with pytest.raises(UserError, match=f"config.json has {REFUSED[name]}"):
        config_from_hf(read(assets, name))


# Both spellings ----------------------------------------------------------------------------------


def test_both_spellings_give_the_same_config(stories: Path):
    classic, since_v5 = (json.loads((stories / name).read_text()) for name in ("config.json", "config.v5.json"))
    assert "rope_parameters" in since_v5
    assert "rope_theta" in classic
    assert config_from_hf(classic) == config_from_hf(since_v5)


@pytest.mark.parametrize("name", TINY)
def test_what_transformers_saves_is_ours_and_what_we_save_is_theirs(name: str):
    ours, theirs = TINY[name].ours, TINY[name].theirs()
    assert "rope_parameters" in theirs.to_dict()
    assert from_transformers(theirs) == ours
    back = config_to_hf(replace(ours, family=theirs.model_type), "float32")
    assert "rope_parameters" not in back
    assert config_from_hf(back) == ours
    assert from_transformers(in_transformers(back)) == ours


@pytest.mark.parametrize("name", TINY)
def test_a_model_that_came_from_no_family_finds_one(name: str):
    assert TINY[name].ours.family is None
    assert config_from_hf(config_to_hf(TINY[name].ours, "float32")) == TINY[name].ours


@pytest.mark.parametrize("scaling", [LinearScaling(factor=2.0), DynamicScaling(factor=4.0)], ids=lambda s: s.kind)
@pytest.mark.parametrize("family", ["llama", "phi", "stablelm"])
def test_kinds_of_2023_are_written_as_transformers_of_2023_demands(family: str, scaling: Any):
    """Exactly two fields, one of them `type`, the other a float."""
    back = config_to_hf(replace(BASES[family], rope_scaling=scaling), "float32")
    assert back["rope_scaling"] == {"type": scaling.kind, "factor": scaling.factor}
    assert isinstance(back["rope_scaling"]["factor"], float)


def test_longrope_is_written_as_transformers_of_2024_demands():
    """Exactly three fields, and the original context beside them."""
    scaling = LongRopeScaling(short_factor=(1.0,) * 4, long_factor=(2.0,) * 4, original_context=16)
    back = config_to_hf(replace(BASES["phi3"], rope_scaling=scaling), "float32")
    assert back["rope_scaling"] == {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    assert back["original_max_position_embeddings"] == 16


# Every field ----------------------------------------------------------------------------------


def longrope(base: ModelConfig) -> Json:
    factors = {"short_factor": (1.5,) * (base.rotary_dim // 2), "long_factor": (2.5,) * (base.rotary_dim // 2)}
    return {"rope_scaling": LongRopeScaling(**factors, original_context=16, factor=4.0, attention_factor=1.25)}


YARN = YarnScaling(factor=4.0, original_context=16, beta_fast=16.0, beta_slow=2.0, truncate=False, attention_factor=1.5)
NOT_PHI3 = "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi stablelm"
# A field of ModelConfig, a change of it with what must go with it, and the families that can say that.
CHANGES: list[tuple[str, Json | Callable[[ModelConfig], Json], str]] = [
    ("vocab_size", {"vocab_size": 101}, EVERY),
    (
        "embed_dim",
        lambda base: {"embed_dim": 96, "num_heads": 12, "embed_scale": 96**0.5 if base.norm_offset else 1.0},
        EVERY,
    ),
    ("mlp_dim", {"mlp_dim": 88}, EVERY),
    ("num_layers", {"num_layers": 6}, EVERY),
    ("num_heads", {"num_heads": 12, "head_dim": 4}, EVERY),
    ("num_kv_heads", {"num_kv_heads": 3}, EVERY),
    ("head_dim", {"head_dim": 16}, "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text"),
    ("context_length", {"context_length": 128}, EVERY),
    ("norm", {"norm": "layer"}, "phi stablelm"),
    ("norm_eps", {"norm_eps": 1e-3}, EVERY),
    ("norm_offset", {"norm_offset": 1.0}, GEMMAS),
    ("post_norms", {"post_norms": True}, "gemma2 gemma3_text"),
    ("parallel_block", {"parallel_block": True}, "phi stablelm"),
    ("activation", {"activation": "gelu"}, "llama mistral qwen2 qwen3 phi phi3 stablelm"),
    ("activation", {"activation": "gelu_tanh"}, EVERY),
    ("gated_mlp", {"gated_mlp": False}, "phi"),
    ("qkv_bias", {"qkv_bias": True, "o_bias": False}, "qwen2 stablelm"),
    ("o_bias", {"qkv_bias": True, "o_bias": True}, "llama qwen3 gemma gemma2 gemma3_text phi"),
    ("mlp_bias", {"mlp_bias": True}, "llama phi"),
    ("head_bias", {"head_bias": True, "tie_embeddings": False}, "phi"),
    ("qk_norm", {"qk_norm": True}, "qwen3 gemma3_text"),
    ("query_pre_attn_scalar", {"query_pre_attn_scalar": 14}, "gemma2 gemma3_text"),
    ("attn_softcap", {"attn_softcap": 5.0}, "gemma2 gemma3_text"),
    ("logits_softcap", {"logits_softcap": 6.0}, "gemma2 gemma3_text"),
    (
        "sliding_window",
        {"sliding_window": 9, "window_pattern": (True,)},
        "mistral qwen2 qwen3 gemma2 gemma3_text phi3",
    ),
    ("window_pattern", {"sliding_window": 9, "window_pattern": (False, True)}, "qwen2 qwen3 gemma2 gemma3_text"),
    ("window_pattern", {"sliding_window": 9, "window_pattern": (True, True, False)}, "qwen2 qwen3 gemma2 gemma3_text"),
    ("rope_theta", {"rope_theta": 500.0}, EVERY),
    ("rope_scaling", {"rope_scaling": LinearScaling(factor=3.0)}, NOT_PHI3),
    ("rope_scaling", {"rope_scaling": DynamicScaling(factor=3.0)}, NOT_PHI3),
    ("rope_scaling", {"rope_scaling": LLAMA3}, NOT_PHI3),
    ("rope_scaling", {"rope_scaling": YARN}, NOT_PHI3),
    ("rope_scaling", {"rope_scaling": YarnScaling(original_context=16, mscale=1.0, mscale_all_dim=0.5)}, NOT_PHI3),
    ("rope_scaling", longrope, EVERY),
    ("rotary_fraction", {"rotary_fraction": 0.25}, "phi phi3 stablelm"),
    (
        "local_rope_theta",
        {"local_rope_theta": 300.0, "sliding_window": 9, "window_pattern": (True, False)},
        "gemma3_text",
    ),
    ("embed_scale", {"embed_scale": 48**0.5}, GEMMAS),
    ("tie_embeddings", {"tie_embeddings": True, "head_bias": False}, EVERY.replace("phi ", "")),
    ("tie_embeddings", {"tie_embeddings": False}, EVERY),
    ("init_std", {"init_std": 0.5}, EVERY),
    ("bos_id", {"bos_id": 3}, EVERY),
    ("eos_ids", {"eos_ids": (5, 7)}, EVERY),
    ("eos_ids", {"eos_ids": (5,)}, EVERY),
    ("pad_id", {"pad_id": 0}, EVERY),
]


def changed(family: str, changes: Json | Callable[[ModelConfig], Json]) -> tuple[ModelConfig, Json]:
    base = BASES[family]
    changes = changes(base) if callable(changes) else changes
    return replace(base, **changes), changes


def test_every_field_of_a_model_and_of_every_rope_scaling_is_changed_somewhere():
    cases = [(field, *changed(families.split()[0], changes)) for field, changes, families in CHANGES]
    for field in fields(ModelConfig):
        if field.name != "family":
            values = [getattr(config, name) for name, config, _ in cases if name == field.name]
            assert any(value != field.default for value in values), field.name
    scalings = [config.rope_scaling for name, config, _ in cases if name == "rope_scaling"]
    for kind in SCALINGS.values():
        for field in fields(kind):
            values = [getattr(scaling, field.name) for scaling in scalings if isinstance(scaling, kind)]
            assert values, kind
            assert field.name == "kind" or any(value != field.default for value in values), field.name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("field", "changes", "families"), CHANGES, ids=[field for field, *_ in CHANGES])
def test_a_field_survives_where_the_family_can_say_it_and_is_refused_by_name_elsewhere(
    family: str, field: str, changes: Any, families: str
):
    config, changes = changed(family, changes)
    if family in families.split():
        back = config_to_hf(config, "float32")
        assert back["model_type"] == family
        assert config_from_hf(back) == config
        assert config_from_hf(back).family == family
        assert from_transformers(in_transformers(back)) == config
    else:
        names = "|".join(changes)
        with pytest.raises(UserError, match=f"a config.json of model_type '{family}' cannot express .*({names})"):
            config_to_hf(config, "float32")


def test_what_no_family_can_say_is_refused_by_name():
    """And the family is named that comes closest."""
    with pytest.raises(UserError, match=r"model_type 'gemma2' cannot express mlp_bias = True\nNo supported model_type"):
        config_to_hf(replace(TINY["gemma2"].ours, mlp_bias=True), "float32")
    with pytest.raises(UserError, match="family = 'bert' is unknown\nChoose one of llama, mistral"):
        config_to_hf(tiny_config(family="bert"), "float32")


@pytest.mark.parametrize(
    ("family", "said", "plainly"),
    [
        ("llama", {"query_pre_attn_scalar": 10}, {}),
        ("gemma2", {"query_pre_attn_scalar": None}, {"query_pre_attn_scalar": 10}),
        ("gemma2", {"window_pattern": (True, False, True, False)}, {}),
        ("gemma3_text", {"num_layers": 2}, {"num_layers": 2, "window_pattern": (True,)}),
        (
            "gemma3_text",
            {"window_pattern": (False,)},
            {"sliding_window": None, "window_pattern": (True,), "local_rope_theta": None},
        ),
    ],
    ids=str,
)
def test_one_model_said_in_two_ways_is_written_alike(family: str, said: Json, plainly: Json):
    base = BASES[family]
    back = config_to_hf(replace(base, **said), "float32")
    assert back == config_to_hf(replace(base, **plainly), "float32")
    read_again = config_from_hf(back)
    assert config_to_hf(read_again, "float32") == back
    assert from_transformers(in_transformers(back)) == read_again


def test_gemma3_files_tell_versions_before_layer_types_which_layers_have_a_window():
    for pattern, period in {(True, True, False): 3, (True,): 6, (False, True): None}.items():
        back = config_to_hf(replace(BASES["gemma3_text"], window_pattern=pattern), "float32")
        assert back.get("sliding_window_pattern") == period


# What absent, null and equivalent fields mean ----------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_file_leaves_out_means_what_it_means_in_transformers(family: str):
    sizes = {"hidden_size": 512, "num_attention_heads": 32}
    sizes |= {"vocab_size": 97, "intermediate_size": 80, "num_hidden_layers": 13}
    bare = {"model_type": family} | sizes
    assert config_from_hf(bare) == from_transformers(in_transformers(bare))


def test_gemma3_leaves_out_sizes_too():
    bare = {"model_type": "gemma3_text"}
    assert config_from_hf(bare) == from_transformers(in_transformers(bare))


YARN_JSON = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16}
LONG_JSON = {"short_factor": [1, 1, 1, 1], "long_factor": [2, 2, 2, 2]}
LONG = LongRopeScaling(short_factor=(1.0,) * 4, long_factor=(2.0,) * 4, original_context=16)
GONE = ...
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 7, "layer_types": GONE}
NO_WINDOW = {"sliding_window": None, "window_pattern": (True,)}
# A family, a change of its config.json, and what it changes in ours: transformers, too, must understand it so.
MEANINGS: list[tuple[str, Json, Json]] = [
    ("llama", {"num_key_value_heads": None}, {"num_kv_heads": 6}),
    ("llama", {"num_key_value_heads": GONE}, {"num_kv_heads": 6}),
    ("qwen2", {"num_key_value_heads": None}, {"num_kv_heads": 6}),
    ("qwen3", {"num_key_value_heads": None}, {"num_kv_heads": 6}),
    ("llama", {"head_dim": None}, {"head_dim": 8}),
    ("mistral", {"head_dim": GONE}, {"head_dim": 8}),
    ("qwen3", {"head_dim": GONE}, {"head_dim": 128}),
    ("llama", {"rope_theta": 500, "rms_norm_eps": 1e-3}, {"rope_theta": 500.0, "norm_eps": 1e-3}),
    ("llama", {"hidden_act": "swish"}, {}),
    ("llama", {"hidden_act": "gelu_new"}, {"activation": "gelu_tanh"}),
    ("phi", {"hidden_act": "gelu_pytorch_tanh"}, {}),
    ("gemma", {"hidden_act": "gelu"}, {}),
    ("gemma", {"hidden_activation": None}, {}),
    ("llama", {"pad_token_id": -1, "bos_token_id": -1}, {}),
    ("llama", {"eos_token_id": []}, {}),
    ("llama", {"eos_token_id": [5]}, {"eos_ids": (5,)}),
    ("llama", {"bos_token_id": GONE, "eos_token_id": GONE}, {"bos_id": 1, "eos_ids": (2,)}),
    # Sliding windows
    ("mistral", {"sliding_window": GONE}, {"sliding_window": 4096}),
    ("mistral", {"sliding_window": None}, NO_WINDOW),
    ("phi3", {"sliding_window": GONE}, NO_WINDOW),
    ("mistral", {"sliding_window": None, "layer_types": ["full_attention"] * 4}, NO_WINDOW),
    ("qwen2", {"use_sliding_window": False, "layer_types": GONE}, NO_WINDOW),
    ("qwen2", {"use_sliding_window": GONE, "layer_types": GONE}, NO_WINDOW),
    ("qwen2", QWEN_WINDOW | {"sliding_window": None}, NO_WINDOW),
    ("qwen2", QWEN_WINDOW | {"max_window_layers": 1}, {"window_pattern": (False, True, True, True)}),
    ("qwen2", QWEN_WINDOW | {"max_window_layers": 0}, {"window_pattern": (True,)}),
    ("qwen2", QWEN_WINDOW | {"max_window_layers": GONE}, NO_WINDOW),
    ("gemma2", {"layer_types": GONE}, {}),
    ("gemma2", {"sliding_window_size": 7}, {}),
    ("gemma3_text", {"layer_types": GONE}, {}),
    ("gemma3_text", {"layer_types": GONE, "sliding_window_pattern": 2}, {"window_pattern": (True, False)}),
    ("gemma3_text", {"layer_types": GONE, "sliding_window_pattern": GONE}, {"window_pattern": (True,)}),
    ("gemma3_text", {"sliding_window_pattern": 2}, {}),  # layer_types says otherwise
    # Rotations
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_scaling": LinearScaling(factor=2.0)}),
    ("llama", {"rope_scaling": {"type": "x", "rope_type": "default"}}, {}),
    ("llama", {"rope_scaling": {}, "rope_parameters": {"rope_theta": 500}}, {"rope_theta": 500.0}),
    ("llama", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500}, {"rope_theta": 500.0}),
    ("llama", {"rope_scaling": YARN_JSON}, {"rope_scaling": YarnScaling(factor=4.0, original_context=16)}),
    (
        "llama",
        {"rope_scaling": YARN_JSON | dict.fromkeys(("beta_fast", "beta_slow", "mscale", "attention_factor"))},
        {"rope_scaling": YarnScaling(factor=4.0, original_context=16)},
    ),
    (
        "llama",
        {"rope_scaling": YARN_JSON | {"truncate": None}},
        {"rope_scaling": YarnScaling(factor=4.0, original_context=16, truncate=False)},
    ),
    (
        "llama",
        {"rope_scaling": YARN_JSON | {"truncate": True}},
        {"rope_scaling": YarnScaling(factor=4.0, original_context=16, truncate=True)},
    ),
    (
        "llama",
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": YarnScaling(factor=4.0, original_context=64)},
    ),
    (
        "gemma3_text",
        {"rope_parameters": {"full_attention": {"rope_theta": 900}, "sliding_attention": None}},
        {"rope_theta": 900.0, "rope_scaling": None},
    ),
    ("phi", {"partial_rotary_factor": GONE, "rope_parameters": {"partial_rotary_factor": 1}}, {"rotary_fraction": 1.0}),
    (
        "phi3",
        {"rope_scaling": LONG_JSON | {"type": "yarn"}, "original_max_position_embeddings": 16},
        {"rope_scaling": LONG},
    ),
    (
        "phi3",
        {
            "rope_scaling": LONG_JSON | {"type": "longrope", "original_max_position_embeddings": 32},
            "original_max_position_embeddings": 16,
        },
        {"rope_scaling": LONG},
    ),
    # Repetitions, and what other people add
    ("phi", {"rotary_dim": 4, "head_dim": 8, "resid_pdrop": 0.1}, {}),  # as Phi-2 has it
    ("phi3", {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}, {}),  # Phi-4-mini
    ("llama", {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}, {}),
    ("mistral", {"unsloth_fixed": True, "unsloth_version": "2024.9", "_attn_implementation_autoset": True}, {}),
]
# What transformers 5 refuses, or understands only when the model is built; earlier versions understood it as here.
BEYOND_V5: list[tuple[str, Json, Json]] = [
    ("llama", {"max_position_embeddings": GONE, "max_sequence_length": 32}, {"context_length": 32}),
    ("gemma", {"hidden_act": None}, {}),
    ("mistral", {"num_key_value_heads": None}, {"num_kv_heads": 6}),
    ("phi3", {"rope_scaling": LONG_JSON | {"type": "su"}}, {"rope_scaling": replace(LONG, original_context=4096)}),
    ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 8.0}}, {}),
    (
        "llama",
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16},
        {"rope_scaling": YarnScaling(factor=4.0, original_context=16)},
    ),
]


def edited(table: Json, change: Json) -> Json:
    if "rope_parameters" in change:
        table = {key: value for key, value in table.items() if key not in ("rope_theta", "rope_scaling")}
    return {key: value for key, value in (table | change).items() if value is not GONE}


@pytest.mark.parametrize(("family", "change", "ours"), [*MEANINGS, *BEYOND_V5], ids=str)
def test_a_field_means_what_it_means_in_transformers(family: str, change: Json, ours: Json):
    table = edited(saved(family), change)
    config = config_from_hf(table)
    assert config == replace(BASES[family], **ours)
    assert all(isinstance(getattr(config, name), float) for name in ("rope_theta", "norm_eps", "init_std"))
    if (family, change, ours) in MEANINGS:
        assert from_transformers(in_transformers(table)) == config


# What is refused ----------------------------------------------------------------------------------

FLAT = {"rope_type": "default"}
YARN_OF_OURS = {"rope_type": "yarn", "factor": 4.0, "original_context": 16}
LLAMA3_JSON = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}
KINDS = "linear, dynamic, llama3, yarn, longrope"
# A family, a change of its config.json, and what is said about it.
WRONG: list[tuple[str, Json, str]] = [
    # Unknown fields, and known ones of other families
    ("llama", {"sliding_window": 4096}, "has unknown fields: sliding_window = 4096"),
    ("llama", {"b": [2], "a": 1, "c": None}, "has unknown fields: a = 1, b = [2]"),
    ("llama", {"scale_emb": 12}, "has unknown fields: scale_emb = 12"),
    ("llama", {"per_layer_config": {"0": {}}}, "has unknown fields: per_layer_config = {'0': {}}"),
    (
        "mistral",
        {"layer_types": []},
        "has layer_types = []; camelid supports ['sliding_attention', 'sliding_attention'",
    ),
    ("mistral", {"layer_types": ["full_attention"] * 4}, "has layer_types = ['full_attention', 'full_attention', "),
    ("llama", {"layer_types": ["full_attention"] * 3}, "has layer_types = ['full_attention', 'full_attention', "),
    ("qwen2", {"attention_bias": True}, "has unknown fields: attention_bias = True"),
    ("phi3", {"qk_layernorm": True}, "has unknown fields: qk_layernorm = True"),
    ("llama", {"partial_rotary_factor": 0.5}, "has partial_rotary_factor = 0.5; camelid supports 1.0 or None"),
    # Settings that change what is computed
    ("llama", {"model_type": "mixtral"}, "has model_type = 'mixtral'"),
    ("llama", {"model_type": GONE}, "has model_type = None"),
    ("llama", {"model_type": ["llama"]}, "has model_type = ['llama']"),
    ("llama", {"quantization_config": {"bits": 4}}, "has quantization_config = {'bits': 4}; camelid supports None"),
    ("llama", {"is_encoder_decoder": True}, "has is_encoder_decoder = True; camelid supports False or None"),
    ("llama", {"rope_interleaved": True}, "has rope_interleaved = True; camelid supports False or None"),
    ("phi", {"qk_layernorm": True}, "has qk_layernorm = True; camelid supports False or None"),
    ("stablelm", {"qk_layernorm": True}, "has qk_layernorm = True; camelid supports False or None"),
    ("phi3", {"mlp_bias": True}, "has mlp_bias = True; camelid supports False or None"),
    ("qwen2", {"use_mrope": True}, "has use_mrope = True; camelid supports False or None"),
    ("gemma", {"use_bidirectional_attention": True}, "has use_bidirectional_attention = True; camelid supports False"),
    ("llama", {"hidden_act": "relu"}, "has hidden_act = 'relu'; camelid supports 'silu' or 'swish' or"),
    ("llama", {"hidden_act": ["silu"]}, "has hidden_act = ['silu']; camelid supports "),
    ("gemma", {"hidden_act": "silu"}, "has hidden_act = 'silu'; camelid supports 'gelu_pytorch_tanh' or"),
    ("gemma", {"hidden_activation": "gelu"}, "has hidden_activation = 'gelu'; camelid supports 'gelu_pytorch_tanh'"),
    # Wrong types and numbers
    ("llama", {"hidden_size": "48"}, "has hidden_size = '48'"),
    ("llama", {"num_hidden_layers": 2.5}, "has num_hidden_layers = 2.5"),
    ("llama", {"num_hidden_layers": True}, "has num_hidden_layers = True"),
    ("llama", {"vocab_size": 0}, "has vocab_size = 0"),
    ("llama", {"num_attention_heads": -8}, "has num_attention_heads = -8"),
    ("llama", {"rms_norm_eps": "1e-5"}, "has rms_norm_eps = '1e-5'"),
    ("llama", {"rms_norm_eps": math.inf}, "has rms_norm_eps = inf"),
    ("llama", {"rms_norm_eps": math.nan}, "has rms_norm_eps = nan"),
    ("llama", {"tie_word_embeddings": 1}, "has tie_word_embeddings = 1"),
    ("llama", {"bos_token_id": [1]}, "has bos_token_id = [1]"),
    ("llama", {"pad_token_id": -2}, "has pad_token_id = -2"),
    ("llama", {"eos_token_id": "2"}, "has eos_token_id = '2'"),
    ("llama", {"eos_token_id": [2, True]}, "has eos_token_id = True"),
    ("gemma2", {"query_pre_attn_scalar": 13.5}, "has query_pre_attn_scalar = 13.5"),
    ("mistral", {"sliding_window": 0}, "has sliding_window = 0"),
    ("qwen2", {"use_sliding_window": False, "sliding_window": "7"}, "has sliding_window = '7'"),
    ("qwen2", {"use_sliding_window": "false"}, "has use_sliding_window = 'false'"),
    ("qwen2", {"max_window_layers": -1}, "has max_window_layers = -1"),
    ("gemma3_text", {"sliding_window_pattern": 0}, "has sliding_window_pattern = 0"),
    # Nulls, and fields that nothing can replace
    *[("llama", {name: GONE}, f"has no {name}") for name in ("vocab_size", "hidden_size", "num_hidden_layers")],
    ("llama", {"vocab_size": None}, "has no vocab_size"),
    ("llama", {"tie_word_embeddings": None}, "has tie_word_embeddings = None"),
    ("llama", {"hidden_act": None}, "has hidden_act = None; camelid supports "),
    ("llama", {"rope_theta": None}, "has rope_theta = None"),
    ("qwen3", {"head_dim": None}, "has head_dim = None"),
    ("gemma2", {"query_pre_attn_scalar": None}, "has query_pre_attn_scalar = None"),
    ("gemma3_text", {"rope_local_base_freq": None}, "has rope_local_base_freq = None"),
    # Fields that contradict each other
    ("llama", {"num_key_value_heads": 5}, "num_heads = 6 is not a multiple of num_kv_heads = 5"),
    ("llama", {"head_dim": 7}, "head_dim = 7 has 7 rotary features; an even number"),
    ("phi", {"partial_rotary_factor": 0.4}, "head_dim = 8 has 3 rotary features; an even number"),
    ("phi", {"partial_rotary_factor": 1.25}, "head_dim = 8 has 10 rotary features; an even number"),
    ("phi", {"rotary_dim": 6}, "has rotary_dim = 6; camelid supports 4 or None"),
    ("phi", {"head_dim": 10}, "has head_dim = 10; camelid supports 8 or None"),
    ("phi", {"tie_word_embeddings": True}, "head_bias cannot be combined with tie_embeddings"),
    ("gemma2", {"sliding_window_size": 9}, "has sliding_window_size = 9; camelid supports 7 or None"),
    ("qwen2", {"layer_types": ["full_attention"]}, "has layer_types = ['full_attention'] for 4 layers"),
    ("qwen2", {"layer_types": "full_attention"}, "has layer_types = 'full_attention' for 4 layers"),
    (
        "qwen2",
        {"layer_types": ["chunked_attention"] * 4},
        "has layer_types = ['chunked_attention', 'chunked_attention'",
    ),
    ("qwen2", {"use_sliding_window": False}, "has layers with sliding_attention, but no sliding_window"),
    ("gemma2", {"sliding_window": None}, "has layers with sliding_attention, but no sliding_window"),
    # Rotations
    ("llama", {"rope_theta": 0}, "has rope_theta = 0"),
    ("llama", {"rope_theta": "1e4"}, "has rope_theta = '1e4'"),
    ("llama", {"rope_scaling": "linear"}, "has rope_scaling = 'linear'"),
    (
        "llama",
        {"rope_parameters": FLAT, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "has rope_parameters = {'rope_type': 'default'} and rope_scaling = {'type': 'linear', 'factor': 2.0}, which",
    ),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "has rope_parameters.partial_rotary_factor = 0.5"),
    ("llama", {"rope_scaling": {"type": "ntk"}}, f"has rope_scaling = {{'type': 'ntk'}}; camelid supports {KINDS}"),
    ("llama", {"rope_parameters": {"rope_type": ["linear"]}}, "has rope_parameters = {'rope_type': ['linear']}; "),
    ("llama", {"rope_scaling": {"factor": 2.0}}, f"has rope_scaling = {{'factor': 2.0}}; camelid supports {KINDS}"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "{'type': 'linear'}; camelid supports 'linear' with factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": None}}, "; camelid supports 'linear' with factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "has factor = '2'"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 9}}, "has rope_scaling.alpha = 9; camelid "),
    (
        "llama",
        {"rope_scaling": YARN_OF_OURS},
        "has rope_scaling.original_context = 16; camelid supports 'yarn' with factor, original_max_position_embeddings",
    ),
    ("llama", {"rope_scaling": YARN_JSON | {"truncate": 1}}, "has truncate = 1"),
    ("llama", {"rope_scaling": LLAMA3_JSON}, "high_freq_factor = 1.0 is not above low_freq_factor"),
    (
        "llama",
        {"rope_scaling": YARN_JSON, "original_max_position_embeddings": 32},
        "has original_max_position_embeddings = 32, and 16 in rope_scaling",
    ),
    ("phi3", {"original_max_position_embeddings": "16"}, "has original_max_position_embeddings = '16'"),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "; camelid supports longrope, su, yarn"),
    ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0] * 4}}, "; camelid supports 'su' with short_factor"),
    (
        "phi3",
        {"rope_scaling": LONG_JSON | {"type": "su", "short_factor": [1.0]}},
        "rope_scaling.short_factor has 1 values, and 4 pairs of features are rotated",
    ),
    ("phi3", {"rope_scaling": LONG_JSON | {"type": "su", "long_factor": [1, 2, 3, "4"]}}, "has long_factor = '4'"),
    (
        "gemma3_text",
        {"rope_parameters": FLAT},
        "has rope_parameters = {'rope_type': 'default'}; camelid supports scaling of full_",
    ),
    (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 8.0}}},
        "has rope_parameters = {'sliding_attention': {'rope_type': 'linear', 'factor': 8.0}}; camelid supports ",
    ),
]


@pytest.mark.parametrize(("family", "change", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_what_would_be_computed_wrongly_is_refused_with_its_name_and_value(family: str, change: Json, message: str):
    with pytest.raises(UserError) as refusal:
        config_from_hf(edited(saved(family), change))
    assert message in refusal.value.problem
    assert refusal.value.problem.startswith("config.json")
    assert refusal.value.advice


ODD: list[Any] = [None, True, False, -2, -1, 0, 1, 3, 2.5, "", "x", [], [1], {}, {"a": 1}, math.inf, math.nan, 10**400]


def places(table: Json, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in table.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


FILES = {(entry.theirs().model_type, type(entry.ours.rope_scaling)): name for name, entry in TINY.items()}


@pytest.mark.parametrize("name", FILES.values())
def test_whatever_stands_in_a_field_gives_a_config_or_a_clear_error(name: str):
    """A config that can be saved, and read again as it was."""
    theirs = TINY[name].theirs()
    for table in (config_to_hf(replace(TINY[name].ours, family=theirs.model_type), "float32"), theirs.to_dict()):
        for *way, last in places({key: value for key, value in table.items() if key not in IGNORED}):
            for value in ODD:
                odd = copy.deepcopy(table)
                functools.reduce(operator.getitem, way, odd)[last] = value
                try:
                    config = config_from_hf(odd)
                except UserError:
                    continue
                assert config_from_hf(config_to_hf(config, "float32")) == config


# Names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_names_change_nothing(family: str):
    names = {"_name_or_path": "google/gemma-7b", "architectures": ["PhiForCausalLM"], "transformers_version": "4.0"}
    assert config_from_hf(saved(family) | names) == BASES[family]
    assert BASES[family] == replace(BASES[family], family=None)
