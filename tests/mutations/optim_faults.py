"""Faults in optimizers, schedules and freezing."""

from mutations.fault import Fault

OPTIMIZERS = "train/test_optimizers.py::"
SCHEDULES = "train/test_schedules.py::"
EASYLM = "end_to_end/test_train_state.py::test_a_run_of_easylm_is_reproduced_and_goes_on_from_the_state_that_it_left"

FAULTS = (
    Fault(
        "the first update is always warm",
        "train/schedules.py",
        'ahead = 1 if config.first_update == "warm" else 0',
        "ahead = 1",
        EASYLM,
    ),
    Fault(
        "decay = all leaves norms out",
        "train/optimizer.py",
        "everything or (matrices and spec.is_matrix)",
        "(everything or matrices) and spec.is_matrix",
        f"{OPTIMIZERS}test_weight_decay_reaches_the_parameters_that_are_chosen",
    ),
    Fault(
        "Adafactor takes root mean squares over all layers",
        "train/optimizer.py",
        '{"True": _for_each_layer(adafactor), "False": adafactor}',
        '{"True": adafactor, "False": adafactor}',
        f"{OPTIMIZERS}test_adafactor_is_that_of_its_paper_for_each_layer",
    ),
    Fault(
        "the weight decay of palm is proportional to the learning rate",
        "train/optimizer.py",
        "rate(count) ** exponent",
        "rate(count)",
        f"{OPTIMIZERS}test_palm_and_uio_are_those_of_easylm_and_ll3m",
    ),
    Fault(
        "the uncorrected Adam forgets to take the root",
        "train/optimizer.py",
        "m / (jnp.sqrt(v) + eps)",
        "m / jnp.sqrt(v + eps)",
        f"{OPTIMIZERS}test_adamw_without_bias_correction_is_that_of_mindspore",
    ),
    Fault(
        "Muon takes each head for a matrix of its own",
        "train/optimizer.py",
        "first, last = len(spec.stacked),",
        "first, last = len(spec.shape) - len(spec.inputs) - 1,",
        f"{OPTIMIZERS}test_muon_orthogonalizes_the_matrix_of_each_layer_with_all_heads[rms]",
    ),
    Fault(
        "factors of several patterns replace each other",
        "train/optimizer.py",
        "factors[path] * np.where(mask, np.float32(factor), np.float32(1))",
        "np.where(mask, np.float32(factor), np.float32(1))",
        f"{OPTIMIZERS}test_factors_multiply_learning_rates_by_pattern_and_layer",
    ),
    Fault(
        "the optimizer keeps a state for frozen parameters",
        "train/optimizer.py",
        "trained = [bool(mask.any()) for mask in",
        "trained = [True for mask in",
        f"{OPTIMIZERS}test_what_is_frozen_stays_and_has_no_state[adamw]",
    ),
    Fault(
        "single layers are not frozen",
        "train/trainable.py",
        "leaf if mask.all() else",
        "leaf if mask.any() else",
        f"{OPTIMIZERS}test_what_is_frozen_stays_and_has_no_state[adamw]",
    ),
    Fault(
        "a pattern that matches nothing is accepted",
        "train/patterns.py",
        "if not any(mask.any() for mask in found.values()):",
        "if False:",
        f"{OPTIMIZERS}test_patterns_choose_parameters_and_layers",
    ),
    Fault(
        "an option of another optimizer is ignored",
        "train/optimizer_config.py",
        "if (value := getattr(self, name)) is not None:",
        "if (value := None) is not None:",
        f"{OPTIMIZERS}test_an_option_that_would_be_ignored_is_refused_by_name",
    ),
    Fault(
        "a decay that ends before the warmup is accepted",
        "runs/run.py",
        "        recipe.optimizer.check_decay()\n",
        "",
        f"{SCHEDULES}test_a_decay_that_ends_before_the_warmup_is_refused_with_both_numbers",
    ),
    Fault(
        "a longer run has a longer warmup",
        "train/optimizer_config.py",
        "return self.final_fraction is not None or self.warmup_ratio is not None",
        "return self.final_fraction is not None",
        f"{SCHEDULES}test_a_longer_run_keeps_its_warmup_ratio_and_a_schedule_without_an_end_needs_no_step",
    ),
    Fault(
        "the warmup starts at 0",
        "train/schedules.py",
        'optax.linear_schedule(options["warmup_start"],',
        "optax.linear_schedule(0.0,",
        f"{SCHEDULES}test_easylm_and_llama_2_jax_begin_at_their_initial_value",
    ),
    Fault(
        "the cooldown begins with the decay",
        "train/schedules.py",
        "[length - cooldown])",
        "[0])",
        f"{SCHEDULES}test_a_schedule_has_the_rates_of_transformers_before_during_and_after_the_decay[wsd]",
    ),
    Fault(
        "all cycles have the same length",
        "train/schedules.py",
        'options["restart_growth"] ** number',
        "1.0",
        f"{SCHEDULES}test_cycles_grow_and_end_together_with_the_decay",
    ),
)
