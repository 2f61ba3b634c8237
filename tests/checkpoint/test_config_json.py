"""config.json: released ones map both ways, and what camelid would compute wrongly is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from camelid.checkpoint import hf
from camelid.errors import UserError
from camelid.model.flops import count_parameters
from tiny import LLAMA3, tiny_config

# Every released config.json of the Llama family among the assets.
RELEASED = """
    HuggingFaceTB__SmolLM-1.7B Infinigence__Megrez-3B-Instruct TinyLlama__TinyLlama-1.1B-intermediate-step
    dfurman__llama-7b meta-llama__Llama-2-13b-hf meta-llama__Llama-2-70b-hf meta-llama__Llama-2-7b-chat-hf
    meta-llama__Llama-2-7b-hf meta-llama__Llama-3.1-405B meta-llama__Llama-3.1-8B-Instruct meta-llama__Llama-3.1-8B
    meta-llama__Llama-3.2-1B-Instruct meta-llama__Llama-3.2-1B meta-llama__Meta-Llama-3-8B-Instruct
    meta-llama__Meta-Llama-3-8B quoted/decapoda-research__llama-13b-hf quoted/decapoda-research__llama-7b-hf
    quoted/huggyllama__llama-7b.resaved-4.34
""".split()
# As the makers and the Hub's safetensors headers give them.
PARAMETERS = {
    "meta-llama__Llama-2-7b-hf": 6_738_415_616,
    "meta-llama__Llama-2-13b-hf": 13_015_864_320,
    "meta-llama__Llama-2-70b-hf": 68_976_648_192,
    "meta-llama__Llama-3.1-8B": 8_030_261_248,
    "meta-llama__Llama-3.1-405B": 405_853_388_800,
    "meta-llama__Llama-3.2-1B": 1_235_814_400,
    "TinyLlama__TinyLlama-1.1B-intermediate-step": 1_100_048_384,
    "HuggingFaceTB__SmolLM-1.7B": 1_711_376_384,
}
# What says nothing about the decoder, or is written for other programs.
ASIDE = {"_name_or_path", "architectures", "dtype", "transformers_version", "pretraining_tp", "auto_map", "use_cache"}


def read(assets: Path, name: str) -> dict[str, Any]:
    return json.loads((assets / "hf_files" / "configs" / f"{name}.json").read_text())


def in_transformers(table: dict[str, Any]) -> dict[str, Any]:
    """The same, as transformers understands it."""
    understood = transformers.LlamaConfig.from_dict(table).to_dict()
    understood |= {"pad_token_id": None} if understood.get("pad_token_id") == -1 else {}  # early files' "none"
    return {key: value for key, value in understood.items() if key not in ASIDE}


def test_the_table_lists_every_released_llama(assets: Path):
    folder = assets / "hf_files" / "configs"
    found = {
        str(file.relative_to(folder).with_suffix(""))
        for file in folder.rglob("*.json")
        if json.loads(file.read_text())["model_type"] == "llama"
    }
    assert found == set(RELEASED)


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_maps_to_ours_and_back_to_what_transformers_reads(assets: Path, name: str):
    table = read(assets, name)
    config = hf.config_from_hf(table)
    back = hf.config_to_hf(config, "bfloat16")
    assert hf.config_from_hf(back) == config
    theirs = in_transformers(table)
    if "max_position_embeddings" not in table:
        theirs["max_position_embeddings"] = table["max_sequence_length"]  # the name that the first conversions used
        del theirs["max_sequence_length"]
    ours = in_transformers(back)
    assert ours == {key: value for key, value in theirs.items() if key in ours}
    assert theirs.keys() - ours.keys() <= {"max_sequence_length"}
    with torch.device("meta"):
        twin = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(table))
    assert count_parameters(config) == twin.num_parameters()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_that_the_makers_give(assets: Path, name: str):
    assert count_parameters(hf.config_from_hf(read(assets, name))) == PARAMETERS[name]


def test_both_spellings_give_the_same_config(stories: Path):
    classic, since_v5 = (json.loads((stories / name).read_text()) for name in ("config.json", "config.v5.json"))
    assert "rope_parameters" in since_v5
    assert "rope_theta" in classic
    assert hf.config_from_hf(classic) == hf.config_from_hf(since_v5)


def test_both_spellings_of_llama3_scaling_give_the_same_config():
    config = tiny_config(rope_scaling=LLAMA3, rope_theta=500_000.0)
    classic = hf.config_to_hf(config, "float32")
    since_v5 = transformers.LlamaConfig.from_dict(classic).to_dict()
    assert since_v5["rope_parameters"]["rope_theta"] == 500_000.0
    assert "rope_theta" not in since_v5
    assert hf.config_from_hf(since_v5) == hf.config_from_hf(classic) == config
    # Llama 3.1 was first released with `type` for `rope_type`.
    old = classic | {"rope_scaling": classic["rope_scaling"] | {"type": "llama3"}}
    del old["rope_scaling"]["rope_type"]
    assert hf.config_from_hf(old) == config


@pytest.mark.parametrize(
    "field",
    [
        {"bos_id": 3},
        {"eos_ids": (5, 7)},
        {"pad_id": 0},
        {"tie_embeddings": True},
        {"rope_theta": 5e5},
        {"init_std": 0.5},
        {"norm_eps": 1e-3},
    ],
    ids=str,
)
def test_every_field_survives_the_way_through_transformers(field: dict[str, Any]):
    config = tiny_config(**field)
    assert config != tiny_config()
    through = transformers.LlamaConfig.from_dict(hf.config_to_hf(config, "float32")).to_dict()
    assert hf.config_from_hf(through) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 4096}, r"does not know: sliding_window = 4096"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu'; camelid computes 'silu'"),
        ({"attention_bias": True}, r"attention_bias = True; camelid computes False"),
        ({"mlp_bias": True}, r"mlp_bias = True"),
        ({"attention_dropout": 0.1}, r"attention_dropout = 0\.1"),
        ({"model_type": "qwen2"}, r"model_type = 'qwen2'; camelid computes 'llama'"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config = \{'bits': 4\}"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope scaling 'linear' with \{'factor': 2\.0\}"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"rope scaling 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope scaling 'llama3' with \{'factor': 8\.0\}"),
        ({"hidden_size": "48"}, r"hidden_size = '48'"),
        ({"num_hidden_layers": 2.5}, r"num_hidden_layers = 2\.5"),
        ({"num_hidden_layers": True}, r"num_hidden_layers = True"),
        ({"vocab_size": 0}, r"vocab_size = 0"),
        ({"num_attention_heads": -8}, r"num_attention_heads = -8"),
        ({"rms_norm_eps": "1e-5"}, r"rms_norm_eps = '1e-5'"),
        ({"tie_word_embeddings": 1}, r"tie_word_embeddings = 1"),
        ({"bos_token_id": [1]}, r"bos_token_id = \[1\]"),
        ({"num_key_value_heads": 5}, r"num_heads = 6 is not a multiple of num_kv_heads = 5"),
        ({"head_dim": 7}, r"head_dim = 7 is odd"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_would_be_computed_wrongly_is_refused_with_its_name_and_value(change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as refusal:
        hf.config_from_hf(hf.config_to_hf(tiny_config(), "float32") | change)
    assert refusal.value.advice


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "model_type"])
def test_a_field_that_nothing_can_replace_is_asked_for(field: str):
    table = hf.config_to_hf(tiny_config(), "float32")
    del table[field]
    with pytest.raises(UserError, match=f"config.json has no {field}"):
        hf.config_from_hf(table)


def test_what_a_file_leaves_out_means_what_it_means_in_transformers():
    named = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    full = hf.config_to_hf(tiny_config(embed_dim=60), "float32")
    bare = {"model_type": "llama"} | {name: full[name] for name in named}
    theirs = transformers.LlamaConfig.from_dict(bare).to_dict()
    assert hf.config_from_hf(bare) == hf.config_from_hf(theirs)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("meta-llama__Llama-2-7b-chat.bnb-4bit-finetune", "quantization_config"),
        ("meta-llama__Llama-3.1-405B-Instruct-FP8", "quantization_config"),
        ("Qwen__Qwen3-0.6B.prerelease", "model_type"),
        ("deepseek-ai__deepseek-moe-16b-base", "model_type"),
    ],
)
def test_edited_and_foreign_configs_are_refused(assets: Path, name: str, field: str):
    table = json.loads((assets / "hf_files" / "variants" / f"{name}.json").read_text())
    with pytest.raises(UserError, match=f"config.json has {field} = "):
        hf.config_from_hf(table)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("01-ai__Yi-6B-Chat.automap", 6_061_035_520),
        ("TinyLlama__TinyLlama-1.1B-Chat-v0.x.automap", 1_100_048_384),
        ("LargeWorldModel__LWM-Text-Chat-1M.edited", 6_738_415_616),
        ("modelscope__Llama-2-7b-chat-ms.automap", 6_738_415_616),
    ],
)
def test_harmless_additions_of_other_people_are_accepted(assets: Path, name: str, parameters: int):
    table = json.loads((assets / "hf_files" / "variants" / f"{name}.json").read_text())
    config = hf.config_from_hf(table)
    assert count_parameters(config) == parameters
    assert config.rope_theta == table.get("rope_theta", 10_000.0)
