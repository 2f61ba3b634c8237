"""Faults in going on with a run, in what is damaged or not finite, and in the schedule."""

from mutations.fault import Fault

DAMAGE = "end_to_end/test_damage.py::"
FINITE = "end_to_end/test_not_finite.py::"
OWN = "end_to_end/test_own_folder.py::"
SCHEDULE = "end_to_end/test_schedule.py::"
NAMED = f"{DAMAGE}test_resuming_names_the_damage_and_the_steps_that_are_whole_and_changes_nothing"
UNDISTURBED = f"{DAMAGE}test_from_an_older_step_the_run_becomes_the_one_that_never_was_disturbed"
ENDS = f"{FINITE}test_a_loss_that_is_not_finite_ends_the_run_at_its_step_with_the_last_good_checkpoint"

FAULTS = (
    # Damage
    Fault(
        "a resumed run takes numbers that changed on the disk",
        "checkpoint/state/saved_state.py",
        "if array.checksum not in (None, checksums[name])",
        "if array.checksum is False",
        f"{NAMED}[a bit is flipped]",
    ),
    Fault(
        "a run is opened with numbers that changed on the disk",
        "checkpoint/state/saved_state.py",
        "if self.checksum not in (None, total):",
        "if self.checksum is False:",
        f"{DAMAGE}test_opening_a_run_names_the_damage_and_the_steps_that_are_whole[a bit is flipped]",
    ),
    Fault(
        "a checkpoint without its metadata counts as one of an older camelid",
        "checkpoint/state/saved_state.py",
        'raise DamagedState(f"{METADATA} cannot be read: {error.strerror}") from error',
        "return {}",
        f"{NAMED}[the metadata is gone]",
    ),
    Fault(
        "steps are listed as whole that are damaged",
        "checkpoint/state/saved_state.py",
        "if verify_step(place.parent / str(step)) is None",
        "",
        f"{DAMAGE}test_a_step_that_is_damaged_too_is_not_listed",
    ),
    Fault(
        "--from-step goes on from the newest step",
        "runs/start.py",
        "step = steps[-1] if from_step is None else from_step",
        "step = steps[-1]",
        UNDISTURBED,
    ),
    Fault(
        "later checkpoints stay where a run went back",
        "runs/start.py",
        "if other > step]",
        "if other > 10**9]",
        UNDISTURBED,
    ),
    Fault(
        "the metrics of steps that are made again are lost",
        "runs/run_folder.py",
        "shutil.copyfile(file, aside / file.name)",
        "pass",
        UNDISTURBED,
    ),
    # Nothing but the folder
    Fault(
        "a run that goes on opens its init",
        "runs/components.py",
        'if started and recipe.lora is None and (folder / "config.json").is_file():',
        "if False:",
        f"{OWN}test_init_may_be_gone",
    ),
    Fault(
        "a run that goes on opens the tokenizer of the recipe",
        "runs/components.py",
        "(not started or Path(recipe.tokenizer).exists())",
        "True",
        f"{OWN}test_the_tokenizer_may_be_gone[]",
    ),
    Fault(
        "a template of the tokenizer's own is lost with it",
        "runs/components.py",
        'if len(names) == 1 and "default" in',
        'if len(names) > 1 and "default" in',
        f"{OWN}test_the_template_that_is_learnt_is_found_in_the_folder[own-False]",
    ),
    Fault(
        "text that is gone ends a run whose tokens are there",
        "runs/components.py",
        "return found, next((path for path in before if path not in now), None)",
        "return {}, None",
        f"{OWN}test_text_may_be_gone_where_what_was_prepared_from_it_is_there[]",
    ),
    Fault(
        "a run goes on with what was prepared from text that changed",
        "runs/components.py",
        "if any(before.get(path) != file for path, file in now.items()):",
        "if False:",
        "end_to_end/test_run_folder.py::test_text_that_changed_since_the_run_began_is_refused_by_name",
    ),
    Fault(
        "a run goes on with a store of other tokens",
        "runs/components.py",
        'if store.fingerprint != was["fingerprint"]:',
        "if False:",
        f"{OWN}test_a_store_that_is_another_now_is_not_taken",
    ),
    # Not finite
    Fault(
        "training goes on after a loss that is not finite",
        "train/metrics_log.py",
        "if in_a_row > self._config.max_skipped or (step == self._config.steps and in_a_row > 1):",
        "if False:",
        f"{ENDS}[1]",
    ),
    Fault(
        "the step that was not finite is not in metrics.jsonl",
        "train/metrics_log.py",
        "if finite and not spike and step % self._config.log_every",
        "if not spike and step % self._config.log_every",
        f"{ENDS}[4]",
    ),
    Fault(
        "a state that is not finite is saved",
        "checkpoint/state/orbax_state.py",
        "        if not_finite:\n            raise UserError(",
        "        if False:\n            raise UserError(",
        f"{FINITE}test_a_state_that_is_not_finite_is_not_saved",
    ),
    Fault(
        "a state that is not finite is resumed",
        "checkpoint/state/orbax_state.py",
        "            if not_finite:\n                raise DamagedState(",
        "            if False:\n                raise DamagedState(",
        f"{FINITE}test_a_checkpoint_of_an_older_camelid_that_is_not_finite_is_not_resumed",
    ),
    Fault(
        "a validation loss that is not finite goes by",
        "train/metrics_log.py",
        "        if not math.isfinite(loss):",
        "        if False:",
        f"{FINITE}test_a_validation_loss_that_is_not_finite_ends_the_run",
    ),
    Fault(
        "metrics hold NaN",
        "train/loggers.py",
        "None if isinstance(value, float) and not math.isfinite(value) else value",
        "value",
        f"{FINITE}test_metrics_are_json_whatever_the_numbers[nan]",
    ),
    Fault(
        "training begins from weights that are not finite",
        "runs/start.py",
        "(not_finite := checksum_arrays(state)[1])",
        "(not_finite := {})",
        f"{FINITE}test_training_does_not_begin_from_weights_that_are_not_finite",
    ),
    Fault(
        "a conversion does not see NaN of negative sign",
        "checkpoint/integrity.py",
        "and values.view(UNSIGNED[size]).max(initial=0) < infinity | sign",
        "",
        f"{FINITE}test_a_conversion_keeps_them_and_says_where_they_are[None-hf]",
    ),
    Fault(
        "a model is saved with infinities that it did not have",
        "api.py",
        "rounded(path, fetched(path, layer)[index], dtype)",
        "fetched(path, layer)[index].astype(dtype)",
        f"{FINITE}test_a_model_is_not_saved_in_a_dtype_that_cannot_hold_it",
    ),
    # Precision
    Fault(
        "parameters of 16 bits are trained",
        "runs/recipe.py",
        'if self.compute.param_dtype != "float32":',
        "if False:",
        "train/test_precision.py::test_16_bit_parameters_are_refused_with_the_reason_and_the_way_out",
    ),
    Fault(
        "float16 is trained without a loss scale",
        "runs/recipe.py",
        'object.__setattr__(self, "loss_scale", self.loss_scale or LossScaleConfig())',
        "pass",
        "train/test_precision.py::test_products_in_float16_have_a_loss_scale_and_others_refuse_one",
    ),
    # The schedule
    Fault(
        "more steps stretch the schedule",
        "runs/recipe.py",
        "    if steps is None and kept is not None and recipe.optimizer.has_end:",
        "    if False:",
        f"{SCHEDULE}test_more_steps_keep_the_schedule_and_say_so_once",
    ),
    Fault(
        "decay_steps is ignored",
        "train/optimizer_config.py",
        "max(self.decay_steps or steps, self.warmup(steps) + 1)",
        "max(steps, self.warmup(steps) + 1)",
        f"{SCHEDULE}test_a_run_of_1000_steps_that_gets_1000_more_does_not_jump",
    ),
    Fault(
        "another schedule is not announced",
        "runs/summary.py",
        "    if now != before:\n",
        "    if False:\n",
        f"{SCHEDULE}test_a_schedule_that_is_asked_for_is_announced_with_both_learning_rates",
    ),
    Fault(
        "a run without checkpoints replaces its finished model",
        "runs/run_folder.py",
        "if (folder / name).exists():",
        "if (folder / name).is_file():",
        "end_to_end/test_run_folder.py::test_a_recipe_may_be_mended_as_long_as_nothing_was_trained_with_it",
    ),
)
