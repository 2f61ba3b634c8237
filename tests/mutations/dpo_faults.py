"""Faults in training on preferences."""

from mutations.fault import Fault

LOSS = "train/test_preference.py::"
EQUAL = f"{LOSS}test_loss_gradients_and_metrics_equal_trls"
RUNS = "end_to_end/test_preference.py::"
ROWS = "data/test_pairs.py::"

FAULTS = (
    Fault(
        "label smoothing is left out",
        "train/preference.py",
        "- smoothing * jax.nn.log_sigmoid(-scaled)",
        "",
        f"{EQUAL}[label smoothing]",
    ),
    Fault(
        "IPO sums log-probabilities instead of averaging them",
        "train/preference.py",
        "means = ratios / jnp.where(lengths > 0, lengths, 1.0)",
        "means = ratios",
        f"{EQUAL}[ipo]",
    ),
    Fault(
        "the rewards leave out the reference",
        "train/preference.py",
        "rewards = self.dpo.beta * ratios",
        "rewards = self.dpo.beta * logps",
        f"{EQUAL}[sigmoid]",
    ),
    Fault(
        "prompts count in the log-probability of an answer",
        "train/preference.py",
        'return by_answer(log_probs * batch["weights"], segments)',
        "return by_answer(log_probs * jnp.minimum(segments, 1).astype(jnp.float32), segments)",
        f"{EQUAL}[sigmoid]",
    ),
    Fault(
        "running sums go on into the next answer",
        "train/preference.py",
        "return jnp.where(starts, value, before + value), started | starts",
        "return before + value, started | starts",
        f"{LOSS}test_sums_are_those_of_each_answer_alone[15]",
    ),
    Fault(
        "pairs that lost an answer count",
        "train/preference.py",
        "counts = jnp.all(lengths > 0, -1).astype(jnp.float32)",
        "counts = jnp.any(lengths > 0, -1).astype(jnp.float32)",
        f"{LOSS}test_pairs_whose_answer_was_cut_away_do_not_count",
    ),
    Fault(
        "the reference has the adapters too",
        "train/preference.py",
        'base = Context("scoring", adapters=jnp.full(len(batch["tokens"]), -1))',
        'base = Context("scoring")',
        f"{LOSS}test_without_precomputed_values_the_reference_is_the_base_of_the_adapters",
    ),
    Fault(
        "gradients flow through the reference",
        "train/preference.py",
        "return self.answer_log_probs(lax.stop_gradient(params), batch, base)",
        "return self.answer_log_probs(params, batch, base)",
        f"{LOSS}test_without_precomputed_values_the_reference_is_the_base_of_the_adapters",
    ),
    Fault(
        "a pair that is too long is packed",
        "data/rows/pairs.py",
        'if over and (overlong == "split" or sequence_length < 2):',
        "if over and sequence_length < 2:",
        f"{ROWS}test_a_pair_that_is_longer_than_a_row_is_never_split[9-split]",
    ),
    Fault(
        "the values of the reference are those of the document before",
        "data/rows/packing.py",
        'return np.searchsorted(self.store.offsets, starts, "right") - 1',
        'return np.searchsorted(self.store.offsets, starts, "left") - 1',
        f"{ROWS}test_a_row_holds_the_answers_in_order_with_the_values_of_the_reference[best_fit]",
    ),
    Fault(
        "documents of a preference are packed one by one",
        "data/rows/loader.py",
        "                self.pairs,\n",
        "",
        f"{ROWS}test_a_loader_of_preferences_packs_pairs_and_no_worker_changes_them",
    ),
    Fault(
        "the reference of another init is kept",
        "runs/reference.py",
        'about = {**_about(components, loaders), "init": checksum_arrays(params)[0]}',
        "about = _about(components, loaders)",
        f"{RUNS}test_a_run_without_a_checkpoint_keeps_the_values_of_the_same_reference_only",
    ),
    Fault(
        "a resumed run compares with the parameters that it has reached",
        "runs/reference.py",
        "    if start.resumed is not None:\n",
        "    if False:\n",
        f"{RUNS}test_a_run_does_not_resume_without_its_reference[missing]",
    ),
)
