"""Faults in attention's views and dropout, the caches, and the steps of decoding."""

from mutations.fault import Fault

CACHE = "model/test_kv_cache.py::"
READING = f"{CACHE}test_reading_a_cache_equals_attention_without_one"
STATE = "generate/test_state.py::"
DROPOUT = "model/test_attention_dropout.py::"
ORDER = "model/test_attention.py::test_the_order_of_keys_makes_no_difference"

FAULTS = (
    # Views
    Fault(
        "blocks of keys are taken to be in order",
        "model/mask.py",
        "visible = keys.min(-1) <= queries.max(-1)",
        "visible = keys[..., 0] <= queries[..., -1]",
        ORDER,
    ),
    Fault(
        "keys that are not valid are seen",
        "model/attention.py",
        "positions if view.valid is None else jnp.where(view.valid, positions, INVISIBLE)",
        "positions",
        ORDER,
    ),
    # Dropout
    Fault(
        "blockwise: the gradient of the values forgets what was dropped",
        "model/blockwise.py",
        "dropped, dweights = weights * factors, dweights * factors",
        "dropped, dweights = weights, dweights * factors",
        f"{DROPOUT}test_blockwise_equals_dense_in_outputs_and_gradients_for_any_block",
    ),
    Fault(
        "blockwise: the normalizer counts only weights that are kept",
        "model/blockwise.py",
        "normalizer = normalizer * correction + weights.sum(-1)\n            if dropout is not None:\n"
        "                weights = weights * dropout.factors(mask_ij)",
        "if dropout is not None:\n                weights = weights * dropout.factors(mask_ij)\n"
        "            normalizer = normalizer * correction + weights.sum(-1)",
        f"{DROPOUT}test_outputs_are_those_of_the_definition",
    ),
    Fault(
        "all heads drop the same weights",
        "model/mask.py",
        "return AttentionDropout(context.attention_dropout, bits)",
        "return AttentionDropout(context.attention_dropout, jnp.broadcast_to(bits[:, :1, :1], bits.shape))",
        f"{DROPOUT}test_drops_are_as_frequent_as_the_rate_and_independent",
    ),
    Fault(
        "dropped weights are not made up for",
        "model/mask.py",
        "0.0, 1 / (1 - self.rate))",
        "0.0, 1.0)",
        f"{DROPOUT}test_drops_are_as_frequent_as_the_rate_and_independent",
    ),
    Fault(
        "a fused kernel ignores dropout",
        "model/kernels.py",
        "        and dropout == 0\n        and not keys_hidden,\n",
        "        and not keys_hidden,\n",
        f"{DROPOUT}test_kernels_that_cannot_reproduce_it_are_refused",
    ),
    # Caches
    Fault(
        "padding is written into a ring",
        "model/kv_cache.py",
        "written = (positions >= 0) & (positions > last - count)",
        "written = positions > last - count",
        f"{STATE}test_a_row_that_is_admitted_later_gives_what_it_gives_alone[mistral]",
    ),
    Fault(
        "a chunk longer than the ring writes its slots twice",
        "model/kv_cache.py",
        "written = (positions >= 0) & (positions > last - count)",
        "written = (positions >= 0) & (positions <= positions.min(1, keepdims=True) + count - 1)",
        READING,
    ),
    Fault(
        "a long chunk reads the ring after it was overwritten",
        "model/kv_cache.py",
        "if k.shape[1] + self.window - 1 <= count:",
        "if k.shape[1] <= count:",
        READING,
    ),
    Fault(
        "empty slots of a ring are seen",
        "model/kv_cache.py",
        "return View(new.k[layer], new.v[layer], stored, valid=stored >= 0)",
        "return View(new.k[layer], new.v[layer], stored)",
        READING,
    ),
    Fault(
        "in a scan, a layer writes into the cache of the other kind",
        "model/kv_cache.py",
        "self.full.update(jnp.where(windowed, nowhere, index), k, v, positions)",
        "self.full.update(index, k, v, positions)",
        READING,
    ),
    Fault(
        "a ring promises one token too many",
        "model/kv_cache.py",
        "jnp.where(written <= count, 0, written - 1 - count + self.window)",
        "jnp.where(written <= count, 0, written - 2 - count + self.window)",
        f"{CACHE}test_a_ring_says_how_far_rows_can_be_rolled_back",
    ),
    # Steps
    Fault(
        "a prompt reads the empty cache",
        "model/decoder.py",
        'if context.phase != "prefill":',
        "if True:",
        f"{STATE}test_a_prompt_attends_to_its_own_keys_and_not_to_the_empty_cache",
    ),
    Fault(
        "a rollback is not checked against what was overwritten before",
        "generate/state.py",
        "written = jnp.maximum(state.written, lengths)",
        "written = lengths",
        f"{STATE}test_a_second_rollback_counts_from_the_longest_length",
    ),
    Fault(
        "a free row is written",
        "generate/state.py",
        "counts = jnp.where(state.active, counts, 0)",
        "counts = jnp.asarray(counts)",
        f"{STATE}test_a_row_that_is_admitted_later_gives_what_it_gives_alone",
    ),
    Fault(
        "reordered rows keep the keys of their places",
        "generate/state.py",
        "DecodeState(cache=state.cache.reorder(rows), ",
        "DecodeState(cache=state.cache.reorder(jnp.arange(len(rows)) % len(state.lengths)), ",
        f"{STATE}test_reordered_rows_continue_as_fresh_ones",
    ),
    Fault(
        "all rows draw as if they were at the step of the first",
        "generate/state.py",
        "return self.lengths - self.prompt_lengths",
        "return jnp.broadcast_to(self.lengths[0] - self.prompt_lengths[0], self.lengths.shape)",
        f"{STATE}test_a_row_that_is_admitted_later_gives_what_it_gives_alone",
    ),
    Fault(
        "one row's top-p is that of all",
        "generate/filters.py",
        "jax.nn.softmax(logits, -1), top_p[:, None])",
        "jax.nn.softmax(logits, -1), top_p[:1, None])",
        "generate/test_sampling.py::test_each_row_has_its_own_settings",
    ),
    Fault(
        "tokens after the prompt use no adapter",
        "generate/state.py",
        'context = Context(phase="decode", adapters=state.adapters)',
        'context = Context(phase="decode", adapters=None if state.adapters is None else state.adapters * 0 - 1)',
        f"{STATE}test_each_row_decodes_with_its_own_adapter",
    ),
    Fault(
        "a requested kernel is required for prompts too",
        "model/attention.py",
        'required=context.phase != "prefill"',
        'required=context.phase != "none"',
        f"{STATE}test_a_kernel_that_cannot_process_a_prompt_is_not_used_for_it",
    ),
)
