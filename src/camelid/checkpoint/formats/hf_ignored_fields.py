"""Fields of config.json that are ignored, because they do not change what a decoder of any family computes.

A field that its family does not map (hf_families.py) and that is not in these tables is refused by name, because it may
change the result: a scale of the embeddings, for example, or experts. Fields that are null or false are never refused.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

# Attributes of transformers' PreTrainedConfig and GenerationConfig, in all versions since 4.0, that it writes to
# config.json or reads from it. is_encoder_decoder, add_cross_attention, quantization_config, per_layer_config and
# transformers_weights are not included, because they change the model or select the files of its weights.
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
# Fields written by training and conversion tools: names, tokenizer lengths, kernels, parallelism, and settings of
# losses that only apply to training.
TOOL_FIELDS = """
    pretraining_tp max_sequence_length max_seq_len max_seq_length seq_length sequence_length model_max_length
    tokenizer_model_max_length tokenizer_padding_side padding_side start_token_id end_token_id bos_token eos_token
    pad_token unk_token model_name model_name_or_path base_model base_model_name_or_path gradient_checkpointing
    use_gradient_checkpointing neftune_noise_alpha router_aux_loss_coef router_z_loss_coef output_router_logits
    use_flash_attn use_flash_attention use_flash_attention_2 flash_attn use_sdpa use_fused_rms_norm
    use_fused_cross_entropy fp16 bf16 fp32 initializer_factor
    max_window_layers selective_checkpoint_enabled sequence_parallel_enabled move_model_to_device is_llama_config
    transformers.js_config
""".split()
# Dropout is a setting of a training run, not of a model; checkpoint/formats/hf.py adds a note if a model requests it.
DROPOUTS = frozenset(
    """
    attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout classifier_dropout
    hidden_dropout_prob attention_probs_dropout_prob
    """.split()
)
IGNORED = frozenset({*ATTRIBUTES, *TOOL_FIELDS, *DROPOUTS})
# In rope_scaling and rope_parameters. transformers reads none of them: attn_factor is a factor by which vLLM and
# llama.cpp multiply the attention factor of YaRN, finetuned comes from the original code of YaRN, and the original
# context has no meaning for types of scaling without such a field.
ROPE_IGNORED = frozenset({"attn_factor", "finetuned", "original_max_position_embeddings"})


def is_ignored(name: str, value: object) -> bool:
    """Whether a field that is not part of a family may be ignored in its config.json."""
    private = name.startswith(("_", "unsloth_"))  # attributes of the program that wrote the file
    return value is None or value is False or private or name in IGNORED


def remarks(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns notes on ignored fields that users may rely on."""
    notes = []
    if drops := [f"{name} = {hf[name]}" for name in sorted(DROPOUTS & hf.keys()) if hf[name]]:
        notes.append(
            f"config.json requests dropout in training ({', '.join(drops)}), which is not applied; recipes set "
            "dropout.embedding, dropout.attention and dropout.residual"
        )
    for name in ("rope_scaling", "rope_parameters"):
        table = hf.get(name)
        if isinstance(table, Mapping) and table.get("attn_factor") not in (None, 1):
            notes.append(
                f"{name}.attn_factor = {table['attn_factor']} is ignored, as in transformers; vLLM and llama.cpp "
                "multiply the attention factor by it (to do so here, set attention_factor to the product)"
            )
    return tuple(notes)


def without(hf: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Returns config.json without these fields; `rope_scaling.alpha` means the field alpha inside rope_scaling."""
    return functools.reduce(_without, names, dict(hf))


def _without(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    if name in table:
        return {key: value for key, value in table.items() if key != name}
    outer, _, inner = name.partition(".")
    nested = table.get(outer)
    return {**table, outer: _without(nested, inner)} if isinstance(nested, Mapping) else dict(table)


def advice_to_ignore(*names: str) -> str:
    """Returns the advice of a message about fields: the options that open the model without them."""
    they, are = ("They", "they were") if names[1:] else ("It", "it were")
    options = " ".join(f"--ignore-config-field {name}" for name in names)
    return (
        f"{they} may change what the model computes. To open the model as if {are} absent, add {options} "
        f"(in Python ignore={[*names]}; for init in a recipe, init_ignore = {[*names]})."
    )
