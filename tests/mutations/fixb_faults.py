"""Faults in skipped updates, frozen parameters, added adapters, and the base of an adapter."""

from mutations.fault import Fault

LORA = "train/test_lora.py::"
PEFT = "checkpoint/test_peft.py::"
LOOP = "train/test_loop.py::"
PRECISION = "train/test_precision.py::"
MOMENTS = "checkpoint/test_run_folder.py::test_moments_are_those_of_the_parameters_that_are_trained"

FAULTS = (
    Fault(
        "a skipped update stops the schedule of weight decay",
        "train/state.py",
        'return getattr(node, "_fields", ()) == ("count",)',
        "return isinstance(node, optax.ScaleByScheduleState)",
        "train/test_skipped_updates.py::test_the_schedule_of_weight_decay_advances_with_that_of_the_learning_rate[palm]",
    ),
    Fault(
        "an added adapter removes the tokens of the one before it",
        "checkpoint/adapters/added.py",
        "vocab_size=max(each.adapter.config.vocab_size, base.config.vocab_size),",
        "vocab_size=each.adapter.config.vocab_size,",
        f"{PEFT}test_an_added_adapter_keeps_the_tokens_that_another_one_brought",
    ),
    Fault(
        "moments of parameters that are not trained are read",
        "checkpoint/state/saved_state.py",
        "if path in targets and isinstance(tensor, SavedArray)",
        "if isinstance(tensor, SavedArray)",
        MOMENTS,
    ),
    Fault(
        "a run that freezes an entire parameter has no moments",
        "checkpoint/state/run_folder.py",
        "optimizer = MASKED if masked else OPTIMIZER",
        "optimizer = OPTIMIZER",
        MOMENTS,
    ),
    Fault(
        "the base of an adapter is quantized when all of it is read",
        "runs/lora.py",
        "    params = build(specs, arrays)\n",
        "    arrays = [_load(base, path, spec, recipe, mesh) for path, spec in named(specs).items()]\n"
        "    params = build(specs, arrays)\n",
        f"{LORA}test_a_base_is_read_and_quantized_one_parameter_after_another",
    ),
    Fault(
        "magnitudes are computed of all layers at once",
        "model/adapters.py",
        "lax.map(lengths, base) if spec.stacked",
        "jax.vmap(lengths)(base) if spec.stacked",
        f"{LORA}test_magnitudes_are_computed_of_one_layer_after_another",
    ),
    Fault(
        "the base of an adapter is whatever a run has last saved",
        "runs/lora.py",
        'if (base := base_of(source)).format == "run":',
        "if (base := base_of(source)) is None:",
        f"{LORA}test_the_base_of_an_adapter_is_a_step_of_a_run_that_may_train_on",
    ),
    Fault(
        "the revision of a base is forgotten",
        "checkpoint/adapters/peft.py",
        "        name = with_revision(name, settings.revision)\n",
        "        pass\n",
        f"{PEFT}test_the_revision_of_a_base_on_the_hub_is_kept",
    ),
    Fault(
        "param_norm includes what is frozen",
        "train/step.py",
        "_float32(self._masked(updated.trainable))",
        "_float32(updated.trainable)",
        "train/test_step.py::test_param_norm_is_that_of_the_parameters_that_are_trained",
    ),
    Fault(
        "a validation loss of the average that is not finite goes by",
        "train/metrics_log.py",
        'if averaged is not None and not math.isfinite(averaged["loss"]):',
        "if False:",
        f"{LOOP}test_a_validation_loss_of_the_average_that_is_not_finite_ends_the_run",
    ),
    Fault(
        "a mean over rows has a perplexity",
        "train/metrics_log.py",
        ' if self._perplexity else "")',
        ")",
        f"{LOOP}test_the_exponential_of_a_mean_over_rows_is_not_shown_as_perplexity[False-]",
    ),
    Fault(
        "a loss scale may round gradients",
        "train/config.py",
        "if mantissa != 0.5:",
        "if False:",
        f"{PRECISION}test_values_out_of_range_are_refused",
    ),
    Fault(
        "weight decay of no parameter is accepted",
        "train/optimizer_config.py",
        'self.decay != _COMMON["decay"] and self.weight_decay == 0',
        "False",
        "train/test_optimizers.py::test_an_option_that_would_be_ignored_is_refused_by_name",
    ),
    Fault(
        "dropout of the embedding table's adapter is accepted",
        "runs/lora_targets.py",
        'if lora.dropout and matrices.keys() == {"embed"}:',
        "if False:",
        "train/test_lora_targets.py::test_a_table_that_does_not_fit_is_refused_by_its_field",
    ),
)
