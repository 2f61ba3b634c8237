"""A hundred config.json, edited as those of finetunes are: equal logits, or a refusal that names the field and option.

The models are released config.json with tiny sizes and random weights, made and saved by transformers.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

import camelid
from camelid.checkpoint.formats.hf_config import config_to_hf
from camelid.checkpoint.formats.hf_ignored_fields import IGNORED
from camelid.errors import UserError

pytestmark = pytest.mark.quick_compile

Json = dict[str, Any]
TINY: Json = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# What other tiny sizes must go with those, where a config.json has it.
ALSO: Json = {"head_dim": 8, "sliding_window": 7, "max_window_layers": 1, "rotary_dim": 4, "sliding_window_pattern": 2}
FAMILIES = {
    "llama": "meta-llama__Llama-2-7b-chat-hf",
    "llama3": "meta-llama__Llama-3.1-8B-Instruct",
    "mistral": "mistralai__Mistral-7B-v0.1",
    "qwen2": "Qwen__Qwen2-7B-Instruct",
    "qwen3": "Qwen__Qwen3-0.6B",
    "gemma2": "google__gemma-2-2b-it",
    "gemma3": "google__gemma-3-1b-it",
    "phi3": "microsoft__Phi-3-mini-4k-instruct",
    "stablelm": "stabilityai__stablelm-3b-4e1t",
    "mha": "meta-llama__Llama-2-7b-hf",
}
GONE = ...
FULL, SLIDING = ["full_attention"] * 2, ["sliding_attention"] * 2
LINEAR = {"type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# What must change nothing, in any family.
ANYWHERE: list[Json] = [
    *[{name: None} for name in ("quantization", "text_config", "vision_config", "scale_emb", "mup", "moe")],
    *[{name: False} for name in ("alibi", "use_logn_attn", "use_dynamic_ntk", "is_moe", "qk_layernorm_extra")],
    {"_flash_attn_2_enabled": True, "_commit_hash": "0" * 40, "_attn_implementation": "eager"},
    {"_attn_implementation_autoset": True, "_attn_implementation_internal": "flash_attention_2"},
    {"_from_model_config": True, "_diffusers_version": "0.1"},
    {"model_max_length": 4096, "tokenizer_model_max_length": 2048, "max_sequence_length": 2048, "seq_length": 512},
    {"end_token_id": 2, "start_token_id": 1, "pad_token": "<pad>", "tokenizer_padding_side": "right"},
    {"neftune_noise_alpha": 5.0, "gradient_checkpointing": True, "router_aux_loss_coef": 0.001},
    {"num_labels": 3},
    {"id2label": {"0": "A", "1": "B"}, "label2id": {"A": 0, "B": 1}, "problem_type": "regression"},
    {"attention_dropout": 0.1},
    {"hidden_dropout": 0.1, "attention_probs_dropout_prob": 0.1, "classifier_dropout": 0.1},
    {"initializer_range": 0.0},
    {"initializer_range": 1e-4},
    {"use_cache": False, "pretraining_tp": 2, "is_decoder": True, "fp16": True, "use_flash_attn": True},
    {"temperature": 0.6, "top_p": 0.9, "min_p": 0.1, "max_new_tokens": 512, "do_sample": True, "stop_strings": ["a"]},
    {"unsloth_fixed": True, "unsloth_version": "2025.1", "unsloth_tokenizer": "x"},
    {"transformers.js_config": {"dtype": "q4"}, "auto_map": {"AutoConfig": "x.Y"}, "architectures": ["Mine"]},
    {"torch_dtype": "float32", "transformers_version": "4.31.0.dev0", "_name_or_path": "/tmp/x", "name_or_path": "x"},
    {"max_position_embeddings": 128},
    {"output_router_logits": False, "tf_legacy_loss": False, "pruned_heads": {}, "task_specific_params": None},
]
# A model, and an edit that may change the numbers, as it does in transformers.
EQUAL: list[tuple[str, Json]] = [
    ("llama", {"sliding_window": None}),
    ("llama", {"partial_rotary_factor": 1.0}),
    ("llama", {"layer_types": FULL}),
    ("llama", {"attention_bias": False, "mlp_bias": False, "use_qkv_bias": False, "qk_layernorm": False}),
    ("llama", {"max_window_layers": 28, "use_sliding_window": False}),
    ("llama", {"rope_scaling": LINEAR}),
    ("llama", {"rope_scaling": LINEAR | {"original_max_position_embeddings": 16, "finetuned": True}}),
    ("llama", {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e4}}),
    ("llama", {"rope_scaling": LINEAR | {"rope_theta": 500.0}, "rope_theta": 500.0}),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": None}}),
    ("llama", {"rope_scaling": YARN}),
    ("llama", {"rope_scaling": YARN | {"attn_factor": 0.8782488562869419}}),
    ("llama", {"rope_scaling": YARN | {"finetuned": True, "beta_fast": None}}),
    ("llama", {"rope_scaling": YARN | {"attention_factor": 1.5, "attn_factor": 1.0, "extrapolation_factor": None}}),
    ("llama", {"rope_scaling": {"rope_type": "default", "finetuned": False}}),
    ("llama", {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
    ("llama", {"rms_norm_eps": 0.01, "rope_theta": 500.0, "hidden_act": "gelu"}),
    ("llama", {"tie_word_embeddings": GONE}),
    ("llama3", {"tie_word_embeddings": GONE, "rope_theta": 1000.0}),
    ("mha", {"num_key_value_heads": None}),
    ("mha", {"num_key_value_heads": GONE}),
    ("mistral", {"attention_bias": False, "mlp_bias": False}),
    ("mistral", {"layer_types": SLIDING, "head_dim": 8}),  # which transformers takes for Ministral
    ("mistral", {"sliding_window": 3}),
    ("qwen2", {"rope_scaling": YARN | {"attn_factor": 2.0}}),
    ("qwen2", {"layer_types": FULL}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    ("qwen3", {"attention_bias": False, "use_qk_norm": None}),
    ("qwen3", {"rope_scaling": YARN | {"attn_factor": 0.87}}),
    ("gemma2", {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}),
    ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("phi3", {"attention_bias": False, "qk_layernorm": False}),
    ("phi3", {"sliding_window": None, "embd_pdrop": 0.1, "resid_pdrop": 0.1}),
    ("stablelm", {"partial_rotary_factor": 0.5}),
    ("stablelm", {"rope_scaling": LINEAR}),
]
# A model, an edit that transformers does not compute or that might mean something else, and the fields to ignore.
NAMED: list[tuple[str, Json, list[str]]] = [
    ("llama", {"scale_emb": 12}, ["scale_emb"]),
    ("llama", {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}, ["dim_model_base", "scale_depth"]),
    ("llama", {"alibi": True}, ["alibi"]),
    ("llama", {"sliding_window": 4096}, ["sliding_window"]),
    ("llama", {"layer_types": SLIDING}, ["layer_types"]),
    ("llama", {"num_experts": 8, "num_experts_per_tok": 2}, ["num_experts"]),
    ("llama", {"rope_scaling": LINEAR | {"alpha": 1000.0}}, ["rope_scaling.alpha"]),
    ("llama", {"rope_scaling": YARN | {"extrapolation_factor": 1.0}}, ["rope_scaling.extrapolation_factor"]),
    ("llama", {"rope_scaling": {"rope_type": "default", "factor": 4.0}}, ["rope_scaling"]),
    ("llama", {"is_encoder_decoder": True}, ["is_encoder_decoder"]),
    ("llama", {"is_causal": False}, ["is_causal"]),
    ("mistral", {"layer_types": FULL}, ["layer_types"]),
    ("mistral", {"attention_bias": True}, ["attention_bias"]),
    ("qwen2", {"use_logn_attn": True}, ["use_logn_attn"]),
    ("gemma2", {"query_scale": 2.0}, ["query_scale"]),
    ("phi3", {"short_mscale": 1.2}, ["short_mscale"]),
]
REFUSED_BY_BOTH: list[tuple[str, Json]] = [
    ("llama", {"vocab_size": "97"}),
    ("llama", {"hidden_size": 47}),
    ("llama", {"head_dim": 8.0}),
    ("llama", {"num_hidden_layers": 2.5}),
    ("llama", {"tie_word_embeddings": "yes"}),
    ("llama", {"rope_scaling": {"type": "ntk", "factor": 2.0}}),
    ("llama", {"rope_scaling": "linear"}),
    ("llama", {"bos_token_id": [1]}),
    ("llama", {"hidden_act": "unknown"}),
    ("qwen2", {"layer_types": FULL * 2}),
    ("qwen3", {"head_dim": None}),
]


def base(assets: Path, family: str) -> Json:
    """A released config.json with tiny sizes."""
    table = json.loads((assets / "hf_files" / "configs" / f"{FAMILIES[family]}.json").read_text())
    table |= {name: value for name, value in (TINY | ALSO).items() if name in TINY or table.get(name) is not None}
    if table.get("rope_scaling"):
        table["rope_scaling"]["original_max_position_embeddings"] = 16
    return table | ({"num_key_value_heads": 6} if family == "mha" else {}) | {"torch_dtype": "float32"}


@pytest.fixture(scope="module")
def folders(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Json]]:
    """By family: a folder that transformers wrote, and its config.json as it was released."""
    made = {}
    for family in FAMILIES:
        table, folder = base(assets, family), tmp_path_factory.mktemp(family)
        theirs = transformers.CONFIG_MAPPING[table["model_type"]].from_dict(json.loads(json.dumps(table)))
        torch.manual_seed(len(made))
        model = transformers.AutoModelForCausalLM.from_config(theirs)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * (0.15 if parameter.ndim > 1 else 0.25))
        model.save_pretrained(folder)
        made[family] = folder, table
    return made


TOKENS = np.random.default_rng(0).integers(0, 97, (2, 24), np.int32)


def in_transformers(folder: Path) -> torch.Tensor:
    found: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    model, report = found
    assert not report["missing_keys"], report
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS).long()).logits


def write(folder: Path, table: Json, edit: Json) -> None:
    edited = {name: value for name, value in (table | edit).items() if value is not GONE}
    (folder / "config.json").write_text(json.dumps(edited))


def assert_equal(ours: Any, theirs: torch.Tensor) -> None:
    scale = float(theirs.abs().max())
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), atol=2e-5 * scale, rtol=1e-4)


EQUAL += [(family, edit) for family, edit in zip(itertools.cycle(FAMILIES), ANYWHERE)]
EQUAL += [(family, {"scale_emb": None, "window": None, "post_norm": False}) for family in FAMILIES]


def test_there_are_a_hundred_cases():
    assert len([*EQUAL, *NAMED, *REFUSED_BY_BOTH]) >= 100


@pytest.mark.parametrize(("family", "edit"), EQUAL, ids=str)
def test_logits_equal_those_of_transformers_and_so_do_those_of_what_is_saved(
    folders: dict[str, tuple[Path, Json]], family: str, edit: Json
):
    folder, table = folders[family]
    write(folder, table, edit)
    model, theirs = camelid.load(folder), in_transformers(folder)
    assert_equal(model.logits(TOKENS), theirs)
    (folder / "config.json").write_text(json.dumps(config_to_hf(model.config, "float32")))
    assert torch.equal(in_transformers(folder), theirs)


@pytest.mark.parametrize(("family", "edit", "names"), NAMED, ids=str)
def test_what_might_change_the_result_is_refused_with_its_name_and_opens_without_it(
    folders: dict[str, tuple[Path, Json]], family: str, edit: Json, names: list[str]
):
    folder, table = folders[family]
    write(folder, table, edit)
    with pytest.raises(UserError) as refusal:
        camelid.load(folder)
    for name in names:
        assert f"{name.partition('.')[0]}" in refusal.value.problem
        assert f"--ignore-config-field {name}" in refusal.value.advice
    given = refusal.value.advice.partition("ignore=")[2].partition("]")[0].strip("[").replace("'", "").split(", ")
    model = camelid.load(folder, ignore=given)
    assert f"config.json is read without {', '.join(given)}, as requested" in model.notes
    # With these transformers does not compute, or computes something else.
    if not edit.keys() & {"layer_types", "is_encoder_decoder", "is_causal"}:
        assert_equal(model.logits(TOKENS), in_transformers(folder))


@pytest.mark.parametrize(("family", "edit"), REFUSED_BY_BOTH, ids=str)
def test_what_transformers_refuses_is_refused_by_name(folders: dict[str, tuple[Path, Json]], family: str, edit: Json):
    folder, table = folders[family]
    write(folder, table, edit)
    with pytest.raises(UserError, match=r"config\.json"):
        camelid.load(folder)
    with pytest.raises((StrictDataclassError, ValueError, TypeError, KeyError)):
        in_transformers(folder)


def test_all_attributes_of_transformers_base_config_and_generation_config_are_known():
    known = IGNORED | {"is_encoder_decoder", "model_type", "bos_token_id", "eos_token_id", "pad_token_id"}
    known |= {"per_layer_config"}  # changes the model
    base, generation = transformers.PreTrainedConfig(), transformers.GenerationConfig()
    names = {*base.to_dict(), *vars(base), *generation.to_dict(), *vars(generation)}
    assert {name for name in names if not name.startswith("_")} - known == set()
