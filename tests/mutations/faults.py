"""Faults that somebody could write, and the test that must notice each: the tests of the tests (CONTRIBUTING.md)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    """below src/camelid"""
    text: str
    """stands there exactly once"""
    instead: str
    test: str
    """below tests; it passes without the fault and fails with it"""


PARITY = "parity/test_transformers.py::test_logits_equal_transformers"
GRADIENTS = "parity/test_transformers.py::test_the_gradient_of_every_parameter_equals_transformers"
PACKED = "model/test_decoder.py::test_packed_documents_equal_separate_documents"
CACHED = "model/test_decoder.py::test_decoding_with_a_cache_equals_the_full_forward"
BLOCKWISE = "model/test_attention.py::test_blockwise_equals_dense_in_outputs_and_gradients"
LOSS = "model/test_loss.py::test_loss_and_gradients_equal_torch_for_any_chunk"

FAULTS = (
    # Attention
    Fault(
        "segments are ignored",
        "model/attention.py",
        "return mask & (q_segments[:, :, None] == k_segments[:, None, :])",
        "return mask & (q_segments[:, :, None] > -1)",
        PACKED,
    ),
    Fault(
        "a query sees the next token",
        "model/attention.py",
        "mask = keys <= order[..., None]",
        "mask = keys <= order[..., None] + 1",
        "model/test_decoder.py::test_a_token_does_not_change_what_came_before_it",
    ),
    Fault(
        "query heads are dealt out to key heads, not grouped",
        "model/attention.py",
        "q.reshape(B, S, k.shape[1], -1, D).transpose(0, 2, 3, 1, 4)",
        "q.reshape(B, S, -1, k.shape[1], D).transpose(0, 3, 2, 1, 4)",
        f"{PARITY}[grouped queries, heads wider than embed]",
    ),
    Fault(
        "scores are divided by the root of another width",
        "model/attention.py",
        'dot("BKGSD,BKTD->BKGST", q, k) * (1 / math.sqrt(q.shape[-1]))',
        'dot("BKGSD,BKTD->BKGST", q, k) * (1 / math.sqrt(8))',
        f"{PARITY}[grouped queries, heads wider than embed]",
    ),
    Fault(
        "blockwise: earlier blocks do not fade when a larger score comes",
        "model/attention.py",
        "mixed = mixed * fade[..., None] + dot(",
        "mixed = mixed + dot(",
        BLOCKWISE,
    ),
    Fault(
        "blockwise: the last block of keys is left out",
        "model/attention.py",
        "lax.fori_loop(0, order_i.max() // k_block + 1, one_key_block, start)",
        "lax.fori_loop(0, jnp.maximum(order_i.max() // k_block, 1), one_key_block, start)",
        BLOCKWISE,
    ),
    Fault(
        "blockwise: the backward pass forgets that weights add up to 1",
        "model/attention.py",
        "(dweights - drop_i[..., None])",
        "dweights",
        BLOCKWISE,
    ),
    Fault(
        "blockwise: the backward pass skips the first block that sees these keys",
        "model/attention.py",
        "first = jnp.sum(last_seen < j * k_block)",
        "first = jnp.sum(last_seen < j * k_block) + 1",
        BLOCKWISE,
    ),
    Fault(
        "splash: segments are ignored",
        "model/attention.py",
        "segments = jnp.ones(q.shape[:2], jnp.int32) if segments is None else segments",
        "segments = jnp.ones(q.shape[:2], jnp.int32)",
        "model/test_attention.py::test_splash_equals_dense_in_outputs_and_gradients[one device-packed]",
    ),
    # Cache
    Fault(
        "keys are cached one slot late",
        "model/cache.py",
        "self.k.at[layer, rows, :, positions]",
        "self.k.at[layer, rows, :, positions + 1]",
        CACHED,
    ),
    Fault(
        "every layer reads the first layer's values",
        "model/decoder.py",
        "cache.v[layer]",
        "cache.v[0]",
        CACHED,
    ),
    # Rotary embedding
    Fault(
        "rope_theta is a constant",
        "model/rope.py",
        "freq = config.rope_theta **",
        "freq = 10_000.0 **",
        f"{PARITY}[rope_theta and norm_eps]",
    ),
    Fault(
        "llama3 scaling is ignored",
        "model/rope.py",
        "if (scaling := config.rope_scaling) is None:",
        "if (scaling := config.rope_scaling) is None or True:",
        f"{PARITY}[llama3 scaling beyond the original context, tied]",
    ),
    Fault(
        "llama3 scaling stretches every frequency",
        "model/rope.py",
        "return freq * (kept + (1.0 - kept) / scaling.factor)",
        "return freq / scaling.factor",
        f"{PARITY}[llama3 scaling beyond the original context, tied]",
    ),
    Fault(
        "neighbouring features turn together, as in Meta's files",
        "model/rope.py",
        "a, b = jnp.split(x.astype(jnp.float32), 2, -1)",
        "a, b = (x.astype(jnp.float32)[..., i::2] for i in (0, 1))",
        f"{PARITY}[grouped queries, heads wider than embed]",
    ),
    Fault(
        "angles are rounded to bfloat16",
        "model/rope.py",
        "positions[..., None].astype(jnp.float32)",
        "positions[..., None].astype(jnp.bfloat16).astype(jnp.float32)",
        "model/test_rope.py::test_angles_are_exact_far_into_the_context_and_whatever_the_activations_are",
    ),
    Fault(
        "positions are counted from the start of the call",
        "model/decoder.py",
        "rotation = rotations(positions, config)",
        "rotation = rotations(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), config)",
        CACHED,
    ),
    # Decoder
    Fault(
        "norm_eps is a constant",
        "model/decoder.py",
        "+ config.norm_eps)",
        "+ 1e-5)",
        f"{PARITY}[rope_theta and norm_eps]",
    ),
    Fault(
        "the embedding is scaled, as in Gemma",
        "model/decoder.py",
        "x = self.embed[tokens].astype(compute.dtype)",
        "x = self.embed[tokens].astype(compute.dtype) * config.embed_dim**0.5",
        f"{PARITY}[grouped queries, heads wider than embed]",
    ),
    Fault(
        "gelu in the place of silu",
        "model/decoder.py",
        "jax.nn.silu(",
        "jax.nn.gelu(",
        f"{PARITY}[grouped queries, heads wider than embed]",
    ),
    Fault(
        "the residual stream is cut before the MLP",
        "model/decoder.py",
        "x = x + self.mlp(",
        "x = self.mlp(",
        f"{PARITY}[grouped queries, heads wider than embed]",
    ),
    Fault(
        "a tied model gets a head of its own",
        "model/decoder.py",
        "when=lambda c: not c.tie_embeddings",
        "when=lambda c: True",
        "model/test_params.py::test_a_tied_model_lacks_the_head_alone",
    ),
    Fault(
        "the embedding table is the head of every model",
        "model/decoder.py",
        "return self.embed if self.lm_head is None else self.lm_head",
        "return self.embed",
        f"{PARITY}[grouped queries, heads wider than embed]",
    ),
    Fault(
        "the table of a tied model learns from its use as a head only",
        "model/decoder.py",
        "x = self.embed[tokens].astype(compute.dtype)",
        "x = lax.stop_gradient(self.embed)[tokens].astype(compute.dtype)",
        f"{GRADIENTS}[one key head for all, tied]",
    ),
    Fault(
        "remat: the two choices are exchanged",
        "model/decoder.py",
        'policies.nothing_saveable if compute.remat == "layer"',
        'policies.nothing_saveable if compute.remat == "elementwise"',
        "model/test_decoder.py::test_remat_layer_keeps_the_input_of_each_layer_only",
    ),
    Fault(
        "remat: products are computed twice",
        "model/weights.py",
        "return checkpoint_name(y, KEPT)",
        "return y",
        "model/test_decoder.py::test_remat_elementwise_keeps_products_and_attention_but_not_what_lies_between",
    ),
    Fault(
        "products are summed in bfloat16",
        "model/weights.py",
        "return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)",
        "return jnp.einsum(equation, a, b).astype(jnp.float32)",
        "model/test_weights.py::test_bfloat16_products_are_summed_in_float32",
    ),
    # Loss
    Fault(
        "the loss is divided by each row's own weight",
        "model/loss.py",
        "return jnp.sum(losses * weights),",
        "return jnp.sum(losses * weights / jnp.maximum(weights.sum(-1, keepdims=True), 1)),",
        LOSS,
    ),
    Fault(
        "gradients forget the weights",
        "model/loss.py",
        "- hit.astype(exp.dtype)) * weights[..., None]",
        "- hit.astype(exp.dtype))",
        LOSS,
    ),
    Fault(
        "the head learns from the last chunk only",
        "model/loss.py",
        "dhead + weight_gradient(",
        "weight_gradient(",
        LOSS,
    ),
    Fault(
        "what is done with the loss afterwards does not reach the gradients",
        "model/loss.py",
        "return dx * g.astype(dx.dtype),",
        "return dx,",
        LOSS,
    ),
    Fault(
        "large logits overflow",
        "model/loss.py",
        "top = lax.stop_gradient(logits.max(-1, keepdims=True))",
        "top = jnp.zeros_like(logits[..., :1])",
        "model/test_loss.py::test_logits_of_any_size_give_a_finite_loss",
    ),
    Fault(
        "the loss holds all logits at once",
        "model/loss.py",
        "chunk = -(-length // count)",
        "chunk = length",
        "model/test_loss.py::test_all_logits_are_never_held_at_once",
    ),
    # Parameters
    Fault(
        "residual projections start as wide as others",
        "model/params.py",
        'if spec.init == "residual" else config.init_std',
        'if spec.init == "narrow" else config.init_std',
        "model/test_params.py::test_fresh_weights_have_the_declared_standard_deviations",
    ),
    Fault(
        "every parameter starts from one key",
        "model/params.py",
        "own = jax.random.fold_in(key, zlib.crc32(path.encode()))",
        "own = key",
        "model/test_params.py::test_no_two_parameters_and_no_two_layers_start_alike",
    ),
    Fault(
        "the head of a tied model is not counted as work",
        "model/flops.py",
        "if config.tie_embeddings:",
        "if False:",
        "model/test_flops.py::test_flops_are_those_of_every_product_thrice",
    ),
    Fault(
        "a mesh axis may cut an array twice",
        "parallel/rules.py",
        "if len(used) != len(set(used)):",
        "if False:",
        "parallel/test_rules.py::test_a_mesh_axis_cannot_cut_one_array_twice",
    ),
    # Generation
    Fault(
        "top-p drops the token that crosses it",
        "generate/sample.py",
        "before = jnp.cumsum(jax.nn.softmax(descending, -1), -1) - jax.nn.softmax(descending, -1)",
        "before = jnp.cumsum(jax.nn.softmax(descending, -1), -1)",
        "generate/test_sample.py::test_kept_tokens_are_those_of_transformers",
    ),
    Fault(
        "temperature comes after top-p",
        "generate/sample.py",
        "keep(logits / how.temperature, how.top_k, how.top_p)",
        "keep(logits, how.top_k, how.top_p) / how.temperature",
        "generate/test_sample.py::test_draws_follow_the_distribution",
    ),
    Fault(
        "each step draws the same number",
        "generate/sample.py",
        "jax.random.fold_in(jax.random.key(seed), step)",
        "jax.random.key(seed)",
        "generate/test_sample.py::test_one_draw_says_nothing_about_the_next_step_or_the_next_seed",
    ),
    Fault(
        "a row's draws depend on its place in the batch",
        "generate/sample.py",
        "jax.vmap(draw)(seeds, kept)",
        "jax.vmap(draw)(seeds + jnp.arange(len(seeds), dtype=jnp.uint32), kept)",
        "generate/test_decode.py::test_a_row_of_a_batch_is_what_it_is_alone[sampled]",
    ),
    Fault(
        "the first new token follows the padding, not the prompt",
        "generate/decode.py",
        "jnp.take_along_axis(x, (lengths - 1)[:, None, None], 1)",
        "x[:, -1:]",
        "generate/test_decode.py::test_sampled_tokens_are_those_of_full_forwards_without_a_cache",
    ),
    Fault(
        "new tokens are placed after the longest prompt",
        "generate/decode.py",
        "positions = (lengths + step)[:, None]",
        "positions = (lengths.max() + step + 0 * lengths)[:, None]",
        "generate/test_decode.py::test_a_row_of_a_batch_is_what_it_is_alone[greedy]",
    ),
    Fault(
        "EOS is one of the new tokens",
        "generate/decode.py",
        "return out, counts",
        "return out, jnp.minimum(counts + 1, limit)",
        "generate/test_decode.py::test_a_row_may_end_at_once",
    ),
    Fault(
        "only the first of several EOS ids ends a row",
        "generate/decode.py",
        "token[:, None] == eos",
        "token[:, None] == eos[:1]",
        "generate/test_decode.py::test_a_row_ends_before_its_first_eos_and_the_others_go_on[sampled]",
    ),
    Fault(
        "every row draws with the same seed",
        "api.py",
        "seeds = [seed + i for i in range(len(each))]",
        "seeds = [seed] * len(each)",
        "test_api.py::test_row_i_draws_with_seed_plus_i",
    ),
    # Evaluation
    Fault(
        "the padding of the last window is scored",
        "evaluate/perplexity.py",
        "weights = np.arange(count * length) < len(tokens) - 1",
        "weights = np.arange(count * length) >= 0",
        "evaluate/test_perplexity.py::test_each_token_but_the_first_is_a_target_once",
    ),
    Fault(
        "the last batch of windows is scored twice",
        "evaluate/perplexity.py",
        "batch = {name: _rows(x, start, at_once)[own] for name, x in rows.items()}",
        "batch = {name: _rows(x, min(start, count - at_once), at_once)[own] for name, x in rows.items()}",
        "evaluate/test_perplexity.py::test_perplexity_is_the_plain_computation",
    ),
    # Training
    Fault(
        "microbatches count rows instead of weights",
        "train/step.py",
        "carry, (total, weight, _float32(grads))",
        "carry, (total, jnp.float32(2), _float32(grads))",
        "train/test_step.py::test_microbatches_change_nothing_however_uneven_their_weights",
    ),
    Fault(
        "small gradients are scaled up to the clipping norm",
        "train/step.py",
        "jnp.minimum(1.0, self.clip_norm / norm)",
        "self.clip_norm / norm",
        "train/test_step.py::test_gradients_are_scaled_down_to_the_norm_and_never_up",
    ),
    Fault(
        "gradients are not clipped",
        "train/step.py",
        "jnp.minimum(1.0, self.clip_norm / norm)",
        "jnp.minimum(1.0, 1e9 / norm)",
        "train/test_step.py::test_training_equals_torch",
    ),
    Fault(
        "a batch of padding alone divides by zero",
        "train/step.py",
        "total / jnp.where(weight > 0, weight, 1.0)",
        "total / weight",
        "train/test_step.py::test_a_batch_of_padding_alone_moves_nothing",
    ),
    Fault(
        "moments have the parameters' dtype",
        "train/state.py",
        "p.astype(jnp.float32), params)",
        "p, params)",
        "train/test_step.py::test_moments_are_float32_and_parameters_keep_their_dtype",
    ),
    Fault(
        "norms decay",
        "train/optimizer.py",
        "mask=decay",
        "mask=None",
        "train/test_step.py::test_training_equals_torch",
    ),
    Fault(
        "the first update has no learning rate",
        "train/optimizer.py",
        "count + 1, jnp.float32",
        "count, jnp.float32",
        "train/test_optimizer.py::test_the_learning_rate_rises_in_a_line_from_above_zero_to_its_peak_and_falls_as_a_cosine_to_its_end",
    ),
    Fault(
        "a step is reported after its callbacks",
        "train/loop.py",
        "        if due:\n            _report(report, waiting)\n",
        "",
        "train/test_loop.py::test_a_step_is_reported_before_its_callbacks",
    ),
    Fault(
        "a stop runs what belongs to the end",
        "train/loop.py",
        "callback.at_stop if stopped else callback.at_end",
        "callback.at_end",
        "train/test_loop.py::test_a_stop_ends_after_the_step_with_its_report_and_what_runs_at_a_stop",
    ),
    Fault(
        "a resumed run drops the row of its checkpoint",
        "train/loggers.py",
        'row["step"] <= resume_from',
        'row["step"] < resume_from',
        "train/test_loggers.py::test_a_resumed_run_drops_what_it_will_do_again_and_keeps_the_rest",
    ),
    Fault(
        "a run that starts again keeps the rows before",
        "train/loggers.py",
        "if resume_from and path.exists()",
        "if path.exists()",
        "train/test_loggers.py::test_a_run_that_starts_again_from_nothing_keeps_nothing",
    ),
    Fault(
        "a resumed run sees the first batches again",
        "data/loader.py",
        "maker.submit(loader.batch, step, start",
        "maker.submit(loader.batch, step - first_step, start",
        "sharded/test_training.py::test_a_run_stopped_on_one_mesh_goes_on_on_another",
    ),
    Fault(
        "a device gets the first rows instead of its own",
        "parallel/hosts.py",
        "return x[start - own.start : stop - own.start]",
        "return x[: stop - start]",
        "sharded/test_training.py::test_twenty_losses_and_gradient_norms_are_those_of_one_device",
    ),
    # Runs
    Fault(
        "a checkpoint comes before the validation of its step",
        "run.py",
        "callbacks.insert(0, Callback(recipe",
        "callbacks.insert(1, Callback(recipe",
        "end_to_end/test_run_folder.py::test_a_run_that_dies_between_validation_and_checkpoint_leaves_no_gap",
    ),
    Fault(
        "a run's folder is not locked",
        "run.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_UN",
        "end_to_end/test_run_folder.py::test_a_run_that_another_process_trains_is_refused",
    ),
    Fault(
        "a run goes on with other data",
        "run.py",
        "and field not in FREE and",
        'and field not in {*FREE, "data.seed"} and',
        "end_to_end/test_run_folder.py::test_another_recipe_is_refused_with_the_field_and_both_values",
    ),
    Fault(
        "true counts as 1",
        "recipe.py",
        "type(value) not in kinds",
        "not isinstance(value, kinds)",
        "test_recipe.py::test_a_recipe_that_is_not_understood_is_refused_with_the_field_and_a_way_out",
    ),
    # Checkpoints
    Fault(
        "an eps that a file leaves out is another",
        "checkpoint/hf.py",
        '"rms_norm_eps", lambda hf: 1e-6',
        '"rms_norm_eps", lambda hf: 1e-5',
        "checkpoint/test_config_json.py::test_what_a_file_leaves_out_means_what_it_means_in_transformers",
    ),
    Fault(
        "attention biases are accepted and left out",
        "checkpoint/hf.py",
        '"attention_bias": (False, None)',
        '"attention_bias": (False, True, None)',
        "checkpoint/test_config_json.py::test_what_would_be_computed_wrongly_is_refused_with_its_name_and_value",
    ),
    Fault(
        "a tied head is not compared with its table",
        "checkpoint/hf.py",
        "if a.tobytes() != b.tobytes():",
        "if False:",
        "checkpoint/test_hf.py::test_a_tied_checkpoint_whose_head_differs_is_refused",
    ),
    Fault(
        "shards are larger than asked for",
        "checkpoint/hf.py",
        "size + item[2].bytes > most",
        "size > most",
        "checkpoint/test_hf.py::test_a_checkpoint_in_shards_opens_in_transformers_and_in_camelid",
    ),
    Fault(
        "the tokenizer is left behind",
        "checkpoint/hf.py",
        "        for file in companions:\n",
        "        for file in companions[:0]:\n",
        "checkpoint/test_hf.py::test_every_companion_of_the_weights_is_carried_along_and_nothing_else",
    ),
    Fault(
        "a file cut short is opened",
        "checkpoint/tensors.py",
        "if end != size:",
        "if end > size + 100:",
        "checkpoint/test_damaged.py::test_a_damaged_checkpoint_is_refused_by_name_and_nothing_is_written",
    ),
    Fault(
        "a tensor that nothing reads is ignored",
        "checkpoint/layout.py",
        "if name not in expected and not re.fullmatch(known, name)",
        "if False",
        "checkpoint/test_damaged.py::test_a_damaged_checkpoint_is_refused_by_name_and_nothing_is_written",
    ),
    Fault(
        "every device reads whole parameters",
        "checkpoint/layout.py",
        "slice(*s.indices(n)[:2]) for s, n in zip(index",
        "slice(0, n) for s, n in zip(index",
        "sharded/test_load.py::test_only_the_slices_of_a_device_are_read",
    ),
    Fault(
        "what was half-written stays",
        "checkpoint/folder.py",
        "    except BaseException:\n        shutil.rmtree(temporary, ignore_errors=True)\n        raise",
        "    except BaseException:\n        raise",
        "checkpoint/test_folder.py::test_a_failure_in_the_middle_leaves_nothing_and_is_not_hidden",
    ),
    Fault(
        "free space is not asked for",
        "checkpoint/native.py",
        "< need:",
        "< 0:",
        "checkpoint/test_native.py::test_a_disk_without_room_for_the_next_checkpoint_is_an_error_and_the_last_one_stays",
    ),
    Fault(
        "a state of another dtype is cast silently",
        "checkpoint/native.py",
        "(tuple(leaf.shape), str(leaf.dtype))",
        "(tuple(leaf.shape),)",
        "checkpoint/test_native.py::test_a_state_of_another_dtype_shape_or_leaf_is_refused",
    ),
)
