"""Faults in what computes on devices: backends, heads on a mesh, and what goes into and comes out of a model."""

from mutations.fault import Fault

BACKEND = "parallel/test_backend.py::"
HEADS = "model/test_attention.py::test_replicated_heads_read_the_keys_that_they_read_on_one_device"
API = "test_api.py::"
BROKEN = f"{API}test_a_row_whose_logits_are_not_finite_does_not_lose_the_others"

FAULTS = (
    # XLA's fusion of reductions
    Fault(
        "the fusion that gives wrong sums stays on",
        "parallel/backend.py",
        'os.environ["XLA_FLAGS"] = f"{before} {FLAG}=-reduce".strip()',
        "pass",
        f"{BACKEND}test_the_flag_is_added_to_the_users_own_before_jax_starts",
    ),
    Fault(
        "the user's XLA_FLAGS are replaced",
        "parallel/backend.py",
        'f"{before} {FLAG}=-reduce".strip()',
        'f"{FLAG}=-reduce"',
        f"{BACKEND}test_the_flag_is_added_to_the_users_own_before_jax_starts",
    ),
    Fault(
        "a JAX that was started with the fusion is used as it is",
        "parallel/backend.py",
        'if jax.default_backend() != "cpu" or not fuses_reductions():',
        "if True:",
        f"{BACKEND}test_a_jax_that_was_started_with_the_fusion_is_refused",
    ),
    Fault(
        "devices are taken before the fusion is off",
        "parallel/mesh.py",
        "        prepare_backend()\n",
        "",
        f"{BACKEND}test_every_entry_turns_the_fusion_off",
    ),
    Fault(
        "checkpoints are compared before the fusion is off",
        "evaluate/parity.py",
        "    config, specs = checkpoint.config, declare_decoder(checkpoint.config)\n",
        "    config, specs = checkpoint.config, declare_decoder(checkpoint.config)\n    jnp.zeros(1)\n",
        f"{BACKEND}test_every_entry_turns_the_fusion_off",
    ),
    # Heads on a mesh
    Fault(
        "replicated key heads are paired with query heads by their local numbers",
        "model/kernels.py",
        "first = 0 if heads_axes is None else lax.axis_index(heads_axes) * heads",
        "first = 0",
        f"{HEADS}[splash-16-2-4-replicate0]",
    ),
    Fault(
        "query heads across the border of a key head share one",
        "model/kernels.py",
        "shared = math.gcd(heads, group)",
        "shared = min(heads, group)",
        f"{HEADS}[splash-12-6-4-replicate3]",
    ),
    Fault(
        "whole query heads meet the key heads of one device",
        "model/kernels.py",
        'partition(tuple(axes.split()), COMPUTE, (*replicate, "kv_heads") if sharded_differently else replicate)',
        "partition(tuple(axes.split()), COMPUTE, replicate)",
        f"{HEADS}[splash-8-4-4-replicate5]",
    ),
    Fault(
        "AMD's GPUs are asked for cuDNN",
        "model/kernels.py",
        "return major.isdigit() and int(major) >= 8",
        'return major != "7"',
        "model/test_attention.py::test_auto_falls_back_with_one_line_and_the_kernel_itself_is_refused",
    ),
    # Ids
    Fault(
        "an id is clamped to the vocabulary",
        "model/tokens.py",
        "if outside := [token for token in (row.min(), row.max()) if not 0 <= token < vocab_size]:",
        "row = row.clip(0, vocab_size - 1)\n    if outside := []:",
        f"{API}test_ids_that_are_none_are_refused_everywhere",
    ),
    Fault(
        "True is the token 1",
        "model/tokens.py",
        "if isinstance(item, bool):",
        "if False:",
        f"{API}test_ids_that_are_none_are_refused_everywhere",
    ),
    Fault(
        "rows may be longer than the context",
        "model/tokens.py",
        "if lengths[0] > config.max_length:",
        "if False:",
        f"{API}test_batches_that_have_no_logits_are_refused",
    ),
    Fault(
        "ids without a token are drawn",
        "generate/decode.py",
        "bias[~drawable] = -np.inf",
        "pass",
        f"{API}test_ids_without_a_token_are_never_drawn",
    ),
    Fault(
        "an end that has no token is never drawn",
        "api.py",
        "[*self.tokenizer.token_ids, *self.tokenizer.eos_ids]",
        "[*self.tokenizer.token_ids]",
        f"{API}test_an_end_that_has_no_token_still_ends_a_text",
    ),
    Fault(
        "only ids beyond the last token are ruled out",
        "api.py",
        "[*self.tokenizer.token_ids, *self.tokenizer.eos_ids]",
        "[*range(self.tokenizer.vocab_size), *self.tokenizer.eos_ids]",
        f"{API}test_a_gap_between_tokens_is_never_drawn",
    ),
    # NaN and infinity
    Fault(
        "logits that are NaN are drawn from",
        "generate/sampling.py",
        "return ~jnp.any(jnp.isnan(logits) | (logits == jnp.inf), -1)",
        "return jnp.ones(len(logits), bool)",
        BROKEN,
    ),
    Fault(
        "one row whose logits are NaN ends all",
        "api.py",
        "if len(failed) == len(completions):",
        "if failed:",
        BROKEN,
    ),
    Fault(
        "one forward pass more than needed ends a row",
        "generate/decode.py",
        "return (step < steps) & jnp.any(carry.state.active)",
        "return (step <= steps) & jnp.any(carry.state.active)",
        f"{API}test_a_row_keeps_what_came_before_its_logits_broke",
    ),
    Fault(
        "a loss that is NaN is a perplexity",
        "evaluate/perplexity.py",
        "if not math.isfinite(total):",
        "if False:",
        f"{API}test_weights_that_are_not_finite_are_named",
    ),
)
