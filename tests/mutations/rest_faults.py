"""Faults in adapters of MindFormers, adapted heads, float16, evaluation, patterns and full disks."""

from mutations.fault import Fault

MODULE = "checkpoint/adapters/mindformers.py"
TEST = "checkpoint/test_mindformers_lora.py::"

FAULTS = (
    Fault(
        "the rows of MindFormers' factors B are taken as they are in the file",
        MODULE,
        '(f"{module}.weight" for module in modules), rope_layout)',
        '(f"{module}.weight" for module in modules), "half")',
        f"{TEST}test_the_rows_of_older_models_are_interleaved",
    ),
    Fault(
        "the alpha of the YAML comes before the one that is given",
        MODULE,
        "    if given is not None:\n        return given\n",
        "",
        f"{TEST}test_the_alpha_is_that_of_the_yaml_and_a_weight_multiplies_the_update",
    ),
    Fault(
        "the moments of factors are read as factors",
        MODULE,
        "if name not in aside}",
        "if True}",
        f"{TEST}test_a_checkpoint_that_holds_base_and_factors_is_merged_when_it_is_read",
    ),
    Fault(
        "factors of two generations are mixed",
        MODULE,
        "        if len(ways) > 1:",
        "        if len(ways) > 4:",
        f"{TEST}test_what_does_not_fit_is_an_error_that_names_it[two generations]",
    ),
    Fault(
        "a YAML of another rank is believed",
        MODULE,
        "and {int(rank) for rank in configured} != {*ranks}:",
        "and not ranks:",
        f"{TEST}test_what_does_not_fit_is_an_error_that_names_it[the YAML of another run]",
    ),
    Fault(
        "an adapter is written without the weight that multiplies it",
        "checkpoint/adapters/added.py",
        "alpha=weight * pair.alpha",
        "alpha=pair.alpha",
        f"{TEST}test_an_adapter_with_another_weight_is_written_with_its_alpha_multiplied",
    ),
    Fault(
        "inputs of an adapted head are dropped anew in each chunk",
        "model/weights.py",
        "if not isinstance(weight, Adapted) or context.adapter_dropout == 0.0 or context.dropout_key is None:",
        "if True:",
        "model/test_head.py::test_inputs_of_an_adapted_head_are_dropped_once_for_all_chunks[adapted-fused]",
    ),
    Fault(
        "float16 loses the gradients of the average over rows",
        "train/objective.py",
        "factor = 2.0 ** (tokens.shape[1] - 1).bit_length()",
        "factor = 1.0",
        "train/test_precision.py::test_the_average_of_rows_keeps_its_gradients_in_float16",
    ),
    Fault(
        "a skipped step has an accuracy of 0",
        "train/step.py",
        "jnp.where(jnp.isfinite(loss), _mean(*pair), jnp.nan)",
        "_mean(*pair)",
        "train/test_skipped_updates.py::test_an_update_that_is_not_finite_is_skipped_bit_for_bit_and_the_schedule_goes_on",
    ),
    Fault(
        "the training data of a recipe are evaluated",
        "runs/evaluation.py",
        'recipe.data, "validation", recipe.loss',
        'recipe.data, "train", recipe.loss',
        "end_to_end/test_evaluation.py::test_the_loss_of_answers_is_the_validation_loss_of_a_run",
    ),
    Fault(
        "the targets of adapters are regular expressions alone",
        "runs/lora_targets.py",
        "return found or {",
        "return found and {",
        "train/test_lora_targets.py::test_patterns_of_parameters_choose_modules_too",
    ),
    Fault(
        "a full disk names no file",
        "disk/atomic.py",
        "error.filename = error.filename or str(path)",
        "error.filename = None",
        "end_to_end/test_faults.py::test_a_full_disk_ends_the_run_which_is_resumed_from_its_last_checkpoint",
    ),
)
