"""Faults in the options of generation, its processors and filters, and the dispatches."""

from mutations.fault import Fault

PROCESSORS = "generate/test_processors.py::"
DECODE = "generate/test_decode.py::"

FAULTS = (
    Fault(
        "negative logits are divided by the repetition penalty",
        "generate/processors.py",
        "jnp.where(logits < 0, logits * penalty, logits / penalty)",
        "logits / penalty",
        f"{PROCESSORS}test_repetition_penalty_equals_transformers",
    ),
    Fault(
        "tokens beyond the length of a row are penalized",
        "generate/sampling.py",
        "present = index < lengths[:, None]",
        "present = jnp.broadcast_to(index >= 0, tokens.shape)",
        f"{PROCESSORS}test_repetition_penalty_equals_transformers",
    ),
    Fault(
        "tokens of the prompt count as generated",
        "generate/sampling.py",
        "present & (index >= prompt_lengths[:, None])",
        "present",
        f"{PROCESSORS}test_presence_and_frequency_penalties_are_those_of_openais_formula",
    ),
    Fault(
        "n-grams are compared with the start of the row",
        "generate/processors.py",
        "((index >= back) & (before_each == before_next))",
        "(before_each == before_next)",
        f"{PROCESSORS}test_no_repeated_ngrams_equals_transformers",
    ),
    Fault(
        "all rows forbid the n-grams of the largest size",
        "generate/processors.py",
        "matches & ((back >= size) |",
        "matches & (",
        f"{PROCESSORS}test_each_row_has_its_own_settings_and_length",
    ),
    Fault(
        "one token too few is generated before EOS",
        "generate/sampling.py",
        "lengths - prompt_lengths < sampling.min_new_tokens",
        "lengths - prompt_lengths + 1 < sampling.min_new_tokens",
        f"{PROCESSORS}test_minimum_of_new_tokens_equals_transformers",
    ),
    Fault(
        "min-p compares with 1, not with the most probable token",
        "generate/filters.py",
        "min_p[:, None] * probabilities.max(-1, keepdims=True)",
        "min_p[:, None]",
        f"{PROCESSORS}test_filters_equal_transformers",
    ),
    Fault(
        "the least typical tokens come first",
        "generate/filters.py",
        "_ordered(-jnp.abs(log_probs + entropy))",
        "_ordered(jnp.abs(log_probs + entropy))",
        f"{PROCESSORS}test_filters_equal_transformers",
    ),
    Fault(
        "a typical_p of 1 removes tokens beside rows that use it",
        "generate/filters.py",
        "kept | (typical_p == 1)[:, None]",
        "kept",
        f"{PROCESSORS}test_filters_that_keep_everything_change_nothing",
    ),
    Fault(
        "allowed tokens exclude EOS",
        "generate/decode.py",
        "[*options.allowed_tokens, *ending]",
        "[*options.allowed_tokens]",
        f"{PROCESSORS}test_only_allowed_tokens_and_those_that_end_a_row_remain",
    ),
    Fault(
        "all completions of a prompt have its seed",
        "generate/decode.py",
        "seeds[row] = _completion_seeds(seed % 2**32, n)",
        "seeds[row] = seed % 2**32",
        f"{DECODE}test_several_completions_of_a_prompt_follow_each_other",
    ),
    Fault(
        "log-probabilities are those after the options",
        "generate/decode.py",
        "log_probs = jax.nn.log_softmax(logits, -1)",
        "log_probs = jax.nn.log_softmax(processed, -1)",
        f"{DECODE}test_log_probabilities_are_those_of_full_forwards",
    ),
    Fault(
        "the cache is copied for each dispatch",
        "generate/decode.py",
        ', donate_argnames="carry")',
        ")",
        f"{DECODE}test_the_cache_is_updated_in_place",
    ),
    Fault(
        "ignored EOS tokens are generated",
        "generate/decode.py",
        "bias[[token for token in eos_ids if token < vocab]] = -np.inf",
        "pass",
        f"{DECODE}test_stop_tokens_end_a_row_as_eos_does",
    ),
    Fault(
        "a stop string is not held back",
        "text/stream.py",
        "certain = len(text) - max((self._begun(text, stop) for stop in self._stops), default=0)",
        "certain = len(text)",
        "text/test_stream.py::test_a_text_ends_before_the_first_stop_wherever_it_is_cut",
    ),
    Fault(
        "too much is held back for a stop string",
        "text/stream.py",
        "if text.endswith(stop[:n])), 0)",
        "if text.endswith(stop[:n])), len(stop) - 1)",
        "text/test_stream.py::test_a_text_ends_before_the_first_stop_wherever_it_is_cut",
    ),
)
