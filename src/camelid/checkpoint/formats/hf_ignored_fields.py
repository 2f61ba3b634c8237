"""Fields of config.json that do not change what a decoder computes, in any family.

A field that no family maps (families.py) and that is not in these tables is refused by its name, because it may change
the result: a scale of the embeddings, say, or experts. Null and false switch nothing on and are never refused.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

# Attributes of transformers' PreTrainedConfig and GenerationConfig, of all versions since 4.0, which it writes into
# config.json or reads from there. Not among them: is_encoder_decoder, add_cross_attention, quantization_config,
# per_layer_config and transformers_weights, which change the model or the files that hold it.
ATTRIBUTES = """
    architectures torch_dtype dtype transformers_version use_cache return_dict output_attentions output_hidden_states
    torchscript use_bfloat16 tf_legacy_loss pruned_heads chunk_size_feed_forward is_decoder tie_encoder_decoder
    cross_attention_hidden_size tie_last_hidden_states tokenizer_class prefix task_specific_params problem_type
    finetuning_task id2label label2id num_labels auto_map name_or_path attn_implementation experts_implementation
    unk_token_id sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id

    max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings do_sample num_beams
    num_beam_groups use_mtp penalty_alpha dola_layers temperature top_k top_p min_p top_h typical_p epsilon_cutoff
    eta_cutoff diversity_penalty repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids force_words_ids renormalize_logits constraints remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias token_healing guidance_scale
    low_memory watermarking_config num_return_sequences output_scores output_logits return_dict_in_generate
    cache_implementation cache_config max_cache_len prefill_chunk_size compile_config disable_compile
    continuous_batching_config is_assistant num_assistant_tokens num_assistant_tokens_schedule
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind target_lookbehind
    speculation_type prompt_lookup_num_tokens max_matching_ngram_size generation_config
""".split()
# What programs for training and conversion leave behind: names, lengths of the tokenizer, kernels, parallelism, and
# settings of losses that only training has.
LEFTOVERS = """
    pretraining_tp max_sequence_length max_seq_len max_seq_length seq_length sequence_length model_max_length
    tokenizer_model_max_length tokenizer_padding_side padding_side start_token_id end_token_id bos_token eos_token
    pad_token unk_token model_name model_name_or_path base_model base_model_name_or_path gradient_checkpointing
    use_gradient_checkpointing neftune_noise_alpha router_aux_loss_coef router_z_loss_coef output_router_logits
    use_flash_attn use_flash_attention use_flash_attention_2 flash_attn use_sdpa use_fused_rms_norm
    use_fused_cross_entropy fp16 bf16 fp32 initializer_factor
    max_window_layers selective_checkpoint_enabled sequence_parallel_enabled move_model_to_device is_llama_config
    transformers.js_config
""".split()
# camelid trains without dropout; checkpoint/formats/hf.py says so where a model asks for it.
DROPOUTS = frozenset(
    """
    attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout classifier_dropout
    hidden_dropout_prob attention_probs_dropout_prob
    """.split()
)
HARMLESS = frozenset({*ATTRIBUTES, *LEFTOVERS, *DROPOUTS})
# Of rope_scaling and rope_parameters. transformers reads none of them: attn_factor is what vLLM and llama.cpp multiply
# the attention factor of YaRN by, finetuned is from the first code of YaRN, and the original context means nothing
# to the kinds of scaling that do not have it among their fields.
ROPE_LEFTOVERS = frozenset({"attn_factor", "finetuned", "original_max_position_embeddings"})


def is_harmless(name: str, value: object) -> bool:
    """Whether a field that a family does not have may stand in its config.json."""
    private = name.startswith(("_", "unsloth_"))  # attributes of the program that wrote the file
    return value is None or value is False or private or name in HARMLESS


def remarks(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes on fields that are left out of account although somebody may rely on them."""
    notes = []
    if drops := [f"{name} = {hf[name]}" for name in sorted(DROPOUTS & hf.keys()) if hf[name]]:
        notes.append(f"config.json asks for dropout in training ({', '.join(drops)}), and camelid trains without")
    for name in ("rope_scaling", "rope_parameters"):
        table = hf.get(name)
        if isinstance(table, Mapping) and table.get("attn_factor") not in (None, 1):
            notes.append(
                f"{name}.attn_factor = {table['attn_factor']} is ignored, as in transformers; vLLM and llama.cpp "
                "multiply the attention factor by it (to have that here, write the product as attention_factor)"
            )
    return tuple(notes)


def without(hf: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """config.json as if it did not have these fields; `rope_scaling.alpha` is a field of the table rope_scaling."""
    return functools.reduce(_without, names, dict(hf))


def _without(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    if name in table:
        return {key: value for key, value in table.items() if key != name}
    outer, _, inner = name.partition(".")
    held = table.get(outer)
    return {**table, outer: _without(held, inner)} if isinstance(held, Mapping) else dict(table)


def way_on(*names: str) -> str:
    """The advice of a refusal that names fields: what the user gives to open the model without them."""
    they, are = ("They", "they were") if names[1:] else ("It", "it were")
    options = " ".join(f"--ignore-config-field {name}" for name in names)
    return (
        f"{they} may change what the model computes. To open the model as if {are} absent, add {options} "
        f"(in Python ignore={[*names]}; for init in a recipe, init_ignore = {[*names]})."
    )
