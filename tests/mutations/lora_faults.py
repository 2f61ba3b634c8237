"""Faults in the training of adapters, and in their files."""

from mutations.fault import Fault

PARITY = "parity/test_lora.py::"
RUNS = "train/test_lora.py::"
TARGETS = "train/test_lora_targets.py::"
PEFT = "checkpoint/test_peft.py::"

FAULTS = (
    Fault(
        "lora: queries and keys drop the same inputs",
        "model/context.py",
        "return replace(self, module=module)",
        "return self",
        f"{PARITY}test_inputs_are_dropped_where_peft_drops_them[lora]",
    ),
    Fault(
        "lora: a rate of adapters alone gives all layers one mask",
        "model/context.py",
        "return any((*rates, self.adapter_dropout))",
        "return any(rates)",
        "model/test_context.py::test_layers_with_adapters_drop_different_inputs",
    ),
    Fault(
        "dora: the base is multiplied by inputs that are not dropped",
        "model/weights.py",
        "return y if given is x else y + _base_product(x - given, self._base, dtype)",
        "return y",
        f"{PARITY}test_inputs_are_dropped_where_peft_drops_them[dora]",
    ),
    Fault(
        "dora: a layer without an adapter is rescaled",
        "model/weights.py",
        "return jnp.where(self.scale[..., None] == 0, 1.0, ratio)",
        "return ratio",
        f"{RUNS}test_the_run_the_adapter_and_the_merged_model_are_the_trained_model",
    ),
    Fault(
        "lora: the padding of shorter factors is not zero",
        "model/adapters.py",
        "a = jnp.where(used.reshape(*used.shape, *[1] * len(inputs)), a, 0.0)",
        "a = a + 0.0 * used.sum()",
        f"{RUNS}test_what_is_not_used_of_a_factor_stays_zero_and_a_layer_without_an_adapter_stays_as_it_is",
    ),
    Fault(
        "lora: b starts as ones",
        "model/adapters.py",
        "b=jnp.zeros(adapter.b.shape, jnp.float32)",
        "b=jnp.ones(adapter.b.shape, jnp.float32)",
        f"{PARITY}test_new_adapters_are_drawn_as_in_peft_and_leave_the_base_as_it_is[lora]",
    ),
    Fault(
        "rslora: the scale of a layer is alpha / rank",
        "model/adapters.py",
        "(math.sqrt(rank) if self.rank_stabilized else rank)",
        "(rank if self.rank_stabilized else rank)",
        f"{TARGETS}test_the_defaults_are_every_matrix_of_every_layer_with_a_scale_of_two",
    ),
    Fault(
        "lora: the last pattern counts",
        "runs/lora_targets.py",
        "next((value for pattern, value in patterns.items()",
        "next((value for pattern, value in reversed(patterns.items())",
        f"{TARGETS}test_the_first_pattern_that_matches_gives_the_rank_and_the_alpha",
    ),
    Fault(
        "lora: a base that changed is not noticed",
        "runs/lora.py",
        "if kept.checksums.get(path) != found",
        "if path not in kept.checksums",
        f"{RUNS}test_a_base_that_changed_is_refused",
    ),
    Fault(
        "lora: an adapter given as init is not used",
        "runs/lora.py",
        "        arrays = to_arrays(source.adapter, plan, config)",
        "        arrays = {name: 0 * array for name, array in to_arrays(source.adapter, plan, config).items()}",
        f"{RUNS}test_an_adapter_is_continued_if_the_recipe_describes_it",
    ),
    Fault(
        "dora: the length of a row is that of a slice",
        "checkpoint/adapters/lora.py",
        "        if pair.magnitude is not None:  # the length of a row needs all of it",
        "        if pair.magnitude is not None and not columns:",
        f"{PEFT}test_a_slice_has_the_bits_of_the_whole[dora]",
    ),
    Fault(
        "dora: queries, keys and values in one matrix have the magnitudes of the queries",
        "checkpoint/adapters/peft.py",
        "magnitude = None if pair.magnitude is None else pair.magnitude[own]",
        "magnitude = None if pair.magnitude is None else pair.magnitude[: own.stop - own.start]",
        f"{PEFT}test_logits_are_those_that_peft_computes[phi3, queries, keys and values in one with DoRA]",
    ),
)
